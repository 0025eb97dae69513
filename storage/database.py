"""Optuna's storage in a database, read by few and plain statements.

Optuna reads a trial through the object-relational mapper, in transactions that on SQLite take the
write lock like any other of a worker (:mod:`storage.engine`): workers would stand in line to read.
:class:`Database` reads the same rows in transactions that take no lock, with statements that are
built once, and hands out the same objects. Its writes are Optuna's.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Executable, and_, bindparam, or_, select
from sqlalchemy.exc import SQLAlchemyError

from storage.engine import reader_options, reading

if TYPE_CHECKING:
    from sqlalchemy import Select, Table
    from sqlalchemy.engine import Connection

T = TypeVar("T")

_TRIALS_AT_ONCE = 500
"""More trials than this are read by a range of ids: databases limit the length of a list."""

# What Optuna reads through its sessions, and this module leaves to it.
_READS = (
    "get_study_name_from_id", "get_study_directions", "get_trial_user_attrs",
    "get_trial_system_attrs", "get_trial_id_from_study_id_trial_number", "get_trial_param",
    "_get_best_trial_id",
)  # fmt: skip


def _without_lock(method: Callable[..., T]) -> Callable[..., T]:
    @wraps(method)
    def read(*arguments: Any, **keywords: Any) -> T:
        with reading():
            return method(*arguments, **keywords)

    return read


class _Reads:
    """The statements of :class:`Database`, built once: building one takes longer than running it.

    Each table of what belongs to trials is read for a list of trials, or for all of a study
    from some trial id on.
    """

    def __init__(self) -> None:
        trials: Table = models.TrialModel.__table__
        params: Table = models.TrialParamModel.__table__
        values: Table = models.TrialValueModel.__table__
        user: Table = models.TrialUserAttributeModel.__table__
        system: Table = models.TrialSystemAttributeModel.__table__
        steps: Table = models.TrialIntermediateValueModel.__table__
        studies: Table = models.StudyModel.__table__
        directions: Table = models.StudyDirectionModel.__table__
        study_user: Table = models.StudyUserAttributeModel.__table__
        study_system: Table = models.StudySystemAttributeModel.__table__
        ids: Any = bindparam("ids", expanding=True)
        columns = trials.c
        found = select(
            columns.trial_id,
            columns.number,
            columns.state,
            columns.datetime_start,
            columns.datetime_complete,
        ).order_by(columns.trial_id)
        self.trial = found.where(columns.trial_id == bindparam("id"))
        newer = columns.trial_id > bindparam("after")
        of_study = columns.study_id == bindparam("study")
        self.newer = found.where(and_(of_study, newer))
        self.newer_or_listed = found.where(and_(of_study, or_(newer, columns.trial_id.in_(ids))))

        def of_trials(
            table: Table, order: str | None, *names: str
        ) -> tuple[Select[Any], Select[Any]]:
            what = select(table.c.trial_id, *[table.c[name] for name in names])
            if order is not None:
                what = what.order_by(table.c[order])
            joined = what.join_from(trials, table, columns.trial_id == table.c.trial_id)
            return what.where(table.c.trial_id.in_(ids)), joined.where(and_(of_study, newer))

        self.params = of_trials(
            params, "param_id", "param_name", "param_value", "distribution_json"
        )
        self.values = of_trials(values, None, "objective", "value", "value_type")
        self.user_attrs = of_trials(user, None, "key", "value_json")
        self.system_attrs = of_trials(system, None, "key", "value_json")
        self.steps = of_trials(steps, None, "step", "intermediate_value", "intermediate_value_type")

        self.study_named = select(studies.c.study_id).where(
            studies.c.study_name == bindparam("name")
        )
        self.study = select(studies.c.study_id).where(studies.c.study_id == bindparam("study"))
        self.studies = select(studies.c.study_id, studies.c.study_name).order_by(studies.c.study_id)
        self.directions = select(directions.c.study_id, directions.c.direction).order_by(
            directions.c.study_id, directions.c.objective
        )
        user_attrs = select(study_user.c.study_id, study_user.c.key, study_user.c.value_json)
        system_attrs = select(
            study_system.c.study_id, study_system.c.key, study_system.c.value_json
        )
        self.all_study_attrs = (user_attrs, system_attrs)
        self.study_user_attrs = user_attrs.where(study_user.c.study_id == bindparam("study"))
        self.study_system_attrs = system_attrs.where(study_system.c.study_id == bindparam("study"))
        self.study_of = select(columns.study_id).where(columns.trial_id == bindparam("id"))


@lru_cache(maxsize=1)
def _reads() -> _Reads:
    return _Reads()


class Database(RDBStorage):
    """As Optuna's, but what it reads takes no lock and a few milliseconds at most a trial."""

    def _rows(self, *queries: tuple[Executable, Mapping[str, Any]]) -> list[Sequence[Any]]:
        """The rows of each query, all of them of one moment on SQLite."""
        with self._reader() as connection:
            return [connection.execute(query, values).all() for query, values in queries]

    @contextmanager
    def _reader(self) -> Iterator[Connection]:
        options = reader_options(self.engine)
        try:
            with self.engine.connect().execution_options(**options) as connection:
                yield connection
        except SQLAlchemyError as error:
            # What Optuna raises.
            raise StorageInternalError(f"the database cannot be read: {error}") from error

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return the id of the study with that name."""
        (rows,) = self._rows((_reads().study_named, {"name": study_name}))
        if not rows:
            raise KeyError(models.NOT_FOUND_MSG)
        return int(rows[0][0])

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Return a study's user attributes by key."""
        return self._study_attrs(study_id, _reads().study_user_attrs)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return a study's system attributes by key."""
        return self._study_attrs(study_id, _reads().study_system_attrs)

    def _study_attrs(self, study_id: int, query: Executable) -> dict[str, Any]:
        (rows,) = self._rows((query, {"study": study_id}))
        if not rows:
            self._require_study(study_id)
        return {key: json.loads(text) for _, key, text in rows}

    def _require_study(self, study_id: int) -> None:
        (rows,) = self._rows((_reads().study, {"study": study_id}))
        if not rows:
            raise KeyError(models.NOT_FOUND_MSG)

    def get_all_studies(self) -> list[FrozenStudy]:
        """Return all studies of the database, by their ids."""
        reads = _reads()
        studies, directions, *attrs = self._rows(
            (reads.studies, {}), (reads.directions, {}), *((q, {}) for q in reads.all_study_attrs)
        )
        directions_of: defaultdict[int, list[Any]] = defaultdict(list)
        for study_id, direction in directions:
            directions_of[study_id].append(direction)
        attrs_of: list[defaultdict[int, dict[str, Any]]] = []
        for rows in attrs:
            of: defaultdict[int, dict[str, Any]] = defaultdict(dict)
            for study_id, key, text in rows:
                of[study_id][key] = json.loads(text)
            attrs_of.append(of)
        return [
            FrozenStudy(
                study_name=name,
                direction=None,
                directions=directions_of[study_id],
                user_attrs=attrs_of[0][study_id],
                system_attrs=attrs_of[1][study_id],
                study_id=study_id,
            )
            for study_id, name in studies
        ]

    def study_of(self, trial_id: int) -> int | None:
        """The study of a trial; None if there is no such trial."""
        (rows,) = self._rows((_reads().study_of, {"id": trial_id}))
        return int(rows[0][0]) if rows else None

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return one trial."""
        with self._reader() as connection:
            rows = connection.execute(_reads().trial, {"id": trial_id}).all()
            if not rows:
                raise KeyError(models.NOT_FOUND_MSG)
            return self._frozen(connection, rows, None)[0]

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        reads, after = _reads(), trial_id_greater_than
        listed = sorted(trial_id for trial_id in included_trial_ids if trial_id <= after)
        query: Executable = reads.newer
        values: dict[str, Any] = {"study": study_id, "after": after}
        if len(listed) > _TRIALS_AT_ONCE:
            values["after"] = listed[0] - 1
        elif listed:
            query = reads.newer_or_listed
            values["ids"] = listed
        wanted = set(listed)
        with self._reader() as connection:
            rows = [
                row
                for row in connection.execute(query, values)
                if (row[0] > after or row[0] in wanted) and (states is None or row[2] in states)
            ]
            trials = self._frozen(connection, rows, study_id)
        if not trials:
            self._require_study(study_id)
        return trials

    def _frozen(
        self, connection: Connection, rows: Sequence[Any], study_id: int | None
    ) -> list[FrozenTrial]:
        """Trials with all that belongs to them.

        Args:
            connection: within a transaction.
            rows: as :attr:`_Reads.trial` gives them.
            study_id: that of all of them; None if they are few.
        """
        if not rows:
            return []
        reads = _reads()
        ids = [row[0] for row in rows]
        few = study_id is None or len(ids) <= _TRIALS_AT_ONCE
        where = {"ids": ids} if few else {"study": study_id, "after": ids[0] - 1}
        found: dict[int, _Parts] = {trial_id: _Parts() for trial_id in ids}
        # Of a trial that is not wanted, or that came after the first query.
        other = _Parts()

        def read(queries: tuple[Executable, Executable]) -> Iterable[Any]:
            # Row by row: the collector of garbage would look through all of them each time.
            return connection.execute(queries[0 if few else 1], where)

        for trial_id, name, number, text in read(reads.params):
            parts, distribution = found.get(trial_id, other), _distribution(text)
            parts.params[name] = distribution.to_external_repr(number)
            parts.distributions[name] = distribution
        to_value = models.TrialValueModel.stored_repr_to_value
        for trial_id, objective, number, kind in read(reads.values):
            found.get(trial_id, other).values[objective] = to_value(number, kind)
        for trial_id, key, text in read(reads.user_attrs):
            found.get(trial_id, other).user_attrs[key] = json.loads(text)
        for trial_id, key, text in read(reads.system_attrs):
            found.get(trial_id, other).system_attrs[key] = json.loads(text)
        to_step = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
        for trial_id, step, number, kind in read(reads.steps):
            found.get(trial_id, other).steps[step] = to_step(number, kind)
        return [
            FrozenTrial(
                number=number,
                state=state,
                value=None,
                values=[parts.values[i] for i in sorted(parts.values)] or None,
                datetime_start=_local(started),
                datetime_complete=_local(completed),
                params=parts.params,
                distributions=parts.distributions,
                user_attrs=parts.user_attrs,
                system_attrs=parts.system_attrs,
                intermediate_values=parts.steps,
                trial_id=trial_id,
            )
            for (trial_id, number, state, started, completed), parts in zip(
                rows, found.values(), strict=True
            )
        ]


for _name in _READS:
    setattr(Database, _name, _without_lock(getattr(RDBStorage, _name)))


class CachedDatabase(_CachedStorage):
    """As Optuna's, which keeps finished trials, but also for trials that it has not read yet."""

    _backend: Database

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: Any
    ) -> None:
        """Store a parameter."""
        # Claimed trials are created beside Optuna's cache, which asks to have seen them.
        if trial_id not in self._trial_id_to_study_id_and_number:
            study_id = self._backend.study_of(trial_id)
            if study_id is None:
                raise KeyError(models.NOT_FOUND_MSG)
            self._read_trials_from_remote_storage(study_id)
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)


class _Parts:
    """What belongs to one trial."""

    __slots__ = ("distributions", "params", "steps", "system_attrs", "user_attrs", "values")

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}
        self.values: dict[int, float] = {}
        self.user_attrs: dict[str, Any] = {}
        self.system_attrs: dict[str, Any] = {}
        self.steps: dict[int, float] = {}


@lru_cache(maxsize=1024)
def _distribution(text: str) -> BaseDistribution:
    # Nobody changes one: Optuna, too, hands the same object to all trials that it caches.
    return json_to_distribution(text)


def _local(moment: datetime | None) -> datetime | None:
    """Naive UTC, as stored, to naive local time, as Optuna gives it."""
    if moment is None:
        return None
    return moment.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
