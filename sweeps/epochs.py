"""What becomes of a trial's epochs: each is stored, and the pruner and the budgets are asked."""

from __future__ import annotations

from collections.abc import Callable

import optuna

from storage.retries import with_retries
from sweeps.objective import Progress
from sweeps.training.loop import Interrupted


class Pruned(Exception):
    """The pruner said so."""


class Reporter:
    """Reports each epoch to Optuna, keeps the curves, asks the pruner.

    Args:
        trial: the trial, with what earlier attempts reported and this one goes on from.
        write: stores a step, its score and the curves; False if the trial is another worker's.
        spent: whether the sweep's time or epochs are used up; the trial then waits.
        prune: whether to ask the pruner.
        last_step: a trial that has come so far is complete, whatever the pruner would say.
    """

    def __init__(
        self,
        trial: optuna.Trial,
        *,
        write: Callable[[int, float, dict[str, list[float]]], bool],
        spent: Callable[[], bool],
        prune: bool,
        last_step: int,
    ) -> None:
        self._trial = trial
        self._write = write
        self._spent = spent
        self._prune = prune
        self._last_step = last_step
        self._reported = trial._cached_frozen_trial.last_step or 0
        self._curves: dict[str, list[float]] = {}
        self.last_score: float | None = None
        # Of each seed as of its latest epoch, by the steps before it.
        self.class_correct: dict[int, list[int]] = {}

    def __call__(self, progress: Progress) -> None:
        """Take in an epoch.

        Raises:
            Pruned: the pruner said so.
            Interrupted: the trial is another worker's, or the sweep's budget is spent.
        """
        result = progress.result
        for name, point in {
            "train_loss": result.train_loss,
            "val_loss": result.val_loss,
            "val_accuracy": result.val_accuracy,
            "lr": result.lr,
            "seconds": result.seconds,
            "images_per_second": result.images_per_second,
        }.items():
            self._curves.setdefault(name, []).append(float(f"{point:.6g}"))
        self.last_score = progress.score
        self.class_correct[progress.step - result.epoch] = result.class_correct
        if progress.step < self._reported:
            return
        if progress.step > self._reported:
            if not self._write(progress.step, progress.score, self._curves):
                raise Interrupted
            # As `Trial.report` does: it is what the pruner sees.
            self._trial._cached_frozen_trial.intermediate_values[progress.step] = progress.score
        # Asked again for the last step of an attempt that ended: it may have ended in between.
        if progress.step == self._last_step:
            return
        if self._prune and with_retries(self._trial.should_prune):
            raise Pruned
        if self._spent():
            raise Interrupted
