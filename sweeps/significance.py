"""What a few repeated runs say: the interval of a mean, a paired test, a correction for several.

All of it takes accuracies from 0 to 1 over independent seeds in the last axis, and as many problems
beside each other as there are leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""Confidence of every interval."""

LEAST_SPREAD = 1e-9
"""A standard deviation below this is rounding: the runs were alike."""


def mean_interval(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean and its interval of confidence `LEVEL`, by Student's t over the last axis.

    Student, The probable error of a mean, Biometrika 1908: mean ± t(n - 1) s / sqrt(n).

    Args:
        values: `[..., n]`, n at least 1.

    Returns:
        Mean, lower and upper end, each `[...]`. The ends are NaN where there is no spread to
        judge by: for a single value, and where all are equal.

    Raises:
        ValueError: if n is 0.
    """
    from scipy.special import stdtrit

    n = values.shape[-1]
    if n == 0:
        raise ValueError("values is empty: a mean needs at least one")
    mean, error = values.mean(-1), _standard_error(values)
    reach = stdtrit(max(1, n - 1), (1 + LEVEL) / 2) * error
    return mean, mean - reach, mean + reach


def paired_p_value(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two-sided p value of the paired t test that the mean difference is 0.

    Args:
        differences: `[..., n]`, of pairs that share a seed.

    Returns:
        `[...]`; 1 where every difference is 0, NaN where there is no spread to judge by.
    """
    from scipy.special import stdtr

    mean, error = differences.mean(-1), _standard_error(differences)
    with np.errstate(invalid="ignore"):
        p = 2 * stdtr(max(1, differences.shape[-1] - 1), -np.abs(mean / error))
    nothing = (np.abs(differences) < LEAST_SPREAD).all(-1) & (differences.shape[-1] > 1)
    return np.where(nothing, 1.0, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for being several, so that the family keeps its level.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of
    Statistics 1979: with the values in ascending order, the k-th of m is multiplied by m - k + 1,
    and none falls below the one before it.

    Args:
        p_values: NaN where there was no test; these are no part of the family.

    Returns:
        The corrected values in the given order, 1 at most; NaN stays.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected = list(p_values)
    least = 0.0
    for rank, (p, i) in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * p))
        corrected[i] = least
    return corrected


def _standard_error(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the mean over the last axis; NaN without spread."""
    n = values.shape[-1]
    if n < 2:
        return np.full(values.shape[:-1], np.nan)
    deviation = values.std(-1, ddof=1)
    return np.where(deviation < LEAST_SPREAD, np.nan, deviation / math.sqrt(n))
