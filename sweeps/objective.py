"""One trial: the trainings of a config, one for each seed, epoch by epoch, and its score.

The objective knows no database. Its caller hands it the place of a checkpoint and a function
that hears of every epoch, and may end the trial by raising from it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from storage.checkpoints import CheckpointStore, CheckpointWriter
from sweeps.assembly import Assembly
from sweeps.config import TrialConfig
from sweeps.errors import kind_and_line
from sweeps.process import return_freed_memory
from sweeps.training.loop import EpochResult, Training

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 1.0
"""From one checkpoint of a trial to the next, at the least: what a kill costs beside the running
epoch. To write those of all epochs would take a percent of the time where epochs are short."""


@dataclass(frozen=True)
class Progress:
    """One epoch of a trial, as its caller hears of it.

    Attributes:
        step: completed epochs of the trial over all its seeds, from 1.
        score: what the pruner compares: validation accuracy (0 to 1), averaged with the final
            accuracies of the seeds before. Trials at the same step are averages of equally many.
        result: the epoch.
    """

    step: int
    score: float
    result: EpochResult


class Objective:
    """Trains configs to their ends, and scores them.

    Args:
        assembly: makes the trainings.
    """

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly

    def precision(self, config: TrialConfig) -> str:
        """What a config's forward passes are computed in here: `float32` or `bfloat16`."""
        return "float32" if self._assembly.autocast_dtype(config) is None else "bfloat16"

    def run(
        self,
        config: TrialConfig,
        *,
        seeds: int,
        test: bool = False,
        on_epoch: Callable[[Progress], None],
        should_stop: Callable[[], bool] = lambda: False,
        checkpoints: CheckpointStore | None = None,
        key: str = "",
        may_replace: Callable[[], bool] = lambda: True,
    ) -> float:
        """Train a config to its end, once for each seed, one after the other.

        Epochs' checkpoints are written beside the training, at most one in `CHECKPOINT_SECONDS`.
        Whenever this returns or raises, that of the last completed epoch is on the disk.

        Args:
            config: what to train; its `seed` is the first.
            seeds: how many trainings.
            test: whether to score the test images, once, with the weights that the last epoch
                leaves; of one training only.
            on_epoch: hears of every epoch in order, of most before their checkpoint is on the
                disk. After a resume it hears again of those that earlier attempts completed. What
                it raises ends the trial.
            should_stop: asked between two updates.
            checkpoints: where each completed epoch is kept; None keeps nothing.
            key: the checkpoint's name.
            may_replace: as of `CheckpointStore.writer`.

        Returns:
            The final epoch's validation accuracy, 0 to 1, averaged over seeds; with `test`, the
            accuracy on the test images.

        Raises:
            Diverged: a seed's training did.
            Interrupted: `should_stop` said so; the checkpoint has all completed epochs.
            CheckpointError: an epoch's could not be saved; the one before is intact. Raised after
                the next epoch at the latest, or instead of what ends the trial.
            ValueError: `test` is asked of several trainings.
        """
        if test and seeds != 1:
            raise ValueError(f"seeds is {seeds}: the test images are scored for one training")
        return_freed_memory()
        state = self._load(config, checkpoints, key)
        with (
            contextlib.nullcontext()
            if checkpoints is None
            else checkpoints.writer(key, every=CHECKPOINT_SECONDS, may_replace=may_replace)
        ) as writer:
            return self._train(config, seeds, test, on_epoch, should_stop, state, writer, key)

    def _train(
        self,
        config: TrialConfig,
        seeds: int,
        test: bool,
        on_epoch: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        state: dict[str, Any],
        writer: CheckpointWriter | None,
        key: str,
    ) -> float:
        finished: list[list[EpochResult]] = [
            [EpochResult(**r) for r in history] for history in state["finished"]
        ]
        for index, history in enumerate(finished):
            for result in history:
                on_epoch(self._progress(config, finished[:index], result))
        settings = json.dumps(config.as_dict())
        for index in range(len(finished), seeds):
            training = self._assembly.training(config, config.seed + index, should_stop)
            if state["training"] is not None:
                if not _restored(training, state["training"], key):
                    training = self._assembly.training(config, config.seed + index, should_stop)
                state["training"] = None
            before = json.dumps([[vars(r) for r in history] for history in finished])
            lines: list[str] = []
            for result in training.history:
                lines.append(json.dumps(vars(result)))
                on_epoch(self._progress(config, finished, result))
            for result in training.run():
                lines.append(json.dumps(vars(result)))
                if writer is not None:
                    # What is long and no tensor is text: to go through thousands of numbers takes
                    # milliseconds. JSON as Python writes it gives every float back as it was.
                    text = f"[{', '.join(lines)}]"
                    writer.save(
                        {
                            "config": settings,
                            "data_fingerprint": self._assembly.dataset.fingerprint,
                            "finished": before,
                            "training": {**training.state_dict(), "history": text},
                        }
                    )
                # Not once the checkpoint is on the disk: pruner and budgets are asked about every
                # epoch before the next begins. An epoch that was reported and not yet saved when
                # its worker was killed is forgotten, trained again and reported again, with the
                # same numbers.
                on_epoch(self._progress(config, finished, result))
            finished.append(training.history)
            if test:
                return self._assembly.test_accuracy(config, training.global_model())
        return sum(history[-1].val_accuracy for history in finished) / len(finished)

    @property
    def chance(self) -> float:
        """The accuracy of a guess, 1 over the number of classes."""
        return 1 / len(self._assembly.dataset.classes)

    def device_accuracies(
        self, config: TrialConfig, class_correct: Sequence[Sequence[int]]
    ) -> list[float | None]:
        """The devices' accuracies, 0 to 1, each a mean over seeds; as `Assembly` has them.

        Args:
            config: what was trained.
            class_correct: of each seed, as of its last epoch; empty as of an earlier version.

        Returns:
            One for each device; empty where a seed's training was of an earlier version.
        """
        if not all(class_correct):
            return []
        of_seeds = [self._assembly.device_accuracies(config, c) for c in class_correct]
        return [
            sum(accuracies) / len(accuracies)
            if (accuracies := [a for a in of_device if a is not None])
            else None
            for of_device in zip(*of_seeds, strict=True)
        ]

    def _progress(
        self,
        config: TrialConfig,
        finished: list[list[EpochResult]],
        result: EpochResult,
    ) -> Progress:
        accuracies = [h[-1].val_accuracy for h in finished] + [result.val_accuracy]
        return Progress(
            step=len(finished) * config.epochs + result.epoch,
            score=sum(accuracies) / len(accuracies),
            result=result,
        )

    def completed_steps(self, config: TrialConfig, checkpoints: CheckpointStore, key: str) -> int:
        """How many epochs, over all seeds, `run` would not train again."""
        state = self._load(config, checkpoints, key)
        running = len(state["training"]["history"]) if state["training"] else 0
        return len(state["finished"]) * config.epochs + running

    def trained(
        self, config: TrialConfig, checkpoints: CheckpointStore, key: str, *, seeds: int
    ) -> tuple[int, nn.Module] | None:
        """The network that a config's last training has ended with, as evaluation sees it.

        Args:
            config, checkpoints, key, seeds: as of `run`.

        Returns:
            The training's seed, and the network on the assembly's device; None where the
            checkpoint is missing, damaged, of other settings, of another version of sweep, or of a
            training under way, as one that another machine has ended.
        """
        state = self._load(config, checkpoints, key)
        if state["training"] is None or len(state["training"]["history"]) < config.epochs:
            return None
        if len(state["finished"]) != seeds - 1:
            return None
        seed = config.seed + seeds - 1
        training = self._assembly.training(config, seed)
        if not _restored(training, state["training"], key):
            return None
        return seed, training.global_model()

    def _load(
        self, config: TrialConfig, checkpoints: CheckpointStore | None, key: str
    ) -> dict[str, Any]:
        fresh: dict[str, Any] = {"finished": [], "training": None}
        state = checkpoints.load(key) if checkpoints is not None else None
        if state is None:
            return fresh
        try:
            state = _parsed(state)
            # An earlier version did not know all settings; it trained as their defaults do.
            of = {**TrialConfig.build({}).as_dict(), **state.get("config", {})}
            running = [] if state["training"] is None else [state["training"]["history"]]
            for history in (*state["finished"], *running):
                for result in history:
                    EpochResult(**result)
        except Exception as error:
            if not _is_misfit(error):
                raise
            logger.warning(_MISFIT, key, kind_and_line(error))
            return fresh
        here = (config.as_dict(), self._assembly.dataset.fingerprint)
        if (of, state.get("data_fingerprint")) != here:
            logger.warning("the checkpoint of %s is of other settings or images; not used", key)
            return fresh
        return state


_MISFIT = "the checkpoint of %s does not fit, as of another version of sweep (%s); not used"


def _restored(training: Training, state: dict[str, Any], key: str) -> bool:
    """Set a fresh training to a checkpoint's state; False, and it is no good, if that misfits."""
    try:
        training.load_state_dict(state)
    except Exception as error:
        if not _is_misfit(error):
            raise
        logger.warning(_MISFIT, key, kind_and_line(error))
        return False
    return True


def _is_misfit(error: Exception) -> bool:
    """Whether a checkpoint lacks or has what a state of this version does not, or has it in another
    shape. A device that fails or is full meanwhile raises errors of other kinds or other words."""
    if type(error) is RuntimeError:  # PyTorch's, of a state that is not the module's or tensor's
        # `Module.load_state_dict` says so of whatever befalls the copy of a tensor that fits.
        if "an exception occurred" in str(error):
            return False
        return any(word in str(error) for word in ("state_dict", "size of tensor", "shape"))
    return isinstance(error, AttributeError | IndexError | KeyError | TypeError | ValueError)


def _parsed(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with the values that stand in it as texts; earlier versions kept these."""
    parsed = {**state}
    for name in ("config", "finished"):
        if isinstance(state.get(name), str):
            parsed[name] = json.loads(state[name])
    training = state.get("training")
    if training is not None and isinstance(training["history"], str):
        parsed["training"] = {**training, "history": json.loads(training["history"])}
    return parsed
