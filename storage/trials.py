"""Hand the trials of a study to worker processes: exactly once, within the budget, with leases.

A trial of a sweep is one Optuna trial for life. It waits, a worker claims it (RUNNING) and
finishes it (COMPLETE, PRUNED or FAIL). An interrupted trial goes back to WAITING as the same
trial, with its number, parameters and reported values: never a clone, so the budget, Hyperband's
brackets and the learning curve are as if nothing had happened.

**Claims.** Every change of a trial's state is one SQL transaction that writes only if the state
and the lease are still the ones that were seen. SQLite runs such transactions one after another
(see :mod:`storage.engine`); PostgreSQL and MySQL re-check the condition under the row's lock.

**Leases.** A running trial carries the system attribute :data:`LEASE_ATTR`: who holds it (worker,
host, process), a random token, and a beat counter that the holder raises every few seconds.
Nothing in it is a time. A lease has run out when its process is gone, which a worker on the same
host sees at once, or when one observer has seen the very same lease unchanged for
``lease_seconds`` on its *own* monotonic clock. No two clocks are ever compared, so clocks that
are wrong, skewed or set back cannot break a lease. A worker that was only frozen finds its token
gone and gets :class:`LeaseLostError`; whatever it does, it cannot write a result any more.
"""

from __future__ import annotations

import json
import math
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from storage.engine import READ_ONLY_OPTION, StorageError, sql_engine

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import TrialState
    from sqlalchemy import ColumnElement, Table
    from sqlalchemy.engine import Connection, Engine

T = TypeVar("T")

LEASE_ATTR = "sweep:lease"
"""Trial system attribute with the lease as JSON.

Held: worker, host, pid, process_start, token, beat, attempt, deaths. Released: released, worker,
attempt, deaths. Finished: finished (the state's name), value, worker, host, token, attempt,
deaths.
"""

RETRY_SECONDS = 120.0
"""How long the operations of a :class:`TrialQueue` retry a locked or unreachable database."""

_CANDIDATES = 32


class LeaseLostError(Exception):
    """The trial is no longer this worker's: another took it over, or somebody finished it."""


@dataclass(frozen=True)
class Claim:
    """A running trial that this worker holds."""

    study_id: int
    trial_id: int
    number: int
    attempt: int
    """1 for the first worker that runs the trial, then 2, …"""
    deaths: int
    """How many earlier attempts died, i.e. ended with a lease that ran out, not a release."""
    worker_id: str
    token: str


# --- retries ------------------------------------------------------------------------------------


def is_transient(error: BaseException) -> bool:
    """Whether a storage error may pass by itself: a lock, a deadlock or a lost connection."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
    from sqlalchemy.exc import TimeoutError as PoolTimeoutError

    cause: BaseException | None = error
    if isinstance(error, StorageInternalError):
        cause = error.__cause__
    if isinstance(cause, PoolTimeoutError):
        return True
    if not isinstance(cause, DBAPIError):
        return False
    if type(cause.orig).__module__.startswith("sqlite3"):
        # Others, such as a full disk or a missing table, do not go away by waiting.
        return any(word in str(cause.orig) for word in ("locked", "busy"))
    return cause.connection_invalidated or isinstance(cause, OperationalError | InterfaceError)


def with_retries(fn: Callable[[], T], *, total_seconds: float = RETRY_SECONDS) -> T:
    """Call ``fn``, again on transient storage failures, with exponential back-off.

    ``fn`` must be safe to repeat: a connection can break after its commit.

    Raises:
        Exception: whatever ``fn`` raised that is not transient (:func:`is_transient`), or its
            last transient failure once ``total_seconds`` have passed.
    """
    deadline = time.monotonic() + total_seconds
    delay = 0.05
    while True:
        try:
            return fn()
        except Exception as error:
            left = deadline - time.monotonic()
            if left <= 0 or not is_transient(error):
                raise
        time.sleep(min(left, delay * random.uniform(0.5, 1.0)))
        delay = min(2 * delay, 5.0)


# --- processes ----------------------------------------------------------------------------------


def _host_id() -> str:
    """Name the set of processes whose process ids this process can look up."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        # Containers may share host name and kernel, yet not their process ids.
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        pass  # Not Linux.
    return "|".join(parts)


def _process_stat(pid: int) -> tuple[str, int] | None:
    """Return (state letter, start time in clock ticks since boot); None where not known."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _process_gone(pid: int, start: int | None) -> bool:
    """Whether that process of this host has certainly ended. In doubt: False."""
    if os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # It exists and belongs to another user.
    stat = _process_stat(pid)
    if stat is None:
        return False
    state, started = stat
    return state in "ZX" or (start is not None and started != start)


# --- the tables ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Running:
    study_id: int
    trial_id: int
    started: datetime | None
    lease_text: str | None


@dataclass(frozen=True)
class _Candidate:
    number: int
    position: int
    study_id: int
    trial_id: int | None
    """None: a trial that does not exist yet."""


def _parse(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _count(lease: Mapping[str, Any], key: str) -> int:
    value = lease.get(key, 0)
    return value if isinstance(value, int) else 0


def _utc_now() -> datetime:
    # Optuna keeps naive UTC in these columns. For display: nothing is decided by it.
    return datetime.now(UTC).replace(tzinfo=None)


class _TrialTable:
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
        self._values: Table = models.TrialValueModel.__table__
        self._intermediate: Table = models.TrialIntermediateValueModel.__table__
        self._finite = models.TrialValueModel.TrialValueType.FINITE

    def _reading(self) -> AbstractContextManager[Connection]:
        return self._engine.connect().execution_options(**{READ_ONLY_OPTION: True})

    def _below_budget(self, studies: Sequence[tuple[int, int]]) -> ColumnElement[bool]:
        from sqlalchemy import and_, or_

        columns = self._trials.c
        return or_(
            *[and_(columns.study_id == study, columns.number < budget) for study, budget in studies]
        )

    def running(self, study_ids: Sequence[int]) -> list[_Running]:
        """List the running trials with their lease as stored."""
        from optuna.trial import TrialState
        from sqlalchemy import and_, select

        trials, attrs = self._trials.c, self._attrs.c
        query = (
            select(trials.study_id, trials.trial_id, trials.datetime_start, attrs.value_json)
            .select_from(
                self._trials.outerjoin(
                    self._attrs, and_(attrs.trial_id == trials.trial_id, attrs.key == LEASE_ATTR)
                )
            )
            .where(trials.study_id.in_(study_ids), trials.state == TrialState.RUNNING)
        )
        with self._reading() as connection:
            return [_Running(*row) for row in connection.execute(query)]

    def candidates(self, studies: Sequence[tuple[int, int]]) -> list[_Candidate]:
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
                _Candidate(number, positions[study_id], study_id, trial_id)
                for number, study_id, trial_id in connection.execute(waiting)
            ]
            counts = {int(row[0]): int(row[1]) for row in connection.execute(totals)}
        found += [
            _Candidate(counts.get(study_id, 0), position, study_id, None)
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
        """WAITING → RUNNING. Return the lease as written, or None if another was faster."""
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
                return None
            is_lease = (attrs.c.trial_id == trial_id) & (attrs.c.key == LEASE_ATTR)
            text = connection.execute(select(attrs.c.value_json).where(is_lease)).scalar()
            before = _parse(text)
            lease = lease | {
                "attempt": _count(before, "attempt") + 1,
                "deaths": _count(before, "deaths"),
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
        """Create the trial with that number, already held. None if the number is taken."""
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
                return None
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
        return True

    def requeue(
        self, trial_id: int, old: str | None, *, died: bool, started: datetime | None = None
    ) -> bool:
        """RUNNING → WAITING if the lease still is ``old``, and for no lease, ``started`` too."""
        from optuna.trial import TrialState

        before = _parse(old)
        held = "token" in before and "finished" not in before
        released = {
            "released": True,
            "worker": before.get("worker"),
            # A running trial without a lease of ours was an attempt of another Optuna program.
            "attempt": _count(before, "attempt") + (0 if held else 1),
            "deaths": _count(before, "deaths") + int(died),
        }
        return self._leave_running(
            trial_id, old, released, state=TrialState.WAITING, started=started
        )

    def finish(self, trial_id: int, old: str, state: TrialState, value: float | None) -> bool:
        """RUNNING → ``state`` with ``value`` if the lease still is ``old``."""
        before = _parse(old)
        finished = {"finished": state.name, "value": value} | {
            key: before.get(key) for key in ("worker", "host", "token", "attempt", "deaths")
        }
        return self._leave_running(
            trial_id, old, finished, state=state, value=value, completed=_utc_now()
        )

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
            lease = _parse(row[1])
            if lease.get("token") != token:
                return False
            new = json.dumps(lease | {"beat": _count(lease, "beat") + 1})
            return self._swap(connection, trial_id, row[1], new)


# --- the queue ----------------------------------------------------------------------------------


class TrialQueue:
    """One worker process's access to the trials of one or more studies.

    Its methods retry a locked or unreachable database for :data:`RETRY_SECONDS` before they
    raise, may be called from several threads, and leave no trial claimed twice whenever the
    process is killed. Keep one queue for the life of the worker: it remembers since when it has
    seen other workers' leases unchanged.

    Args:
        storage: from :func:`storage.engine.open_storage`, not ``read_only``.
        worker_id: names this worker in leases; different for every process.
        lease_seconds: how long a lease must stay unchanged, on this process's clock, before its
            trial is taken over from a holder that cannot be seen to be gone. Renew several
            times as often.
        clock: monotonic seconds; replaced in tests.

    Raises:
        StorageError: the storage is not a database that claims can be made in.
        ValueError: ``lease_seconds`` is not positive.
    """

    def __init__(
        self,
        storage: BaseStorage,
        *,
        worker_id: str,
        lease_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not lease_seconds > 0:
            raise ValueError(f"lease_seconds must be positive, got {lease_seconds}")
        self.worker_id = worker_id
        self.lease_seconds = lease_seconds
        self._storage = storage
        self._clock = clock
        self._table = _TrialTable(sql_engine(storage))
        self._host = _host_id()
        self._lock = threading.Lock()
        self._held: dict[int, Claim] = {}
        # Trial id → (lease and start as seen, own clock when they were first seen so).
        self._observed: dict[int, tuple[object, float]] = {}

    def claim(self, studies: Sequence[tuple[int, int]]) -> Claim | None:
        """Claim the next trial of some studies, or return None if there is none just now.

        First puts back the trials whose lease has run out. Then takes the lowest trial number
        below its study's budget, of equal numbers that of the study listed first, so that the
        studies advance side by side; waiting trials (queued ones, interrupted ones) and those
        still to be created stand in the same order. Exactly ``budget`` trials ever come to be
        claimed in a study; to extend it, ask with a larger budget.

        Args:
            studies: pairs of (Optuna study id, budget in trials).

        Raises:
            StorageError: a study was deleted.
        """
        if not studies:
            return None
        claim = with_retries(lambda: self._claim(studies))
        if claim is None:
            return None
        with self._lock:
            self._held[claim.trial_id] = claim
        try:
            # Optuna's cache refuses parameters for a trial that it has never read.
            with_retries(lambda: self._storage.get_all_trials(claim.study_id, deepcopy=False))
        except BaseException:
            # Nobody will run it, and this process may live on for long: do not sit on it.
            self._forget(claim)
            with suppress(Exception):
                self._release(claim)
            raise
        return claim

    def _claim(self, studies: Sequence[tuple[int, int]]) -> Claim | None:
        self._requeue_run_out([study_id for study_id, _ in studies])
        while candidates := self._table.candidates(studies):
            for candidate in candidates:
                claim = self._take(candidate)
                if claim is not None:
                    return claim
                # Another worker was faster. After a lost creation its study's next number is
                # due, which may be lower than what stands next in this list.
                if candidate.trial_id is None:
                    break
        return None

    def _take(self, candidate: _Candidate) -> Claim | None:
        pid = os.getpid()
        stat = _process_stat(pid)
        lease: dict[str, Any] = {
            "worker": self.worker_id,
            "host": self._host,
            "pid": pid,
            "process_start": None if stat is None else stat[1],
            "token": secrets.token_hex(16),
            "beat": 0,
            "attempt": 1,
            "deaths": 0,
        }
        if candidate.trial_id is None:
            trial_id = self._table.create(candidate.study_id, candidate.number, lease)
            if trial_id is None:
                return None
        else:
            trial_id = candidate.trial_id
            written = self._table.take(trial_id, lease)
            if written is None:
                return None
            lease = written
        return Claim(
            study_id=candidate.study_id,
            trial_id=trial_id,
            number=candidate.number,
            attempt=lease["attempt"],
            deaths=lease["deaths"],
            worker_id=self.worker_id,
            token=lease["token"],
        )

    def forget_steps(self, claim: Claim, *, after: int) -> None:
        """Remove the values that were reported for steps beyond ``after``.

        For a trial that goes back to an earlier step, because the checkpoint of the later ones
        is lost or on another machine: they will be reported again.

        Raises:
            LeaseLostError: the trial is not this worker's any more.
        """
        if not self.owns(claim):
            raise LeaseLostError(f"trial {claim.number} is no longer held by {claim.worker_id}")
        with_retries(lambda: self._table.forget_steps(claim.trial_id, after))

    def requeue_abandoned(self, study_ids: Sequence[int]) -> None:
        """Put back the trials whose lease has run out, without claiming any.

        For a launcher that has ended its workers: nothing is left RUNNING behind them.
        """
        if study_ids:
            with_retries(lambda: self._requeue_run_out(study_ids))

    def _requeue_run_out(self, study_ids: Sequence[int]) -> None:
        # Before the query: a pause between the two must not age what was read.
        now = self._clock()
        running = self._table.running(study_ids)
        with self._lock:
            ours = {claim.token for claim in self._held.values()}
            seen = self._observed
            self._observed = {}
            run_out: list[_Running] = []
            for trial in running:
                lease = _parse(trial.lease_text)
                if lease.get("token") in ours:
                    continue
                mark = (trial.lease_text, trial.started)
                before = seen.get(trial.trial_id)
                since = before[1] if before is not None and before[0] == mark else now
                self._observed[trial.trial_id] = (mark, since)
                if now - since >= self.lease_seconds or self._holder_gone(lease):
                    run_out.append(trial)
        for trial in run_out:
            # False when another worker put it back first, or its holder lives after all.
            self._table.requeue(trial.trial_id, trial.lease_text, died=True, started=trial.started)

    def _holder_gone(self, lease: Mapping[str, Any]) -> bool:
        pid, start = lease.get("pid"), lease.get("process_start")
        return (
            lease.get("host") == self._host
            and isinstance(pid, int)
            and _process_gone(pid, start if isinstance(start, int) else None)
        )

    def pending(self, studies: Sequence[tuple[int, int]]) -> int:
        """Count the trials within the budgets that are neither finished nor held by this queue.

        While it is positive there is, or may again be, something to claim: others hold trials
        that they may lose. A worker is done when it is 0. Trials that were not created yet count.
        """
        if not studies:
            return 0
        budgets = dict(studies)
        with self._lock:
            mine = sum(
                claim.number < budgets.get(claim.study_id, 0) for claim in self._held.values()
            )
        return max(0, with_retries(lambda: self._table.unfinished(studies)) - mine)

    def renew(self, claim: Claim) -> None:
        """Raise the beat of the lease; call it from a thread several times per lease period.

        Raises:
            LeaseLostError: the trial was taken over, put back or finished by somebody else.
        """
        if not with_retries(lambda: self._table.beat(claim.trial_id, claim.token)):
            self._forget(claim)
            raise LeaseLostError(
                f"trial {claim.number} is no longer held by {claim.worker_id}: "
                "its lease ran out and another worker took it over, or it was finished by hand"
            )

    def owns(self, claim: Claim) -> bool:
        """Whether the trial is running and its lease is this claim's."""
        from optuna.trial import TrialState

        row = with_retries(lambda: self._table.read(claim.trial_id))
        return (
            row is not None
            and row[0] == TrialState.RUNNING
            and _parse(row[1]).get("token") == claim.token
        )

    def release(self, claim: Claim) -> bool:
        """Put the trial back into the queue, as it is; False if it is not held any more."""
        self._forget(claim)
        return with_retries(lambda: self._release(claim))

    def _release(self, claim: Claim) -> bool:
        text = self._own_lease(claim)
        while text is not None:
            if self._table.requeue(claim.trial_id, text, died=False):
                return True
            text = self._own_lease(claim)  # A renewal came between, or the lease is lost.
        return False

    def finish(self, claim: Claim, state: TrialState, value: float | None = None) -> bool:
        """Write the result of the trial, once.

        Returns False, and writes nothing, if the lease was lost or the trial is already
        finished. Repeating the very call that has succeeded returns True and changes nothing.
        The sampler's ``after_trial`` is not called.

        Args:
            claim: the trial.
            state: COMPLETE with a value, PRUNED with or without one, FAIL without.
            value: the objective; finite.

        Raises:
            ValueError: another state, a missing or superfluous value, or one that is not finite.
                Optuna would take an infinite value for the best of the study for ever.
        """
        from optuna.trial import TrialState

        if not state.is_finished():
            raise ValueError(f"a trial finishes as COMPLETE, PRUNED or FAIL, not as {state.name}")
        if state == TrialState.COMPLETE and value is None:
            raise ValueError("a COMPLETE trial needs a value; use PRUNED or FAIL without one")
        if state == TrialState.FAIL and value is not None:
            raise ValueError(f"a FAIL trial has no value, got {value}; use PRUNED to keep it")
        if value is not None:
            value = float(value)
            if not math.isfinite(value):
                raise ValueError(f"the value must be finite, got {value}; use PRUNED or FAIL")
        finished = with_retries(lambda: self._finish(claim, state, value))
        self._forget(claim)
        return finished

    def _finish(self, claim: Claim, state: TrialState, value: float | None) -> bool:
        while (text := self._own_lease(claim)) is not None:
            if self._table.finish(claim.trial_id, text, state, value):
                return True
        # Our own commit may have gone through although its answer was lost.
        row = self._table.read(claim.trial_id)
        lease = _parse(row[1]) if row is not None else {}
        result = (lease.get("token"), lease.get("finished"), lease.get("value"))
        return result == (claim.token, state.name, value)

    def _own_lease(self, claim: Claim) -> str | None:
        from optuna.trial import TrialState

        row = self._table.read(claim.trial_id)
        if row is None or row[0] != TrialState.RUNNING:
            return None
        return row[1] if _parse(row[1]).get("token") == claim.token else None

    def _forget(self, claim: Claim) -> None:
        with self._lock:
            held = self._held.get(claim.trial_id)
            if held is not None and held.token == claim.token:
                del self._held[claim.trial_id]


def enqueue(
    storage: BaseStorage,
    study_id: int,
    params: Mapping[str, Any],
    *,
    user_attrs: Mapping[str, Any] | None = None,
) -> int:
    """Queue a trial with given parameters and return its number.

    It is claimed in its turn by number, and not before the study's budget exceeds that number.
    """
    from optuna.trial import TrialState, create_trial

    template = create_trial(
        state=TrialState.WAITING,
        system_attrs={"fixed_params": dict(params)},
        user_attrs=dict(user_attrs or {}),
    )
    trial_id = storage.create_new_trial(study_id, template_trial=template)
    return storage.get_trial_number_from_id(trial_id)
