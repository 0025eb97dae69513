"""Hand the trials of a study to worker processes: exactly once, within the budget, with leases.

A trial of a sweep is one Optuna trial for life. It waits, a worker claims it (RUNNING) and
finishes it (COMPLETE, PRUNED or FAIL). An interrupted trial goes back to WAITING as the same
trial, with its number, parameters and reported values: never a clone, so the budget, Hyperband's
brackets and the learning curve are as if nothing had happened.

**Claims.** Every change of a trial's state is one SQL transaction that writes only if the state
and the lease are still the ones that were seen. SQLite runs such transactions one after another
(see :mod:`storage.sqlite`); PostgreSQL and MySQL re-check the condition under the row's lock.

**Leases.** A running trial carries the system attribute
:data:`storage.leases.LEASE_ATTR`: who holds it (worker,
host, process), a random token, and a beat counter that the holder raises every few seconds.
Nothing in it is a time. A lease has run out when its process is gone, which a worker on the same
host sees at once, or when one observer has seen the very same lease unchanged for
``lease_seconds`` on its *own* monotonic clock. No two clocks are ever compared, so clocks that
are wrong, skewed or set back cannot break a lease. A worker that was only frozen finds its token
gone and gets :class:`LeaseLostError`; whatever it does, it cannot write a result any more.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.engine import sql_engine
from storage.leases import host_id, parse_lease, process_gone, start_of
from storage.retries import outages, with_retries
from storage.statements import FIXED
from storage.trial_table import Candidate, RunningTrial, TrialTable

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import TrialState

    from storage.remote import RemoteTrialTable


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


class TrialQueue:
    """One worker process's access to the trials of one or more studies.

    Its methods retry a locked or unreachable store (:mod:`storage.retries`) before they raise,
    may be called from several threads, and leave no trial claimed twice whenever the process is
    killed. Keep one queue for the life of the worker: it remembers since when it has
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
        self._table = _open_table(storage)
        self._host = host_id()
        self._lock = threading.Lock()
        self._held: dict[int, Claim] = {}
        # Trial id → (lease and start as seen, own clock when they were first seen so).
        self._observed: dict[int, tuple[object, float]] = {}
        self._outages = outages()

    def claim(self, studies: Sequence[tuple[int, int]], *, lag: int = 0) -> Claim | None:
        """Claim the next trial of some studies, or return None if there is none just now.

        First puts back the trials whose lease has run out. Then takes the lowest trial number
        below its study's budget, of equal numbers that of the study listed first, so that the
        studies advance side by side; waiting trials (queued ones, interrupted ones) and those
        still to be created stand in the same order. Exactly ``budget`` trials ever come to be
        claimed in a study; to extend it, ask with a larger budget.

        Args:
            studies: pairs of (Optuna study id, budget in trials).
            lag: trials by which each study is to stay behind the one listed before it.

        Raises:
            StorageError: a study was deleted.
        """
        if not studies:
            return None
        token = secrets.token_hex(16)
        claim = with_retries(lambda: self._claim(studies, token, lag))
        if claim is None:
            return None
        with self._lock:
            self._held[claim.trial_id] = claim
        return claim

    def _claim(self, studies: Sequence[tuple[int, int]], token: str, lag: int) -> Claim | None:
        for trial in self._requeue_run_out([study_id for study_id, _ in studies]):
            lease = parse_lease(trial.lease_text)
            if lease.get("token") == token:
                # An earlier try had gone through, and only its answer was lost.
                return self._made(trial.study_id, trial.trial_id, trial.number, lease)
        while candidates := self._table.candidates(studies, lag):
            for candidate in candidates:
                claim = self._take(candidate, token)
                if claim is not None:
                    return claim
                # Another worker was faster. After a lost creation its study's next number is
                # due, which may be lower than what stands next in this list.
                if candidate.trial_id is None:
                    break
        return None

    def _take(self, candidate: Candidate, token: str) -> Claim | None:
        pid = os.getpid()
        lease: dict[str, Any] = {
            "worker": self.worker_id,
            "host": self._host,
            "pid": pid,
            "process_start": start_of(pid),
            "token": token,
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
        return self._made(candidate.study_id, trial_id, candidate.number, lease)

    def _made(self, study_id: int, trial_id: int, number: int, lease: Mapping[str, Any]) -> Claim:
        return Claim(
            study_id=study_id,
            trial_id=trial_id,
            number=number,
            attempt=lease["attempt"],
            deaths=lease["deaths"],
            worker_id=self.worker_id,
            token=lease["token"],
        )

    def set_params(
        self, claim: Claim, params: Mapping[str, tuple[float, BaseDistribution]]
    ) -> None:
        """Write parameters of the trial, all at once; those that it has keep their values.

        Nobody ever finds a trial with some of its parameters, whatever kills its worker: an
        attempt that began with the first worker's half of a suggestion would draw another half.

        Args:
            claim: the trial.
            params: by name, the value in Optuna's internal representation and its distribution.

        Raises:
            LeaseLostError: the trial is not this worker's any more.
        """
        from optuna.distributions import distribution_to_json

        rows = [
            (name, value, distribution_to_json(distribution))
            for name, (value, distribution) in params.items()
        ]
        if not with_retries(lambda: self._table.set_params(claim.trial_id, claim.token, rows)):
            raise _lost(claim)

    def fix_params(self, claim: Claim, params: Mapping[str, Any], *, mark: tuple[str, str]) -> bool:
        """Give a trial that has no parameters yet those of an enqueued one, and mark it.

        The mark says what they come from. However many workers would give one study's trials
        the same parameters at once, one does.

        Args:
            claim: the trial.
            params: values by name.
            mark: a user attribute, key and text, that no other trial of the study may have.

        Returns:
            False, with nothing written, if another trial has the mark, or these parameters as
            those that were fixed for it.

        Raises:
            LeaseLostError: the trial is not this worker's any more.
        """
        key, text = mark
        made = with_retries(
            lambda: self._table.fix_params(
                claim.study_id, claim.trial_id, claim.token, params, key, text
            )
        )
        if made is None:
            raise _lost(claim)
        return made

    def forget_steps(self, claim: Claim, *, after: int) -> None:
        """Remove the values that were reported for steps beyond ``after``.

        For a trial that goes back to an earlier step, because the checkpoint of the later ones
        is lost or on another machine: they will be reported again.

        Raises:
            LeaseLostError: the trial is not this worker's any more.
        """
        if not with_retries(lambda: self._table.forget_steps(claim.trial_id, claim.token, after)):
            raise _lost(claim)

    def requeue_abandoned(self, study_ids: Sequence[int]) -> None:
        """Put back the trials whose lease has run out, without claiming any.

        For a launcher that has ended its workers: nothing is left RUNNING behind them.
        """
        if study_ids:
            with_retries(lambda: self._requeue_run_out(study_ids))

    def _requeue_run_out(self, study_ids: Sequence[int]) -> list[RunningTrial]:
        """Put back the trials whose lease has run out; return all that ran."""
        # Before the query: a pause between the two must not age what was read.
        now = self._clock()
        running = self._table.running(study_ids)
        with self._lock:
            ours = {(claim.trial_id, claim.token) for claim in self._held.values()}
            seen = self._observed
            if self._outages != (met := outages()):
                # While the store was away nobody could renew a lease: it is observed anew.
                self._outages, seen = met, {}
            self._observed = {}
            run_out: list[RunningTrial] = []
            for trial in running:
                lease = parse_lease(trial.lease_text)
                if (trial.trial_id, lease.get("token")) in ours:
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
        return running

    def _holder_gone(self, lease: Mapping[str, Any]) -> bool:
        pid, start = lease.get("pid"), lease.get("process_start")
        return (
            lease.get("host") == self._host
            and isinstance(pid, int)
            and process_gone(pid, start if isinstance(start, int) else None)
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
            raise _lost(claim)

    def owns(self, claim: Claim, *, total_seconds: float | None = None) -> bool:
        """Whether the trial is running and its lease is this claim's.

        Args:
            claim: of the trial.
            total_seconds: how long to ask, as of :func:`storage.retries.with_retries`.
        """
        lease = with_retries(lambda: self._own_lease(claim), total_seconds=total_seconds)
        return lease is not None

    def release(self, claim: Claim) -> bool:
        """Put the trial back into the queue, as it is; False if it is not held any more.

        Repeating the call that has succeeded returns True, until somebody claims the trial.
        """
        self._forget(claim)
        return with_retries(lambda: self._release(claim))

    def _release(self, claim: Claim) -> bool:
        text = self._own_lease(claim)
        while text is not None:
            if self._table.requeue(claim.trial_id, text, died=False):
                return True
            text = self._own_lease(claim)  # A renewal came between, or the lease is lost.
        # Our own commit may have gone through although its answer was lost.
        row = self._table.read(claim.trial_id)
        return row is not None and parse_lease(row[1]).get("released_token") == claim.token

    def report(
        self, claim: Claim, step: int, value: float, *, system_attrs: Mapping[str, Any]
    ) -> bool:
        """Write the value of a step, as ``optuna.Trial.report`` does, and attributes beside it.

        Returns False, and writes nothing, if the trial is not this worker's any more. A step
        that is there already is overwritten.

        Args:
            claim: the trial.
            step: from 0.
            value: finite.
            system_attrs: JSON values by key.
        """
        if not math.isfinite(value):
            raise ValueError(f"the value of a step must be finite, got {value}")
        return with_retries(
            lambda: self._table.report(claim.trial_id, claim.token, step, value, system_attrs)
        )

    def finish(
        self,
        claim: Claim,
        state: TrialState,
        value: float | None = None,
        *,
        user_attrs: Mapping[str, Any] | None = None,
        system_attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Write the result of the trial, once, and attributes with it.

        Returns False, and writes nothing, if the lease was lost or the trial is already
        finished. Repeating the very call that has succeeded returns True and changes nothing.
        The sampler's ``after_trial`` is not called.

        Args:
            claim: the trial.
            state: COMPLETE with a value, PRUNED with or without one, FAIL without.
            value: the objective; finite.
            user_attrs, system_attrs: JSON values by key.

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
        attrs = (user_attrs or {}, system_attrs or {})
        finished = with_retries(
            lambda: self._table.finish(claim.trial_id, claim.token, state, value, *attrs)
        )
        self._forget(claim)
        return finished

    def _own_lease(self, claim: Claim) -> str | None:
        from optuna.trial import TrialState

        row = self._table.read(claim.trial_id)
        if row is None or row[0] != TrialState.RUNNING:
            return None
        return row[1] if parse_lease(row[1]).get("token") == claim.token else None

    def _forget(self, claim: Claim) -> None:
        with self._lock:
            held = self._held.get(claim.trial_id)
            if held is not None and held.token == claim.token:
                del self._held[claim.trial_id]


def _lost(claim: Claim) -> LeaseLostError:
    return LeaseLostError(
        f"trial {claim.number} is no longer held by {claim.worker_id}: its lease ran out and "
        "another worker took it over, or it was finished by hand"
    )


def _open_table(storage: BaseStorage) -> TrialTable | RemoteTrialTable:
    claims: RemoteTrialTable | None = getattr(storage, "claims", None)
    return TrialTable(sql_engine(storage)) if claims is None else claims


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
        system_attrs={FIXED: dict(params)},
        user_attrs=dict(user_attrs or {}),
    )
    trial_id = storage.create_new_trial(study_id, template_trial=template)
    return storage.get_trial_number_from_id(trial_id)
