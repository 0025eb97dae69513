"""The transactions on a trial's state and lease, in SQL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from storage.engine import StorageError, reader_options
from storage.leases import LEASE_ATTR, count, parse_lease, released

if TYPE_CHECKING:
    from optuna.trial import TrialState
    from sqlalchemy import ColumnElement, Executable, Select, Table
    from sqlalchemy.engine import Connection, Engine

FIXED = "fixed_params"
"""Optuna's system attribute of a trial whose parameters are given, not suggested."""

_CANDIDATES = 32


@dataclass(frozen=True)
class RunningTrial:
    """A running trial with its lease as stored."""

    study_id: int
    trial_id: int
    number: int
    started: datetime | None
    lease_text: str | None


@dataclass(frozen=True)
class Candidate:
    """A trial that may be claimed; ``position`` is that of its study in the query."""

    number: int
    position: int
    study_id: int
    trial_id: int | None
    """None: a trial that does not exist yet."""


def _utc_now() -> datetime:
    # Optuna keeps naive UTC in these columns. For display: nothing is decided by it.
    return datetime.now(UTC).replace(tzinfo=None)


class _Statements:
    """The statements of :class:`TrialTable`, built once: building takes longer than running."""

    def __init__(self, dialect: str) -> None:
        from optuna.storages._rdb import models
        from optuna.trial import TrialState
        from sqlalchemy import and_, bindparam, delete, func, insert, select, update

        self.trials: Table = models.TrialModel.__table__
        self.attrs: Table = models.TrialSystemAttributeModel.__table__
        self._waiting: dict[tuple[int, ...], Select[Any]] = {}
        self._finished: dict[tuple[int, ...], Select[Any]] = {}
        studies: Table = models.StudyModel.__table__
        user_attrs: Table = models.TrialUserAttributeModel.__table__
        values: Table = models.TrialValueModel.__table__
        params: Table = models.TrialParamModel.__table__
        steps: Table = models.TrialIntermediateValueModel.__table__
        trials, attrs = self.trials, self.attrs
        one: Any = bindparam("id")
        of_studies: Any = bindparam("studies", expanding=True)
        is_one = trials.c.trial_id == one
        is_lease = and_(attrs.c.trial_id == one, attrs.c.key == LEASE_ATTR)
        lease = attrs.c.value_json
        with_lease = trials.outerjoin(
            attrs, and_(attrs.c.trial_id == trials.c.trial_id, attrs.c.key == LEASE_ATTR)
        )

        started = trials.c.datetime_start
        self.running = (
            select(trials.c.study_id, trials.c.trial_id, trials.c.number, started, lease)
            .select_from(with_lease)
            .where(trials.c.study_id.in_(of_studies), trials.c.state == TrialState.RUNNING)
        )
        self.totals = (
            select(trials.c.study_id, func.count())
            .where(trials.c.study_id.in_(of_studies))
            .group_by(trials.c.study_id)
        )
        self.state_and_lease = select(trials.c.state, lease).select_from(with_lease).where(is_one)
        self.lease = select(lease).where(is_lease)
        self.locked_lease = (
            select(trials.c.state, lease)
            .join_from(attrs, trials, attrs.c.trial_id == trials.c.trial_id)
            .where(is_lease)
            .with_for_update(of=attrs)
        )
        self.locked_study = (
            select(studies.c.study_id).where(studies.c.study_id == one).with_for_update()
        )
        self.total = select(func.count()).where(trials.c.study_id == one)
        self.numbered = select(trials.c.trial_id).where(
            trials.c.study_id == one, trials.c.number == bindparam("number")
        )
        self.add_trial = insert(trials).values(state=TrialState.RUNNING)
        self.take = (
            update(trials)
            .where(is_one, trials.c.state == TrialState.WAITING)
            .values(state=TrialState.RUNNING, datetime_start=bindparam("started"))
        )
        self.finish = (
            update(trials)
            .where(is_one, trials.c.state == TrialState.RUNNING)
            .values(state=bindparam("to"), datetime_complete=bindparam("completed"))
        )
        self.set_lease = update(attrs).where(is_lease).values(value_json=bindparam("new"))
        self.swap_lease = self.set_lease.where(lease == bindparam("old"))
        self.add_attr = insert(attrs)
        self.add_value = insert(values).values(
            objective=0, value_type=models.TrialValueModel.TrialValueType.FINITE
        )
        self.marked = (
            select(trials.c.trial_id)
            .join_from(user_attrs, trials, user_attrs.c.trial_id == trials.c.trial_id)
            .where(
                trials.c.study_id == bindparam("study"),
                user_attrs.c.key == bindparam("key"),
                user_attrs.c.value_json == bindparam("text"),
            )
        )
        self.fixed = (
            select(trials.c.trial_id)
            .join_from(attrs, trials, attrs.c.trial_id == trials.c.trial_id)
            .where(
                trials.c.study_id == bindparam("study"),
                attrs.c.key == FIXED,
                attrs.c.value_json == bindparam("text"),
            )
        )
        self.param_names = select(params.c.param_name).where(params.c.trial_id == one)
        self.add_params = insert(params)
        self.forget_steps = delete(steps).where(
            steps.c.trial_id == one, steps.c.step > bindparam("after")
        )
        self.set_step = _Upsert(
            dialect, steps, ("trial_id", "step"), ("intermediate_value", "intermediate_value_type")
        )
        self.finite_step = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
        self.set_attr = _Upsert(dialect, attrs, ("trial_id", "key"), ("value_json",))
        self.set_user_attr = _Upsert(dialect, user_attrs, ("trial_id", "key"), ("value_json",))

    def _below_budget(self, studies: Sequence[int]) -> ColumnElement[bool]:
        from sqlalchemy import and_, bindparam, or_

        columns = self.trials.c
        return or_(
            *[
                and_(columns.study_id == study, columns.number < bindparam(f"budget_{study}"))
                for study in studies
            ]
        )

    def waiting(self, studies: tuple[int, ...]) -> Select[Any]:
        """Those below the budgets, the lowest numbers first."""
        from optuna.trial import TrialState
        from sqlalchemy import select

        if studies not in self._waiting:
            columns = self.trials.c
            self._waiting[studies] = (
                select(columns.number, columns.study_id, columns.trial_id)
                .where(columns.state == TrialState.WAITING, self._below_budget(studies))
                .order_by(columns.number)
                .limit(_CANDIDATES + len(studies))
            )
        return self._waiting[studies]

    def finished(self, studies: tuple[int, ...]) -> Select[Any]:
        """How many below the budgets are finished."""
        from optuna.trial import TrialState
        from sqlalchemy import func, select

        if studies not in self._finished:
            states = [state for state in TrialState if state.is_finished()]
            self._finished[studies] = select(func.count()).where(
                self.trials.c.state.in_(states), self._below_budget(studies)
            )
        return self._finished[studies]


class _Upsert:
    """Inserts a row, or changes the one that has the same keys.

    Args:
        dialect: SQLAlchemy's name of the database.
        table: one with a unique index on the keys.
        keys: columns.
        columns: what changes.
    """

    def __init__(
        self, dialect: str, table: Table, keys: Sequence[str], columns: Sequence[str]
    ) -> None:
        from sqlalchemy import and_, bindparam, insert, update

        self._at_once: Executable | None = None
        is_it = and_(*[table.c[key] == bindparam(f"its_{key}") for key in keys])
        new: dict[str, Any] = {name: bindparam(f"new_{name}") for name in columns}
        self._keys, self._columns = keys, columns
        self._insert, self._update = insert(table), update(table).where(is_it).values(**new)
        if dialect in ("mysql", "mariadb"):
            from sqlalchemy.dialects import mysql

            add = mysql.insert(table)
            changes = {name: add.inserted[name] for name in columns}
            self._at_once = add.on_duplicate_key_update(**changes)
        elif dialect in ("sqlite", "postgresql"):
            from sqlalchemy.dialects import postgresql, sqlite

            offered = (sqlite if dialect == "sqlite" else postgresql).insert(table)
            self._at_once = offered.on_conflict_do_update(
                index_elements=list(keys), set_={name: offered.excluded[name] for name in columns}
            )

    def run(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store rows, each with all keys and columns."""
        if not rows:
            return
        if self._at_once is not None:
            connection.execute(self._at_once, rows)
            return
        for row in rows:
            renamed = {f"its_{key}": row[key] for key in self._keys}
            renamed |= {f"new_{name}": row[name] for name in self._columns}
            if connection.execute(self._update, renamed).rowcount == 0:
                connection.execute(self._insert, row)


class TrialTable:
    """The transactions on a trial's state and lease. Each is atomic and checks what it changes.

    Those that change a lease touch its row first, then the trial's row, so that two of them on
    the same trial wait for each other instead of deadlocking.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sql = _Statements(engine.dialect.name)
        self._reader_options = reader_options(engine)

    def _reading(self) -> AbstractContextManager[Connection]:
        return self._engine.connect().execution_options(**self._reader_options)

    def running(self, study_ids: Sequence[int]) -> list[RunningTrial]:
        """List the running trials with their lease as stored."""
        with self._reading() as connection:
            rows = connection.execute(self._sql.running, {"studies": list(study_ids)})
            return [RunningTrial(*row) for row in rows]

    def candidates(self, studies: Sequence[tuple[int, int]], lag: int = 0) -> list[Candidate]:
        """List what may be claimed, best first: lowest number, then the study's position.

        Numbers of a study count as many higher as it is `lag` times behind the first.
        """
        positions = {study: position for position, (study, _) in enumerate(studies)}
        with self._reading() as connection:
            waiting = connection.execute(self._sql.waiting(tuple(positions)), _budgets(studies))
            found = [
                Candidate(number, positions[study_id], study_id, trial_id)
                for number, study_id, trial_id in waiting
            ]
            totals = connection.execute(self._sql.totals, {"studies": list(positions)})
            counts = {int(row[0]): int(row[1]) for row in totals}
        found += [
            Candidate(counts.get(study_id, 0), position, study_id, None)
            for position, (study_id, budget) in enumerate(studies)
            if counts.get(study_id, 0) < budget
        ]
        return sorted(found, key=lambda c: (c.number + lag * c.position, c.position))

    def unfinished(self, studies: Sequence[tuple[int, int]]) -> int:
        """Count the trials below the budgets, existing or not, that are not finished."""
        query = self._sql.finished(tuple(study for study, _ in studies))
        with self._reading() as connection:
            done = connection.execute(query, _budgets(studies)).scalar_one()
        return sum(budget for _, budget in studies) - int(done)

    def total(self, study_id: int) -> int:
        """Count the trials of a study."""
        with self._reading() as connection:
            return int(connection.execute(self._sql.total, {"id": study_id}).scalar_one())

    def read(self, trial_id: int) -> tuple[TrialState, str | None] | None:
        """Return a trial's state and its lease as stored; None if there is no such trial."""
        with self._reading() as connection:
            return self._read(connection, trial_id)

    def _read(self, connection: Connection, trial_id: int) -> tuple[TrialState, str | None] | None:
        row = connection.execute(self._sql.state_and_lease, {"id": trial_id}).one_or_none()
        return None if row is None else (row[0], row[1])

    def take(self, trial_id: int, lease: dict[str, Any]) -> dict[str, Any] | None:
        """WAITING → RUNNING. Return the lease as written, or None if another was faster.

        Repeated with the same token, after an answer that was lost, it returns what it wrote.
        """
        from optuna.trial import TrialState

        with self._engine.begin() as connection:
            taken = connection.execute(self._sql.take, {"id": trial_id, "started": _utc_now()})
            if taken.rowcount != 1:
                row = self._read(connection, trial_id)
                held = parse_lease(row[1]) if row and row[0] == TrialState.RUNNING else {}
                return held if held.get("token") == lease["token"] else None
            text = connection.execute(self._sql.lease, {"id": trial_id}).scalar()
            before = parse_lease(text)
            lease = lease | {
                "attempt": count(before, "attempt") + 1,
                "deaths": count(before, "deaths"),
            }
            if text is None:
                self._add_lease(connection, trial_id, json.dumps(lease))
            else:
                new = {"id": trial_id, "new": json.dumps(lease)}
                connection.execute(self._sql.set_lease, new)
            return lease

    def _add_lease(self, connection: Connection, trial_id: int, text: str) -> None:
        row = {"trial_id": trial_id, "key": LEASE_ATTR, "value_json": text}
        connection.execute(self._sql.add_attr, row)

    def create(self, study_id: int, number: int, lease: dict[str, Any]) -> int | None:
        """Create the trial with that number, already held. None if the number is taken.

        Repeated with the same token, after an answer that was lost, it finds what it created.
        """
        with self._engine.begin() as connection:
            # Optuna locks the same row when it numbers a new trial.
            study = connection.execute(self._sql.locked_study, {"id": study_id}).one_or_none()
            if study is None:
                raise StorageError(f"study {study_id} does not exist any more; it was deleted")
            total = connection.execute(self._sql.total, {"id": study_id}).scalar_one()
            if total != number:
                return self._created(connection, study_id, number, lease["token"])
            row = {"study_id": study_id, "number": number, "datetime_start": _utc_now()}
            key = connection.execute(self._sql.add_trial, row).inserted_primary_key
            assert key is not None
            trial_id = int(key[0])
            self._add_lease(connection, trial_id, json.dumps(lease))
            return trial_id

    def _created(
        self, connection: Connection, study_id: int, number: int, token: str
    ) -> int | None:
        """Return the trial with that number if it is held with that token."""
        where = {"id": study_id, "number": number}
        trial_id = connection.execute(self._sql.numbered, where).scalar()
        row = None if trial_id is None else self._read(connection, trial_id)
        ours = row is not None and parse_lease(row[1]).get("token") == token
        return trial_id if ours else None

    def _swap(self, connection: Connection, trial_id: int, old: str | None, new: str) -> bool:
        """Replace the lease if it still is ``old``, compared as the JSON text in the row."""
        from sqlalchemy.exc import IntegrityError

        if old is None:
            try:
                with connection.begin_nested():
                    self._add_lease(connection, trial_id, new)
            except IntegrityError:
                return False
            return True
        values = {"id": trial_id, "old": old, "new": new}
        return bool(connection.execute(self._sql.swap_lease, values).rowcount == 1)

    def _held(self, connection: Connection, trial_id: int, token: str) -> str | None:
        """Lock the lease with that token and return it; None if the trial is not its any more.

        Nobody takes the trial over before this transaction ends.
        """
        from optuna.trial import TrialState

        row = connection.execute(self._sql.locked_lease, {"id": trial_id}).one_or_none()
        # The state may be older than a lock that was waited for; a lease that has ended says so.
        if row is None or row[0] != TrialState.RUNNING:
            return None
        lease = parse_lease(row[1])
        held = lease.get("token") == token and "finished" not in lease
        return row[1] if held else None

    def requeue(
        self, trial_id: int, old: str | None, *, died: bool, started: datetime | None = None
    ) -> bool:
        """RUNNING → WAITING if the lease still is ``old``, and for no lease, ``started`` too."""
        from optuna.trial import TrialState
        from sqlalchemy import update

        trials = self._sql.trials
        conditions = [trials.c.trial_id == trial_id, trials.c.state == TrialState.RUNNING]
        if old is None:
            conditions.append(trials.c.datetime_start == started)
        put_back = (
            update(trials).where(*conditions).values(state=TrialState.WAITING, datetime_start=None)
        )
        new = json.dumps(released(old, died=died))
        with self._engine.connect() as connection, connection.begin() as transaction:
            if self._swap(connection, trial_id, old, new) and (
                connection.execute(put_back).rowcount == 1
            ):
                return True
            transaction.rollback()
            return False

    def finish(
        self,
        trial_id: int,
        token: str,
        state: TrialState,
        value: float | None,
        user_attrs: Mapping[str, Any],
        system_attrs: Mapping[str, Any],
    ) -> bool:
        """RUNNING → ``state`` with ``value`` and attributes if that token's lease holds it.

        Repeated after an answer that was lost, it finds what it wrote.
        """
        user_rows, rows = _attr_rows(trial_id, user_attrs), _attr_rows(trial_id, system_attrs)
        told = {"id": trial_id, "to": state, "completed": _utc_now()}
        with self._engine.connect() as connection, connection.begin() as transaction:
            text = self._held(connection, trial_id, token)
            if text is not None and connection.execute(self._sql.finish, told).rowcount == 1:
                before = parse_lease(text)
                finished = {"finished": state.name, "value": value} | {
                    key: before.get(key) for key in ("worker", "host", "token", "attempt", "deaths")
                }
                if value is not None:
                    row = {"trial_id": trial_id, "value": value}
                    connection.execute(self._sql.add_value, row)
                rows += _attr_rows(trial_id, {LEASE_ATTR: finished})
                self._sql.set_user_attr.run(connection, user_rows)
                self._sql.set_attr.run(connection, rows)
                return True
            transaction.rollback()
        found = self.read(trial_id)
        lease = parse_lease(found[1]) if found is not None else {}
        return (lease.get("token"), lease.get("finished"), lease.get("value")) == (
            token, state.name, value,
        )  # fmt: skip

    def report(
        self, trial_id: int, token: str, step: int, value: float, system_attrs: Mapping[str, Any]
    ) -> bool:
        """Write a step's value and attributes if the lease with that token holds the trial."""
        rows = _attr_rows(trial_id, system_attrs)
        what = {
            "trial_id": trial_id,
            "step": step,
            "intermediate_value": value,
            "intermediate_value_type": self._sql.finite_step,
        }
        with self._engine.begin() as connection:
            if self._held(connection, trial_id, token) is None:
                return False
            self._sql.set_step.run(connection, [what])
            self._sql.set_attr.run(connection, rows)
            return True

    def set_params(self, trial_id: int, token: str, params: Sequence[Sequence[Any]]) -> bool:
        """Write the parameters that a trial lacks, all or none; False if it is not that token's.

        Args:
            trial_id: the trial.
            token: of the lease that must still be held.
            params: name, value in Optuna's internal representation, distribution as JSON.
        """
        with self._engine.begin() as connection:
            if self._held(connection, trial_id, token) is None:
                return False
            known = set(connection.execute(self._sql.param_names, {"id": trial_id}).scalars())
            new = [
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": value,
                    "distribution_json": distribution,
                }
                for name, value, distribution in params
                if name not in known
            ]
            if new:
                connection.execute(self._sql.add_params, new)
        return True

    def fix_params(
        self,
        study_id: int,
        trial_id: int,
        token: str,
        params: Mapping[str, Any],
        key: str,
        mark: str,
    ) -> bool | None:
        """Fix parameters of a trial that has none, as an enqueued trial's are, and mark it.

        No two trials of a study get one mark, or the same parameters. Repeated after an answer
        that was lost, it finds what it wrote.

        Args:
            study_id: the trial's study.
            trial_id: the trial.
            token: of the lease that must still be held.
            params: values by name, in JSON.
            key: the user attribute that holds the mark.
            mark: what no other trial of the study may have there.

        Returns:
            Whether the trial has the mark now; None if it is not that token's any more.
        """
        user_rows = _attr_rows(trial_id, {key: mark})
        rows = _attr_rows(trial_id, {FIXED: dict(params)})
        with self._engine.begin() as connection:
            if self._held(connection, trial_id, token) is None:
                return None
            # Of two that look for the mark at once, the second waits here for what the first wrote.
            connection.execute(self._sql.locked_study, {"id": study_id}).one()
            what = {"study": study_id, "key": key, "text": user_rows[0]["value_json"]}
            same = {"study": study_id, "text": rows[0]["value_json"]}
            taken = {
                *connection.execute(self._sql.marked, what).scalars(),
                *connection.execute(self._sql.fixed, same).scalars(),
            }
            if not taken:
                self._sql.set_user_attr.run(connection, user_rows)
                self._sql.set_attr.run(connection, rows)
            return not taken or trial_id in taken

    def forget_steps(self, trial_id: int, token: str, after: int) -> bool:
        """Delete the intermediate values beyond a step; False if the trial is not its any more."""
        with self._engine.begin() as connection:
            if self._held(connection, trial_id, token) is None:
                return False
            connection.execute(self._sql.forget_steps, {"id": trial_id, "after": after})
            return True

    def beat(self, trial_id: int, token: str) -> bool:
        """Raise the beat of the lease with that token; False if the trial is not its any more."""
        from optuna.trial import TrialState

        with self._engine.begin() as connection:
            row = self._read(connection, trial_id)
            if row is None or row[0] != TrialState.RUNNING or row[1] is None:
                return False
            lease = parse_lease(row[1])
            if lease.get("token") != token:
                return False
            new = json.dumps(lease | {"beat": count(lease, "beat") + 1})
            return self._swap(connection, trial_id, row[1], new)


def _budgets(studies: Sequence[tuple[int, int]]) -> dict[str, int]:
    return {f"budget_{study}": budget for study, budget in studies}


def _attr_rows(trial_id: int, attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of an attribute table, written out before anything is locked."""
    return [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for key, value in attrs.items()
    ]
