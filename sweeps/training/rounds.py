"""What D simulated devices do together in a round.

An algorithm is an object with explicit state: `round` takes the devices' batches and the
learning rate and changes the weights; `state_dict` and `load_state_dict` carry what it
remembers from round to round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DeviceBatch(Protocol):
    """The images that the devices bring to one round, fused into one batch.

    Attributes:
        images: float `[B, C, H, W]`, on the training device.
        labels: int64 `[B]`.
        blocks: which samples belong to which device, as the model's forward takes it.
    """

    @property
    def images(self) -> Tensor: ...  # noqa: D102
    @property
    def labels(self) -> Tensor: ...  # noqa: D102
    @property
    def blocks(self) -> Any: ...  # noqa: D102


@dataclass(frozen=True)
class SGDSettings:
    """Settings of stochastic gradient descent, PyTorch's `torch.optim.SGD`.

    Attributes:
        momentum: factor of the previous update.
        weight_decay: L2 penalty.
        decay_scalars: whether the penalty touches the group "scalars" too.
        scalar_lr_factor: learning rate of the group "scalars", as a share of the weights'.
        clip_grad_norm: the gradient's norm over all parameters is scaled down to this where it
            is larger; None leaves it.
    """

    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_scalars: bool = True
    scalar_lr_factor: float = 1.0
    clip_grad_norm: float | None = None


class SynchronousSGD:
    """Every device computes a gradient on its own local batch; all take the averaged step.

    The gradient is averaged over examples: with devices d holding b_d of the B images of the
    global batch it is sum_d (b_d / B) * gradient_d. Since there is one weight vector, that
    equals one backward pass over the fused batch, provided that a layer which looks across
    samples looks at one device's only; the batch's blocks tell the model where devices end.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, Sequence[nn.Parameter]],
        settings: SGDSettings,
        *,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self._model = model
        self._clip = settings.clip_grad_norm
        self._autocast_dtype = autocast_dtype
        self._parameters = [p for parameters in groups.values() for p in parameters]
        device = self._parameters[0].device
        self._device_type = device.type
        param_groups = [
            {
                "params": list(parameters),
                "weight_decay": settings.weight_decay
                if name != "scalars" or settings.decay_scalars
                else 0.0,
                "lr_factor": settings.scalar_lr_factor if name == "scalars" else 1.0,
            }
            for name, parameters in groups.items()
            if parameters
        ]
        self._optimizer = torch.optim.SGD(
            param_groups,
            lr=0.0,
            momentum=settings.momentum,
            fused=True if device.type == "cuda" else None,
        )

    def round(self, batch: DeviceBatch, lr: float) -> Tensor:
        """Take one step.

        Args:
            batch: the devices' local batches.
            lr: learning rate of the weights.

        Returns:
            The loss averaged over examples, a 0-d tensor on the training device.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            self._device_type,
            dtype=self._autocast_dtype,
            enabled=self._autocast_dtype is not None,
        ):
            logits = self._model(batch.images, batch.blocks)
            loss = F.cross_entropy(logits, batch.labels)
        loss.backward()
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        return loss.detach()

    def global_model(self) -> nn.Module:
        """The model to evaluate, which all devices share."""
        return self._model

    def state_dict(self) -> dict[str, Any]:
        """The model's weights and buffers and the optimizer's memory."""
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
