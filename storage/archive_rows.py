"""The rows of whole studies: read in one snapshot, checked, written back under new ids.

Ids are the database's own and stand in no row here: a study is known by its name, a trial by its
number. optuna-dashboard keeps a trial's note under a key of the *study* that holds the trial's
id; such keys travel with their trial, with :data:`TRIAL_ID` in the id's place.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from storage.engine import StorageError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from sqlalchemy import Table
    from sqlalchemy.engine import Connection

TRIAL_ID = "{trial}"
"""Stands for a trial's id in the keys of :attr:`TrialRows.study_attrs`."""

_OF_A_TRIAL = re.compile(r"dashboard:(\d+):(note_ver|note_str:\d+)|dashboard:artifacts:(\d+):.+")
_OF_ANY_TRIAL = re.compile(r"dashboard:\{trial\}:(note_ver|note_str:\d+)|"
                           r"dashboard:artifacts:\{trial\}:.+")  # fmt: skip

# Columns of Optuna's tables: VARCHAR(512) and 32-bit integers.
_MAX_NAME = 512
_MAX_INTEGER = 2**31 - 1
_NON_FINITE = {"INF_POS": "inf", "INF_NEG": "-inf", "NAN": "nan"}

_ROWS_A_STATEMENT = 20_000

Number = float | str
"""A float, or `inf`, `-inf` or `nan`, as Optuna's tables tell them from numbers."""


class ArchiveError(StorageError):
    """A file that is not a whole archive, or that cannot be written; the message is one line."""


@dataclass(frozen=True)
class TrialRows:
    """One trial, as the tables have it.

    Attributes:
        number: within its study, from 0.
        state: the name of Optuna's `TrialState`.
        started, completed, heartbeat: naive UTC.
        params: name → (internal representation, distribution as JSON), in the order suggested.
        values: one for each objective, or none.
        intermediate: step → value.
        user_attrs, system_attrs: key → JSON text, as stored.
        study_attrs: system attributes of the study that are this trial's, see :data:`TRIAL_ID`.
        trial_id: in the database that it was read from; None if it comes from a file.
    """

    number: int
    state: str
    started: datetime | None = None
    completed: datetime | None = None
    heartbeat: datetime | None = None
    params: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    values: tuple[Number, ...] = ()
    intermediate: Mapping[int, Number] = field(default_factory=dict)
    user_attrs: Mapping[str, str] = field(default_factory=dict)
    system_attrs: Mapping[str, str] = field(default_factory=dict)
    study_attrs: Mapping[str, str] = field(default_factory=dict)
    trial_id: int | None = None

    @property
    def is_finished(self) -> bool:
        """Whether its state is COMPLETE, PRUNED or FAIL."""
        return self.state not in ("WAITING", "RUNNING")

    def external_params(self) -> dict[str, Any]:
        """Its parameters as Optuna shows them."""
        return {
            name: _distribution(text).to_external_repr(value)
            for name, (value, text) in self.params.items()
        }

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; `_trial` reads them back."""
        return {
            "number": self.number,
            "state": self.state,
            "started": _iso(self.started),
            "completed": _iso(self.completed),
            "heartbeat": _iso(self.heartbeat),
            "params": {name: list(param) for name, param in self.params.items()},
            "values": list(self.values),
            "steps": list(self.intermediate),
            "intermediate_values": list(self.intermediate.values()),
            "user_attrs": dict(self.user_attrs),
            "system_attrs": dict(self.system_attrs),
            "study_attrs": dict(self.study_attrs),
        }


@dataclass(frozen=True)
class StudyRows:
    """One study and all its trials, in the order of their numbers.

    Attributes:
        name: Optuna's study name.
        directions: names of Optuna's `StudyDirection`, one for each objective.
        user_attrs, system_attrs: key → JSON text, as stored; without those of single trials.
        trials: all of them.
        study_id: in the database that it was read from; None if it comes from a file.
    """

    name: str
    directions: tuple[str, ...]
    user_attrs: Mapping[str, str]
    system_attrs: Mapping[str, str]
    trials: Sequence[TrialRows]
    study_id: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; `parse_study` reads them back."""
        return {
            "name": self.name,
            "directions": list(self.directions),
            "user_attrs": dict(self.user_attrs),
            "system_attrs": dict(self.system_attrs),
            "trials": [trial.as_json() for trial in self.trials],
        }


# --- from the database --------------------------------------------------------------------------


class StudyTables:
    """Optuna's tables, whole studies at a time; every method is a part of its caller's
    transaction."""

    def __init__(self) -> None:
        from optuna.storages._rdb import models

        self._studies: Table = models.StudyModel.__table__
        self._directions: Table = models.StudyDirectionModel.__table__
        self._study_user: Table = models.StudyUserAttributeModel.__table__
        self._study_system: Table = models.StudySystemAttributeModel.__table__
        self._trials: Table = models.TrialModel.__table__
        self._params: Table = models.TrialParamModel.__table__
        self._values: Table = models.TrialValueModel.__table__
        self._intermediate: Table = models.TrialIntermediateValueModel.__table__
        self._user: Table = models.TrialUserAttributeModel.__table__
        self._system: Table = models.TrialSystemAttributeModel.__table__
        self._heartbeats: Table = models.TrialHeartbeatModel.__table__
        self._versions: Table = models.VersionInfoModel.__table__
        self._value_type = models.TrialValueModel.TrialValueType
        self._intermediate_type = models.TrialIntermediateValueModel.TrialIntermediateValueType

    def schema_version(self, connection: Connection) -> int:
        """The version of Optuna's tables."""
        from sqlalchemy import select

        return int(connection.execute(select(self._versions.c.schema_version)).scalar_one())

    def ids(
        self, connection: Connection, *, attr: tuple[str, str], names: Sequence[str] = ()
    ) -> list[int]:
        """The studies that have a user attribute (key, JSON text), or one of the names."""
        from sqlalchemy import or_, select

        columns, attrs = self._studies.c, self._study_user.c
        having = select(attrs.study_id).where(attrs.key == attr[0], attrs.value_json == attr[1])
        query = select(columns.study_id).where(
            or_(columns.study_id.in_(having), columns.study_name.in_(names))
        )
        return sorted(connection.execute(query).scalars())

    def lock(self, connection: Connection, study_ids: Sequence[int]) -> None:
        """Keep others from creating trials in these studies, or changing their state, until the
        transaction ends. On SQLite every writing transaction does."""
        from sqlalchemy import select

        for study_id in study_ids:
            # In the order in which a worker touches them, so that none waits for the other.
            studies, trials, system = self._studies.c, self._trials.c, self._system.c
            of_study = select(trials.trial_id).where(trials.study_id == study_id)
            for query in (
                select(studies.study_id).where(studies.study_id == study_id),
                select(system.trial_id)
                .where(system.trial_id.in_(of_study))
                .order_by(system.trial_id),
                of_study.order_by(trials.trial_id),
            ):
                connection.execute(query.with_for_update()).all()

    def read(self, connection: Connection, study_id: int) -> StudyRows:
        """All rows of one study."""
        from sqlalchemy import select

        columns = self._studies.c
        name = connection.execute(
            select(columns.study_name).where(columns.study_id == study_id)
        ).scalar_one()
        directions = connection.execute(
            select(self._directions.c.direction)
            .where(self._directions.c.study_id == study_id)
            .order_by(self._directions.c.objective)
        ).scalars()
        system = self._attrs_of_study(connection, self._study_system, study_id)
        of_trials: dict[int, dict[str, str]] = {}
        for key in [key for key in system if _OF_A_TRIAL.fullmatch(key)]:
            trial_id = next(part for part in key.split(":") if part.isdigit())
            moved = key.replace(trial_id, TRIAL_ID, 1)
            of_trials.setdefault(int(trial_id), {})[moved] = system.pop(key)
        return StudyRows(
            name=name,
            directions=tuple(direction.name for direction in directions),
            user_attrs=self._attrs_of_study(connection, self._study_user, study_id),
            system_attrs=system,
            trials=self._read_trials(connection, study_id, of_trials),
            study_id=study_id,
        )

    def _attrs_of_study(
        self, connection: Connection, table: Table, study_id: int
    ) -> dict[str, str]:
        from sqlalchemy import select

        rows = connection.execute(
            select(table.c.key, table.c.value_json).where(table.c.study_id == study_id)
        )
        # Sorted here: databases collate differently, and equal states make equal files.
        return dict(sorted((key, text or "null") for key, text in rows))

    def _read_trials(
        self, connection: Connection, study_id: int, study_attrs: Mapping[int, dict[str, str]]
    ) -> list[TrialRows]:
        from sqlalchemy import select

        trials = self._trials.c
        found = connection.execute(
            select(
                trials.trial_id, trials.number, trials.state,
                trials.datetime_start, trials.datetime_complete,
            )
            .where(trials.study_id == study_id)
            .order_by(trials.number)
        ).all()  # fmt: skip
        of_study = select(trials.trial_id).where(trials.study_id == study_id)

        def rows(table: Table, *columns: Any, order: Any) -> Any:
            query = select(table.c.trial_id, *columns).where(table.c.trial_id.in_(of_study))
            return connection.execute(query.order_by(order))

        params: dict[int, dict[str, tuple[float, str]]] = {}
        table = self._params
        for trial_id, name, value, text in rows(
            table, table.c.param_name, table.c.param_value, table.c.distribution_json,
            order=table.c.param_id,
        ):  # fmt: skip
            params.setdefault(trial_id, {})[name] = (value, text)
        values: dict[int, list[Number]] = {}
        table = self._values
        for trial_id, value, kind in rows(
            table, table.c.value, table.c.value_type, order=table.c.objective
        ):
            values.setdefault(trial_id, []).append(_NON_FINITE.get(kind.name, value))
        intermediate: dict[int, dict[int, Number]] = {}
        table = self._intermediate
        for trial_id, step, value, kind in rows(
            table, table.c.step, table.c.intermediate_value, table.c.intermediate_value_type,
            order=table.c.step,
        ):  # fmt: skip
            intermediate.setdefault(trial_id, {})[step] = _NON_FINITE.get(kind.name, value)
        attrs: list[dict[int, dict[str, str]]] = []
        for table in (self._user, self._system):
            texts: dict[int, dict[str, str]] = {}
            for trial_id, key, text in rows(
                table, table.c.key, table.c.value_json, order=table.c.trial_id
            ):
                texts.setdefault(trial_id, {})[key] = text or "null"
            attrs.append(texts)
        table = self._heartbeats
        beats = {row[0]: row[1] for row in rows(table, table.c.heartbeat, order=table.c.trial_id)}
        return [
            TrialRows(
                number=number,
                state=state.name,
                started=started,
                completed=completed,
                heartbeat=beats.get(trial_id),
                params=params.get(trial_id, {}),
                values=tuple(values.get(trial_id, ())),
                intermediate=intermediate.get(trial_id, {}),
                user_attrs=dict(sorted(attrs[0].get(trial_id, {}).items())),
                system_attrs=dict(sorted(attrs[1].get(trial_id, {}).items())),
                study_attrs=study_attrs.get(trial_id, {}),
                trial_id=trial_id,
            )
            for trial_id, number, state, started, completed in found
        ]

    # --- to the database ------------------------------------------------------------------------

    def insert_study(self, connection: Connection, study: StudyRows) -> int:
        """Create a study with its trials; return its id."""
        from optuna.study import StudyDirection
        from sqlalchemy import insert

        key = connection.execute(
            insert(self._studies).values(study_name=study.name)
        ).inserted_primary_key
        assert key is not None
        study_id = int(key[0])
        self._bulk(
            connection,
            self._directions,
            [
                {"study_id": study_id, "objective": index, "direction": StudyDirection[name]}
                for index, name in enumerate(study.directions)
            ],
        )
        self.set_study_attrs(connection, study_id, user=study.user_attrs, system=study.system_attrs)
        self.insert_trials(connection, study_id, study.trials)
        return study_id

    def insert_trials(
        self, connection: Connection, study_id: int, trials: Sequence[TrialRows]
    ) -> None:
        """Create trials whose numbers are not taken; ids ascend with numbers, as Optuna's do."""
        from optuna.trial import TrialState
        from sqlalchemy import select

        trials = sorted(trials, key=lambda trial: trial.number)
        self._bulk(
            connection,
            self._trials,
            [
                {
                    "study_id": study_id,
                    "number": trial.number,
                    "state": TrialState[trial.state],
                    "datetime_start": trial.started,
                    "datetime_complete": trial.completed,
                }
                for trial in trials
            ],
        )
        columns = self._trials.c
        numbered = connection.execute(
            select(columns.number, columns.trial_id).where(columns.study_id == study_id)
        )
        ids = {row[0]: row[1] for row in numbered}
        self._insert_parts(connection, study_id, [(ids[trial.number], trial) for trial in trials])

    def replace_trial(
        self, connection: Connection, study_id: int, trial_id: int, trial: TrialRows
    ) -> None:
        """Give an existing trial the state and all the rows of another; its number stays."""
        from optuna.trial import TrialState
        from sqlalchemy import delete, update

        for table in (
            self._system, self._user, self._params, self._values, self._intermediate,
            self._heartbeats,
        ):  # fmt: skip
            connection.execute(delete(table).where(table.c.trial_id == trial_id))
        connection.execute(
            update(self._trials)
            .where(self._trials.c.trial_id == trial_id)
            .values(
                state=TrialState[trial.state],
                datetime_start=trial.started,
                datetime_complete=trial.completed,
            )
        )
        self._insert_parts(connection, study_id, [(trial_id, trial)])

    def set_study_attrs(
        self,
        connection: Connection,
        study_id: int,
        *,
        user: Mapping[str, str] | None = None,
        system: Mapping[str, str] | None = None,
    ) -> None:
        """Set attributes of a study, replacing those of the same keys."""
        for table, texts in ((self._study_user, user or {}), (self._study_system, system or {})):
            self._set_attrs(connection, table, table.c.study_id, study_id, texts)

    def set_trial_attrs(
        self,
        connection: Connection,
        study_id: int,
        trial_id: int,
        *,
        user: Mapping[str, str] | None = None,
        system: Mapping[str, str] | None = None,
        study: Mapping[str, str] | None = None,
    ) -> None:
        """Set attributes of a trial, replacing those of the same keys; see :class:`TrialRows`."""
        for table, texts in ((self._user, user or {}), (self._system, system or {})):
            self._set_attrs(connection, table, table.c.trial_id, trial_id, texts)
        self.set_study_attrs(connection, study_id, system=_with_id(study or {}, trial_id))

    def _set_attrs(
        self, connection: Connection, table: Table, owner: Any, key: int, texts: Mapping[str, str]
    ) -> None:
        from sqlalchemy import delete

        if texts:
            connection.execute(delete(table).where(owner == key, table.c.key.in_(list(texts))))
            self._bulk(
                connection,
                table,
                [{owner.name: key, "key": k, "value_json": text} for k, text in texts.items()],
            )

    def _insert_parts(
        self, connection: Connection, study_id: int, trials: Sequence[tuple[int, TrialRows]]
    ) -> None:
        self._bulk(
            connection,
            self._params,
            [
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": value,
                    "distribution_json": text,
                }
                for trial_id, trial in trials
                for name, (value, text) in trial.params.items()
            ],
        )
        kinds = {
            text: self._value_type[name] for name, text in _NON_FINITE.items() if text != "nan"
        }
        finite = self._value_type.FINITE
        self._bulk(
            connection,
            self._values,
            [
                {
                    "trial_id": trial_id,
                    "objective": objective,
                    "value": None if isinstance(value, str) else value,
                    "value_type": kinds[value] if isinstance(value, str) else finite,
                }
                for trial_id, trial in trials
                for objective, value in enumerate(trial.values)
            ],
        )
        of = {text: self._intermediate_type[name] for name, text in _NON_FINITE.items()}
        whole = self._intermediate_type.FINITE
        self._bulk(
            connection,
            self._intermediate,
            [
                {
                    "trial_id": trial_id,
                    "step": step,
                    "intermediate_value": None if isinstance(value, str) else value,
                    "intermediate_value_type": of[value] if isinstance(value, str) else whole,
                }
                for trial_id, trial in trials
                for step, value in trial.intermediate.items()
            ],
        )
        for table in (self._user, self._system):
            self._bulk(
                connection,
                table,
                [
                    {"trial_id": trial_id, "key": key, "value_json": text}
                    for trial_id, trial in trials
                    for key, text in (
                        trial.user_attrs if table is self._user else trial.system_attrs
                    ).items()
                ],
            )
        self._bulk(
            connection,
            self._heartbeats,
            [
                {"trial_id": trial_id, "heartbeat": trial.heartbeat}
                for trial_id, trial in trials
                if trial.heartbeat is not None
            ],
        )
        for trial_id, trial in trials:
            self.set_study_attrs(connection, study_id, system=_with_id(trial.study_attrs, trial_id))

    def _bulk(self, connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
        from sqlalchemy import insert

        if not rows:
            return
        if connection.dialect.name == "postgresql":
            self._bulk_from_arrays(connection, table, rows)
        else:
            connection.execute(insert(table), rows)

    def _bulk_from_arrays(
        self, connection: Connection, table: Table, rows: list[dict[str, Any]]
    ) -> None:
        """One array a column and one statement, where a statement for each row takes its time."""
        from sqlalchemy import bindparam, cast, func, insert, select
        from sqlalchemy.dialects.postgresql import ARRAY

        names = list(rows[0])
        kinds = {name: ARRAY(table.c[name].type) for name in names}
        columns = [
            func.unnest(cast(bindparam(f"all_{name}", type_=kind), kind))
            for name, kind in kinds.items()
        ]
        statement = insert(table).from_select(names, select(*columns))
        for start in range(0, len(rows), _ROWS_A_STATEMENT):
            some = rows[start : start + _ROWS_A_STATEMENT]
            connection.execute(
                statement, {f"all_{name}": [row[name] for row in some] for name in names}
            )


def _with_id(attrs: Mapping[str, str], trial_id: int) -> dict[str, str]:
    return {key.replace(TRIAL_ID, str(trial_id), 1): text for key, text in attrs.items()}


# --- from a file --------------------------------------------------------------------------------


_TRIAL_KEYS = (
    "number", "state", "started", "completed", "heartbeat", "params", "values", "steps",
    "intermediate_values", "user_attrs", "system_attrs", "study_attrs",
)  # fmt: skip


def parse_study(value: Any) -> StudyRows:
    """Check what `StudyRows.as_json` gave and somebody may have changed since.

    Raises:
        ArchiveError: something in it is not what Optuna's tables hold.
    """
    where = "the study"
    table = _table(value, where, ("name", "directions", "user_attrs", "system_attrs", "trials"))
    name = _text(table["name"], f"{where}'s name", _MAX_NAME)
    where = f"study {name!r}"
    directions = tuple(
        _one_of(direction, f"{where}: direction", ("MINIMIZE", "MAXIMIZE"))
        for direction in _list(table["directions"], f"{where}: directions")
    )
    if not directions:
        raise ArchiveError(f"{where} has no direction")
    system = _attrs(table["system_attrs"], f"{where}: system_attrs")
    for key in system:
        if _OF_A_TRIAL.fullmatch(key):
            raise ArchiveError(f"{where}: attribute {key!r} is of a trial of another database")
    trials = [
        _trial(trial, f"{where}: trial {number}", number, len(directions))
        for number, trial in enumerate(_list(table["trials"], f"{where}: trials"))
    ]
    _check_distributions(trials, where)
    return StudyRows(
        name, directions, _attrs(table["user_attrs"], f"{where}: user_attrs"), system, trials
    )


def _trial(value: Any, where: str, number: int, objectives: int) -> TrialRows:
    table = _table(value, where, _TRIAL_KEYS)
    if _integer(table["number"], f"{where}: number") != number:
        raise ArchiveError(
            f"{where} is numbered {table['number']}; numbers run from 0 without gaps"
        )
    state = _one_of(
        table["state"], f"{where}: state", ("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING")
    )
    values = tuple(
        _number(v, f"{where}: value", nan=False) for v in _list(table["values"], f"{where}: values")
    )
    accepted = {"COMPLETE": (objectives,), "PRUNED": (0, objectives)}.get(state, (0,))
    if len(values) not in accepted:
        raise ArchiveError(f"{where} is {state} with {len(values)} values")
    steps = _list(table["steps"], f"{where}: steps")
    curve = _list(table["intermediate_values"], f"{where}: intermediate_values")
    if len(steps) != len(curve):
        raise ArchiveError(f"{where} has {len(steps)} steps and {len(curve)} intermediate values")
    intermediate = {
        _integer(step, f"{where}: step"): _number(v, f"{where}: intermediate value")
        for step, v in zip(steps, curve, strict=True)
    }
    if len(intermediate) < len(steps):
        raise ArchiveError(f"{where} has a step twice")
    study_attrs = _attrs(table["study_attrs"], f"{where}: study_attrs")
    for key in study_attrs:
        if not _OF_ANY_TRIAL.fullmatch(key):
            raise ArchiveError(f"{where}: study attribute {key!r} is not one of a trial")
    return TrialRows(
        number=number,
        state=state,
        started=_time(table["started"], f"{where}: started"),
        completed=_time(table["completed"], f"{where}: completed"),
        heartbeat=_time(table["heartbeat"], f"{where}: heartbeat"),
        params=_params(table["params"], f"{where}: params"),
        values=values,
        intermediate=intermediate,
        user_attrs=_attrs(table["user_attrs"], f"{where}: user_attrs"),
        system_attrs=_attrs(table["system_attrs"], f"{where}: system_attrs"),
        study_attrs=study_attrs,
    )


def _params(value: Any, where: str) -> dict[str, tuple[float, str]]:
    params: dict[str, tuple[float, str]] = {}
    for name, pair in _table(value, where).items():
        _text(name, f"{where}: name", _MAX_NAME)
        if not isinstance(pair, list) or len(pair) != 2:
            raise ArchiveError(f"{where}: {name!r} is not a value and a distribution")
        internal = _number(pair[0], f"{where}: {name!r}")
        text = _text(pair[1], f"{where}: distribution of {name!r}")
        if isinstance(internal, str):
            raise ArchiveError(f"{where}: {name!r} is {internal}")
        if not _distribution(text)._contains(internal):
            raise ArchiveError(f"{where}: {name!r} = {internal!r} is not in {_shown(text)}")
        params[name] = (internal, text)
    return params


@lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    from optuna.distributions import json_to_distribution

    try:
        return json_to_distribution(text)
    except Exception as error:
        raise ArchiveError(f"{_shown(text)} is not a distribution of Optuna's") from error


def _check_distributions(trials: Iterable[TrialRows], where: str) -> None:
    """Optuna's samplers count on one kind of distribution for each parameter of a study."""
    from optuna.distributions import check_distribution_compatibility

    first: dict[str, str] = {}
    checked: set[tuple[str, str]] = set()
    for trial in trials:
        for name, (_, text) in trial.params.items():
            if (name, text) in checked:
                continue
            checked.add((name, text))
            try:
                check_distribution_compatibility(
                    _distribution(first.setdefault(name, text)), _distribution(text)
                )
            except ValueError as error:
                raise ArchiveError(
                    f"{where}: trial {trial.number} has another kind of {name!r} than those before"
                ) from error


def _attrs(value: Any, where: str) -> dict[str, str]:
    attrs: dict[str, str] = {}
    for key, text in _table(value, where).items():
        _text(key, f"{where}: key", _MAX_NAME)
        attrs[key] = _text(text, f"{where}: {_shown(key)}")
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArchiveError(f"{where}: {_shown(key)} is not JSON") from error
    return attrs


def _table(value: Any, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArchiveError(f"{where} is {_shown(value)}, not a table")
    if keys is not None and value.keys() != set(keys):
        odd = sorted(value.keys() ^ set(keys))
        raise ArchiveError(f"{where} lacks or has too much: {_shown(', '.join(odd))}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ArchiveError(f"{where} is {_shown(value)}, not a list")
    return value


def _text(value: Any, where: str, longest: int | None = None) -> str:
    if not isinstance(value, str):
        raise ArchiveError(f"{where} is {_shown(value)}, not a text")
    if longest is not None and not 0 < len(value) <= longest:
        raise ArchiveError(f"{where} has {len(value)} characters; accepted: 1 to {longest}")
    # PostgreSQL keeps no NUL, and no database half a surrogate pair.
    if "\0" in value or (not value.isascii() and _SURROGATE.search(value)):
        raise ArchiveError(f"{where} holds characters that no database keeps")
    return value


_SURROGATE = re.compile("[\ud800-\udfff]")


def _one_of(value: Any, where: str, accepted: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in accepted:
        raise ArchiveError(f"{where} is {_shown(value)}; accepted: {', '.join(accepted)}")
    return value


def _integer(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_INTEGER:
        raise ArchiveError(f"{where} is {_shown(value)}, not a whole number below 2^31")
    return value


def _number(value: Any, where: str, *, nan: bool = True) -> Number:
    if isinstance(value, str) and value in _NON_FINITE.values() and (nan or value != "nan"):
        return value
    if type(value) not in (int, float) or not abs(value) <= _MAX_FLOAT:
        raise ArchiveError(f"{where} is {_shown(value)}, not a finite number")
    return float(value)


_MAX_FLOAT = math.nextafter(math.inf, 0)


def _time(value: Any, where: str) -> datetime | None:
    if value is None:
        return None
    try:
        time = datetime.fromisoformat(_text(value, where))
    except ValueError:
        time = None
    if time is None or time.tzinfo is not None:
        raise ArchiveError(f"{where} is {_shown(value)}, not a time in UTC such as {_TIME}")
    return time


_TIME = "2026-01-31T12:00:00.5"


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _shown(value: Any) -> str:
    """A value of a file in a message: short, on one line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def renumbered(trial: TrialRows, number: int, system_attrs: Mapping[str, str]) -> TrialRows:
    """The same trial under another number, with further system attributes."""
    return replace(
        trial, number=number, system_attrs={**trial.system_attrs, **system_attrs}, trial_id=None
    )
