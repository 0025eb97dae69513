"""The transactions on a trial's state and lease, in SQL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from storage.engine import READ_ONLY_OPTION, StorageError
from storage.leases import LEASE_ATTR, count, parse_lease, released

if TYPE_CHECKING:
    from optuna.trial import TrialState
    from sqlalchemy import ColumnElement, Table
    from sqlalchemy.engine import Connection, Engine

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


class TrialTable:
    """The transactions on a trial's state and lease. Each is atomic and checks what it changes.

    Those that change a lease touch its row first, then the trial's row, so that two of them on
    the same trial wait for each other instead of deadlocking.
    """

    def __init__(self, engine: Engine) -> None:
        from optuna.storages._rdb import models

        self._engine = engine
        self._studies: Table = models.StudyModel.__table__
        self._trials: Table = models.TrialModel.__table__
        self._attrs: Table = models.TrialSystemAttributeModel.__table__
        self._user_attrs: Table = models.TrialUserAttributeModel.__table__
        self._values: Table = models.TrialValueModel.__table__
        self._params: Table = models.TrialParamModel.__table__
        self._intermediate: Table = models.TrialIntermediateValueModel.__table__
        self._finite = models.TrialValueModel.TrialValueType.FINITE
        self._finite_step = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE

    def _reading(self) -> AbstractContextManager[Connection]:
        return self._engine.connect().execution_options(**{READ_ONLY_OPTION: True})

    def _below_budget(self, studies: Sequence[tuple[int, int]]) -> ColumnElement[bool]:
        from sqlalchemy import and_, or_

        columns = self._trials.c
        return or_(
            *[and_(columns.study_id == study, columns.number < budget) for study, budget in studies]
        )

    def running(self, study_ids: Sequence[int]) -> list[RunningTrial]:
        """List the running trials with their lease as stored."""
        from optuna.trial import TrialState
        from sqlalchemy import and_, select

        trials, attrs = self._trials.c, self._attrs.c
        query = (
            select(
                trials.study_id,
                trials.trial_id,
                trials.number,
                trials.datetime_start,
                attrs.value_json,
            )
            .select_from(
                self._trials.outerjoin(
                    self._attrs, and_(attrs.trial_id == trials.trial_id, attrs.key == LEASE_ATTR)
                )
            )
            .where(trials.study_id.in_(study_ids), trials.state == TrialState.RUNNING)
        )
        with self._reading() as connection:
            return [RunningTrial(*row) for row in connection.execute(query)]

    def candidates(self, studies: Sequence[tuple[int, int]]) -> list[Candidate]:
        """List what may be claimed, best first: lowest number, then the study's position."""
        from optuna.trial import TrialState
        from sqlalchemy import func, select

        trials = self._trials.c
        positions = {study: position for position, (study, _) in enumerate(studies)}
        waiting = (
            select(trials.number, trials.study_id, trials.trial_id)
            .where(trials.state == TrialState.WAITING, self._below_budget(studies))
            .order_by(trials.number)
            .limit(_CANDIDATES + len(studies))
        )
        totals = (
            select(trials.study_id, func.count())
            .where(trials.study_id.in_(list(positions)))
            .group_by(trials.study_id)
        )
        with self._reading() as connection:
            found = [
                Candidate(number, positions[study_id], study_id, trial_id)
                for number, study_id, trial_id in connection.execute(waiting)
            ]
            counts = {int(row[0]): int(row[1]) for row in connection.execute(totals)}
        found += [
            Candidate(counts.get(study_id, 0), position, study_id, None)
            for position, (study_id, budget) in enumerate(studies)
            if counts.get(study_id, 0) < budget
        ]
        return sorted(found, key=lambda candidate: (candidate.number, candidate.position))

    def unfinished(self, studies: Sequence[tuple[int, int]]) -> int:
        """Count the trials below the budgets, existing or not, that are not finished."""
        from optuna.trial import TrialState
        from sqlalchemy import func, select

        finished = [state for state in TrialState if state.is_finished()]
        query = select(func.count()).where(
            self._trials.c.state.in_(finished), self._below_budget(studies)
        )
        with self._reading() as connection:
            done = connection.execute(query).scalar_one()
        return sum(budget for _, budget in studies) - int(done)

    def study_of(self, trial_id: int) -> int | None:
        """Return the study of a trial; None if there is no such trial."""
        from sqlalchemy import select

        columns = self._trials.c
        query = select(columns.study_id).where(columns.trial_id == trial_id)
        with self._reading() as connection:
            return connection.execute(query).scalar()

    def read(self, trial_id: int) -> tuple[TrialState, str | None] | None:
        """Return a trial's state and its lease as stored; None if there is no such trial."""
        with self._reading() as connection:
            return self._read(connection, trial_id)

    def _read(self, connection: Connection, trial_id: int) -> tuple[TrialState, str | None] | None:
        from sqlalchemy import and_, select

        trials, attrs = self._trials.c, self._attrs.c
        row = connection.execute(
            select(trials.state, attrs.value_json)
            .select_from(
                self._trials.outerjoin(
                    self._attrs, and_(attrs.trial_id == trials.trial_id, attrs.key == LEASE_ATTR)
                )
            )
            .where(trials.trial_id == trial_id)
        ).one_or_none()
        return None if row is None else (row[0], row[1])

    def take(self, trial_id: int, lease: dict[str, Any]) -> dict[str, Any] | None:
        """WAITING → RUNNING. Return the lease as written, or None if another was faster.

        Repeated with the same token, after an answer that was lost, it returns what it wrote.
        """
        from optuna.trial import TrialState
        from sqlalchemy import insert, select, update

        trials, attrs = self._trials, self._attrs
        with self._engine.begin() as connection:
            taken = connection.execute(
                update(trials)
                .where(trials.c.trial_id == trial_id, trials.c.state == TrialState.WAITING)
                .values(state=TrialState.RUNNING, datetime_start=_utc_now())
            )
            if taken.rowcount != 1:
                row = self._read(connection, trial_id)
                held = parse_lease(row[1]) if row and row[0] == TrialState.RUNNING else {}
                return held if held.get("token") == lease["token"] else None
            is_lease = (attrs.c.trial_id == trial_id) & (attrs.c.key == LEASE_ATTR)
            text = connection.execute(select(attrs.c.value_json).where(is_lease)).scalar()
            before = parse_lease(text)
            lease = lease | {
                "attempt": count(before, "attempt") + 1,
                "deaths": count(before, "deaths"),
            }
            if text is None:
                connection.execute(
                    insert(attrs).values(
                        trial_id=trial_id, key=LEASE_ATTR, value_json=json.dumps(lease)
                    )
                )
            else:
                connection.execute(
                    update(attrs).where(is_lease).values(value_json=json.dumps(lease))
                )
            return lease

    def create(self, study_id: int, number: int, lease: dict[str, Any]) -> int | None:
        """Create the trial with that number, already held. None if the number is taken.

        Repeated with the same token, after an answer that was lost, it finds what it created.
        """
        from optuna.trial import TrialState
        from sqlalchemy import func, insert, select

        trials, studies = self._trials, self._studies
        with self._engine.begin() as connection:
            # Optuna locks the same row when it numbers a new trial.
            study = connection.execute(
                select(studies.c.study_id).where(studies.c.study_id == study_id).with_for_update()
            ).one_or_none()
            if study is None:
                raise StorageError(f"study {study_id} does not exist any more; it was deleted")
            total = connection.execute(
                select(func.count()).where(trials.c.study_id == study_id)
            ).scalar_one()
            if total != number:
                return self._created(connection, study_id, number, lease["token"])
            result = connection.execute(
                insert(trials).values(
                    study_id=study_id,
                    number=number,
                    state=TrialState.RUNNING,
                    datetime_start=_utc_now(),
                )
            )
            key = result.inserted_primary_key
            assert key is not None
            trial_id = int(key[0])
            connection.execute(
                insert(self._attrs).values(
                    trial_id=trial_id, key=LEASE_ATTR, value_json=json.dumps(lease)
                )
            )
            return trial_id

    def _created(
        self, connection: Connection, study_id: int, number: int, token: str
    ) -> int | None:
        """Return the trial with that number if it is held with that token."""
        from sqlalchemy import select

        columns = self._trials.c
        trial_id = connection.execute(
            select(columns.trial_id).where(columns.study_id == study_id, columns.number == number)
        ).scalar()
        row = None if trial_id is None else self._read(connection, trial_id)
        ours = row is not None and parse_lease(row[1]).get("token") == token
        return trial_id if ours else None

    def _swap(self, connection: Connection, trial_id: int, old: str | None, new: str) -> bool:
        """Replace the lease if it still is ``old``, compared as the JSON text in the row."""
        from sqlalchemy import insert, update
        from sqlalchemy.exc import IntegrityError

        attrs = self._attrs
        if old is None:
            try:
                with connection.begin_nested():
                    connection.execute(
                        insert(attrs).values(trial_id=trial_id, key=LEASE_ATTR, value_json=new)
                    )
            except IntegrityError:
                return False
            return True
        swapped = connection.execute(
            update(attrs)
            .where(
                attrs.c.trial_id == trial_id,
                attrs.c.key == LEASE_ATTR,
                attrs.c.value_json == old,
            )
            .values(value_json=new)
        )
        return bool(swapped.rowcount == 1)

    def _leave_running(
        self,
        trial_id: int,
        old: str | None,
        new: dict[str, Any],
        *,
        state: TrialState,
        value: float | None = None,
        started: datetime | None = None,
        completed: datetime | None = None,
        user_attrs: Mapping[str, Any] | None = None,
        system_attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """RUNNING → ``state`` if the lease still is ``old``, else change nothing."""
        from optuna.trial import TrialState
        from sqlalchemy import insert, update

        trials, values = self._trials, self._values
        times = {"datetime_start": None} if completed is None else {"datetime_complete": completed}
        conditions = [trials.c.trial_id == trial_id, trials.c.state == TrialState.RUNNING]
        if old is None:
            conditions.append(trials.c.datetime_start == started)
        with self._engine.connect() as connection, connection.begin() as transaction:
            changed = self._swap(connection, trial_id, old, json.dumps(new)) and (
                connection.execute(
                    update(trials).where(*conditions).values(state=state, **times)
                ).rowcount
                == 1
            )
            if not changed:
                transaction.rollback()
                return False
            if value is not None:
                connection.execute(
                    insert(values).values(
                        trial_id=trial_id, objective=0, value=value, value_type=self._finite
                    )
                )
            self._set_attrs(connection, self._user_attrs, trial_id, user_attrs or {})
            self._set_attrs(connection, self._attrs, trial_id, system_attrs or {})
        return True

    def _set_attrs(
        self, connection: Connection, table: Table, trial_id: int, attrs: Mapping[str, Any]
    ) -> None:
        from sqlalchemy import insert, update

        for key, value in attrs.items():
            text = json.dumps(value)
            is_it = (table.c.trial_id == trial_id) & (table.c.key == key)
            if connection.execute(update(table).where(is_it).values(value_json=text)).rowcount == 0:
                connection.execute(
                    insert(table).values(trial_id=trial_id, key=key, value_json=text)
                )

    def requeue(
        self, trial_id: int, old: str | None, *, died: bool, started: datetime | None = None
    ) -> bool:
        """RUNNING → WAITING if the lease still is ``old``, and for no lease, ``started`` too."""
        from optuna.trial import TrialState

        return self._leave_running(
            trial_id, old, released(old, died=died), state=TrialState.WAITING, started=started
        )

    def finish(
        self,
        trial_id: int,
        old: str,
        state: TrialState,
        value: float | None,
        user_attrs: Mapping[str, Any],
        system_attrs: Mapping[str, Any],
    ) -> bool:
        """RUNNING → ``state`` with ``value`` and attributes if the lease still is ``old``."""
        before = parse_lease(old)
        finished = {"finished": state.name, "value": value} | {
            key: before.get(key) for key in ("worker", "host", "token", "attempt", "deaths")
        }
        return self._leave_running(
            trial_id, old, finished, state=state, value=value, completed=_utc_now(),
            user_attrs=user_attrs, system_attrs=system_attrs,
        )  # fmt: skip

    def report(
        self, trial_id: int, token: str, step: int, value: float, system_attrs: Mapping[str, Any]
    ) -> bool:
        """Write a step's value and attributes if the lease with that token holds the trial."""
        from optuna.trial import TrialState
        from sqlalchemy import insert, select, update

        attrs, steps = self._attrs, self._intermediate
        with self._engine.begin() as connection:
            # Locked, so that nobody takes the trial over before the step is written.
            text = connection.execute(
                select(attrs.c.value_json)
                .where(attrs.c.trial_id == trial_id, attrs.c.key == LEASE_ATTR)
                .with_for_update()
            ).scalar()
            state = connection.execute(
                select(self._trials.c.state).where(self._trials.c.trial_id == trial_id)
            ).scalar()
            if state != TrialState.RUNNING or parse_lease(text).get("token") != token:
                return False
            what = {"intermediate_value": value, "intermediate_value_type": self._finite_step}
            is_it = (steps.c.trial_id == trial_id) & (steps.c.step == step)
            if connection.execute(update(steps).where(is_it).values(**what)).rowcount == 0:
                connection.execute(insert(steps).values(trial_id=trial_id, step=step, **what))
            self._set_attrs(connection, attrs, trial_id, system_attrs)
            return True

    def set_params(self, trial_id: int, token: str, params: Sequence[Sequence[Any]]) -> bool:
        """Write the parameters that a trial lacks, all or none; False if it is not that token's.

        Args:
            trial_id: the trial.
            token: of the lease that must still be held.
            params: name, value in Optuna's internal representation, distribution as JSON.
        """
        from optuna.trial import TrialState
        from sqlalchemy import insert, select

        attrs, columns = self._attrs.c, self._params.c
        with self._engine.begin() as connection:
            # The lock on the lease's row holds off whoever would take the trial over.
            connection.execute(
                select(attrs.value_json)
                .where(attrs.trial_id == trial_id, attrs.key == LEASE_ATTR)
                .with_for_update()
            )
            row = self._read(connection, trial_id)
            if row is None or row[0] != TrialState.RUNNING:
                return False
            if parse_lease(row[1]).get("token") != token:
                return False
            query = select(columns.param_name).where(columns.trial_id == trial_id)
            known = set(connection.execute(query).scalars())
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
                connection.execute(insert(self._params), new)
        return True

    def forget_steps(self, trial_id: int, after: int) -> None:
        """Delete the intermediate values beyond a step."""
        from sqlalchemy import delete

        columns = self._intermediate.c
        with self._engine.begin() as connection:
            connection.execute(
                delete(self._intermediate).where(columns.trial_id == trial_id, columns.step > after)
            )

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
