"""Intervals and tests keep what they promise, on noise whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from sweeps.significance import LEVEL, holm, mean_interval, paired_p_value

PROBLEMS = 40_000
"""Binomial errors of a rate of 5 % are then 0.11 %."""

SEEDS = 5
TOLERANCE = 0.006


def noisy(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def coverage(low: np.ndarray, high: np.ndarray, truth: np.ndarray) -> float:
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize("runs", [2, 5, 8])
def test_an_interval_covers_the_truth_as_often_as_it_says(runs: int) -> None:
    truth = np.linspace(0.3, 0.95, PROBLEMS)
    values = truth[:, None] + 0.01 * noisy(runs, PROBLEMS, runs)
    mean, low, high = mean_interval(values)
    assert coverage(low, high, truth) == pytest.approx(LEVEL, abs=TOLERANCE)
    np.testing.assert_allclose(mean, values.mean(1))
    # The normal distribution's would be too short at so few runs, which this can tell.
    short = 1.96 * values.std(1, ddof=1) / math.sqrt(runs)
    assert coverage(mean - short, mean + short, truth) < LEVEL - 2 * TOLERANCE


def test_an_interval_covers_the_accuracy_of_counted_images() -> None:
    """Accuracies are shares of few images: discrete, and not quite normal."""
    generator = np.random.default_rng(0)
    truth = generator.uniform(0.7, 0.95, PROBLEMS)
    values = generator.binomial(450, truth[:, None], (PROBLEMS, SEEDS)) / 450
    _, low, high = mean_interval(values)
    assert coverage(low, high, truth) == pytest.approx(LEVEL, abs=2 * TOLERANCE)


def test_the_winner_of_many_trials_is_lucky_and_its_fresh_runs_are_not() -> None:
    """A whole sweep's choice: 20 trials, the best by one noisy score, then fresh seeds."""
    generator = np.random.default_rng(1)
    truth = generator.normal(0.8, 0.02, (PROBLEMS, 20))
    scores = truth + generator.normal(0, 0.02, truth.shape)
    winner = scores.argmax(1)
    rows = np.arange(PROBLEMS)
    its = truth[rows, winner]
    fresh = its[:, None] + generator.normal(0, 0.02, (PROBLEMS, SEEDS))
    mean, low, high = mean_interval(fresh)
    assert (scores[rows, winner] - its).mean() > 0.02
    assert abs((mean - its).mean()) < 0.0005
    assert coverage(low, high, its) == pytest.approx(LEVEL, abs=TOLERANCE)
    assert coverage(low, high, scores[rows, winner]) < 0.6


def test_the_paired_test_rejects_what_is_equal_as_seldom_as_it_says() -> None:
    """Runs of one seed share much of their noise; the pairs' differences are the test's."""
    shared = noisy(2, PROBLEMS, SEEDS)
    first = shared + 0.3 * noisy(3, PROBLEMS, SEEDS)
    second = shared + 0.3 * noisy(4, PROBLEMS, SEEDS)
    p = paired_p_value(first - second)
    for level in (0.01, 0.05, 0.2):
        assert (p <= level).mean() == pytest.approx(level, abs=TOLERANCE)
    # Unpaired, a difference that is there would drown in the noise that they share.
    found = paired_p_value(first + 0.8 - second)
    assert (found <= 0.05).mean() > 0.8
    assert (stats.ttest_ind(first + 0.8, second, axis=1).pvalue <= 0.05).mean() < 0.3


def test_holm_keeps_the_level_of_the_whole_family() -> None:
    """One best against three known configurations that equal it: false alarms in 1 of 20."""
    problems = 10_000
    best = noisy(5, problems, 1, SEEDS)
    p = paired_p_value(best - noisy(6, problems, 3, SEEDS))
    corrected = np.array([holm(row) for row in p.tolist()])
    assert (p <= 0.05).any(1).mean() > 0.1
    assert 0.02 < (corrected <= 0.05).any(1).mean() < 0.055


def test_numbers_are_those_of_scipy() -> None:
    values = noisy(7, 6, SEEDS)
    for row, p in zip(values, paired_p_value(values), strict=True):
        assert p == pytest.approx(stats.ttest_1samp(row, 0).pvalue)
    for row, low, high in zip(values, *mean_interval(values)[1:], strict=True):
        wanted = stats.ttest_1samp(row, 0).confidence_interval(LEVEL)
        assert (low, high) == pytest.approx((wanted.low, wanted.high))


def test_holm_by_hand() -> None:
    # Holm's steps: 3 x 0.01, 2 x 0.02, then 0.03, which may not fall below the one before.
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    corrected = holm([0.04, math.nan])
    assert corrected[0] == 0.04
    assert math.isnan(corrected[1])
    assert holm([]) == []


def test_without_spread_there_is_nothing_to_judge_by() -> None:
    for values in ([0.3], [0.1, 0.1, 0.1]):
        mean, low, high = mean_interval(np.array(values))
        assert mean == pytest.approx(values[0])
        assert np.isnan([low, high]).all()
    with pytest.raises(ValueError, match="empty"):
        mean_interval(np.empty((3, 0)))
    # The same for every pair, but for rounding.
    apart = np.array([0.3, 0.4, 1.0]) - np.array([0.2, 0.3, 0.9])
    assert apart.std() > 0
    assert np.isnan(paired_p_value(apart))
    assert paired_p_value(np.zeros(3)) == 1.0
    assert np.isnan(paired_p_value(np.zeros(1)))
