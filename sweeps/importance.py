"""Which parameters matter: PED-ANOVA.

Watanabe, Bansal and Hutter, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in
Arbitrary Subspaces", IJCAI 2023, https://arxiv.org/abs/2304.10255, Algorithm 1; for parameters
whose range was moved, its conditional form, https://arxiv.org/abs/2601.20800, Theorem 4.2. The
numbers are those of Optuna's evaluator, whose import takes as long as a whole report: it brings
scikit-learn for the other evaluators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sweeps.config import Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

GRID = 50
"""Points that a numeric range is divided into."""


def importance_shares(
    trials: Sequence[FrozenTrial], names: Sequence[str], quantile: float
) -> dict[str, float]:
    """How much the values of each parameter in the best trials differ from those in all of them.

    Args:
        trials: complete ones with finite values, of which the larger is better.
        names: of the parameters.
        quantile: the share of trials that count as the best, above 0 and at most 1.

    Returns:
        Shares that add to one; empty where nothing differs, as among trials that scored alike.
    """
    values = np.array([trial.value for trial in trials], dtype=float)
    cutoff = np.sort(values)[::-1][math.ceil(quantile * len(values)) - 1]
    best = values >= cutoff
    found = {name: _importance(trials, best, name) for name in names}
    total = sum(found.values())
    return {name: value / total for name, value in found.items()} if total > 0 else {}


def _importance(trials: Sequence[FrozenTrial], best: np.ndarray, name: str) -> float:
    # Optuna calls the trials with equal ranges a regime.
    regimes: dict[BaseDistribution, list[int]] = {}
    for index, trial in enumerate(trials):
        if name in trial.distributions:
            regimes.setdefault(trial.distributions[name], []).append(index)
    total = 0.0
    for distribution, members in regimes.items():
        among = [index for index in members if best[index]]
        if len(members) < 2 or not among or distribution.single():
            continue
        share_of_best, share = len(among) / int(best.sum()), len(members) / len(trials)
        top, every = (
            _density(distribution, [trials[i].params[name] for i in indices]) + 1e-12
            for indices in (among, members)
        )
        # The Pearson divergence, equation 16.
        total += share_of_best**2 / share * float(every @ (top / every - 1) ** 2)
    return total


def _density(distribution: BaseDistribution, values: Sequence[Value]) -> np.ndarray:
    """A kernel density on the grid of a range; [points]."""
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        indices = [int(distribution.to_internal_repr(value)) for value in values]
        counts = np.bincount(indices, minlength=len(distribution.choices))
        return _categorical_density(counts)
    return _numeric_density(_counts(distribution, values))


def _counts(distribution: BaseDistribution, values: Sequence[Value]) -> np.ndarray:
    """How many values fall to each point of the grid of a numeric range."""
    low, high = float(distribution.low), float(distribution.high)  # type: ignore[attr-defined]
    step, log = distribution.step, distribution.log  # type: ignore[attr-defined]
    points = GRID
    if log and step is not None:
        points = min(math.ceil(math.log2(high - low + 1)) + 1, GRID)
    elif step is not None:
        points = min(round((high - low) / step) + 1, GRID)
    found = np.asarray(values, dtype=float)
    if log:
        low, high, found = math.log(low), math.log(high), np.log(found)
    width = (high - low) / (points - 1)
    indices = np.clip(np.ceil((found - low) / width - 0.5).astype(int), 0, points - 1)
    return np.bincount(indices, minlength=points)


def _numeric_density(counts: np.ndarray) -> np.ndarray:
    """Normal kernels of Scott's width, cut off at the ends, and a wide one for the prior."""
    seen = np.flatnonzero(counts)
    weights = counts[seen]
    total, running = weights.sum(), np.cumsum(weights)
    mean = seen @ weights / total
    deviation = math.sqrt((seen - mean) ** 2 @ weights / max(1, total - 1))
    first = np.searchsorted(running, total // 4, side="left")
    third = np.searchsorted(running, total * 3 // 4, side="right")
    range_ = seen[min(len(seen) - 1, third)] - seen[first]
    width = max(1.059 * min(range_ / 1.34, deviation) * total**-0.2, 0.5 / 1.64)
    centres = np.append(seen, (len(counts) - 1) / 2)
    widths = np.append(np.full(len(seen), width), len(counts))
    edges = np.arange(len(counts) + 1) - 0.5
    below = _normal((edges - centres[:, None]) / widths[:, None])  # [kernels, edges]
    kernels = np.diff(below, axis=1) / (below[:, -1:] - below[:, :1])
    shares = np.append(weights, 1) / (total + 1)
    return np.asarray(shares @ kernels)


def _categorical_density(counts: np.ndarray) -> np.ndarray:
    seen = np.flatnonzero(counts)
    kernels = np.full((len(seen) + 1, len(counts)), 1 / (len(seen) + 1))
    kernels[np.arange(len(seen)), seen] += 1
    kernels /= kernels.sum(axis=1, keepdims=True)
    shares = np.append(counts[seen], 1) / (counts.sum() + 1)
    return np.asarray(shares @ kernels)


def _normal(x: np.ndarray) -> np.ndarray:
    """The standard normal distribution function."""
    erf = np.array([math.erf(value) for value in (x / math.sqrt(2)).flat])
    return 0.5 * (1 + erf.reshape(x.shape))
