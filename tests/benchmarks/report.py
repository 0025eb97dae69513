"""`sweep report` on large sweeps: size of the page, time and memory of the command.

    python tests/benchmarks/report.py [--trials 100 1000 5000] [--epochs 100] [--json FILE]

A made-up sweep in a SQLite file: three studies of `fixup-largebatch`, whose trials complete, are
pruned or diverge as those of the preset do. The command runs in a process of its own, imports
included; the table has the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NAME = "large"
COLUMNS = ("train_loss", "train_accuracy", "val_accuracy", "learning_rate", "images_per_second")


def make_store(url: str, trials: int, epochs: int) -> None:
    """A store with that many trials over three studies, written in one transaction.

    The cliff in peak_lr moves down with the batch size and up with the warmup.
    """
    import optuna
    from optuna.storages._rdb import models as tables
    from sqlalchemy import insert

    from storage.engine import open_storage, sql_engine
    from sweeps import search, specfiles
    from sweeps.attributes import CURVES
    from sweeps.studies import create_or_resume, stored_sweep

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    overrides = [f"budget.trials={-(-trials // 3)}", f"train.epochs={epochs}", "try=[]"]
    if epochs <= 30:
        overrides.append(f"search.warmup_epochs.high={epochs / 3}")
    made = specfiles.load("fixup-largebatch", overrides=overrides, rename=NAME)
    store = open_storage(url)
    create_or_resume(store, made, ["0" * 64] * len(made.cells))
    spaces = search.distributions(made.search)
    drawn = random.Random(0)
    rows: dict[Any, list[dict[str, Any]]] = {
        table: []
        for table in (
            tables.TrialModel, tables.TrialParamModel, tables.TrialValueModel,
            tables.TrialIntermediateValueModel, tables.TrialUserAttributeModel,
            tables.TrialSystemAttributeModel,
        )
    }  # fmt: skip
    trial_id = 0
    start = datetime(2026, 1, 1)
    for place, study in enumerate(stored_sweep(store, NAME).studies):
        for number in range(len(range(place, trials, 3))):
            trial_id += 1
            best = number / trials * 3
            params = {
                # Samplers draw nearer to what is good, as the search goes on.
                "peak_lr": min(1.6, max(0.01, 0.15 * 10 ** drawn.gauss(0, 0.8 - 0.4 * best))),
                "warmup_start_factor": 10 ** drawn.uniform(-2, 0),
                "warmup_epochs": drawn.uniform(0, made.search["warmup_epochs"].high),
                "clip_grad_norm": drawn.choice(made.search["clip_grad_norm"].choices),
            }
            warmup = params["warmup_epochs"] / made.search["warmup_epochs"].high
            cliff = (0.9, 0.4, 0.25)[place] * (1 + warmup) * 10 ** drawn.gauss(0, 0.08)
            final = 0.93 - 0.03 * place - 0.08 * abs(drawn.gauss(0, 1)) * (1 - 0.7 * best)
            final -= 0.1 * abs(params["peak_lr"] - 0.5 * cliff)
            outcome, ran = "complete", epochs
            if params["peak_lr"] > cliff:
                outcome, ran = "diverged", drawn.randrange(0, max(1, epochs // 4))
            elif number > 5 and drawn.random() < 0.45:
                outcome, ran = "pruned", max(1, round(epochs * drawn.uniform(0.35, 0.6)))
            curve = [
                round(max(0.1, final * (1 - 2.0 ** (-20 * e / epochs)) + drawn.gauss(0, 0.005)), 6)
                for e in range(1, ran + 1)
            ]
            attrs: dict[str, Any] = {"outcome": outcome, "seconds": 12.0 * ran}
            attrs |= {"label": "post"} if number == 0 else {}
            attrs |= {"reason": "loss exploded to 5.61e+14"} if outcome == "diverged" else {}
            state = "COMPLETE" if outcome == "complete" else "PRUNED"
            rows[tables.TrialModel].append(
                {
                    "trial_id": trial_id, "study_id": study.study_id, "number": number,
                    "state": optuna.trial.TrialState[state], "datetime_start": start,
                    "datetime_complete": start + timedelta(seconds=12 * ran + 1),
                }
            )  # fmt: skip
            for name, value in params.items():
                space = spaces[name]
                rows[tables.TrialParamModel].append(
                    {
                        "trial_id": trial_id, "param_name": name,
                        "param_value": space.to_internal_repr(value),
                        "distribution_json": optuna.distributions.distribution_to_json(space),
                    }
                )  # fmt: skip
            if curve:
                rows[tables.TrialValueModel].append(
                    {
                        "trial_id": trial_id, "objective": 0, "value": curve[-1],
                        "value_type": tables.TrialValueModel.TrialValueType.FINITE,
                    }
                )  # fmt: skip
            kind = tables.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
            rows[tables.TrialIntermediateValueModel] += [
                {
                    "trial_id": trial_id, "step": step, "intermediate_value": value,
                    "intermediate_value_type": kind,
                }
                for step, value in enumerate(curve, start=1)
            ]  # fmt: skip
            rows[tables.TrialUserAttributeModel] += [
                {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
                for key, value in attrs.items()
            ]
            kept = json.dumps(dict.fromkeys(COLUMNS, curve))
            rows[tables.TrialSystemAttributeModel].append(
                {"trial_id": trial_id, "key": CURVES, "value_json": kept}
            )
    with sql_engine(store).begin() as connection:
        for table, values in rows.items():
            connection.execute(insert(table), values)


def measure(folder: Path, arguments: list[str]) -> tuple[float, float, float]:
    """Seconds, seconds on a processor, and peak megabytes of one `sweep` command."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "sweeps.cli", *arguments],
        cwd=folder, env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with status {process.returncode}")
    return elapsed, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="Leave the stores and reports in this folder.")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for trials in args.trials:
            folder = (args.keep or Path(temporary)) / str(trials)
            folder.mkdir(parents=True)
            make_store(f"sqlite:///{folder / 'sweep.db'}", trials, args.epochs)
            runs = [measure(folder, ["report", NAME]) for _ in range(args.rounds)]
            report = folder / f"{NAME}-report"
            row = {
                "trials": trials,
                "epochs": args.epochs,
                "seconds": round(statistics.median(seconds for seconds, _, _ in runs), 2),
                "cpu_seconds": round(statistics.median(busy for _, busy, _ in runs), 2),
                "peak_mb": round(max(memory for _, _, memory in runs)),
                "page_mb": round((report / "index.html").stat().st_size / 1e6, 2),
                "store_mb": round((folder / "sweep.db").stat().st_size / 1e6, 1),
            }
            rows.append(row)
            print(
                f"{trials} trials x {args.epochs} epochs: {row['seconds']} s "
                f"({row['cpu_seconds']} s on a processor), {row['peak_mb']} MB of memory, "
                f"page {row['page_mb']} MB",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
