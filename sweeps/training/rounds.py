"""What D simulated devices do together in a round.

An algorithm is an object with explicit state: `round` takes the devices' batches and the
learning rate and changes the weights; `state_dict` and `load_state_dict` carry what it
remembers from round to round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sweeps.training.clipping import clip_units_
from sweeps.training.compiled import CompiledNetwork
from sweeps.training.lars import LARS
from sweeps.training.muon import Muon
from sweeps.training.optimizers import SGD


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
    """Settings of stochastic gradient descent, PyTorch's `torch.optim.SGD`, of LARS or of Muon.

    Attributes:
        momentum: factor of the previous update.
        weight_decay: L2 penalty.
        decay_scalars: whether the penalty touches the group "scalars" too.
        scalar_lr_factor: learning rate of the group "scalars", as a share of the weights' (under
            Muon of the classifier's).
        clip_grad_norm: the gradient's norm over all parameters is scaled down to this where it
            is larger; None leaves it.
        nesterov: Nesterov's form of the momentum.
        lars_trust_coefficient: η of `LARS`, which then takes the place of SGD: the group
            "scalars" takes plain steps, every other parameter is a layer; None is SGD.
        muon_lr_factor: learning rate of the weights under `Muon`, which then takes the place of
            SGD, as a share of the classifier's weights', whose steps stay those of SGD, as those
            of the group "scalars" do; None is SGD.
        muon_weight_decay: share of their learning rate by which the weights under Muon shrink in
            a step; they have no L2 penalty.
        agc_clip_factor: λ of adaptive gradient clipping (`sweeps.training.clipping`) of the
            weights, before `clip_grad_norm`; None leaves the gradient.
        label_smoothing: share ε of each label that is spread over all classes, the true one
            included (Szegedy et al. 2016, arXiv 1512.00567, section 7).
    """

    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_scalars: bool = True
    scalar_lr_factor: float = 1.0
    clip_grad_norm: float | None = None
    nesterov: bool = False
    lars_trust_coefficient: float | None = None
    muon_lr_factor: float | None = None
    muon_weight_decay: float = 0.0
    agc_clip_factor: float | None = None
    label_smoothing: float = 0.0


def param_groups(
    groups: Mapping[str, Sequence[nn.Parameter | Tensor]], settings: SGDSettings
) -> list[dict[str, Any]]:
    """The groups as an optimizer takes them, with what the settings say of each.

    `lr_factor` is the group's share of the weights' learning rate; `layerwise` says whether LARS
    scales its tensors.
    """
    return [
        {
            "params": list(parameters),
            "weight_decay": settings.weight_decay
            if name != "scalars" or settings.decay_scalars
            else 0.0,
            "lr_factor": settings.scalar_lr_factor if name == "scalars" else 1.0,
            "layerwise": name != "scalars",
        }
        for name, parameters in groups.items()
        if parameters
    ]


def optimizer_of(
    groups: Mapping[str, Sequence[nn.Parameter | Tensor]],
    settings: SGDSettings,
    classifier: Collection[int],
    *,
    dtype: torch.dtype | None,
    stacked: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of the settings, its learning rate 0 until a round sets it.

    Args:
        groups: parameters by group.
        settings: of the optimizer.
        classifier: ids of the parameters that Muon leaves to SGD.
        dtype: what Muon orthogonalises in; None is the parameters' own.
        stacked: whether the parameters are `[D, ...]`, of D networks that train apart.

    Raises:
        ValueError: LARS for stacked parameters.
    """
    described = param_groups(groups, settings)
    if settings.lars_trust_coefficient is not None:
        if stacked:
            raise ValueError("the devices' local optimizer cannot be LARS; accepted: SGD, Muon")
        return LARS(
            described,
            lr=0.0,
            momentum=settings.momentum,
            trust_coefficient=settings.lars_trust_coefficient,
            nesterov=settings.nesterov,
        )
    if settings.muon_lr_factor is not None:
        return Muon(
            _with_matrices(described, classifier, settings, stacked=stacked),
            lr=0.0,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            dtype=dtype,
            stacked=stacked,
        )
    return SGD(
        described, lr=0.0, momentum=settings.momentum, nesterov=settings.nesterov, fused=True
    )


def rows_of(participants: Tensor, of_all: Tensor) -> Tensor:
    """The participants' rows, `[m, ...]`, of what all D devices have, `[D, ...]`.

    Args:
        participants: their numbers in order, int64 `[m]`.
        of_all: itself given back where all take part.
    """
    if len(participants) == len(of_all):
        return of_all
    return of_all.index_select(0, participants)


class SynchronousSGD:
    """Every device computes a gradient on its own local batch; all take the averaged step.

    The gradient is averaged over examples: with devices d holding b_d of the B images of the
    global batch it is sum_d (b_d / B) * gradient_d. Since there is one weight vector, that
    equals one backward pass over the fused batch, provided that a layer which looks across
    samples looks at one device's only; the batch's blocks tell the model where devices end.

    Args:
        model: called as `model(images, blocks)`.
        groups: its parameters; the group "scalars" has settings of its own.
        settings: of the step.
        classifier: those of the last linear layer, which adaptive gradient clipping and Muon
            leave out.
        autocast_dtype: of the forward pass; None leaves it in the parameters' own.
        compiled: whether training passes through `CompiledNetwork`; the model is evaluated as it
            is.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, Sequence[nn.Parameter]],
        settings: SGDSettings,
        *,
        classifier: Collection[nn.Parameter] = (),
        autocast_dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        self._model = model
        self._forward = CompiledNetwork(model) if compiled else model
        self._settings = settings
        self._autocast_dtype = autocast_dtype
        self._parameters = [p for parameters in groups.values() for p in parameters]
        spared = {id(p) for p in classifier}
        self._clipped_by_unit = [p for p in self._parameters if id(p) not in spared]
        device = self._parameters[0].device
        self._device_type = device.type
        self._optimizer = optimizer_of(groups, settings, spared, dtype=autocast_dtype)

    def round(self, batch: DeviceBatch, lr: float) -> Tensor:
        """Take one step.

        Args:
            batch: the devices' local batches.
            lr: learning rate of the weights; under Muon of the classifier's, of which the others
                have their share.

        Returns:
            The loss that was trained, averaged over examples, a 0-d tensor on the training
            device.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            self._device_type,
            dtype=self._autocast_dtype,
            enabled=self._autocast_dtype is not None,
        ):
            logits = self._forward(batch.images, batch.blocks)
            loss = F.cross_entropy(
                logits, batch.labels, label_smoothing=self._settings.label_smoothing
            )
        loss.backward()
        if self._settings.agc_clip_factor is not None:
            clip_units_(
                ((p, p.grad) for p in self._clipped_by_unit if p.grad is not None),
                self._settings.agc_clip_factor,
            )
        if self._settings.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.clip_grad_norm)
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


def _with_matrices(
    groups: Sequence[dict[str, Any]],
    classifier: Collection[int],
    settings: SGDSettings,
    *,
    stacked: bool,
) -> list[dict[str, Any]]:
    """The groups with what `Muon` orthogonalises in one of its own.

    Args:
        groups: as of `param_groups`.
        classifier: ids of parameters that are left out.
        settings: those of the new group.
        stacked: whether the parameters are `[D, ...]`.
    """
    fewest = 3 if stacked else 2
    parts: list[dict[str, Any]] = []
    for group in groups:
        matrices = [p for p in group["params"] if p.ndim >= fewest and id(p) not in classifier]
        others = [p for p in group["params"] if p.ndim < fewest or id(p) in classifier]
        if matrices:
            parts.append(
                group
                | {
                    "params": matrices,
                    "matrices": True,
                    "lr_factor": settings.muon_lr_factor,
                    "weight_decay": settings.muon_weight_decay,
                }
            )
        if others:
            parts.append(group | {"params": others, "matrices": False})
    return parts
