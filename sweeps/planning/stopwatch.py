"""How long an epoch takes, measured in this process: a trial that is cut short, and timed.

What is measured is the training of a trial (`sweeps.objective.Objective.run`); only the clock
between two updates is added. An epoch that is too long to be waited for is added up from its
updates, its validation and its checkpoint; an update that is too long, from one with fewer images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from data.dataset import Dataset
from storage.checkpoints import CheckpointStore
from sweeps.assembly import Assembly
from sweeps.config import TrialConfig
from sweeps.errors import SweepError, first_line, kind_and_line
from sweeps.objective import Objective, Progress
from sweeps.planning.speeds import STARTUP_SECONDS, Sample
from sweeps.stopping import StopRequest
from sweeps.training.loop import Diverged, Interrupted, Training, evaluate

SMALL_BATCH = 32
"""Images of the first batch, by which the time of a large one is foreseen."""

SYNC_SECONDS = 0.2
"""How often a GPU's queue is waited for: more often would slow down what is measured."""

OVERHEAD_SECONDS = 0.02
"""What saving and reporting an epoch takes, where only updates were measured: on two CPU cores,
10 to 50 ms."""

BEGIN_SECONDS = 0.3
"""What a trial takes before its first update and after its last, where that was not measured."""

MAX_RUNS = 20
"""Trials after which a measurement is given up that has not seen one update end."""


@dataclass
class _Run:
    """One call of `Objective.run` as the clock saw it: times of `time.perf_counter`.

    Attributes:
        marks: (time, updates begun, epochs ended) at moments between two updates.
        ends: when epochs had been reported.
    """

    began: float
    marks: list[tuple[float, int, int]] = dataclasses.field(default_factory=list)
    ends: list[float] = dataclasses.field(default_factory=list)
    ended: float = 0.0


class _Keeping(Assembly):
    """Keeps the training that it made last, whose network and state are measured apart."""

    last: Training | None = None

    def training(
        self, config: TrialConfig, seed: int, should_stop: Callable[[], bool] = lambda: False
    ) -> Training:
        self.last = super().training(config, seed, should_stop)
        return self.last


class Stopwatch(Objective):
    """Trains as an `Objective` does, for some seconds, and takes the time.

    Args:
        dataset: decoded images, or made ones.
        device: where to train.
        config: what is measured.
        seconds: for how long; at least one update is waited for.
        stop: set when it is done.
    """

    def __init__(
        self,
        dataset: Dataset,
        device: torch.device,
        config: TrialConfig,
        seconds: float,
        stop: StopRequest | None = None,
    ) -> None:
        self._made = _Keeping(dataset, device)
        super().__init__(self._made)
        self._device = device
        self._config = config
        self._seconds = seconds
        self._stop = StopRequest() if stop is None else stop
        self._batch: int | None = None
        self._runs: list[_Run] = []
        self._first = 0.0
        self._checkpoint_bytes = 0
        self.called = 0.0
        """When the first run was asked for, by `time.perf_counter`."""
        self.error = ""
        """What went wrong, in a line."""

    def run(
        self,
        config: TrialConfig,
        *,
        on_epoch: Callable[[Progress], None],
        should_stop: Callable[[], bool] = lambda: False,
        checkpoints: CheckpointStore | None = None,
        key: str = "",
        **others: Any,
    ) -> float:
        """As `Objective.run`, until the seconds are over.

        Raises:
            Interrupted: when they are, or `error` is set.
        """
        try:
            if self._batch is None:
                self.called = time.perf_counter()
                if self._device.type == "cuda":  # what the shape before it has left
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(self._device)
                self._batch = self._foresee(config)
                self._first = time.perf_counter()
            run = _Run(time.perf_counter())
            self._runs.append(run)

            def heard(progress: Progress) -> None:
                try:
                    on_epoch(progress)
                finally:
                    if run.marks:  # epochs of an earlier attempt are only told again
                        run.ends.append(time.perf_counter())
                        self._weigh(checkpoints, key)

            watch = self._watch(run, lambda: self._enough(run))
            try:
                return super().run(
                    dataclasses.replace(config, global_batch_size=self._batch),
                    on_epoch=heard,
                    should_stop=lambda: watch() or should_stop(),
                    checkpoints=checkpoints,
                    key=key,
                    **others,
                )
            finally:
                run.ended = time.perf_counter()
                self._weigh(checkpoints, key)  # a single epoch's is on the disk only now
        except (RuntimeError, MemoryError, ValueError) as error:
            memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            self.error = f"out of memory: {first_line(error)}" if memory else kind_and_line(error)
            self._stop.set()
            # A worker takes it for a request to stop, and leaves the trial alone.
            raise Interrupted from error

    def sample(self, checkpoints: CheckpointStore | None = None) -> Sample:
        """What was measured.

        Args:
            checkpoints: where one may be saved to be weighed.

        Raises:
            SweepError: nothing could be measured, saying why.
        """
        if self.error:
            raise SweepError(self.error)
        config, runs = self._config, [run for run in self._runs if run.marks]
        batch = self._batch or config.global_batch_size
        sizes = self._made.sizes(config)
        gaps = [b - a for run in runs for a, b in itertools.pairwise(run.ends)]
        if not gaps:  # trials of one epoch
            gaps = [run.ends[0] - run.began for run in runs if run.ends]
        if batch == config.global_batch_size and gaps:
            # A sweep's time is the sum of its epochs', slow ones included.
            epoch, measured = statistics.mean(gaps), "epochs"
        else:
            steps = [step for run in runs for step in _steps(run)]
            if not steps:
                raise SweepError("no update ended in time")
            updates = sizes.updates_per_epoch * config.global_batch_size / batch
            epoch = updates * statistics.median(steps)
            epoch += self._scoring(sizes.val_images) + self._saving(checkpoints)
            measured = "updates"
        between = [b.marks[0][0] - a.ended for a, b in itertools.pairwise(runs)]
        first = runs[0].marks[0][0] - runs[0].began
        return Sample(
            epoch_seconds=epoch,
            begin_seconds=statistics.median(between) if between else first + BEGIN_SECONDS / 2,
            startup_seconds=STARTUP_SECONDS,
            checkpoint_bytes=self._checkpoint_bytes,
            updates=sizes.updates_per_epoch,
            batch=batch,
            measured=measured,
            gpu_bytes=self._gpu_bytes() * config.global_batch_size // batch,
        )

    def _gpu_bytes(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.max_memory_reserved(self._device)

    def _foresee(self, config: TrialConfig) -> int:
        """The batch to measure with: the config's own, or the largest that is done in time."""
        whole, devices = config.global_batch_size, config.devices_per_round
        # Two images a device: Batch Normalization takes statistics of no less.
        small = 2 * devices * max(1, SMALL_BATCH // (2 * devices))
        if whole < 4 * small:
            return whole
        run = _Run(time.perf_counter())
        until = run.began + self._seconds / 8
        watch = self._watch(
            run,
            lambda: len(_steps(run)) >= (1 if time.perf_counter() > until else 5),
        )
        with contextlib.suppress(Interrupted, Diverged):
            super().run(
                dataclasses.replace(config, global_batch_size=small, epochs=10**6, warmup_epochs=0),
                seeds=1, on_epoch=lambda _: None, should_stop=watch,
            )  # fmt: skip
        steps = _steps(run)
        if not steps:
            return whole
        # One update to warm up, and one to be timed; the quickest, as others were held up.
        fitting = small * max(self._seconds, 1.0) / (2 * min(steps))
        return whole if fitting >= whole else max(small, int(fitting) // small * small)

    def _watch(self, run: _Run, done: Callable[[], bool]) -> Callable[[], bool]:
        """What is asked between two updates: notes the time, and says whether `done`."""
        updates = 0
        synced = 0.0

        def watch() -> bool:
            nonlocal updates, synced
            updates += 1
            if self._device.type == "cuda":
                if run.marks and time.perf_counter() < synced + SYNC_SECONDS:
                    return False
                torch.cuda.synchronize(self._device)
                synced = time.perf_counter()
            run.marks.append((time.perf_counter(), updates, len(run.ends)))
            return done()

        return watch

    def _enough(self, run: _Run) -> bool:
        known = any(_steps(r) or len(r.ends) >= 2 or (r.ended and r.ends) for r in self._runs)
        # Trials that diverge before there is anything to time would go on for ever.
        if not known and len(self._runs) <= MAX_RUNS:
            return False
        spent = time.perf_counter() - self._first
        if spent > self._seconds:
            self._stop.set()
            return True
        # Broken off once, to see what it takes to begin.
        slow = spent / max(1, len(run.marks)) > self._seconds / 10
        return len(self._runs) == 1 and spent > self._seconds / 2 and not slow

    def _weigh(self, checkpoints: CheckpointStore | None, key: str) -> None:
        if checkpoints is not None and not self._checkpoint_bytes:
            with contextlib.suppress(OSError):
                self._checkpoint_bytes = checkpoints.path(key).stat().st_size

    def _scoring(self, images: int) -> float:
        """Seconds that scoring so many validation images takes."""
        assert self._made.last is not None
        prepared = self._made.prepared(self._config)
        network = self._made.last.global_model()
        few = min(len(prepared.val_images[0]), max(SMALL_BATCH, (self._batch or 0) // 2))
        labels = prepared.val_labels[:few]
        took = float("inf")
        for _ in range(2):
            began = time.perf_counter()
            evaluate(
                network,
                [prepared.val_images[0][:few]],
                labels,
                autocast_dtype=self._made.autocast_dtype(self._config),
            )
            took = time.perf_counter() - began
            if took > self._seconds / 4:
                break
        return took * images / few

    def _saving(self, checkpoints: CheckpointStore | None) -> float:
        """Seconds that an epoch waits for its checkpoint and report."""
        assert self._made.last is not None
        if checkpoints is None:
            return OVERHEAD_SECONDS
        with checkpoints.writer("weighed") as writer:
            began = time.perf_counter()
            writer.save({"training": self._made.last.state_dict()})
            took = time.perf_counter() - began
        self._weigh(checkpoints, "weighed")
        checkpoints.delete("weighed")
        return took + OVERHEAD_SECONDS


def _steps(run: _Run) -> list[float]:
    """Seconds an update, without the first where there are others."""
    found = [
        (b[0] - a[0]) / (b[1] - a[1]) for a, b in itertools.pairwise(run.marks) if a[2] == b[2]
    ]
    return found[1:] or found


def measure_here(
    dataset: Dataset, device: torch.device, config: TrialConfig, seconds: float
) -> Sample:
    """Measure one shape in this process, without a store: updates, validation, no checkpoints.

    Raises:
        SweepError: nothing could be measured, saying why.
    """
    watch = Stopwatch(dataset, device, config, seconds)
    for _ in range(2):  # the second shows what it takes to begin
        with contextlib.suppress(Interrupted, Diverged):
            watch.run(config, seeds=1, on_epoch=lambda _: None)
    sample = watch.sample()
    return dataclasses.replace(
        sample,
        epoch_seconds=sample.epoch_seconds + OVERHEAD_SECONDS * (sample.measured == "epochs"),
    )
