"""What the service itself costs: time to start, between trials and within them, memory, packing.

    python tests/benchmarks/service.py [--rows help start gap share memory ...] [--json FILE]

Each row is measured on real commands, workers and trainings, and printed beside its target:

- `help`: seconds of `sweep --help`.
- `start`: seconds from `sweep start` to the first update of its first trial. The network notes the
  time of its first training forward pass.
- `gap`: milliseconds from a trial's end in the store to the first update of the worker's next.
- `share`: of a trial of about 20 s and 60 epochs, what is not training or scoring: claim,
  suggestion, reports, checkpoints, result. On the clock, what 60 epochs take beyond their own time.
  Of the processor, what all threads of the worker take beyond the training's own, so that
  checkpoints which are written beside the next epoch count in full.
- `memory`: resident memory of one worker after 100, 500 and 1,000 trials.
- `footprint`: what a worker is planned to take, and what one took, for trainings of several sizes.
- `packing`: trials an hour of `fixup-largebatch --quick` with `--workers auto` against one worker
  with all threads, in turns.
- `gpu`: the same on a GPU at batch 128, `--workers auto` against one worker; left out without one.

No-op trials a second, against plain Optuna and Ray Tune, are in `throughput.py`; what each step
costs in long studies is in `costs.py`. The load of the machine is printed with each row; where it
is not idle, the figures of processor time say more than those of the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("help", "start", "gap", "share", "memory", "footprint", "packing", "gpu")
EPOCHS = 60

MODEL = """
import os, time
import torch
from torch import nn
from models import build_model

class Timed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.first = net, True
    def forward(self, x):
        # Whoever makes a network tries it, too, on a few images and in evaluation mode.
        if self.first and self.training and torch.is_grad_enabled() and len(x) > 32:
            self.first = False
            with open(os.environ["BENCH_TIMES"], "a") as file:
                file.write(f"{time.time()} {os.getpid()}\\n")
        return self.net(x)

def timed(*, norm_layer, num_classes, in_channels, image_size):
    net = build_model(
        "resnet8", norm="group", num_groups=2, num_classes=num_classes, in_channels=in_channels,
        image_size=image_size, num_devices=5, width_factor=0.5, seed=0,
    )
    return Timed(net)
"""

TRAIN: dict[str, Any] = {
    "dataset": "digits", "augment": "none", "num_devices": 5, "split": "iid", "norm": "group",
    "num_groups": 2, "global_batch_size": 80, "num_train_images": 160, "schedule": "constant",
    "model": "resnet8", "width_factor": 0.5,
}  # fmt: skip


def spec_table(trials: int, epochs: int, **train: Any) -> dict[str, Any]:
    """A sweep of small real trainings."""
    return {
        "question": "What does the service cost?",
        "train": {**TRAIN, "epochs": epochs, **train},
        "search": {"peak_lr": {"low": 0.01, "high": 0.1, "log": True}},
        "pruner": {"type": "NopPruner"},
        "budget": {"trials": trials},
    }


class Folder:
    """A folder to run in, with the network that notes times; use as a context."""

    def __enter__(self) -> Folder:
        self._temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.path = Path(self._temporary.name)
        (self.path / "bench_model.py").write_text(MODEL, encoding="utf-8")
        self.times = self.path / "times"
        self.url = f"sqlite:///{self.path / 'sweep.db'}"
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()

    def write(self, table: dict[str, Any]) -> None:
        """The sweep as a file, `bench.toml`."""
        import tomli_w

        (self.path / "bench.toml").write_text(tomli_w.dumps(table), encoding="utf-8")

    def sweep(self, *arguments: str, capture: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command here."""
        path = os.pathsep.join([str(ROOT), str(self.path)])
        return subprocess.run(
            [sys.executable, "-P", "-m", "sweeps.cli", *arguments],
            cwd=self.path,
            env=os.environ | {"PYTHONPATH": path, "BENCH_TIMES": str(self.times)},
            capture_output=capture,
            text=True,
            check=True,
        )

    def first_updates(self) -> list[tuple[float, int]]:
        """When trials began to train, and in which process."""
        lines = self.times.read_text(encoding="ascii").split("\n")[:-1]
        return [(float(line.split()[0]), int(line.split()[1])) for line in lines]


@dataclass
class Clock:
    """What a worker in this process did, as (wall-clock, processor) seconds.

    Attributes:
        begun: before the first update of each trial.
        trained: that each trial spent in updates and in scoring; of the processor, what the thread
            that trains took.
        ended: when each trial's result was in the store.
    """

    begun: list[tuple[float, float]]
    trained: list[tuple[float, float]]
    ended: list[tuple[float, float]]


def in_process(
    folder: Folder,
    trials: int,
    epochs: int,
    each: Callable[[int], None] = lambda _: None,
    **train: Any,
) -> Clock:
    """Run one worker in this process; `each` hears of every trial that has ended."""
    import torch

    from data.sources import load_dataset
    from storage.checkpoints import CheckpointStore
    from storage.engine import open_storage
    from sweeps.spec import SweepSpec
    from sweeps.stopping import StopRequest
    from sweeps.studies import create_or_resume
    from sweeps.training.loop import EpochResult, Training
    from sweeps.worker import Worker, WorkerOptions

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    torch.set_num_threads(1)
    spec = SweepSpec.from_table(spec_table(trials, epochs, **train), name="bench")
    store = open_storage(folder.url)
    create_or_resume(store, spec, [load_dataset("digits").fingerprint])
    clock = Clock([], [], [])
    run_epoch = Training._run_epoch

    def timed_epoch(self: Training, epoch: int) -> EpochResult:
        if epoch == 0:
            clock.begun.append(now())
            clock.trained.append((0.0, 0.0))
        began = time.perf_counter(), time.thread_time()
        result = run_epoch(self, epoch)
        ended, (wall, cpu) = (time.perf_counter(), time.thread_time()), clock.trained[-1]
        clock.trained[-1] = (wall + ended[0] - began[0], cpu + ended[1] - began[1])
        return result

    class Told(Worker):
        def _tidy_checkpoints(self, *arguments: Any) -> None:
            clock.ended.append(now())
            super()._tidy_checkpoints(*arguments)
            each(len(clock.ended))

    options = WorkerOptions(worker_id="bench", device=torch.device("cpu"))
    Training._run_epoch = timed_epoch  # type: ignore[method-assign]
    try:
        checkpoints = CheckpointStore(folder.path / "checkpoints")
        Told(store, checkpoints, "bench", options, StopRequest()).run()
    finally:
        Training._run_epoch = run_epoch  # type: ignore[method-assign]
    return clock


def row_help() -> dict[str, Any]:
    """`sweep --help`."""
    found = []
    with Folder() as folder:
        for _ in range(5):
            began = time.perf_counter()
            folder.sweep("--help")
            found.append(time.perf_counter() - began)
    return {"seconds": statistics.median(found), "best": min(found), "target": 0.5}


def row_start() -> dict[str, Any]:
    """From the command to the first update; the first of three warms the disk's caches."""
    found, processor = [], []
    for _ in range(4):
        with Folder() as folder:
            train = {"model": "bench_model:timed", "width_factor": 1.0}
            folder.write(spec_table(2, 1, **train))
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            began = time.time()
            folder.sweep("start", "bench.toml")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found.append(min(folder.first_updates())[0] - began)
            processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {
        "seconds": statistics.median(found[1:]),
        "best": min(found[1:]),
        "processor_seconds_of_the_whole_run": statistics.median(processor[1:]),
        "target": 5.0,
    }


def row_gap() -> dict[str, Any]:
    """From the end of a trial to the first update of the next."""
    with Folder() as folder:
        clock = in_process(folder, 40, 1)
    pairs = list(zip(clock.ended, clock.begun[1:], strict=False))
    wall, cpu = ([1000 * (b[n] - a[n]) for a, b in pairs] for n in (0, 1))
    return {
        "milliseconds": statistics.median(wall),
        "longest": max(wall),
        "processor_milliseconds": statistics.median(cpu),
        "target": 100.0,
    }


def row_share() -> dict[str, Any]:
    """What 60 epochs take beyond their training and scoring."""
    with Folder() as folder:
        # Epochs of a third of a second: checkpoints are written by the clock.
        clock = in_process(folder, 4, EPOCHS, num_train_images="all", width_factor=1.5)
    wall, cpu = (
        statistics.median(
            b[n] - a[n] - trained[n]
            for a, b, trained in zip(clock.ended, clock.ended[1:], clock.trained[1:], strict=False)
        )
        for n in (0, 1)
    )
    trial = statistics.median(b[0] - a[0] for a, b in itertools.pairwise(clock.ended))
    return {
        "trial_seconds": trial,
        "seconds_beyond": wall,
        "processor_seconds_beyond": cpu,
        "share": wall / trial,
        "processor_share": cpu / trial,
        "target": 0.01,
    }


def _memory(_: Any = None) -> dict[str, float]:
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon", "VmHWM"):
            found[name] = int(value.split()[0]) / 1024
    return found


def row_memory(trials: int) -> dict[str, Any]:
    """Resident megabytes of one worker after so many trials, and Python's objects."""
    import gc

    found: dict[str, Any] = {}
    seconds = time.process_time()

    def look(count: int) -> None:
        if count in (10, 50, 100, 200, 300, 500, 1000, trials):
            gc.collect()
            found[f"after {count}"] = {**_memory(), "objects": len(gc.get_objects())}
            print(f"            after {count} trials: {found[f'after {count}']}", flush=True)

    with Folder() as folder:
        in_process(folder, trials, 1, look)
    found["processor_seconds"] = time.process_time() - seconds
    return found


FOOTPRINT = """
import sys, json, dataclasses, resource
from pathlib import Path
import itertools
import torch
import sweeps.run
from sweeps.process import prepare_process
prepare_process(torch.device("cpu"), 1)
from data.dataset import made_dataset
from data.sources import load_dataset, outline
from sweeps.assembly import Assembly
from sweeps.config import TrialConfig
from sweeps.footprint import worker_bytes
name, model, batch, width = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
none = Path("none")
data = load_dataset(name) if name == "digits" else made_dataset(outline(name, data_dir=none))
config = TrialConfig.build({"dataset": name, "model": model, "norm": "group", "num_groups": 2,
    "width_factor": width, "global_batch_size": batch, "num_devices": 4, "split": "iid",
    "epochs": 1, "precision": sys.argv[5]})
planned = worker_bytes(Assembly(data, torch.device("cpu")), config, cuda=False)
training = Assembly(data, torch.device("cpu")).training(config, 0)
for batch in itertools.islice(training._batches.epoch(0), 3):  # the first leaves fewer holes
    training._algorithm.round(batch, 0.0)
lines = dict(l.split(":", 1) for l in Path("/proc/self/status").read_text().splitlines())
files = sum(int(lines[k].split()[0]) for k in ("RssFile", "RssShmem"))
peak = int(lines["VmHWM"].split()[0])
print(json.dumps({"planned": planned / 1e6, "peak": (peak - files) * 1024 / 1e6}))
"""


def row_footprint() -> dict[str, Any]:
    """Megabytes that a worker is planned to take, and its peak without the libraries' files."""
    from sweeps.execution import has_matrix_units

    found = {}
    for case in (
        ("digits", "resnet8", "128", "0.5", "float32"),
        *(
            ("cifar10", "resnet18", batch, "1", precision)
            for batch in ("128", "1024")
            for precision in ("float32", *(["bfloat16"] if has_matrix_units() else []))
        ),
    ):
        done = subprocess.run(
            [sys.executable, "-c", FOOTPRINT, *case], cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[" ".join((*case[:3], case[4]))] = json.loads(done.stdout)
    return found


def _trials_an_hour(arguments: list[str], threads: int, workers: str, trials: int) -> float:
    """Of one run, counted from its first update to its end, as a longer sweep goes on."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with Folder() as folder:
        options = ["--workers", workers, "--set", f"workers.threads={threads}", "--yes"]
        folder.sweep("start", *arguments, *options, "--set", f"trials={trials}", "--name", "bench")
        names = optuna.get_all_study_names(folder.url)
        found: list[Any] = [
            trial
            for name in names
            for trial in optuna.load_study(study_name=name, storage=folder.url).trials
        ]
    began = min(trial.datetime_start for trial in found)
    ended = max(trial.datetime_complete for trial in found)
    return 3600 * len(found) / float((ended - began).total_seconds())


def row_packing(rounds: int, trials: int) -> dict[str, Any]:
    """Trials an hour, `auto` and one worker with all threads taking turns."""
    from sweeps.machine import cores

    rates: dict[str, list[float]] = {"auto": [], "one": []}
    command = ["fixup-largebatch", "--quick", "--set", "pruner.type=NopPruner"]
    for _ in range(rounds):
        rates["auto"].append(_trials_an_hour(command, 1, "auto", trials))
        rates["one"].append(_trials_an_hour(command, cores(), "1", trials))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = [a / b for a, b in zip(rates["auto"], rates["one"], strict=True)]
    return {**medians, "ratio": statistics.median(ratios), "rounds": rates, "target": 1.5}


def row_gpu(rounds: int, trials: int) -> dict[str, Any] | None:
    """Trials an hour at batch 128 on a GPU, packed and one at a time."""
    import torch

    if not torch.cuda.is_available():
        return None
    rates: dict[str, list[float]] = {"auto": [], "one": []}
    command = ["fixup-largebatch", "--set", "each.global_batch_size=[128]", "--set", "epochs=3"]
    command += ["--set", "pruner.type=NopPruner", "--set", "warmup_epochs=0"]
    for _ in range(rounds):
        rates["auto"].append(_trials_an_hour(command, 1, "auto", trials))
        rates["one"].append(_trials_an_hour(command, 1, "1", trials))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {**medians, "ratio": medians["auto"] / medians["one"], "target": 1.5}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--rounds", type=int, default=3, help="Of packing and gpu.")
    parser.add_argument("--trials", type=int, default=8, help="Of each study in a round.")
    parser.add_argument("--memory-trials", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    calls: dict[str, Callable[[], dict[str, Any] | None]] = {
        "help": row_help,
        "start": row_start,
        "gap": row_gap,
        "share": row_share,
        "memory": lambda: row_memory(args.memory_trials),
        "footprint": row_footprint,
        "packing": lambda: row_packing(args.rounds, args.trials),
        "gpu": lambda: row_gpu(args.rounds, args.trials),
    }
    found: dict[str, Any] = {}
    for name in args.rows:
        before = os.getloadavg()[0]
        row = calls[name]()
        if row is None:
            print(f"{name:>10}  left out: no GPU", flush=True)
            continue
        found[name] = {**row, "load_before": before, "load_after": os.getloadavg()[0]}
        shown = re.sub(r"[{}\"]", "", json.dumps(found[name], default=str))
        shown = re.sub(r"(\d+\.\d{3})\d+", r"\1", shown)
        print(f"{name:>10}  {shown}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
