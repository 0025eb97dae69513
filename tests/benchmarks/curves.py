"""Tables of full learning curves, for `replays.py` to try search strategies on without training.

    python tests/benchmarks/curves.py --records curves.jsonl [--question groupnorm-plateau]
        [--processes 2] [--pack]

The question of a preset on noisy digits: ten devices of two classes each, with every setting of a
grid (peak learning rate x length of the warmup x gradient clipping) at several batch sizes, for 40
epochs. `fixup-cosine` has 120 settings at batch 80, 160 and 320, with three seeds;
`groupnorm-plateau`, of a smaller model, 24 settings at 80 and 320, with one. What is trained is the
product's own `Objective`, which ends dead and exploded trainings as it does in a sweep.

Each curve is appended to `--records` as it ends. A run that was stopped goes on where it was:
the same command trains what is missing. When nothing is, or at once with `--pack`, the records
become the question's table beside this file (`curves.npz`, `curves-groupnorm-plateau.npz`):

- `correct`: uint16 [batches, settings, seeds, epochs], validation images classified correctly
  after each epoch; 65535 where there was none.
- `end`: uint8 [batches, settings, seeds], an index into `ENDS`.
- `cost`: float32 [batches, settings, seeds], epochs trained, the last one's share of updates
  included where it broke off.
- `seconds`: float32 [batches, settings, seeds], of one core.
- `lr`: float32 [batches, settings, seeds, epochs], learning rate of each epoch's last update, NaN
  where there was none. Only where the schedule is `plateau`: another's follows from the settings.
- `peak_lr`, `warmup_epochs`, `clip_grad_norm` (0 is "off"), `batches`: what the axes are;
  settings are in the order of the product of the first three.
- `about`: JSON: the command, date, versions, processor, size of the validation split, and the
  settings that all share.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 40
NONE = 65535
ENDS = ("missing", "complete", "dead", "exploded")

TRAIN: dict[str, Any] = {
    "dataset": "digits",
    "noise_std": 1.0,
    "validation_fraction": 0.2,
    "augment": "none",
    "model": "resnet18",
    "width_factor": 0.125,
    "num_devices": 10,
    "split": "classes",
    "classes_per_device": 2,
    "assignment": "pairs",
    "epochs": EPOCHS,
    "warmup_start_factor": 0.1,
}


@dataclass(frozen=True)
class Question:
    """What a table is of.

    Attributes:
        table: the file.
        train: what all settings share.
        peak_lrs: the grid's first axis.
        warmups: its second, in epochs.
        clips: its third.
        batches: each a study.
        seeds: of each setting's trainings.
    """

    table: Path
    train: Mapping[str, Any]
    peak_lrs: Sequence[float]
    warmups: Sequence[float]
    clips: Sequence[str | float]
    batches: Sequence[int]
    seeds: Sequence[int]

    def settings(self) -> list[tuple[float, float, str | float]]:
        """Every setting of the grid: peak learning rate, warmup epochs, clipping."""
        return list(itertools.product(self.peak_lrs, self.warmups, self.clips))


def peak_lrs(count: int) -> tuple[float, ...]:
    """Learning rates from 0.02 to 1, by equal factors."""
    return tuple(round(0.02 * 50 ** (i / (count - 1)), 6) for i in range(count))


QUESTIONS = {
    "fixup-cosine": Question(
        table=Path(__file__).with_name("curves.npz"),
        train={**TRAIN, "norm": "fixup", "scalar_lr_factor": 0.1, "schedule": "cosine"},
        peak_lrs=peak_lrs(10),
        warmups=(0.0, 4.0, 8.0, 16.0),
        clips=("off", 0.5, 1.0),
        batches=(80, 160, 320),
        seeds=(0, 1, 2),
    ),
    "groupnorm-plateau": Question(
        table=Path(__file__).with_name("curves-groupnorm-plateau.npz"),
        train={
            **TRAIN,
            "model": "resnet8",
            "width_factor": 0.25,
            "norm": "group",
            "num_groups": 2,
            "schedule": "plateau",
            "plateau_factor": 0.1,
            "plateau_patience": 5,
        },
        peak_lrs=peak_lrs(6),
        warmups=(0.0, 16.0),
        clips=("off", 0.5),
        batches=(80, 320),
        seeds=(0,),
    ),
}


class Curve(NamedTuple):
    """Which training of the table it is, as indices of its axes."""

    seed: int
    batch: int
    setting: int


def train(question: str, curve: Curve) -> dict[str, Any]:
    """Train one curve to its end; return its record."""
    import torch

    from sweeps.assembly import Assembly, open_dataset
    from sweeps.config import TrialConfig
    from sweeps.objective import Objective, Progress
    from sweeps.training.loop import Diverged

    torch.set_num_threads(1)
    asked = QUESTIONS[question]
    peak_lr, warmup_epochs, clip = asked.settings()[curve.setting]
    config = TrialConfig.build(
        {
            **asked.train,
            "global_batch_size": asked.batches[curve.batch],
            "peak_lr": peak_lr,
            "warmup_epochs": warmup_epochs,
            "clip_grad_norm": clip,
            "seed": asked.seeds[curve.seed],
        }
    )
    global _assembly
    if _assembly is None:
        _assembly = Assembly(open_dataset(config, None), torch.device("cpu"))
    sizes = _assembly.sizes(config)
    epochs: list[Progress] = []
    started = time.process_time()
    end, reason = "complete", ""
    cost = float(EPOCHS)
    try:
        Objective(_assembly).run(config, seeds=1, on_epoch=epochs.append)
    except Diverged as diverged:
        reason = str(diverged)
        update = re.search(r"update (\d+)$", reason)
        end = "exploded" if update else "dead"
        cost = (int(update[1]) + 1) / sizes.updates_per_epoch if update else float(len(epochs))
    return {
        "curve": list(curve),
        "correct": [round(epoch.score * sizes.val_images) for epoch in epochs],
        "lr": [epoch.result.lr for epoch in epochs],
        "val_images": sizes.val_images,
        "end": end,
        "reason": reason,
        "cost": round(cost, 3),
        "seconds": round(time.process_time() - started, 2),
    }


_assembly: Any = None


def read(path: Path) -> dict[Curve, dict[str, Any]]:
    """The records of a file; a line that was cut off by a kill is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[Curve(*record["curve"])] = record
    return found


def pack(question: str, records: dict[Curve, dict[str, Any]]) -> None:
    """Write the question's table."""
    import numpy as np

    asked = QUESTIONS[question]
    shape = (len(asked.batches), len(asked.settings()), len(asked.seeds))
    correct = np.full((*shape, EPOCHS), NONE, dtype=np.uint16)
    end = np.zeros(shape, dtype=np.uint8)
    cost, seconds = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    rates: dict[str, Any] = {}
    if asked.train["schedule"] == "plateau":
        rates["lr"] = np.full((*shape, EPOCHS), np.nan, dtype=np.float32)
    for curve, record in records.items():
        at = (curve.batch, curve.setting, curve.seed)
        correct[(*at, slice(len(record["correct"])))] = record["correct"]
        for name, values in rates.items():
            values[(*at, slice(len(record[name])))] = record[name]
        end[at] = ENDS.index(record["end"])
        cost[at], seconds[at] = record["cost"], record["seconds"]
    about = {
        "command": "python tests/benchmarks/curves.py --records curves.jsonl"
        f" --question {question}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {n: metadata.version(n) for n in ("torch", "numpy", "scikit-learn")},
        "python": platform.python_version(),
        "processor": _processor(),
        "val_images": next(iter(records.values()))["val_images"],
        "epochs": EPOCHS,
        "ends": ENDS,
        "train": asked.train,
    }
    np.savez_compressed(
        asked.table,
        **rates,
        correct=correct,
        end=end,
        cost=cost,
        seconds=seconds,
        peak_lr=np.array(asked.peak_lrs),
        warmup_epochs=np.array(asked.warmups),
        clip_grad_norm=np.array([0.0 if clip == "off" else float(clip) for clip in asked.clips]),
        batches=np.array(asked.batches),
        about=np.array(json.dumps(about)),
    )
    size = asked.table.stat().st_size / 1024
    print(f"{asked.table.name}: {len(records)} curves, {size:.0f} KiB")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, one core a training"


def main() -> None:
    """Parse, train what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--question", choices=[*QUESTIONS], default="fixup-cosine")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--pack", action="store_true", help="Train nothing; write what there is.")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    asked, records = QUESTIONS[args.question], read(args.records)
    # Seed after seed, so that a part of the table is a whole one with fewer seeds.
    every = [
        Curve(seed, batch, setting)
        for seed in range(len(asked.seeds))
        for batch in (len(asked.batches) - 1, *range(len(asked.batches) - 1))
        for setting in range(len(asked.settings()))
    ]
    missing = [] if args.pack else [curve for curve in every if curve not in records]
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with args.records.open("a") as file, context.Pool(args.processes) as pool:
        if file.tell():
            file.write("\n")  # the last line may have been cut off
        for done, record in enumerate(
            pool.imap_unordered(functools.partial(train, args.question), missing), start=1
        ):
            records[Curve(*record["curve"])] = record
            file.write(json.dumps(record) + "\n")
            file.flush()
            if done % 50 == 0:
                left = (time.monotonic() - started) / done * (len(missing) - done)
                print(
                    f"{len(records)} of {len(every)} curves, {left / 60:.0f} min left", flush=True
                )
    pack(args.question, records)


if __name__ == "__main__":
    main()
