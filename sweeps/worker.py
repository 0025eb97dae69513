"""The pull loop: claim a trial, train it, report every epoch, tell the result, ask for the next.

A worker needs the store's URL, the sweep's name and the data set; all else is in the store.
It may come and go at any time: the trial that it holds is under a lease that it renews, and
goes to another worker when it stops doing so.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import torch
from optuna.trial import TrialState

from data.errors import DataError
from storage.checkpoints import CheckpointError, CheckpointStore
from storage.retries import StopRequestedError, is_transient, with_retries
from storage.trials import Claim, LeaseLostError, TrialQueue
from sweeps import carrying, search
from sweeps.assembly import Assembly, dataset_identity, open_dataset
from sweeps.attributes import (
    CURVES,
    FAILURES,
    LABEL,
    OUTCOME,
    PROGRESS,
    PROVENANCE,
    REASON,
    SECONDS,
)
from sweeps.config import TrialConfig, Value
from sweeps.errors import SpecError, SweepError, kind_and_line
from sweeps.launch import NO_ROOM
from sweeps.limits import Session, spent, stops, stops_in
from sweeps.objective import Objective, Progress
from sweeps.studies import StoredSweep, SweepStudy, check_fingerprint, stored_sweep
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

STOP_GRACE_SECONDS = 7.0
"""A worker that was told to stop and is still in the same update after this long ends at once."""

SIGN_SECONDS = 2.0
"""How often a worker in a trial looks whether it was told to stop."""

SAME_FAILURES = 3
"""Trials in a row that failed alike, after which a worker gives up: the sweep is at fault."""

ERROR = "error"


class _Pruned(Exception):
    """The pruner said so."""


class _Hopeless(Exception):
    """Another attempt at the trial would end the same way."""


class StopRequest:
    """Asked for from a signal handler, seen from the loop.

    An event of `threading` would not do: its lock may be held by the very wait that the handler
    interrupts.
    """

    def __init__(self) -> None:
        self._asked = False
        self.exit_code = 0
        """What the process is to exit with once it has stopped."""

    def set(self, exit_code: int = 0) -> None:
        """Ask to stop."""
        self.exit_code = exit_code
        self._asked = True

    def is_set(self) -> bool:
        """Whether it was asked for."""
        return self._asked


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


class Worker:
    """Runs trials of one sweep until none is left, or until told to stop.

    Args:
        store: the studies.
        checkpoints: where unfinished trials keep their state.
        name: the sweep.
        options: how to run.
        stop: set it to end after the running update.
    """

    def __init__(
        self,
        store: BaseStorage,
        checkpoints: CheckpointStore,
        name: str,
        options: WorkerOptions,
        stop: StopRequest,
    ) -> None:
        self._store = store
        self._checkpoints = checkpoints
        self._name = name
        self._options = options
        self._stop = stop
        self._queue = TrialQueue(
            store, worker_id=options.worker_id, lease_seconds=options.lease_seconds
        )
        self._objectives: dict[tuple[Value, ...], Objective] = {}
        self._failures: list[str] = []
        self._session: Session | None = None
        self._hold: _Hold | None = None
        self._keeping = threading.Lock()
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
        self._session = Session(self._store, sweep, self._options.worker_id)
        self._stops = stops_in(sweep.marks)
        ended = threading.Event()
        # One for all trials: to begin one for each takes longer than a claim when cores are busy.
        keeper = threading.Thread(target=self._keep, args=(ended,), name="lease", daemon=True)
        keeper.start()
        try:
            self._pull_trials(sweep)
        finally:
            ended.set()
            keeper.join()

    def _pull_trials(self, sweep: StoredSweep) -> None:
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
            with self._leased(sweep, claim) as lost:
                self._run_claim(sweep, study, claim, lost)

    def _spent(self, sweep: StoredSweep) -> bool:
        """Whether the sweep's time or epochs are used up."""
        session = self._session
        assert session is not None
        if not with_retries(lambda: spent(self._store, sweep, session)):
            return False
        # Whoever starts or looks next sees what is recorded, and is to come to the same answer.
        with_retries(lambda: session.record(at_once=True))
        return True

    def _look_for_request(self, sweep: StoredSweep) -> None:
        """Stop if the store says so (`sweep stop`)."""
        if with_retries(lambda: stops(self._store, sweep)) != self._stops:
            self._stop.set()

    @contextlib.contextmanager
    def _leased(self, sweep: StoredSweep, claim: Claim) -> Iterator[threading.Event]:
        """Have the claim's lease renewed within the block; the event says that it was lost."""
        assert self._session is not None
        session = self._session
        with_retries(session.record)
        hold = self._hold = _Hold(sweep, claim)
        try:
            yield hold.lost
        finally:
            hold.done.set()
            with self._keeping:  # what is under way for it ends first
                self._hold = None
        # Not after an error: a store that stayed away would be waited for once more.
        with contextlib.suppress(StopRequestedError):
            with_retries(session.record)

    def _may_hold(self, claim: Claim, lost: threading.Event) -> bool:
        """Whether the claim's trial is this worker's still, as far as can be known.

        A worker that was frozen wakes up with a checkpoint half-written or an epoch half-trained,
        and another may have gone on from where it was. Its lease is too old then by its own clock.
        """
        hold = self._hold
        if lost.is_set() or hold is None:
            return False
        if time.monotonic() - hold.beat < self._options.lease_seconds:
            return True
        try:
            return self._queue.owns(claim, total_seconds=0)
        except Exception:  # nobody takes a trial over through a store that does not answer
            return True

    def _keep(self, ended: threading.Event) -> None:
        """Look after the held trial, from a thread of its own, until `ended`."""
        between_beats = self._options.lease_seconds / 4
        between_signs = min(SIGN_SECONDS, between_beats)
        while not ended.wait(between_signs):
            with self._keeping:
                hold = self._hold
                if hold is None:
                    continue
                try:
                    # A lease is renewed now if it would otherwise be too late the next time.
                    self._sign(hold, beat_after=between_beats - between_signs)
                except Exception as error:
                    if not isinstance(error, LeaseLostError | StopRequestedError):
                        logger.error("cannot renew the lease: %s", kind_and_line(error))
                    hold.lost.set()

    def _sign(self, hold: _Hold, *, beat_after: float) -> None:
        """Renew the lease, write down that the worker is at work, hear of requests to stop.

        Ends the process when a request is not met in time.
        """
        assert self._session is not None
        if self._stop.is_set():
            self._end_in_time(hold.claim, hold.done)
        if hold.lost.is_set() or hold.done.is_set():
            return
        self._look_for_request(hold.sweep)
        if time.monotonic() >= hold.beat + beat_after:
            hold.beat = time.monotonic()
            self._queue.renew(hold.claim)
            with_retries(self._session.record)

    def _end_in_time(self, claim: Claim, done: threading.Event) -> None:
        """Wait for the running update; end the process if it takes too long.

        An epoch whose checkpoint is not on the disk by then is trained again, as after a kill.
        """
        if done.wait(STOP_GRACE_SECONDS):
            return

        def put_back() -> None:
            with contextlib.suppress(Exception):  # it goes to another worker in any case
                self._queue.release(claim)

        release = threading.Thread(target=put_back, daemon=True)
        release.start()
        release.join(timeout=1.0)  # a store that does not answer must not hold the process
        os._exit(self._stop.exit_code)

    def _run_claim(
        self, sweep: StoredSweep, study: SweepStudy, claim: Claim, lost: threading.Event
    ) -> None:
        started = time.monotonic()
        key = f"{study.name}/{claim.number}"
        state, value = TrialState.PRUNED, None
        attrs: dict[str, Any] = {}
        reporter: _Reporter | None = None
        confirms = bool(sweep.spec.confirms)
        try:
            self._refuse_deadly(claim)
            if claim.attempt == 1 and self._queue.owns(claim):
                # One of an earlier store in the same place is not this trial's.
                self._checkpoints.delete(key)
            trial, config = self._begin(sweep, study, claim)
            objective = self._objective(study, config)
            last_step = config.epochs * sweep.spec.budget.seeds
            reporter = self._reporter(sweep, claim, trial, objective, config, key, last_step)
            value = objective.run(
                config,
                seeds=sweep.spec.budget.seeds,
                test=confirms,
                on_epoch=reporter,
                should_stop=lambda: self._stop.is_set() or lost.is_set(),
                checkpoints=self._checkpoints,
                key=key,
                may_replace=lambda: self._may_hold(claim, lost),
            )
            state, attrs = TrialState.COMPLETE, {OUTCOME: "complete"}
        except _Pruned:
            attrs = {OUTCOME: "pruned"}
        except Diverged as divergence:
            # Optuna's samplers learn from a pruned trial; one told as FAIL, or as NaN, they
            # forget, and then suggest the like of it again.
            attrs = {OUTCOME: "diverged", REASON: str(divergence)}
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
            if not self._queue.owns(claim):
                # As a worker frozen past its lease sees it, whose trial has been finished.
                logger.warning("%s #%d went to another worker", study.name, claim.number)
                return
            full = _out_of_memory(error) or _gpu_is_full(error)
            if full and self._options.gpu_memory is not None:
                # Told only where the GPU is the trial's alone; the launcher makes room.
                logger.warning("%s #%d: %s", study.name, claim.number, kind_and_line(error))
                self._queue.release(claim)
                self._stop.set(NO_ROOM)
                return
            if _breaks_device(error):
                self._queue.release(claim)
                raise SweepError(f"the device failed: {kind_and_line(error)}") from error
            attrs = {OUTCOME: "failed", REASON: kind_and_line(error), ERROR: traceback.format_exc()}
            if _out_of_memory(error):
                # Told as pruned, so that the sampler keeps away from the like of it.
                attrs[REASON] = f"out of memory: {kind_and_line(error)}"
            elif self._retry_after(error, claim):
                return
            else:
                state = TrialState.FAIL
        if state == TrialState.PRUNED and reporter is not None:
            value = objective.chance if confirms else reporter.last_score
        attrs[SECONDS] = round(time.monotonic() - started, 3)
        provenance = {**_provenance(self._options.device), "data_fingerprint": study.fingerprint}
        if lost.is_set() or not self._queue.finish(
            claim, state, value, user_attrs=attrs, system_attrs={PROVENANCE: provenance}
        ):
            logger.warning(
                "%s #%d went to another worker; result dropped", study.name, claim.number
            )
            return
        self._tidy_checkpoints(sweep, study, claim, state)
        self._note_failure(attrs if attrs[OUTCOME] == "failed" else None)

    def _tidy_checkpoints(
        self, sweep: StoredSweep, study: SweepStudy, claim: Claim, state: TrialState
    ) -> None:
        """Keep of a finished trial's checkpoint, and of those before it, what the rule says."""
        keep = sweep.spec.budget.keep_checkpoints
        if state != TrialState.COMPLETE or keep == "none":
            self._checkpoints.delete(f"{study.name}/{claim.number}")
        elif keep == "best":
            complete = with_retries(
                lambda: self._store.get_all_trials(
                    study.study_id, deepcopy=False, states=(TrialState.COMPLETE,)
                )
            )
            records = _records(complete)
            for number in {claim.number, *records} - {records[-1]}:
                self._checkpoints.delete(f"{study.name}/{number}")

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
            raise _Hopeless(f"{deaths} workers died before it completed another epoch")

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
            raise _Hopeless(str(error)) from error
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
        self,
        sweep: StoredSweep,
        claim: Claim,
        trial: optuna.Trial,
        objective: Objective,
        config: TrialConfig,
        key: str,
        last_step: int,
    ) -> _Reporter:
        """What hears of the epochs; steps that no checkpoint here covers are forgotten first.

        They were reported by a worker that was killed before it had written the last one's, or
        whose checkpoints are elsewhere or lost, and will be trained again.
        """
        reported = trial._cached_frozen_trial.last_step
        if reported is not None:
            covered = objective.completed_steps(config, self._checkpoints, key)
            if reported > covered:
                self._queue.forget_steps(claim, after=covered)
                trial = with_retries(lambda: optuna.Trial(trial.study, claim.trial_id))
        # The known configurations are what the others are compared with: they run to their end.
        return _Reporter(
            trial,
            write=lambda step, score, curves: self._queue.report(
                claim, step, score, system_attrs={CURVES: curves}
            ),
            spent=lambda: self._spent(sweep),
            prune=LABEL not in trial.user_attrs,
            last_step=last_step,
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
        if failures >= MAX_FAILURES or isinstance(error, _Hopeless):
            return False
        with_retries(lambda: self._store.set_trial_system_attr(claim.trial_id, FAILURES, failures))
        self._queue.release(claim)
        return True

    def _note_failure(self, attrs: dict[str, Any] | None) -> None:
        if attrs is None:
            self._failures.clear()
            return
        self._failures.append(_failure_kind(attrs[REASON]))
        recent = self._failures[-SAME_FAILURES:]
        if len(recent) == SAME_FAILURES and len(set(recent)) == 1:
            raise SweepError(
                f"{SAME_FAILURES} trials in a row failed alike: {attrs[REASON]}; the traceback is "
                f"kept with each of them as the attribute {ERROR!r}"
            )


class _Hold:
    """The trial that a worker holds.

    Attributes:
        sweep: as it was when the trial was claimed.
        claim: of the trial.
        lost: set when it is not this worker's any more.
        done: set when the worker has done with it.
        beat: when the lease was renewed, on the monotonic clock.
    """

    def __init__(self, sweep: StoredSweep, claim: Claim) -> None:
        self.sweep = sweep
        self.claim = claim
        self.lost = threading.Event()
        self.done = threading.Event()
        self.beat = time.monotonic()


class _Reporter:
    """Reports each epoch to Optuna, keeps the curves, asks the pruner.

    Args:
        trial: the trial, with what earlier attempts reported and this one goes on from.
        write: stores a step, its score and the curves; False if the trial is another worker's.
        spent: whether the sweep's time or epochs are used up; the trial then waits.
        prune: whether to ask the pruner.
        last_step: a trial that has come so far is complete, whatever the pruner would say.
    """

    def __init__(
        self,
        trial: optuna.Trial,
        *,
        write: Callable[[int, float, dict[str, list[float]]], bool],
        spent: Callable[[], bool],
        prune: bool,
        last_step: int,
    ) -> None:
        self._trial = trial
        self._write = write
        self._spent = spent
        self._prune = prune
        self._last_step = last_step
        self._reported = trial._cached_frozen_trial.last_step or 0
        self._curves: dict[str, list[float]] = {}
        self.last_score: float | None = None

    def __call__(self, progress: Progress) -> None:
        result = progress.result
        for name, point in {
            "train_loss": result.train_loss,
            "val_loss": result.val_loss,
            "val_accuracy": result.val_accuracy,
            "lr": result.lr,
            "seconds": result.seconds,
            "images_per_second": result.images_per_second,
        }.items():
            self._curves.setdefault(name, []).append(float(f"{point:.6g}"))
        self.last_score = progress.score
        if progress.step < self._reported:
            return
        if progress.step > self._reported:
            if not self._write(progress.step, progress.score, self._curves):
                raise Interrupted
            # As `Trial.report` does: it is what the pruner sees.
            self._trial._cached_frozen_trial.intermediate_values[progress.step] = progress.score
        # Asked again for the last step of an attempt that ended: it may have ended in between.
        if progress.step == self._last_step:
            return
        if self._prune and with_retries(self._trial.should_prune):
            raise _Pruned
        if self._spent():
            raise Interrupted


def new_worker_id(suffix: str) -> str:
    """A name for a worker that no other has: host, process, and what tells it apart there."""
    return f"{socket.gethostname()}-{os.getpid()}-{suffix}"


@functools.cache
def _provenance(device: torch.device) -> dict[str, Any]:
    """What a result depends on beside its config."""
    packages = {
        name: metadata.version(name) for name in ("sweep", "optuna", "torch", "torchvision")
    }
    return {
        **packages,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


@functools.cache
def _git_commit() -> str | None:
    """The commit of this package's own checkout; None where it is installed as a package."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def _records(complete: list[FrozenTrial]) -> list[int]:
    """Numbers of the trials that were the best of their study for a time; the last one still is.

    Only they can have left a checkpoint behind. Of equals, the lowest number is the best.
    """
    records: list[FrozenTrial] = []
    for trial in sorted(complete, key=lambda t: (t.datetime_complete or datetime.min, t.number)):
        if not records or (trial.value, -trial.number) > (records[-1].value, -records[-1].number):
            records.append(trial)
    return [trial.number for trial in records]


def _breaks_device(error: Exception) -> bool:
    """Whether the process can use its GPU no more, as after an illegal access."""
    text = str(error)
    return "CUDA error" in text and not isinstance(error, torch.cuda.OutOfMemoryError)


def _gpu_is_full(error: Exception) -> bool:
    """Whether CUDA or one of its libraries found no memory beside what PyTorch holds for tensors.

    Its own errors carry that in their text alone. On a GPU that others share, fewer workers help;
    elsewhere the device counts as broken, as nobody knows who holds the rest.
    """
    text = str(error)
    return "CUBLAS_STATUS_ALLOC_FAILED" in text or "CUDA error: out of memory" in text


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _failure_kind(reason: str) -> str:
    """What failures alike have in common: out of memory differs in its numbers each time."""
    return reason.partition(":")[0] if reason.startswith("out of memory") else reason
