"""Epoch after epoch: rounds, validation, the schedule, and the two faces of divergence.

The loop yields and its caller decides: about reports, pruning and checkpoints it knows
nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sweeps.training.rounds import DeviceBatch
from sweeps.training.schedule import Schedule

EXPLODED_LOSS_FACTOR = 20.0
"""A step's loss above this many times ln(classes) has exploded.

An untrained network starts within a few times a constant guess; the explosions that were
measured passed 1e3 within a few updates of leaving that range.
"""

DEAD_LOSS_SHARE = 0.98
"""A dead network's training loss stays at or above this share of a constant guess's; both are
counted from the least loss there is."""

DEAD_EPOCHS = 3
"""Consecutive epochs at the loss of a constant guess, all predictions alike and coming no further
apart, that end a training."""

CHECK_EVERY = 25
"""Updates between two looks at the loss where looking would stall the device."""


class Diverged(Exception):
    """The training cannot recover. Its text is the reason.

    Attributes:
        epoch: completed epochs before it happened.
    """

    def __init__(self, reason: str, epoch: int) -> None:
        super().__init__(reason)
        self.epoch = epoch


class Interrupted(Exception):
    """`should_stop` said so, between two updates."""


@dataclass(frozen=True)
class EpochResult:
    """What one epoch yielded.

    Attributes:
        epoch: completed epochs, from 1.
        train_loss: mean cross-entropy over the epoch's images, in nats, as they were trained:
            with the labels smoothed, where that is set.
        val_loss: mean cross-entropy over the validation images, with their labels as they are.
        val_accuracy: share of the validation images classified correctly, 0 to 1.
        predicted_classes: how many classes the validation predictions name at all.
        lr: learning rate of the weights in the epoch's last update.
        seconds: wall-clock time of the epoch, validation included.
        images_per_second: training images over the time that training took.
        logit_range: how far a logit lies apart between validation images, at most over classes.
        class_correct: of each class, how many of its validation images are classified correctly.
    """

    epoch: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    predicted_classes: int
    lr: float
    seconds: float
    images_per_second: float
    # Not in checkpoints of earlier versions.
    logit_range: float = 0.0
    class_correct: list[int] = field(default_factory=list)


class Algorithm(Protocol):
    """What `sweeps.training.rounds` offers: one round, its network, and its state."""

    def round(self, batch: DeviceBatch, lr: float) -> Tensor: ...  # noqa: D102
    def global_model(self) -> nn.Module: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # noqa: D102


class Batches(Protocol):
    """The batches of any epoch, as a function of its number."""

    updates_per_epoch: int
    images_per_epoch: int

    def epoch(self, epoch: int) -> Iterator[DeviceBatch]: ...  # noqa: D102


class Training:
    """One training that can stop after any epoch and go on from its state.

    Args:
        algorithm: what a round does.
        batches: the devices' images, epoch by epoch.
        evaluate: scores the validation images.
        schedule: learning rate by update.
        epochs: how many there are in all.
        guess_loss: cross-entropy of the best constant guess, in nats: ln(classes) where they
            are equally frequent. A dead network is at it. With smoothed labels it is theirs.
        untrained_loss: cross-entropy of equal guesses, ln(classes). An exploded loss is far
            above it.
        least_loss: cross-entropy of perfect answers: 0, or more where labels are smoothed.
        should_stop: asked between two updates.
    """

    def __init__(
        self,
        *,
        algorithm: Algorithm,
        batches: Batches,
        evaluate: Callable[[], Evaluation],
        schedule: Schedule,
        epochs: int,
        guess_loss: float,
        untrained_loss: float,
        least_loss: float = 0.0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._algorithm = algorithm
        self._batches = batches
        self._evaluate = evaluate
        self._schedule = schedule
        self._epochs = epochs
        self._untrained_loss = untrained_loss
        # Smoothed labels leave less than `guess_loss` to gain.
        self._dead_loss = least_loss + DEAD_LOSS_SHARE * (guess_loss - least_loss)
        self._should_stop = should_stop
        self.history: list[EpochResult] = []
        """One result for each completed epoch, those before a resume included."""

    def run(self) -> Iterator[EpochResult]:
        """Train epoch after epoch, from where the state stands.

        Yields:
            Each epoch's result when the epoch is complete; `state_dict` then describes it.

        Raises:
            Diverged: a loss was not finite or exploded (raised within the epoch), or the
                network is dead: its loss sat at a constant guess's with all predictions alike,
                and came no nearer to telling images apart, for `DEAD_EPOCHS` epochs past the
                warmup (raised after the epoch was yielded).
            Interrupted: `should_stop` said so; the running epoch is lost.
        """
        # A training that was stopped right after the epoch that showed it dead is still dead.
        self._raise_if_dead()
        while len(self.history) < self._epochs:
            result = self._run_epoch(len(self.history))
            self.history.append(result)
            yield result
            self._raise_if_dead()

    def global_model(self) -> nn.Module:
        """The network that the epochs so far have trained, to be evaluated."""
        return self._algorithm.global_model()

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on, as tensors and plain values."""
        return {
            "algorithm": self._algorithm.state_dict(),
            "schedule": self._schedule.state_dict(),
            "history": [dict(vars(result)) for result in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; epochs that it holds are not run again."""
        self._algorithm.load_state_dict(state["algorithm"])
        self._schedule.load_state_dict(state["schedule"])
        self.history = [EpochResult(**result) for result in state["history"]]

    def _run_epoch(self, epoch: int) -> EpochResult:
        started = time.perf_counter()
        first = epoch * self._batches.updates_per_epoch
        total: Tensor | None = None
        largest: Tensor | None = None
        images, lr, update = 0, 0.0, first
        for update, batch in enumerate(self._batches.epoch(epoch), start=first):
            if self._should_stop():
                raise Interrupted
            lr = self._schedule.lr(update)
            loss = self._algorithm.round(batch, lr)
            count = batch.labels.shape[0]
            images += count
            total = loss * count if total is None else total + loss * count
            largest = loss if largest is None else torch.maximum(largest, loss)
            # A look at the loss makes a GPU's queue run dry; on a CPU it is free.
            if loss.device.type == "cpu" or (update - first) % CHECK_EVERY == 0:
                self._raise_if_exploded(largest, epoch, update)
        assert total is not None
        assert largest is not None
        self._raise_if_exploded(largest, epoch, update)
        train_loss = total.item() / images
        trained = time.perf_counter()
        scored = self._evaluate()
        if not math.isfinite(scored.loss):
            raise Diverged(f"validation loss is not finite after update {update}", epoch)
        self._schedule.end_epoch(first, scored.accuracy)
        finished = time.perf_counter()
        return EpochResult(
            epoch=epoch + 1,
            train_loss=train_loss,
            val_loss=scored.loss,
            val_accuracy=scored.accuracy,
            predicted_classes=scored.predicted_classes,
            lr=lr,
            seconds=finished - started,
            images_per_second=images / (trained - started),
            logit_range=scored.logit_range,
            class_correct=list(scored.class_correct),
        )

    def _raise_if_exploded(self, largest: Tensor, epoch: int, update: int) -> None:
        loss = float(largest)
        if not math.isfinite(loss):
            raise Diverged(f"loss is not finite at update {update}", epoch)
        if loss > EXPLODED_LOSS_FACTOR * self._untrained_loss:
            raise Diverged(f"loss exploded to {loss:.3g} at update {update}", epoch)

    def _raise_if_dead(self) -> None:
        warmup_epochs = math.ceil(self._schedule.warmup_updates / self._batches.updates_per_epoch)
        recent = self.history[warmup_epochs:][-DEAD_EPOCHS:]
        if len(recent) < DEAD_EPOCHS:
            return
        alike = all(r.predicted_classes == 1 and r.train_loss >= self._dead_loss for r in recent)
        # Fixup begins as a constant guess. At a low rate it takes many epochs to leave it, in which
        # its logits come apart all the time; those of a dead network do not.
        if alike and recent[-1].logit_range <= recent[0].logit_range:
            raise Diverged(
                f"network is dead: loss {recent[-1].train_loss:.3f} is a constant guess's, "
                f"all predictions alike for {DEAD_EPOCHS} epochs",
                len(self.history),
            )


class Evaluation(NamedTuple):
    """Scores of a model on some images; the fields are as in :class:`EpochResult`."""

    loss: float
    accuracy: float
    predicted_classes: int
    logit_range: float
    class_correct: Sequence[int] = ()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: Sequence[Tensor],
    labels: Tensor,
    *,
    autocast_dtype: torch.dtype | None = None,
) -> Evaluation:
    """Score a model, in evaluation mode; it is left in training mode.

    Args:
        model: gives logits `[N, classes]`.
        images: normalised batches, float `[N_i, C, H, W]`.
        labels: int64 `[sum N_i]`, in the same order.
        autocast_dtype: as in training.

    Returns:
        Mean cross-entropy in nats, accuracy from 0 to 1, the number of classes that the
        predictions name, the widest range of a class's logit over the images, and of each class
        how many of its images are classified correctly.
    """
    model.eval()
    with torch.autocast(
        labels.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None
    ):
        logits = torch.cat([model(batch).float() for batch in images])
    model.train()
    predictions = logits.argmax(1)
    loss = F.cross_entropy(logits, labels).item()
    right = predictions == labels
    accuracy = right.double().mean().item()
    logit_range = (logits.amax(0) - logits.amin(0)).max().item()
    classes = int(torch.bincount(predictions).count_nonzero())
    class_correct = torch.bincount(labels[right], minlength=logits.shape[1]).tolist()
    return Evaluation(loss, accuracy, classes, logit_range, class_correct)
