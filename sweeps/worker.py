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
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import torch
from optuna.trial import TrialState

from data.sources import DataError
from storage.checkpoints import CheckpointError, CheckpointStore
from storage.trials import Claim, LeaseLostError, TrialQueue, with_retries
from sweeps import search
from sweeps.config import TrialConfig, Value
from sweeps.errors import SweepError
from sweeps.objective import Objective, Progress, dataset_identity, open_dataset
from sweeps.status import CURVES, OUTCOME, PROVENANCE, REASON, SECONDS
from sweeps.studies import StoredSweep, SweepStudy, check_fingerprint, stored_sweep
from sweeps.training.loop import Diverged, Interrupted

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

logger = logging.getLogger(__name__)

MAX_FAILURES = 2
"""A trial that raised this often is told as failed; until then it goes back to the queue."""

MAX_DEATHS = 3
"""A trial whose workers died this often (killed for memory, say) is told as failed."""

SAME_FAILURES = 3
"""Trials in a row that failed alike, after which a worker gives up: the sweep is at fault."""

ERROR = "error"
FAILURES = "sweep:failures"


class _Pruned(Exception):
    """The pruner said so."""


class _WorkersDied(Exception):
    """The trial takes its worker down with it."""


@dataclass(frozen=True)
class WorkerOptions:
    """How one worker runs.

    Attributes:
        worker_id: unique among all workers of the store.
        device: where it trains.
        lease_seconds: a trial whose worker gave no sign of life for this long is taken over.
        poll_seconds: how often an idle worker looks for work that came back to the queue.
        data_dir: where the data set is, None for its usual place.
    """

    worker_id: str
    device: torch.device
    lease_seconds: float = 60.0
    poll_seconds: float = 1.0
    data_dir: Path | None = None


class Worker:
    """Runs trials of one sweep until none is left, or until told to stop.

    Args:
        store: the studies.
        checkpoints: where unfinished trials keep their state.
        name: the sweep.
        options: how to run.
        stop: set it, from a signal handler, to end after the running update.
    """

    def __init__(
        self,
        store: BaseStorage,
        checkpoints: CheckpointStore,
        name: str,
        options: WorkerOptions,
        stop: threading.Event,
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

    def run(self) -> None:
        """Pull trials until the budget is met or `stop` is set.

        Raises:
            SweepError: the sweep is not in the store, its data set is another one here, or
                trial after trial fails alike.
            DataError: the data set is missing or broken.
        """
        while not self._stop.is_set():
            sweep = with_retries(lambda: stored_sweep(self._store, self._name))
            studies = [(study.study_id, study.budget) for study in sweep.studies]
            claim = self._queue.claim(studies)
            if claim is None:
                if self._queue.pending(studies) == 0:
                    return
                # Others hold the rest; a trial of theirs may yet come back to the queue.
                self._stop.wait(self._options.poll_seconds)
                continue
            study = next(s for s in sweep.studies if s.study_id == claim.study_id)
            with self._leased(claim) as lost:
                self._run_claim(sweep, study, claim, lost)

    @contextlib.contextmanager
    def _leased(self, claim: Claim) -> Iterator[threading.Event]:
        """Renew the claim's lease from a thread of its own; the event says that it was lost."""
        lost, done = threading.Event(), threading.Event()

        def keep() -> None:
            while not done.wait(self._options.lease_seconds / 4):
                try:
                    self._queue.renew(claim)
                except Exception as error:
                    if not isinstance(error, LeaseLostError):
                        logger.error("cannot renew the lease: %s", _first_line(error))
                    lost.set()
                    return

        thread = threading.Thread(target=keep, name="lease", daemon=True)
        thread.start()
        try:
            yield lost
        finally:
            done.set()
            thread.join()

    def _run_claim(
        self, sweep: StoredSweep, study: SweepStudy, claim: Claim, lost: threading.Event
    ) -> None:
        started = time.monotonic()
        key = f"{study.name}/{claim.number}"
        state, value = TrialState.PRUNED, None
        attrs: dict[str, Any] = {}
        reporter: _Reporter | None = None
        try:
            if claim.deaths >= MAX_DEATHS:
                raise _WorkersDied(f"{claim.deaths} workers died while they ran it")
            reporter, config = self._begin(sweep, study, claim)
            value = self._objective(study, config).run(
                config,
                seeds=sweep.spec.budget.seeds,
                on_epoch=reporter,
                should_stop=lambda: self._stop.is_set() or lost.is_set(),
                checkpoints=self._checkpoints,
                key=key,
            )
            state, attrs = TrialState.COMPLETE, {OUTCOME: "complete"}
        except _Pruned:
            attrs = {OUTCOME: "pruned"}
        except Diverged as divergence:
            # Optuna's samplers learn from a pruned trial; one told as FAIL, or as NaN, they
            # forget, and then suggest the like of it again.
            attrs = {OUTCOME: "diverged", REASON: str(divergence)}
        except Interrupted:
            if not lost.is_set():
                self._queue.release(claim)
            return
        except (SweepError, DataError, CheckpointError):
            # Not the trial's fault: no other would fare better here.
            self._queue.release(claim)
            raise
        except Exception as error:
            if self._retry_after(error, claim):
                return
            state = TrialState.FAIL
            attrs = {OUTCOME: "failed", REASON: _first_line(error), ERROR: traceback.format_exc()}
        if state == TrialState.PRUNED and reporter is not None:
            value = reporter.last_score
        attrs[SECONDS] = round(time.monotonic() - started, 3)
        if lost.is_set() or not self._finish(claim, state, value, attrs):
            logger.warning(
                "%s #%d went to another worker; result dropped", study.name, claim.number
            )
            return
        self._checkpoints.delete(key)
        self._note_failure(attrs if state == TrialState.FAIL else None)

    def _begin(
        self, sweep: StoredSweep, study: SweepStudy, claim: Claim
    ) -> tuple[_Reporter, TrialConfig]:
        """Suggest the trial's settings; tell its provenance."""
        optuna_study = with_retries(
            lambda: optuna.load_study(
                storage=self._store,
                study_name=study.name,
                sampler=search.build_sampler(sweep.spec, study.name, claim.number),
                pruner=search.build_pruner(sweep.spec),
            )
        )
        trial = with_retries(lambda: optuna.Trial(optuna_study, claim.trial_id))
        params = with_retries(lambda: search.suggest(trial, sweep.spec.search))
        config = sweep.spec.config(study.cell, params)
        provenance = {**_provenance(self._options.device), "data_fingerprint": study.fingerprint}
        with_retries(
            lambda: self._store.set_trial_system_attr(claim.trial_id, PROVENANCE, provenance)
        )
        return _Reporter(self._store, trial, lambda: self._queue.owns(claim)), config

    def _objective(self, study: SweepStudy, config: TrialConfig) -> Objective:
        identity = dataset_identity(config)
        if identity not in self._objectives:
            dataset = open_dataset(config, self._options.data_dir)
            check_fingerprint(study, dataset.fingerprint)
            self._objectives[identity] = Objective(dataset, self._options.device)
        return self._objectives[identity]

    def _finish(
        self, claim: Claim, state: TrialState, value: float | None, attrs: dict[str, Any]
    ) -> bool:
        if not self._queue.owns(claim):
            return False
        for name, attr in attrs.items():
            with_retries(
                lambda n=name, a=attr: self._store.set_trial_user_attr(claim.trial_id, n, a)  # type: ignore[misc]
            )
        return self._queue.finish(claim, state, value)

    def _retry_after(self, error: Exception, claim: Claim) -> bool:
        """Put a trial that raised back into the queue, unless it has done so before."""
        logger.error("trial #%d raised %s", claim.number, _first_line(error))
        attrs = self._store.get_trial_system_attrs(claim.trial_id)
        failures = attrs.get(FAILURES, 0) + 1
        # The same config would only run out of the same memory again.
        hopeless = isinstance(error, torch.cuda.OutOfMemoryError | _WorkersDied)
        if failures >= MAX_FAILURES or hopeless:
            return False
        self._store.set_trial_system_attr(claim.trial_id, FAILURES, failures)
        self._queue.release(claim)
        return True

    def _note_failure(self, attrs: dict[str, Any] | None) -> None:
        if attrs is None:
            self._failures.clear()
            return
        self._failures.append(attrs[REASON])
        recent = self._failures[-SAME_FAILURES:]
        if len(recent) == SAME_FAILURES and len(set(recent)) == 1:
            raise SweepError(
                f"{SAME_FAILURES} trials in a row failed alike: {recent[0]}; the traceback is "
                f"kept with each of them as the attribute {ERROR!r}"
            )


class _Reporter:
    """Reports each epoch to Optuna, keeps the curves, asks the pruner."""

    def __init__(self, store: BaseStorage, trial: optuna.Trial, owns: Callable[[], bool]) -> None:
        self._store = store
        self._trial = trial
        self._owns = owns
        self._reported = set(
            store.get_trial(trial._trial_id).intermediate_values  # those of earlier attempts
        )
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
        if progress.step in self._reported:
            return
        if not self._owns():
            raise Interrupted
        with_retries(lambda: self._trial.report(progress.score, progress.step))
        with_retries(
            lambda: self._store.set_trial_system_attr(self._trial._trial_id, CURVES, self._curves)
        )
        if with_retries(self._trial.should_prune):
            raise _Pruned


def new_worker_id(suffix: str) -> str:
    """A name for a worker that no other has: host, process, and what tells it apart there."""
    return f"{socket.gethostname()}-{os.getpid()}-{suffix}"


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
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
