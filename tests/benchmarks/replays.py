"""Epochs until a sweep has found a good setting in each of its studies, by search strategy.

    python tests/benchmarks/replays.py [--replays 60] [--seed 1000] [--strategies NAME ...]

Nothing is trained: each trial's curve is read from `curves.npz` (see `curves.py`), and what a
strategy does with it is real: real Optuna studies, samplers and pruners, and of ours the product's
own. A sweep is three studies, one for each batch size of the table, that take turns trial by
trial, as one worker runs them. What a sampler suggests is snapped to the nearest setting of the
grid that the study has not tried, and stored so: in a space that is not a grid, a sampler that
closes in on a place tries another setting each time, with another outcome.

What a strategy sees of a setting is either the mean of its seeds' curves, where a setting ends as
its first seed to diverge does (the headline), or the curve of one seed, another for each replay.
A trial that dies or explodes is told as pruned, with its last score, to all strategies alike.
Nobody is told the settings that the presets try first.

The quality of a setting is its final accuracy, averaged over all seeds of the table; one that
diverged counts as a guess. A study has hit when the best of its complete trials, by what the
strategy saw, has a quality within `WITHIN` of the best in the table. It then stops. Its cost is
the epochs trained until then, those of pruned, dead and exploded trials included; the sweep's is
the sum over studies. The table of the output has medians and quartiles over the replays. A replay
whose studies have not all hit after `MOST` trials each counts as the most expensive of all.

`oracle` knows the table: each study trains one good setting in full. `in order` is what no search
without knowledge of final accuracies can beat by pruning: random settings, each cut after one
epoch unless it is good.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import optuna

TABLE = Path(__file__).with_name("curves.npz")
WITHIN = 0.01
MOST = 300
"""Trials of a study after which a replay gives up."""


@dataclass(frozen=True)
class Curve:
    """What a strategy sees of a setting: accuracies by epoch, and what they cost."""

    scores: Sequence[float]
    complete: bool
    cost: float


class Table:
    """The curves, by study (a batch size) and setting.

    Args:
        path: what `curves.py` wrote.
    """

    def __init__(self, path: Path = TABLE) -> None:
        with np.load(path) as file:
            self.about = json.loads(str(file["about"]))
            correct = file["correct"]
            self.ends, self.costs = file["end"], file["cost"]
            self.batches = [int(batch) for batch in file["batches"]]
            axes = [file[name].tolist() for name in ("peak_lr", "warmup_epochs", "clip_grad_norm")]
        self.peak_lrs, self.warmups = axes[0], axes[1]
        self.clips: list[float | str] = [clip or "off" for clip in axes[2]]
        self.epochs: int = self.about["epochs"]
        missing = correct == np.iinfo(correct.dtype).max
        self.scores = np.where(missing, np.nan, correct / self.about["val_images"])
        complete = self.ends == self.about["ends"].index("complete")
        final = np.where(complete, self.scores[..., -1], 0.1)
        final[self.ends == 0] = np.nan  # not in the table
        self.quality: np.ndarray[Any, Any] = np.nanmean(final, axis=2)
        """[batches, settings]"""
        self.good = self.quality >= self.quality.max(axis=1, keepdims=True) - WITHIN - 1e-9
        self.complete = complete

    def curve(self, batch: int, setting: int, seed: int | None) -> Curve:
        """One seed's curve, or the mean over the seeds."""
        there = [i for i in range(self.ends.shape[2]) if self.ends[batch, setting, i]]
        if seed is not None:
            there = [seed]
        ends = self.complete[batch, setting, there]
        if not ends.all():
            costs = self.costs[batch, setting, there] + 1e9 * ends
            there = [there[int(costs.argmin())]]
        scores = self.scores[batch, setting, there].mean(axis=0)
        return Curve(
            scores=[float(s) for s in scores if not math.isnan(s)],
            complete=bool(ends.all()),
            cost=float(self.costs[batch, setting, there].mean()),
        )

    def setting(self, params: Mapping[str, Any], tried: Collection[int] = ()) -> int:
        """The nearest setting of the grid that is not among those tried, in steps of the grid."""
        lrs = np.log(self.peak_lrs)
        lr = np.abs(lrs - math.log(params["peak_lr"])) / (lrs[1] - lrs[0])
        # Where a value would lie if the grid's were equally far apart.
        at = np.interp(params["warmup_epochs"], self.warmups, range(len(self.warmups)))
        warmup = np.abs(np.arange(len(self.warmups)) - at)
        order = ["off", *sorted((c for c in self.clips if c != "off"), reverse=True)]
        place = [order.index(clip) for clip in self.clips]
        clip = np.abs(np.array(place) - order.index(params["clip_grad_norm"]))
        far = (lr[:, None, None] + warmup[:, None] + clip).ravel()
        far[list(tried)] = np.inf
        return int(far.argmin())

    def params(self, setting: int) -> dict[str, Any]:
        """The values of a setting."""
        rest, clip = divmod(setting, len(self.clips))
        lr, warmup = divmod(rest, len(self.warmups))
        return {
            "peak_lr": self.peak_lrs[lr],
            "warmup_epochs": self.warmups[warmup],
            "clip_grad_norm": self.clips[clip],
        }

    def spec(self, **sections: Any) -> Any:
        """The table's question as a sweep of the product's."""
        from sweeps.spec import SweepSpec

        return SweepSpec.from_table(
            {
                "train": self.about["train"],
                "each": {"global_batch_size": self.batches},
                "search": {
                    "peak_lr": {"low": self.peak_lrs[0], "high": self.peak_lrs[-1], "log": True},
                    "warmup_epochs": {"low": self.warmups[0], "high": self.warmups[-1]},
                    "clip_grad_norm": {"choices": self.clips},
                },
                **sections,
            },
            name="replay",
        )


@dataclass(frozen=True)
class Strategy:
    """How trials are chosen and cut.

    Attributes:
        samplers: of the table, the study's position and a seed: the sampler of each trial, by its
            number.
        pruner: of the table and the study's position.
        carry: as `[budget] carry`.
    """

    samplers: Callable[[Table, int, int], Callable[[int], Any]]
    pruner: Callable[[Table, int], Any]
    carry: int = 0


def strategies() -> dict[str, Strategy]:
    """All that are compared, by name."""
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
    from optuna.samplers import RandomSampler, TPESampler

    def each(sampler: Any) -> Any:
        """One sampler for all trials of a study, as plain Optuna has it."""

        def samplers(table: Table, study: int, seed: int) -> Any:
            one = sampler(seed=1000 * seed + study)
            return lambda number: one

        return samplers

    def full(table: Table, study: int) -> Any:
        return NopPruner()

    def median(table: Table, study: int) -> Any:
        return MedianPruner()

    def halving(table: Table, study: int) -> Any:
        return SuccessiveHalvingPruner(min_resource=1)

    def hyperband(table: Table, study: int) -> Any:
        return HyperbandPruner(min_resource=1, max_resource=table.epochs)

    return {
        "grid": Strategy(_grid, full),
        "random": Strategy(each(RandomSampler), full),
        "TPE": Strategy(each(TPESampler), full),
        "TPE + median": Strategy(each(TPESampler), median),
        "random + ASHA": Strategy(each(RandomSampler), halving),
        "TPE + ASHA": Strategy(each(TPESampler), halving),
        "TPE + Hyperband": Strategy(each(TPESampler), hyperband),
    }


def _grid(table: Table, study: int, seed: int) -> Callable[[int], Any]:
    """Every setting of the grid, in an order of the replay's."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import PartialFixedSampler, RandomSampler

    count = table.quality.shape[1]
    order = np.random.default_rng([seed, study]).permutation(count)

    def sampler(number: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return PartialFixedSampler(table.params(int(order[number % count])), RandomSampler())

    return sampler


def replay(table: Table, strategy: Strategy, seed: int, one_seed: bool = False) -> list[float]:
    """Run a sweep until each study has hit.

    Args:
        table: the curves.
        strategy: what chooses and cuts.
        seed: of the replay.
        one_seed: whether the strategy sees the curves of a single seed.

    Returns:
        Epochs of each study; infinite where it did not hit.
    """
    import optuna

    from sweeps import search

    seen = seed % table.ends.shape[2] if one_seed else None
    spec = table.spec()
    store = optuna.storages.InMemoryStorage()
    samplers = [strategy.samplers(table, i, seed) for i in range(len(table.batches))]
    studies = [
        optuna.create_study(
            storage=store,
            study_name=spec.study_name(cell),
            pruner=strategy.pruner(table, i),
            direction="maximize",
        )
        for i, cell in enumerate(spec.cells)
    ]
    spent = [0.0] * len(studies)
    best = [(-1.0, 0)] * len(studies)
    running = set(range(len(studies)))
    for number in range(MOST):
        for i in sorted(running):
            study = studies[i]
            study.sampler = samplers[i](number)
            trial = study.ask()
            params = search.draw(trial, spec.search)[0]
            setting = table.setting(params)
            for name, distribution in search.distributions(spec.search).items():
                value = distribution.to_internal_repr(table.params(setting)[name])
                store.set_trial_param(trial._trial_id, name, value, distribution)
            trial._cached_frozen_trial = store.get_trial(trial._trial_id)
            curve = table.curve(i, setting, seen)
            state, cost = optuna.trial.TrialState.COMPLETE, curve.cost
            for step, score in enumerate(curve.scores, start=1):
                trial.report(score, step)
                if step < table.epochs and trial.should_prune():
                    state, cost = optuna.trial.TrialState.PRUNED, float(step)
                    break
            spent[i] += cost
            if state == optuna.trial.TrialState.COMPLETE and curve.complete:
                study.tell(trial, curve.scores[-1])
                best[i] = max(best[i], (curve.scores[-1], -setting))
                if table.good[i, -best[i][1]]:
                    running.discard(i)
            else:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return [math.inf if i in running else spent[i] for i in range(len(studies))]


def quartiles(costs: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile; infinity where a replay did not hit."""
    return [float(np.quantile(costs, q, method="lower")) for q in (0.25, 0.5, 0.75)]


def _job(job: tuple[str, int, bool]) -> list[float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name, seed, one_seed = job
    return replay(_table(), strategies()[name], seed, one_seed)


@functools.cache
def _table() -> Table:
    return Table()


def main() -> None:
    """Parse, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replays", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1000, help="Of the first replay.")
    parser.add_argument("--strategies", nargs="+", choices=list(strategies()))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = args.strategies or list(strategies())
    table = _table()
    about = table.about
    print(f"{about['command']}, {about['date']}; {table.good.shape[1]} settings a study")
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for one_seed in (False, True):
            print("One seed's curves:" if one_seed else "Mean curves:")
            for name in names:
                jobs = [(name, args.seed + i, one_seed) for i in range(args.replays)]
                costs = pool.map(_job, jobs, chunksize=1)
                row = {"strategy": name, "curves": "one seed" if one_seed else "mean"}
                row["sweep"] = quartiles([sum(c) for c in costs])
                for i, batch in enumerate(table.batches):
                    row[f"batch {batch}"] = quartiles([c[i] for c in costs])
                rows.append(row)
                _show(row, rows)
    if args.json:
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2))


def _show(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    medians = {r["strategy"]: r["sweep"][1] for r in rows if r["curves"] == row["curves"]}
    low, median, high = row["sweep"]
    ratios = "".join(
        f"  {median / medians[base]:5.2f} of {base}"
        for base in ("random", "TPE + median")
        if base in medians
    )
    studies = "  ".join(f"{k[6:]}: {v[1]:.0f}" for k, v in row.items() if k.startswith("batch"))
    print(
        f"{row['strategy']:<28}{median:7.0f} ({low:.0f} to {high:.0f}); {studies};{ratios}",
        flush=True,
    )


if __name__ == "__main__":
    main()
