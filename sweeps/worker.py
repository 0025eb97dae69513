"""The pull loop: claim a trial, train it, report every epoch, tell the result, ask for the next.

A worker needs the store's URL, the sweep's name and the data set; all else is in the store.
It may come and go at any time: the trial that it holds is under a lease that it renews, and
goes to another worker when it stops doing so.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import torch
from optuna.trial import TrialState

from data.errors import DataError
from storage.checkpoints import CheckpointError, CheckpointStore, trial_key
from storage.retries import StopRequestedError, is_transient, with_retries
from storage.trials import Claim, LeaseLostError, TrialQueue
from sweeps import carrying, search
from sweeps.assembly import Assembly, dataset_identity, open_dataset
from sweeps.attributes import (
    CURVES,
    DEVICE_ACCURACIES,
    FAILURES,
    LABEL,
    OUTCOME,
    PROGRESS,
    PROVENANCE,
    REASON,
    SECONDS,
    WORST_DEVICE_ACCURACY,
)
from sweeps.config import TrialConfig, Value
from sweeps.epochs import Pruned, Reporter
from sweeps.errors import SpecError, SweepError, kind_and_line
from sweeps.failures import Hopeless, failure_kind, out_of_memory
from sweeps.holding import Keeper
from sweeps.launch import NO_ROOM
from sweeps.limits import Session, spent, stops, stops_in
from sweeps.objective import Objective
from sweeps.provenance import provenance
from sweeps.status import TrialStatus
from sweeps.stopping import StopRequest
from sweeps.studies import StoredSweep, SweepStudy, check_fingerprint, stored_sweep
from sweeps.training.gpu_errors import breaks_device, gpu_is_full
from sweeps.training.loop import Diverged, Interrupted

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

logger = logging.getLogger(__name__)

MAX_FAILURES = 2
"""A trial that raised this often is told as failed; until then it goes back to the queue."""

MAX_DEATHS = 3
"""A trial whose workers died this often without completing one more epoch (killed for memory,
say) is told as failed."""

SAME_FAILURES = 3
"""Trials in a row that failed alike, after which a worker gives up: the sweep is at fault."""

ERROR = "error"


@dataclass(frozen=True)
class WorkerOptions:
    """How one worker runs.

    Attributes:
        worker_id: unique among all workers of the store.
        device: where it trains.
        lease_seconds: a trial whose worker gave no sign of life for this long is taken over.
        poll_seconds: how often an idle worker looks for work that came back to the queue.
        data_dir: where the data set is, None for its usual place.
        gpu_memory: bytes of the device that it may allocate, beside other workers; None sets no
            limit.
    """

    worker_id: str
    device: torch.device
    lease_seconds: float = 60.0
    poll_seconds: float = 1.0
    data_dir: Path | None = None
    gpu_memory: int | None = None


@dataclass
class _Attempt:
    """An attempt at a trial, as far as it has come."""

    sweep: StoredSweep
    study: SweepStudy
    claim: Claim
    started: float = field(default_factory=time.monotonic)
    precision: str = ""
    reporter: Reporter | None = None

    @property
    def key(self) -> str:
        """Of the trial's checkpoint."""
        return trial_key(self.study.name, self.claim.number)


@dataclass(frozen=True)
class _End:
    """What a trial is told with; ``of_devices`` is empty unless it is complete."""

    state: TrialState
    value: float | None
    attrs: dict[str, Any]
    of_devices: tuple[float | None, ...] = ()


class Worker:
    """Runs trials of one sweep until none is left, or until told to stop.

    Args:
        store: the studies.
        checkpoints: where unfinished trials keep their state.
        name: the sweep.
        options: how to run.
        stop: set it to end after the running update.
        on_end: hears of each trial that has ended here: its study's name and what became of it.

    Attributes:
        spent: which budget of time or epochs it has found spent, as of `sweeps.limits.spent`.
    """

    def __init__(
        self,
        store: BaseStorage,
        checkpoints: CheckpointStore,
        name: str,
        options: WorkerOptions,
        stop: StopRequest,
        on_end: Callable[[str, TrialStatus], None] | None = None,
    ) -> None:
        self._store = store
        self._checkpoints = checkpoints
        self._name = name
        self._options = options
        self._stop = stop
        self._on_end = on_end
        self.spent = ""
        self._queue = TrialQueue(
            store, worker_id=options.worker_id, lease_seconds=options.lease_seconds
        )
        self._objectives: dict[tuple[Value, ...], Objective] = {}
        self._failures: list[str] = []
        self._session: Session | None = None
        self._stops = 0

    def run(self) -> None:
        """Pull trials until a budget is met, `stop` is set, or the sweep is told to stop.

        A store that does not answer is waited for. If `stop` is set during the wait, the trial
        stays as it is, under a lease that nobody renews.

        Raises:
            SweepError: the sweep is not in the store, its data set is another one here, or
                trial after trial fails alike.
            DataError: the data set is missing or broken.
        """
        try:
            self._pull()
        except StopRequestedError as stopped:
            logger.warning("%s; a trial left running goes to another worker", stopped)

    def _pull(self) -> None:
        sweep = with_retries(lambda: stored_sweep(self._store, self._name))
        session = self._session = Session(self._store, sweep, self._options.worker_id)
        self._stops = stops_in(sweep.marks)
        with Keeper(self._queue, session, self._stop, self._look_for_request) as keeper:
            self._pull_trials(sweep, keeper)

    def _pull_trials(self, sweep: StoredSweep, keeper: Keeper) -> None:
        while not self._stop.is_set():
            read = functools.partial(stored_sweep, self._store, self._name, before=sweep)
            sweep = with_retries(read)
            if stops_in(sweep.marks) != self._stops:
                self._stop.set()
            if self._stop.is_set() or self._spent(sweep):
                return
            studies = [(study.study_id, study.budget) for study in sweep.studies]
            lag = carrying.HEAD_START if sweep.spec.budget.carry else 0
            claim = self._queue.claim(studies, lag=lag)
            if claim is None:
                if self._queue.pending(studies) == 0:
                    return
                # Others hold the rest; a trial of theirs may yet come back to the queue.
                time.sleep(self._options.poll_seconds)
                continue
            study = next(s for s in sweep.studies if s.study_id == claim.study_id)
            with keeper.leased(sweep, claim) as lost:
                self._run_claim(sweep, study, claim, keeper, lost)

    def _spent(self, sweep: StoredSweep) -> bool:
        """Whether the sweep's time or epochs are used up."""
        session = self._session
        assert session is not None
        self.spent = with_retries(lambda: spent(self._store, sweep, session))
        if not self.spent:
            return False
        # Whoever starts or looks next sees what is recorded, and is to come to the same answer.
        with_retries(lambda: session.record(at_once=True))
        return True

    def _look_for_request(self, sweep: StoredSweep) -> None:
        """Stop if the store says so (`sweep stop`)."""
        if with_retries(lambda: stops(self._store, sweep)) != self._stops:
            self._stop.set()

    def _run_claim(
        self,
        sweep: StoredSweep,
        study: SweepStudy,
        claim: Claim,
        keeper: Keeper,
        lost: threading.Event,
    ) -> None:
        attempt = _Attempt(sweep, study, claim)
        try:
            end = self._train(attempt, keeper, lost)
        except (Interrupted, LeaseLostError):
            self._queue.release(claim)
            return
        except StopRequestedError:
            raise
        except (SweepError, DataError, CheckpointError):
            # Not the trial's fault: no other would fare better here.
            self._queue.release(claim)
            raise
        except Exception as error:
            if is_transient(error):
                raise  # The store stayed away: neither the trial's fault nor to be told there.
            failed = self._end_of(error, attempt)
            if failed is None:
                return
            end = failed
        self._tell(attempt, end, lost)

    def _train(self, attempt: _Attempt, keeper: Keeper, lost: threading.Event) -> _End:
        """Train a trial to its end, or to where the pruner or divergence ends it."""
        sweep, study, claim = attempt.sweep, attempt.study, attempt.claim
        self._refuse_deadly(claim)
        if claim.attempt == 1 and self._queue.owns(claim):
            # One of an earlier store in the same place is not this trial's.
            self._checkpoints.delete(attempt.key)
        trial, config = self._begin(sweep, study, claim)
        objective = self._objective(study, config)
        attempt.precision = objective.precision(config)
        seeds, confirms = sweep.spec.budget.seeds, bool(sweep.spec.confirms)
        reporter = attempt.reporter = self._reporter(attempt, trial, objective, config)
        try:
            value = objective.run(
                config,
                seeds=seeds,
                test=confirms,
                on_epoch=reporter,
                should_stop=lambda: self._stop.is_set() or lost.is_set(),
                checkpoints=self._checkpoints,
                key=attempt.key,
                may_replace=lambda: keeper.may_hold(claim, lost),
            )
        except Pruned:
            return _End(TrialState.PRUNED, reporter.last_score, {OUTCOME: "pruned"})
        except Diverged as divergence:
            # Optuna's samplers learn from a pruned trial; one told as FAIL, or as NaN, they
            # forget, and then suggest the like of it again.
            value_then = objective.chance if confirms else reporter.last_score
            attrs = {OUTCOME: "diverged", REASON: str(divergence)}
            return _End(TrialState.PRUNED, value_then, attrs)
        correct = [*reporter.class_correct.values()]
        of_devices = tuple(
            None if accuracy is None else round(accuracy, 6)
            for accuracy in objective.device_accuracies(config, correct)
        )
        return _End(TrialState.COMPLETE, value, {OUTCOME: "complete"}, of_devices)

    def _end_of(self, error: Exception, attempt: _Attempt) -> _End | None:
        """What a trial that raised is told with; None if it goes on elsewhere, or later.

        Raises:
            SweepError: the device failed.
        """
        claim, name = attempt.claim, attempt.study.name
        if not self._queue.owns(claim):
            # As a worker frozen past its lease sees it, whose trial has been finished.
            logger.warning("%s #%d went to another worker", name, claim.number)
            return None
        full = out_of_memory(error)
        if (full or gpu_is_full(error)) and self._options.gpu_memory is not None:
            # Told only where the GPU is the trial's alone; the launcher makes room.
            logger.warning("%s #%d: %s", name, claim.number, kind_and_line(error))
            self._queue.release(claim)
            self._stop.set(NO_ROOM)
            return None
        if breaks_device(error):
            self._queue.release(claim)
            raise SweepError(f"the device failed: {kind_and_line(error)}") from error
        if not full and self._retry_after(error, claim):
            return None
        reason = f"out of memory: {kind_and_line(error)}" if full else kind_and_line(error)
        attrs = {OUTCOME: "failed", REASON: reason, ERROR: traceback.format_exc()}
        if full and not attempt.sweep.spec.confirms:
            # So that the sampler keeps away from the like of it. A confirmation has none to tell,
            # and runs again what failed.
            score = attempt.reporter.last_score if attempt.reporter else None
            return _End(TrialState.PRUNED, score, attrs)
        return _End(TrialState.FAIL, None, attrs)

    def _tell(self, attempt: _Attempt, end: _End, lost: threading.Event) -> None:
        """Finish a trial, unless it has gone to another worker."""
        study, claim = attempt.study, attempt.claim
        attrs = end.attrs | {SECONDS: round(time.monotonic() - attempt.started, 3)}
        where = provenance(self._options.device) | {"data_fingerprint": study.fingerprint}
        if attempt.precision:
            where["precision"] = attempt.precision
        of_system: dict[str, Any] = {PROVENANCE: where}
        if end.of_devices:
            of_system[DEVICE_ACCURACIES] = list(end.of_devices)
            known = [accuracy for accuracy in end.of_devices if accuracy is not None]
            if known:
                attrs[WORST_DEVICE_ACCURACY] = min(known)
        if lost.is_set() or not self._queue.finish(
            claim, end.state, end.value, user_attrs=attrs, system_attrs=of_system
        ):
            logger.warning(
                "%s #%d went to another worker; result dropped", study.name, claim.number
            )
            return
        self._tidy_checkpoints(attempt, end.state)
        if self._on_end is not None:
            trial_now = with_retries(lambda: self._store.get_trial(claim.trial_id))
            self._on_end(study.name, _ended(trial_now, end.value, attrs))
        self._note_failure(attrs if attrs[OUTCOME] == "failed" else None)

    def _tidy_checkpoints(self, attempt: _Attempt, state: TrialState) -> None:
        """Keep of a finished trial's checkpoint, and of those before it, what the rule says."""
        study, number = attempt.study, attempt.claim.number
        keep = attempt.sweep.spec.budget.keep_checkpoints
        if state != TrialState.COMPLETE or keep == "none":
            self._checkpoints.delete(attempt.key)
        elif keep == "best":
            complete = with_retries(
                lambda: self._store.get_all_trials(
                    study.study_id, deepcopy=False, states=(TrialState.COMPLETE,)
                )
            )
            records = _records(complete)
            for beaten in {number, *records} - {records[-1]}:
                self._checkpoints.delete(trial_key(study.name, beaten))

    def _refuse_deadly(self, claim: Claim) -> None:
        """Give up on a trial that takes its workers down without getting anywhere."""
        if not claim.deaths:
            return
        trial = with_retries(lambda: self._store.get_trial(claim.trial_id))
        step = trial.last_step or 0
        seen = trial.system_attrs.get(PROGRESS, {"step": 0, "deaths": 0})
        if step > seen["step"]:
            seen = {"step": step, "deaths": claim.deaths}
            with_retries(lambda: self._store.set_trial_system_attr(claim.trial_id, PROGRESS, seen))
        deaths = claim.deaths - seen["deaths"]
        if deaths >= MAX_DEATHS:
            raise Hopeless(f"{deaths} workers died before it completed another epoch")

    def _begin(
        self, sweep: StoredSweep, study: SweepStudy, claim: Claim
    ) -> tuple[optuna.Trial, TrialConfig]:
        """Suggest the trial's parameters."""
        # A trial and its sampler anew for each try: the random state of a sampler that failed
        # half-way has moved on, and the store may have what it drew.
        trial, params = with_retries(lambda: self._suggested(sweep, study, claim))
        try:
            config = sweep.spec.config(study.cell, params)
        except SpecError as error:
            raise Hopeless(str(error)) from error
        return trial, config

    def _suggested(
        self, sweep: StoredSweep, study: SweepStudy, claim: Claim
    ) -> tuple[optuna.Trial, dict[str, Value]]:
        self._carry(sweep, study, claim)
        trial = self._trial(sweep, study, claim)
        params, new = search.draw(trial, sweep.spec.search)
        self._queue.set_params(claim, new)
        return trial, params

    def _carry(self, sweep: StoredSweep, study: SweepStudy, claim: Claim) -> None:
        """Fix the trial's configuration to one of another study, if it is due and there is any."""
        here = sweep.studies.index(study)
        if not carrying.is_due(sweep.spec, here, claim.number):
            return
        if not carrying.is_undecided(self._store.get_trial(claim.trial_id)):
            return
        upto = sweep.studies[: here + 1]
        trials = [self._store.get_all_trials(s.study_id, deepcopy=False) for s in upto]
        for found in carrying.candidates(sweep.spec, trials):
            mark = (carrying.CARRIED, found.source)
            if self._queue.fix_params(claim, found.params, mark=mark):
                return

    def _trial(self, sweep: StoredSweep, study: SweepStudy, claim: Claim) -> optuna.Trial:
        optuna_study = with_retries(
            lambda: optuna.load_study(
                storage=self._store,
                study_name=study.name,
                sampler=search.build_sampler(sweep.spec, study.name, claim.number),
                pruner=search.build_pruner(sweep.spec, study.cell),
            )
        )
        return with_retries(lambda: optuna.Trial(optuna_study, claim.trial_id))

    def _reporter(
        self, attempt: _Attempt, trial: optuna.Trial, objective: Objective, config: TrialConfig
    ) -> Reporter:
        """What hears of the epochs; steps that no checkpoint here covers are forgotten first.

        They were reported by a worker that was killed before it had written the last one's, or
        whose checkpoints are elsewhere or lost, and will be trained again.
        """
        sweep, claim = attempt.sweep, attempt.claim
        reported = trial._cached_frozen_trial.last_step
        if reported is not None:
            covered = objective.completed_steps(config, self._checkpoints, attempt.key)
            if reported > covered:
                self._queue.forget_steps(claim, after=covered)
                trial = with_retries(lambda: optuna.Trial(trial.study, claim.trial_id))
        # The known configurations are what the others are compared with: they run to their end.
        return Reporter(
            trial,
            write=lambda step, score, curves: self._queue.report(
                claim, step, score, system_attrs={CURVES: curves}
            ),
            spent=lambda: self._spent(sweep),
            prune=LABEL not in trial.user_attrs,
            last_step=config.epochs * sweep.spec.budget.seeds,
        )

    def _objective(self, study: SweepStudy, config: TrialConfig) -> Objective:
        identity = dataset_identity(config)
        if identity not in self._objectives:
            dataset = open_dataset(config, self._options.data_dir)
            check_fingerprint(study.name, study.fingerprint, dataset.fingerprint)
            self._objectives[identity] = Objective(Assembly(dataset, self._options.device))
        return self._objectives[identity]

    def _retry_after(self, error: Exception, claim: Claim) -> bool:
        """Put a trial that raised back into the queue, unless it has done so before."""
        logger.error("trial #%d raised %s", claim.number, kind_and_line(error))
        trial = with_retries(lambda: self._store.get_trial(claim.trial_id))
        failures = trial.system_attrs.get(FAILURES, 0) + 1
        if failures >= MAX_FAILURES or isinstance(error, Hopeless):
            return False
        with_retries(lambda: self._store.set_trial_system_attr(claim.trial_id, FAILURES, failures))
        self._queue.release(claim)
        return True

    def _note_failure(self, attrs: dict[str, Any] | None) -> None:
        if attrs is None:
            self._failures.clear()
            return
        self._failures.append(failure_kind(attrs[REASON]))
        recent = self._failures[-SAME_FAILURES:]
        if len(recent) == SAME_FAILURES and len(set(recent)) == 1:
            raise SweepError(
                f"{SAME_FAILURES} trials in a row failed alike: {attrs[REASON]}; the traceback is "
                f"kept with each of them as the attribute {ERROR!r}"
            )


def _ended(trial: FrozenTrial, value: float | None, attrs: dict[str, Any]) -> TrialStatus:
    """A trial that this worker has told, with what it was told with."""
    return TrialStatus(
        number=trial.number,
        outcome=attrs[OUTCOME],
        label=trial.user_attrs.get(LABEL, ""),
        params=trial.params,
        accuracy=value,
        step=trial.last_step or 0,
        reason=attrs.get(REASON, ""),
        seconds=attrs[SECONDS],
        images_per_second=None,
        worker="",
        carried_from=trial.user_attrs.get(carrying.CARRIED, ""),
    )


def _records(complete: list[FrozenTrial]) -> list[int]:
    """Numbers of the trials that were the best of their study for a time; the last one still is.

    Only they can have left a checkpoint behind. Of equals, the lowest number is the best.
    """
    records: list[FrozenTrial] = []
    for trial in sorted(complete, key=lambda t: (t.datetime_complete or datetime.min, t.number)):
        if not records or (trial.value, -trial.number) > (records[-1].value, -records[-1].number):
            records.append(trial)
    return [trial.number for trial in records]
