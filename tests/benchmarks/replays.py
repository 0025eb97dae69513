"""Epochs until a sweep has found a good setting in each of its studies, by search strategy.

    python tests/benchmarks/replays.py [--replays 60] [--seed 1000] [--strategies NAME ...]
        [--table tests/benchmarks/curves-groupnorm-plateau.npz]

Nothing is trained: each trial's curve is read from a table (see `curves.py`), and what a
strategy does with it is real: real Optuna studies, samplers and pruners, and of ours the product's
own. A sweep has a study for each batch size of the table. They take turns trial by trial, as one
worker runs them; where settings are carried, with the product's head start. What a sampler suggests
is snapped to the nearest setting of the grid that the study has not tried, and stored so: in a
space that is not a grid, a sampler that closes in on a place tries another setting each time, with
another outcome.

What a strategy sees of a setting is either the mean of its seeds' curves, where a setting ends as
its first seed to diverge does (the headline), or the curve of one seed, another for each replay.
A trial that dies or explodes is told as pruned, with its last score, to all strategies alike.
Nobody is told the settings that the presets try first.

The quality of a setting is its final accuracy, averaged over all seeds of the table; one that
diverged counts as a guess. A study has hit when the best of its complete trials, by what the
strategy saw, has a quality within `WITHIN` of the best in the table. It then stops. Its cost is
the epochs trained until then, those of pruned, dead and exploded trials included; the sweep's is
the sum over studies. A study that has tried all such settings without a hit, because it pruned
them, has failed: its cost is infinite. Ratios to a strategy that fails in the median are to what
it had spent by then, so they flatter it.

`plateau` is no strategy but a bound: it knows from the start which settings end within three
points of the best, and trains those in full, in any order.

Seeds of replays below 1000 on `curves.npz` were used to choose what ours does; nothing was chosen
on the other table.
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
from collections.abc import Callable, Collection, Mapping, Sequence
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


@dataclass(frozen=True)
class Curve:
    """What a strategy sees of a setting: by epoch, and what it cost.

    `rates` are learning rates, empty where the table has none; the mean of several seeds is
    geometric, and so falls wherever one of them does.
    """

    scores: Sequence[float]
    rates: Sequence[float]
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
            self.rates = file.get("lr")
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
        self.seeds = np.flatnonzero((self.ends > 0).all(axis=(0, 1))).tolist()
        """Those that the table has all curves of."""

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
        rates: list[float] = []
        if self.rates is not None:
            mean = np.exp(np.log(self.rates[batch, setting, there]).mean(axis=0))
            rates = mean[~np.isnan(mean)].tolist()
        return Curve(
            rates=rates,
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
        carry: as in `[budget]`.
    """

    samplers: Callable[[Table, int, int], Callable[[int], Any]]
    pruner: Callable[[Table, int], Any]
    carry: int = 0


PRESET_SAMPLER = {"n_startup_trials": 8, "multivariate": True, "constant_liar": True}


def strategies() -> dict[str, Strategy]:
    """All that are compared, by name."""
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
    from optuna.samplers import RandomSampler, TPESampler

    from sweeps import search

    def each(sampler: Any) -> Any:
        """One sampler for all trials of a study, as plain Optuna has it."""

        def samplers(table: Table, study: int, seed: int) -> Any:
            one = sampler(seed=1000 * seed + study)
            return lambda number: one

        return samplers

    def ours(table: Table, study: int, seed: int) -> Any:
        spec = table.spec(sampler={"seed": seed, **PRESET_SAMPLER})
        name = spec.study_name(spec.cells[study])
        return lambda number: search.build_sampler(spec, name, number)

    def full(table: Table, study: int) -> Any:
        return NopPruner()

    def median(table: Table, study: int) -> Any:
        return MedianPruner()

    def late_median(table: Table, study: int) -> Any:
        return MedianPruner(n_startup_trials=5, n_warmup_steps=table.epochs // 2)

    def halving(table: Table, study: int) -> Any:
        return SuccessiveHalvingPruner(min_resource=1)

    def late_halving(table: Table, study: int) -> Any:
        return SuccessiveHalvingPruner(min_resource=table.epochs // 4, reduction_factor=2)

    def hyperband(table: Table, study: int) -> Any:
        return HyperbandPruner(min_resource=1, max_resource=table.epochs)

    def warmup_halving(table: Table, study: int) -> Any:
        spec = table.spec(pruner={"type": "WarmupHalvingPruner"})
        return search.build_pruner(spec, spec.cells[study])

    return {
        "grid": Strategy(_grid, full),
        "random": Strategy(each(RandomSampler), full),
        "TPE": Strategy(each(TPESampler), full),
        "TPE + median": Strategy(each(TPESampler), median),
        "random + ASHA": Strategy(each(RandomSampler), halving),
        "TPE + ASHA": Strategy(each(TPESampler), halving),
        "TPE + ASHA from epoch 10": Strategy(each(TPESampler), late_halving),
        "TPE + Hyperband": Strategy(each(TPESampler), hyperband),
        "Sweep before": Strategy(ours, late_median),
        "Sweep, full length": Strategy(ours, full),
        "Sweep, nothing carried": Strategy(ours, warmup_halving),
        "Sweep, nothing pruned": Strategy(ours, full, carry=4),
        "Sweep": Strategy(ours, warmup_halving, carry=4),
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


@dataclass
class Outcome:
    """What became of a study: epochs spent, and whether it hit."""

    epochs: float = 0.0
    hit: bool = False


def replay(table: Table, strategy: Strategy, seed: int, one_seed: bool = False) -> list[Outcome]:
    """Run a sweep until each study has hit, or failed.

    Args:
        table: the curves.
        strategy: what chooses and cuts.
        seed: of the replay.
        one_seed: whether the strategy sees the curves of a single seed.
    """
    import optuna

    from sweeps import carrying, search
    from sweeps.attributes import CURVES

    seen = table.seeds[seed % len(table.seeds)] if one_seed else None
    spec = table.spec(budget={"trials": table.quality.shape[1], "carry": strategy.carry})
    distributions = search.distributions(spec.search)
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
    outcomes = [Outcome() for _ in studies]
    tried: list[list[int]] = [[] for _ in studies]
    best = [(-1.0, 0)] * len(studies)
    running = set(range(len(studies)))
    lag = carrying.HEAD_START if strategy.carry else 0
    while running:
        i = min(running, key=lambda i: (len(tried[i]) + lag * i, i))
        study, number = studies[i], len(tried[i])
        study.sampler = samplers[i](number)
        trial = study.ask()
        params: Mapping[str, Any] | None = None
        if carrying.is_due(spec, i, number):
            upto = [s.get_trials(deepcopy=False) for s in studies[: i + 1]]
            carried = next(carrying.candidates(spec, upto), None)
            if carried is not None:
                params = carried.params
                trial.set_user_attr(carrying.CARRIED, carried.source)
        if params is None:
            params, _ = search.draw(trial, spec.search)
        setting = table.setting(params, tried[i])
        tried[i].append(setting)
        for name, distribution in distributions.items():
            value = distribution.to_internal_repr(table.params(setting)[name])
            store.set_trial_param(trial._trial_id, name, value, distribution)
        curve = table.curve(i, setting, seen)
        if curve.rates:
            store.set_trial_system_attr(trial._trial_id, CURVES, {"lr": curve.rates})
        trial._cached_frozen_trial = store.get_trial(trial._trial_id)
        pruned = _pruned_at(trial, curve, table.epochs)
        outcomes[i].epochs += pruned or curve.cost
        if curve.complete and not pruned:
            study.tell(trial, curve.scores[-1])
            best[i] = max(best[i], (curve.scores[-1], -setting))
            outcomes[i].hit = bool(table.good[i, -best[i][1]])
        else:
            trial.set_user_attr("outcome", "pruned" if pruned else "diverged")
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        left = table.good[i].sum() - table.good[i, tried[i]].sum()
        if outcomes[i].hit or not left:
            running.discard(i)
    return outcomes


def _pruned_at(trial: optuna.Trial, curve: Curve, epochs: int) -> int:
    """Report a curve until the pruner ends it; the epoch at which it did, or 0."""
    for step, score in enumerate(curve.scores, start=1):
        trial.report(score, step)
        if step < epochs and trial.should_prune():
            return step
    return 0


def plateau(table: Table, seed: int) -> list[Outcome]:
    """The bound of the module's docstring."""
    outcomes = []
    for i, quality in enumerate(table.quality):
        near = np.flatnonzero(quality >= quality.max() - 0.03)
        order = np.random.default_rng([seed, i]).permutation(near)
        first = int(np.flatnonzero(table.good[i, order])[0])
        outcomes.append(Outcome(table.epochs * (first + 1.0), True))
    return outcomes


def summary(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    """Quartiles of the epochs, infinite (None in JSON) where a replay failed."""
    costs = [sum(o.epochs for o in each) for each in outcomes]
    failed = [not all(o.hit for o in each) for each in outcomes]
    counted = [math.inf if f else c for c, f in zip(costs, failed, strict=True)]
    found = [float(np.quantile(counted, q, method="higher")) for q in (0.25, 0.5, 0.75)]
    return {
        "quartiles": [None if math.isinf(f) else f for f in found],
        "failed": sum(failed),
        "at least": statistics.median(costs),
    }


def _job(job: tuple[Path, str, int, bool]) -> list[Outcome]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path, name, seed, one_seed = job
    table = _table(path)
    if name == "plateau":
        return plateau(table, seed)
    return replay(table, strategies()[name], seed, one_seed)


@functools.cache
def _table(path: Path) -> Table:
    return Table(path)


def main() -> None:
    """Parse, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*strategies(), "plateau"]
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--replays", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1000, help="Of the first replay.")
    parser.add_argument("--strategies", nargs="+", choices=names, default=names)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = _table(args.table)
    print(
        f"{table.about['date']}: {int((table.ends > 0).sum())} curves of "
        f"{table.good.shape[1]} settings; within {WITHIN:g} of the best are "
        + ", ".join(
            f"{n} at batch {b}" for n, b in zip(table.good.sum(1), table.batches, strict=True)
        )
    )
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for one_seed in (False, True) if len(table.seeds) > 1 else (False,):
            print("\nOne seed's curves:" if one_seed else "\nMean curves:")
            for name in args.strategies:
                jobs = [(args.table, name, args.seed + i, one_seed) for i in range(args.replays)]
                found = pool.map(_job, jobs, chunksize=1)
                row = {
                    "strategy": name,
                    "curves": "one seed" if one_seed else "mean",
                    "sweep": summary(found),
                    **{
                        f"batch {batch}": summary([[each[i]] for each in found])
                        for i, batch in enumerate(table.batches)
                    },
                }
                rows.append(row)
                _show(row, rows, args.replays)
    if args.json:
        args.json.write_text(
            json.dumps({"command": sys.argv[1:], "about": table.about, "rows": rows}, indent=1)
        )


def _show(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], replays: int) -> None:
    def median(of: Mapping[str, Any]) -> float:
        """What a strategy that fails in the median had spent by then."""
        return float(of["quartiles"][1] or of["at least"])

    same = {r["strategy"]: r["sweep"] for r in rows if r["curves"] == row["curves"]}
    sweep = row["sweep"]
    ratios = "".join(
        f"  {median(sweep) / median(same[base]):.2f} of {base}"
        for base in ("random", "TPE + median")
        if base in same and base != row["strategy"] and sweep["quartiles"][1]
    )
    low, middle, high = ("never" if q is None else f"{q:.0f}" for q in sweep["quartiles"])
    studies = " ".join(
        f"{'never' if v['quartiles'][1] is None else round(v['quartiles'][1]):>5}"
        for k, v in row.items()
        if k.startswith("batch")
    )
    failed = f"  {sweep['failed']} of {replays} failed" if sweep["failed"] else ""
    print(
        f"{row['strategy']:<25}{middle:>6} ({low} to {high})  [{studies}]{ratios}{failed}",
        flush=True,
    )


if __name__ == "__main__":
    main()
