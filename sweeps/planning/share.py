"""How many of its epochs a trial runs that a pruner may end.

That is not known beforehand: it is taken from what the store holds of sweeps alike, or else
assumed by the kind of the pruner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sweeps.errors import SpecError
from sweeps.spec import SweepSpec
from sweeps.status import SweepStatus, read_status
from sweeps.studies import stored_names, stored_sweep

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

LEFT_PAST_WARMUP = 0.45
"""Share of its epochs past the pruner's warmup that a trial runs which a median judges.

Half of the trials lie below the median when they are first judged; of the others, some do later.
Measured over the searched trials of one fixup-largebatch --quick: 0.44.
"""

PASS_BY_TOLERANCE = 5.0
"""Of the trials below the best that pass a rung of `WarmupHalvingPruner`, the share that its
tolerance lets pass too, in proportion to it.

Half of them at the usual 0.1, which makes 0.75 of all epochs. Measured on the curves of
`tests/benchmarks/replays.py`: sweeps of 8 trials a study ran 0.70 of them, of 40 trials 0.77, the
wait for warmups and the trials that died or exploded included.
"""

FEW_TRIALS = 5
"""Finished trials from which the store's own share of epochs is taken."""


@dataclass(frozen=True)
class Share:
    """How many of its epochs a trial runs that a pruner may end.

    Attributes:
        value: from 0 to 1.
        whence: where it comes from, in words.
        free: trials of each study that run before the pruner judges any.
    """

    value: float
    whence: str
    free: int = 0


def epoch_share(spec: SweepSpec, status: SweepStatus | None, store: BaseStorage | None) -> Share:
    """How many of its epochs a trial runs that the sweep's pruner may end.

    Taken from this sweep's own finished trials; failing these, from those of the store's sweeps
    with the same pruner, search and epochs. Else by the kind of the pruner: a median leaves
    `LEFT_PAST_WARMUP` past its warmup, a percentile its percentage; `WarmupHalvingPruner` passes
    the best and, by `PASS_BY_TOLERANCE`, those near them; successive halving promotes
    one in `reduction_factor` at each rung (Li et al. 2020, arXiv 1810.05934, algorithm 1), and
    of Hyperband's brackets (Li et al. 2018, arXiv 1603.06560) each has as many trials.
    """
    if spec.pruner["type"] == "NopPruner":
        return Share(1.0, "no pruner")
    ran: list[float] = []
    if status is not None:
        ran = _ran(status)
        if len(ran) >= FEW_TRIALS:
            return Share(
                sum(ran) / len(ran), f"as in the {len(ran)} searched trials that this sweep has run"
            )
    if store is not None:
        for name in stored_names(store):
            try:
                other = stored_sweep(store, name)
            except SpecError:  # of another version; it is in nobody's way here
                continue
            alike = all(
                getattr(other.spec, part) == getattr(spec, part) for part in ("pruner", "search")
            )
            if alike and _length(other.spec) == _length(spec) and name != spec.name:
                ran += _ran(read_status(store, other))
        if len(ran) >= FEW_TRIALS:
            return Share(
                sum(ran) / len(ran),
                f"as in the {len(ran)} searched trials of sweeps like it in the store",
            )
    return _assumed_share(spec)


def _length(spec: SweepSpec) -> int:
    return spec.lowest_config(spec.cells[0]).epochs * spec.budget.seeds


def _ran(status: SweepStatus) -> list[float]:
    """The share of its epochs that each finished trial ran which a pruner could have ended."""
    return [
        trial.step / study.steps_per_trial
        for study in status.studies
        for trial in study.trials
        if trial.outcome in ("complete", "pruned", "diverged") and not trial.label
    ]


def _assumed_share(spec: SweepSpec) -> Share:
    length, kind = _length(spec), str(spec.pruner["type"])
    if kind in ("MedianPruner", "PercentilePruner"):
        warmup = min(length, int(spec.pruner.get("n_warmup_steps", 0)))
        left = LEFT_PAST_WARMUP
        if kind == "PercentilePruner":
            left = float(spec.pruner.get("percentile", 25.0)) / 100
        return Share(
            (warmup + left * (length - warmup)) / length,
            f"assumed: a trial that {kind} judges runs {left:.0%} of its epochs past step {warmup}",
            free=int(spec.pruner.get("n_startup_trials", 5)),
        )
    if kind == "WarmupHalvingPruner":
        first = float(spec.pruner.get("first_rung", 0.3)) * length / spec.budget.seeds
        factor = int(spec.pruner.get("reduction_factor", 2))
        near = min(1.0, PASS_BY_TOLERANCE * float(spec.pruner.get("tolerance", 0.1)))
        passing = 1 / factor + near * (1 - 1 / factor)
        return Share(
            _halved(length, max(1, round(first)), factor, passing),
            f"assumed: at each rung {kind} lets {passing:.0%} of the trials pass",
        )
    if kind in ("SuccessiveHalvingPruner", "HyperbandPruner"):
        factor = int(spec.pruner.get("reduction_factor", 4 if kind.startswith("S") else 3))
        least = spec.pruner.get("min_resource", 1)
        least = least if isinstance(least, int) else 1
        rate = int(spec.pruner.get("min_early_stopping_rate", 0))
        rungs = [rate]
        if kind == "HyperbandPruner":
            while least * factor ** len(rungs) <= length:
                rungs.append(len(rungs))
        value = sum(_halved(length, least * factor**first, factor) for first in rungs) / len(rungs)
        return Share(value, f"assumed: {kind} promotes one trial in {factor} at each rung")
    return Share(1.0, f"assumed: {kind} ends no trial")


def _halved(length: int, rung: int, factor: int, passing: float | None = None) -> float:
    """Share of its epochs that a trial runs on average.

    Args:
        length: epochs of a whole one.
        rung: at which epoch the first rung is; each is `factor` times as far as the one before.
        passing: the share of trials that pass a rung; None is 1 in `factor`.
    """
    passing = 1 / factor if passing is None else passing
    ran, alive, before = 0.0, 1.0, 0
    while rung < length:
        ran += alive * (rung - before)
        before, rung, alive = rung, rung * factor, alive * passing
    return (ran + alive * (length - before)) / length
