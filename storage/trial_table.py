"""The transactions on a trial's state and lease, in SQL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from storage.errors import StorageError
from storage.leases import LEASE_ATTR, count, parse_lease, released
from storage.readers import reader_options
from storage.statements import FIXED, Statements, budgets

if TYPE_CHECKING:
    from optuna.trial import TrialState
    from sqlalchemy.engine import Connection, Engine


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


class TrialTable:
    """The transactions on a trial's state and lease. Each is atomic and checks what it changes.

    Those that change a lease touch its row first, then the trial's row, so that two of them on
    the same trial wait for each other instead of deadlocking.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sql = Statements(engine.dialect.name)
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
            waiting = connection.execute(self._sql.waiting(tuple(positions)), budgets(studies))
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
            done = connection.execute(query, budgets(studies)).scalar_one()
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


def _attr_rows(trial_id: int, attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of an attribute table, written out before anything is locked."""
    return [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for key, value in attrs.items()
    ]
