"""A pruner that judges each trial by its own warmup, schedule and end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optuna.pruners import BasePruner

from sweeps.attributes import CURVES, OUTCOME
from sweeps.config import TrialConfig

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial


class WarmupHalvingPruner(BasePruner):
    """Asynchronous successive halving with rungs that wait for each trial's warmup.

    As in ASHA (Li et al. 2020, arXiv 1810.05934, section 3.2), a trial passes a rung if it is
    among the best 1 in `reduction_factor` of all that have come there. What differs:

    - A rung is not one step for all. Warmup epochs count half, as their learning rate is half of
      the peak's on average, so a trial with a warmup of W epochs comes to the rung at r epochs
      after r + W / 2, and never before its warmup has ended. Its score there is compared with
      the others' at *their* steps: what is slow at first because it warms up is not cut for it.
    - A trial that is hardly worse than the worst that passes does, too. Halfway, the best
      configurations lie closer together than what a few hundred validation images tell apart.
    - Under a plateau schedule accuracy jumps when the learning rate drops. A trial is compared
      with what the others had before they dropped theirs more often than it did.
    - A trial that diverged later sets no bar: high rates learn fastest just before they explode.
    - With several seeds the rungs are in the first training; then one at the end of each.

    It keeps no state: what it says depends on the trials in the study alone, whoever asks, and it
    reads them at rungs only.

    Args:
        reduction_factor: one trial in this many passes a rung, and each rung is this many times
            as far as the one before.
        first_rung: where the first rung is, as a share of a training's epochs.
        tolerance: by how much accuracy (0 to 1) a trial may be worse than the worst that passes.
        config: a training of the study. Its `epochs` and, where they are not searched, its
            `warmup_epochs` and `schedule` hold for all.
        seeds: trainings of each trial.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        reduction_factor: int = 2,
        first_rung: float = 0.3,
        tolerance: float = 0.1,
        *,
        config: TrialConfig,
        seeds: int = 1,
    ) -> None:
        if isinstance(reduction_factor, bool) or not isinstance(reduction_factor, int):
            raise TypeError(f"reduction_factor = {reduction_factor!r} is not a whole number")
        if reduction_factor < 2:
            raise ValueError(f"reduction_factor = {reduction_factor} is not a whole number from 2")
        if not 0 < first_rung < 1:
            raise ValueError(f"first_rung = {first_rung} is not between 0 and 1")
        if not 0 <= tolerance <= 1:
            raise ValueError(f"tolerance = {tolerance} is not from 0 to 1")
        self._factor = reduction_factor
        self._first = first_rung
        self._tolerance = tolerance
        self._config = config
        self._seeds = seeds

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial has come to a rung that it does not pass."""
        step = trial.last_step
        rungs = [rung for rung, at in self._rungs(trial.params) if at == step]
        if not rungs:
            return False
        others = [
            (other, dict(self._rungs(other.params)))
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and other.user_attrs.get(OUTCOME) != "diverged"
        ]
        return not all(self._passes(trial, rung, others) for rung in rungs)

    def _rungs(self, params: Mapping[str, Any]) -> Iterator[tuple[float, int]]:
        """Each rung, in epochs at the full rate, and the step at which a trial comes to it."""
        epochs = self._config.epochs
        warmup = params.get("warmup_epochs", self._config.warmup_epochs)
        rung = self._first * epochs
        while (at := max(math.ceil(rung + warmup / 2), math.ceil(warmup) + 1)) < epochs:
            yield rung, at
            rung *= self._factor
        for seed in range(1, self._seeds):
            yield float(seed * epochs), seed * epochs

    def _passes(
        self, trial: FrozenTrial, rung: float, others: list[tuple[FrozenTrial, dict[float, int]]]
    ) -> bool:
        step = trial.last_step
        assert step is not None
        drops = len(self._drops(trial, step))
        scores = [
            score
            for other, rungs in others
            if rung in rungs and (score := self._score(other, rungs[rung], drops)) is not None
        ]
        mine = trial.intermediate_values[step]
        passing = max(1, (len(scores) + 1) // self._factor)
        best = sorted([*scores, mine], reverse=True)[:passing]
        return mine >= best[-1] - self._tolerance

    def _drops(self, trial: FrozenTrial, step: int) -> list[int]:
        """At which steps a plateau lowered the learning rate, up to `step`."""
        schedule = trial.params.get("schedule", self._config.schedule)
        if schedule != "plateau" or step > self._config.epochs:
            return []
        rates = trial.system_attrs.get(CURVES, {}).get("lr", [])[:step]
        return [at for at in range(2, len(rates) + 1) if rates[at - 1] < rates[at - 2]]

    def _score(self, other: FrozenTrial, step: int, drops: int) -> float | None:
        """What another trial had when it came to a rung, with no more drops than that many."""
        if step not in other.intermediate_values:
            return None
        later = self._drops(other, step)[drops:]
        return other.intermediate_values.get(later[0] - 1 if later else step)
