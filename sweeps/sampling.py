"""How long an epoch takes: measured by trials that are cut short, in a store that is thrown away.

What is measured is the worker's own loop (`sweeps.worker`), with its claims, suggestions, reports
and checkpoints, over `Objective.run`; only the clock between two updates is added. A sampling
process is given the device and threads that a worker would have, and as many of them run side by
side as there would be workers, so that what they share (cores, memory, a GPU, the store) shows in
their times. Pixels do not matter for speed: a data set that is not there is made up.

Run as a module it is such a process: it reads a line of JSON for each thing to measure, and
answers each with a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import torch

from data.sources import Dataset, cache_dir, load_dataset, made_dataset, outline
from storage.checkpoints import CheckpointStore
from storage.engine import open_storage
from sweeps.config import TrialConfig, Value
from sweeps.errors import SpecError, SweepError
from sweeps.machine import Slot
from sweeps.objective import Objective, Progress, autocast_dtype, dataset_identity, prepare_process
from sweeps.spec import Budget, Range, SweepSpec
from sweeps.studies import SweepStudy, create_or_resume
from sweeps.training.loop import Diverged, Interrupted, Training, evaluate
from sweeps.worker import StopRequest, Worker, WorkerOptions, new_worker_id

if TYPE_CHECKING:
    from torch import nn

    from sweeps.studies import StoredSweep

SPEED_SETTINGS = (
    "dataset", "image_size", "num_train_images", "validation", "validation_fraction", "augment",
    "model", "width_factor", "norm", "num_groups", "feature_norm", "num_devices", "participation",
    "algorithm", "local_steps", "local_momentum", "server_optimizer", "global_batch_size",
    "optimizer", "precision", "compile",
)  # fmt: skip
"""Settings whose value decides how long an epoch takes."""

SPEED_SWITCHES = (
    "clip_grad_norm", "agc_clip_factor", "virtual_features", "proximal_mu", "label_smoothing",
)  # fmt: skip
"""Settings of which only this matters: whether they are on."""

MAX_SHAPES = 8
"""Shapes that are measured of one study whose search space has more."""

SMALL_BATCH = 32
"""Images of the first batch, by which the time of a large one is foreseen."""

SYNC_SECONDS = 0.2
"""How often a GPU's queue is waited for: more often would slow down what is measured."""

OVERHEAD_SECONDS = 0.02
"""What saving and reporting an epoch takes, where only updates were measured: on two CPU cores,
10 to 50 ms."""

BEGIN_SECONDS = 0.3
"""What a trial takes before its first update and after its last, where that was not measured."""

STARTUP_SECONDS = 6.0
"""From the command to the first update, where that was not measured: mostly imports."""

MAX_RUNS = 20
"""Trials after which a measurement is given up that has not seen one update end."""

LEFT_SECONDS = 86400.0
"""A folder to measure in that is older than this is nobody's any more."""

FRESH_DAYS = 30
"""A kept measurement older than this is not used: drivers and neighbours change."""


@dataclass(frozen=True)
class Shape:
    """What decides how long an epoch takes, and a config that has it.

    Attributes:
        key: its settings, as :data:`SPEED_SETTINGS` and :data:`SPEED_SWITCHES` name them.
        cell: enumerated settings of a study that trains it.
        pinned: searched parameters that decide it.
        config: one with it.
    """

    key: tuple[tuple[str, Value], ...]
    cell: Mapping[str, Value]
    pinned: Mapping[str, Value]
    config: TrialConfig

    def __str__(self) -> str:
        c = self.config
        model = c.model if c.width_factor == 1 else f"{c.model} x{c.width_factor:g}"
        return f"{model}, {c.norm}, {c.algorithm}, batch {c.global_batch_size}"


@dataclass(frozen=True)
class Sample:
    """How long a shape takes.

    Attributes:
        epoch_seconds: an epoch with its validation, checkpoint and report.
        begin_seconds: a trial beside its epochs.
        startup_seconds: from the command to the first update.
        checkpoint_bytes: 0 where it was not measured.
        updates: updates of the epoch that the time is for.
        batch: images of the batch that was measured; smaller than the shape's where one of its
            own would have taken too long.
        measured: "epochs", "updates", or "run": by trials of an earlier sweep.
        gpu_bytes: the most that its tensors held of a GPU; 0 where it was not measured.
    """

    epoch_seconds: float
    begin_seconds: float
    startup_seconds: float
    checkpoint_bytes: int
    updates: int
    batch: int
    measured: str
    gpu_bytes: int = 0


def key_of(config: TrialConfig) -> tuple[tuple[str, Value], ...]:
    """What decides the speed of a config."""
    values = config.as_dict()
    return (
        *((name, values[name]) for name in SPEED_SETTINGS),
        *((name, _is_on(values[name])) for name in SPEED_SWITCHES),
    )


def shapes(spec: SweepSpec, cell: Mapping[str, Value]) -> list[tuple[float, Shape]]:
    """The shapes that the trials of a study can have, each with the share of trials to expect.

    A searched parameter counts with its choices, each equally often; a range of whole numbers with
    its ends (a sixth each) and its middle, by Simpson's rule; another with its ends.
    """
    axes = []
    for name, space in spec.search.items():
        if options := _options(name, space):
            axes.append([(name, value, share) for value, share in options])
    combinations = list(itertools.product(*axes))
    stride = -(-len(combinations) // MAX_SHAPES)
    found: dict[tuple[tuple[str, Value], ...], tuple[float, Shape]] = {}
    for combination in combinations[::stride]:
        pinned = {name: value for name, value, _ in combination}
        weight = 1.0
        for _, _, share in combination:
            weight *= share
        try:
            config = spec.config(cell, {**spec.lowest_params(), **pinned})
        except SpecError:
            continue  # only the edges of the space are checked
        key = key_of(config)
        before = found[key][0] if key in found else 0.0
        found[key] = (before + weight, Shape(key, cell, pinned, config))
    total = sum(weight for weight, _ in found.values())
    return [(weight / total, shape) for weight, shape in found.values()]


def _options(name: str, space: Range) -> list[tuple[Value, float]]:
    if name in SPEED_SWITCHES:
        choices = space.choices or space.ends()
        if not space.choices:
            return [(choices[-1], 1.0)]
        by_side: dict[bool, list[Value]] = {}
        for choice in choices:
            by_side.setdefault(_is_on(choice), []).append(choice)
        return [(side[0], len(side) / len(choices)) for side in by_side.values()]
    if name not in SPEED_SETTINGS:
        return []
    if space.choices:
        return [(choice, 1 / len(space.choices)) for choice in space.choices]
    low, *between, high = space.values()
    if not between:
        return [(low, 0.5), (high, 0.5)]
    return [(low, 1 / 6), (between[len(between) // 2], 4 / 6), (high, 1 / 6)]


def _is_on(value: Value) -> bool:
    return value != "off" and bool(value)


# Measuring in this process


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
        super().__init__(dataset, device)
        self._config = config
        self._seconds = seconds
        self._stop = StopRequest() if stop is None else stop
        self._batch: int | None = None
        self._runs: list[_Run] = []
        self._first = 0.0
        self._checkpoint_bytes = 0
        self._network: nn.Module | None = None
        self._latest: Training | None = None
        self.called = 0.0
        """When the first run was asked for, by `time.perf_counter`."""
        self.error = ""
        """What went wrong, in a line."""

    def run(
        self,
        config: TrialConfig,
        *,
        seeds: int,
        test: bool = False,
        on_epoch: Callable[[Progress], None],
        should_stop: Callable[[], bool] = lambda: False,
        checkpoints: CheckpointStore | None = None,
        key: str = "",
        may_replace: Callable[[], bool] = lambda: True,
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
                    seeds=seeds,
                    test=test,
                    on_epoch=heard,
                    should_stop=lambda: watch() or should_stop(),
                    checkpoints=checkpoints,
                    key=key,
                    may_replace=may_replace,
                )
            finally:
                run.ended = time.perf_counter()
                self._weigh(checkpoints, key)  # a single epoch's is on the disk only now
        except (RuntimeError, MemoryError, ValueError) as error:
            lines = str(error).strip().splitlines() or [""]
            memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            self.error = f"{'out of memory' if memory else type(error).__name__}: {lines[0]}"
            self._stop.set()
            # Which a worker takes as a request, and leaves the trial alone.
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
        sizes = self.sizes(config)
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

    def _model(self, config: TrialConfig, seed: int) -> nn.Module:
        self._network = super()._model(config, seed)
        return self._network

    def _training(
        self, config: TrialConfig, seed: int, should_stop: Callable[[], bool]
    ) -> Training:
        self._latest = super()._training(config, seed, should_stop)
        return self._latest

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
        assert self._network is not None
        assert self._prepared is not None
        prepared = self._prepared[1]
        few = min(len(prepared.val_images[0]), max(SMALL_BATCH, (self._batch or 0) // 2))
        labels = prepared.val_labels[:few]
        took = float("inf")
        for _ in range(2):
            began = time.perf_counter()
            evaluate(
                self._network,
                [prepared.val_images[0][:few]],
                labels,
                autocast_dtype=autocast_dtype(self._config, self._device),
            )
            took = time.perf_counter() - began
            if took > self._seconds / 4:
                break
        return took * images / few

    def _saving(self, checkpoints: CheckpointStore | None) -> float:
        """Seconds that an epoch waits for its checkpoint and report."""
        assert self._latest is not None
        if checkpoints is None:
            return OVERHEAD_SECONDS
        with checkpoints.writer("weighed") as writer:
            began = time.perf_counter()
            writer.save({"training": self._latest.state_dict()})
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


def sampling_dataset(config: TrialConfig, data_dir: Path | None) -> Dataset:
    """The data set of a config if that takes no decoding, else a made one of its sizes.

    Raises:
        DataError: it is missing and cannot be downloaded.
    """
    arguments: dict[str, Any] = {
        "data_dir": data_dir, "image_size": config.image_size, "noise_std": config.noise_std,
    }  # fmt: skip
    found = outline(config.dataset, **arguments)
    if found.present and found.decoded:
        return load_dataset(config.dataset, **arguments)
    return made_dataset(found)


# Measuring in processes of a worker's kind


class Samplers:
    """As many sampling processes as there would be workers; use as a context.

    Args:
        spec: of the sweep that is measured.
        slots: where workers would run; more may come with `grow`.
        data_dir: where the data set is, None for its usual place.
        prepared: seconds from the command to now; a start takes as many before its workers.
    """

    def __init__(
        self, spec: SweepSpec, slots: Sequence[Slot], data_dir: Path | None, prepared: float = 0.0
    ) -> None:
        self._spec = spec
        self._slots = list(slots)
        self._data_dir = data_dir
        self._prepared = prepared
        self._processes: list[subprocess.Popen[str]] = []
        self._stack = contextlib.ExitStack()
        self._began = 0.0
        self._startup: float | None = None

    def __enter__(self) -> Samplers:
        self._folder = Path(self._stack.enter_context(_throwaway_folder()))
        self._store = open_storage(f"sqlite:///{self._folder / 'sweep.db'}")
        self._began = time.perf_counter()
        for slot in self._slots:
            self._processes.append(self._start(slot))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()
        self._stack.close()

    @property
    def count(self) -> int:
        """How many processes there are."""
        return len(self._processes)

    def grow(self, slots: Sequence[Slot]) -> None:
        """Start more processes, beside those that are there."""
        for slot in slots:
            self._processes.append(self._start(slot))

    def measure(self, shape: Shape, seconds: float) -> Sample:
        """Measure a shape in all processes at once.

        Returns:
            The mean of what they measured.

        Raises:
            SweepError: it could not be measured, saying why.
        """
        name = f"sample-{secrets.token_hex(4)}"
        spec = self._spec
        alone = dataclasses.replace(
            spec,
            name=name,
            cells=({**shape.cell, **shape.pinned},),
            # Only a confirmation searches seeds; which one it is does not show in the time.
            search={
                n: space
                for n, space in spec.search.items()
                if n not in shape.pinned and n != "seed"
            },
            tries=(),
            budget=Budget(trials=10**6, seeds=spec.budget.seeds, keep_checkpoints="none"),
            confirms="",
        )
        create_or_resume(self._store, alone, ["made"])
        request = {"sweep": name, "seconds": seconds, "config": shape.config.as_dict()}
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its answer says what is wrong
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
        answers = [self._answer(process) for process in self._processes]
        for answer in answers:
            if "error" in answer:
                raise SweepError(answer["error"])
        found = [Sample(**answer["sample"]) for answer in answers]
        if self._startup is None:
            waited = max(answer["began"] for answer in answers) - self._began
            self._startup = self._prepared + waited
        return dataclasses.replace(
            found[0],
            epoch_seconds=statistics.mean(sample.epoch_seconds for sample in found),
            begin_seconds=statistics.mean(sample.begin_seconds for sample in found),
            gpu_bytes=max(sample.gpu_bytes for sample in found),
            startup_seconds=self._startup,
        )

    def _start(self, slot: Slot) -> subprocess.Popen[str]:
        threads = str(slot.threads)
        header = {
            "folder": str(self._folder),
            "device": slot.device,
            "threads": slot.threads,
            "data_dir": str(self._data_dir.absolute()) if self._data_dir else None,
        }
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sweeps.sampling"],
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Ctrl-C reaches this process alone, which ends it.
            start_new_session=True,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(header) + "\n")
        process.stdin.flush()
        return process

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            return {"error": f"a sampling process ended with status {process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def _throwaway_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder for the store that is measured with, and an end to what others have left."""
    # Beside the decoded data sets: on a disk like the store's rather than in memory.
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # One that was ended by a signal has left its own.
        for left in cache.glob("plan-*"):
            with contextlib.suppress(FileNotFoundError):  # another has seen to it
                if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        return tempfile.TemporaryDirectory(prefix="plan-", dir=cache)
    except OSError:  # it cannot be written, and nothing is to stay there
        return tempfile.TemporaryDirectory(prefix="sweep-plan-")


class _SamplingWorker(Worker):
    """A worker whose objective is a stopwatch."""

    def __init__(self, *arguments: Any, watch: Stopwatch) -> None:
        super().__init__(*arguments)
        self._stopwatch = watch

    def _objective(self, study: SweepStudy, config: TrialConfig) -> Objective:
        return self._stopwatch

    def _spent(self, sweep: StoredSweep) -> bool:
        return False


def main() -> None:
    """Measure what stdin asks for, until its end: that of the process which asked."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    header = json.loads(sys.stdin.readline())
    device = torch.device(header["device"])
    prepare_process(device, header["threads"])
    folder = Path(header["folder"])
    data_dir = Path(header["data_dir"]) if header["data_dir"] else None
    store = open_storage(f"sqlite:///{folder / 'sweep.db'}")
    checkpoints = CheckpointStore(folder / f"checkpoints-{os.getpid()}")  # one writer of a key
    datasets: dict[tuple[Value, ...], Dataset] = {}
    for line in sys.stdin:
        request = json.loads(line)
        config = TrialConfig.build(request["config"])
        try:
            identity = dataset_identity(config)
            if identity not in datasets:
                datasets[identity] = sampling_dataset(config, data_dir)
            stop = StopRequest()
            watch = Stopwatch(datasets[identity], device, config, request["seconds"], stop)
            options = WorkerOptions(new_worker_id("plan"), device, poll_seconds=0.05)
            _SamplingWorker(store, checkpoints, request["sweep"], options, stop, watch=watch).run()
            sample = watch.sample(checkpoints)
            answer = {"sample": dataclasses.asdict(sample), "began": watch.called}
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            answer = {"error": reason}
        print(json.dumps(answer), flush=True)


# Measurements that are kept


def kept_sample(config: TrialConfig, slots: Sequence[Slot]) -> Sample | None:
    """What was measured of a shape on this machine before, by as many workers; None if nothing."""
    path = _kept_path(config, slots)
    try:
        if time.time() - path.stat().st_mtime > 86400 * FRESH_DAYS:
            return None
        return Sample(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def keep_sample(config: TrialConfig, slots: Sequence[Slot], sample: Sample) -> None:
    """Keep a measurement in the user's cache; where that cannot be written, do not."""
    path = _kept_path(config, slots)
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(dataclasses.asdict(sample)), encoding="utf-8")
        temporary.replace(path)


def _kept_path(config: TrialConfig, slots: Sequence[Slot]) -> Path:
    slot = slots[0]
    cuda = slot.device.startswith("cuda")
    identity = {
        "shape": key_of(config),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(slot.device) if cuda else slot.device,
        # Workers on GPUs of their own are not in each other's way.
        "workers": sum(s.device == slot.device for s in slots),
        "threads": slot.threads,
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "speeds" / f"{digest[:24]}.json"


if __name__ == "__main__":
    main()
