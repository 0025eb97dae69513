"""The learning rate of each update: a warmup, then plateau, cosine, exponential or constant.

The linear warmup is that of Goyal et al. 2017 (arXiv 1706.02677), section 2.2, counted in
updates. The other two shapes have the same ends.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sweeps.training.optimizers import SGD

SCHEDULES = ("plateau", "cosine", "exponential", "constant")
WARMUP_SHAPES = ("linear", "cosine", "exponential")


class Schedule:
    """Learning rate as a function of the update, with explicit state.

    With W warmup updates out of T, update u (from 0) gets, times `peak_lr`,

    - for u < W, with the start factor s, so that the first update has s and update W 1:
      `s + (1 - s) * u / W` (`linear`), `s + (1 - s) * (1 - cos(pi * u / W)) / 2` (`cosine`,
      half a period, as the `cosine` schedule mirrored), or `s ** (1 - u / W)` (`exponential`,
      each update the same multiple of the one before);
    - afterwards, what the plateau rule has left (`plateau`),
      `(1 + cos(pi * (u - W) / (T - W))) / 2` (`cosine`, Loshchilov & Hutter 2017,
      arXiv 1608.03983, without restarts), `gamma ** n` with n the whole epochs since the warmup
      (`exponential`, PyTorch's `ExponentialLR` stepped once an epoch), or 1 (`constant`).

    The plateau rule is PyTorch's `ReduceLROnPlateau` on the validation accuracy, consulted at
    the end of each epoch that began after the warmup.

    Args:
        peak_lr: learning rate after the warmup.
        warmup_start_factor: s above.
        warmup_updates: W above.
        total_updates: T above.
        kind: one of `SCHEDULES`, what follows the warmup.
        plateau_factor, plateau_patience, plateau_threshold: as `factor`, `patience` (epochs) and
            the relative `threshold` of PyTorch's `ReduceLROnPlateau`.
        warmup_shape: one of `WARMUP_SHAPES`.
        exponential_gamma: gamma above.
        updates_per_epoch: for `exponential`.

    Raises:
        ValueError: kind or warmup_shape is unknown.
    """

    def __init__(
        self,
        *,
        peak_lr: float,
        warmup_start_factor: float,
        warmup_updates: int,
        total_updates: int,
        kind: str,
        plateau_factor: float = 0.1,
        plateau_patience: int = 10,
        plateau_threshold: float = 1e-4,
        warmup_shape: str = "linear",
        exponential_gamma: float = 0.97,
        updates_per_epoch: int = 1,
    ) -> None:
        for what, name, accepted in (
            ("schedule", kind, SCHEDULES), ("warmup_shape", warmup_shape, WARMUP_SHAPES)
        ):  # fmt: skip
            if name not in accepted:
                known = ", ".join(map(repr, accepted))
                raise ValueError(f"{what} {name!r} is unknown; accepted: {known}")
        self.peak_lr = peak_lr
        self.warmup_start_factor = warmup_start_factor
        self.warmup_updates = warmup_updates
        self.total_updates = total_updates
        self.kind = kind
        self.warmup_shape = warmup_shape
        self.exponential_gamma = exponential_gamma
        self.updates_per_epoch = updates_per_epoch
        # The scheduler scales the rate of a stand-in optimizer from 1.
        self._scale = SGD([torch.zeros(1)], lr=1.0)
        self._plateau = ReduceLROnPlateau(
            self._scale,
            mode="max",
            factor=plateau_factor,
            patience=plateau_patience,
            threshold=plateau_threshold,
        )

    def lr(self, update: int) -> float:
        """Learning rate of update `update`, counted from 0 over the whole training."""
        if update < self.warmup_updates:
            return self.peak_lr * self._warmup(update)
        if self.kind == "plateau":
            return self.peak_lr * float(self._scale.param_groups[0]["lr"])
        if self.kind == "cosine":
            rest = max(1, self.total_updates - self.warmup_updates)
            return (
                self.peak_lr * (1 + math.cos(math.pi * (update - self.warmup_updates) / rest)) / 2
            )
        if self.kind == "exponential":
            epochs = (update - self.warmup_updates) // self.updates_per_epoch
            return self.peak_lr * self.exponential_gamma**epochs
        return self.peak_lr

    def _warmup(self, update: int) -> float:
        """Share of the peak that an update of the warmup gets."""
        start = self.warmup_start_factor
        if self.warmup_shape == "cosine":
            rise = (1 - math.cos(math.pi * update / self.warmup_updates)) / 2
            return start + (1 - start) * rise
        if self.warmup_shape == "exponential":
            return float(start ** (1 - update / self.warmup_updates))
        return start + (1 - start) * update / self.warmup_updates

    def end_epoch(self, first_update: int, val_accuracy: float) -> None:
        """Tell the plateau rule how an epoch ended.

        Args:
            first_update: the epoch's first update; one before the warmup's end does not count.
            val_accuracy: 0 to 1.
        """
        if self.kind == "plateau" and first_update >= self.warmup_updates:
            self._plateau.step(val_accuracy)

    def state_dict(self) -> dict[str, Any]:
        """What `end_epoch` has changed, as plain values."""
        plateau = self._plateau
        return {
            "scale": self._scale.param_groups[0]["lr"],
            "best": plateau.best,
            "num_bad_epochs": plateau.num_bad_epochs,
            "last_epoch": plateau.last_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._scale.param_groups[0]["lr"] = state["scale"]
        self._plateau.best = state["best"]
        self._plateau.num_bad_epochs = state["num_bad_epochs"]
        self._plateau.last_epoch = state["last_epoch"]
