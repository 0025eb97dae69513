"""Federated Averaging and its relatives: D weight vectors that meet every H local steps.

Between two averages every device d takes H steps of SGD, or of Muon, on its own copy y_d of the
weights, on its own local batches; then the server, which holds the weights x that they all started
from, makes new ones out of the copies. With partial participation only m of the D devices take part
in a round, and S, the set of them, is another in the next; everything below happens to those in
S, who all start the round from x.

Devices bring equally many images to every step and take equally many steps, however many images
they hold. Their weights in the average, w_d with Σ_{d∈S} w_d = 1, decide what they minimise
together, where F_d is the mean loss over the images of device d:

- uniform, w_d = 1/m: the mean of the devices' losses, Σ_d F_d / D, as in `SynchronousSGD`;
- by images, w_d = n_d / Σ_{k∈S} n_k for devices that hold n_d images: Σ_d n_d F_d / Σ_k n_k, the
  mean loss over all images (McMahan et al. 2017, algorithm 1). An image that several devices
  hold, as shared ones are, counts once for each. Participants are drawn uniformly, so with
  m < D this holds up to the variation of Σ_{k∈S} n_k.

That is exact for H = 1, plain SGD and all devices; with more local steps, copies drift towards
their own minima, and their average has a bias that no weights take away.

The server makes its new weights of that average by FedAvg, FedAvgM or FedAdam
(`sweeps.training.server`). What a device may add to the gradient g_d of its loss, each with any of
these servers, is

- FedProx (Li et al. 2020, arXiv 1812.06127, equation 2): μ(y_d - x), the gradient of the
  proximal term (μ/2)·|y_d - x|²;
- SCAFFOLD's control variates (`sweeps.training.control_variates`).

Clipping, per device, limits g_d alone: like the L2 penalty, what these two add comes after. Virtual
features (`sweeps.training.virtual_features`) are a part of the loss, and so of g_d.

With Muon in the local steps and averaged momentum this is FedMuon (Liu et al. 2025, arXiv
2510.27403) without its global direction. Control variates then act before the orthogonalisation,
and against its bias where devices differ (Takezawa et al. 2025, arXiv 2509.26337).

Momentum buffers, which none of the older papers' local steps have, are averaged like weights, with
the same w_d, and given to the next participants; or reset to zero at every average; or, where all
devices take part, kept by them. Averaged, FedAvg with H = 1 and uniform weights is
`SynchronousSGD`.

Batch Normalization's running statistics stay with their devices, and with those that sit a round
out they stay as they are. They have no part in training, and the model aggregates them for
evaluation by the plain mean over those that trained; where all take part it is the same whether or
not they are also averaged in between, as they are exponential averages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from sweeps.training.clipping import clip_units_
from sweeps.training.control_variates import ControlVariates
from sweeps.training.rounds import DeviceBatch, SGDSettings, optimizer_of, rows_of
from sweeps.training.server import SERVER_OPTIMIZERS, Server
from sweeps.training.virtual_features import VirtualFeatures

Tensors: TypeAlias = dict[str, Tensor]

LOCAL_MOMENTA = ("average", "keep", "reset")

LARGE_MAPS = 2**17
"""Elements of a device's first maps above which a CPU takes the devices one by one.

Up to it, one pass for all saves the overhead of D small ones; above, its grouped convolutions cost
more than that. Ten devices on one core, one by one against all at once: ResNet-8 of width 0.5 on
8x8 images in batches of 8, 3.1 (Group Normalization), 3.6 (Fixup) and 4.6 times the time (Batch
Normalization); of width 1 on 32x32 images in batches of 8, which is as many elements as this, 0.95,
1.2 and 1.4; in batches of 32, 0.7, 0.7 and 0.8. ResNet-18 of width 0.5 on 16x16 images in batches
of 8, 1.1, 1.1 and 1.1; in batches of 32, twice as many as this, 0.8, 0.8 and 0.9.
"""

LARGE_PRODUCTS = 2**27
"""Parameters times images of a device above which it does so too, however small the maps are.

ResNet-18 on 8x8 images, as above: in batches of 8, 1.1, 1.1 and 1.0; in batches of 32, two and a
half times as many as this, 0.8, 0.8 and 0.8.
"""


@dataclass(frozen=True)
class FederatedSettings:
    """What happens between devices and server; the modules' docstrings have the rules.

    Attributes:
        local_steps: H.
        local_momentum: what an average does to the devices' momentum: "average", "keep" or
            "reset".
        proximal_mu: FedProx's μ; 0 leaves the term out.
        control_variates: whether the devices correct their gradients as SCAFFOLD does.
        server_optimizer: "sgd" (FedAvg, FedAvgM) or "adam" (FedAdam).
        server_lr: η of the server; FedAvg has 1.
        server_momentum: β of FedAvgM, β₁ of FedAdam; FedAvg has 0.
        server_beta2: β₂ of FedAdam.
        server_epsilon: τ of FedAdam.
        virtual_features: λ of the virtual features' loss; 0 leaves it out.
    """

    local_steps: int = 1
    local_momentum: str = "average"
    proximal_mu: float = 0.0
    control_variates: bool = False
    server_optimizer: str = "sgd"
    server_lr: float = 1.0
    server_momentum: float = 0.0
    server_beta2: float = 0.99
    server_epsilon: float = 1e-3
    virtual_features: float = 0.0


class FederatedAveraging:
    """D devices train their own copies of the weights, all at once, and average them.

    The copies are stacked: for each parameter of the model a tensor `[m, ...]`, with m = D where
    all devices take part in every round. One forward pass of all m, side by side or, where each is
    large, one after the other, and one backward pass give every device the gradient of its own
    loss; since SGD works element by element, and Muon network by network, one optimizer on the
    stacked tensors is m separate ones. What the D devices remember from one turn to the next,
    control variates and running statistics, is `[D, ...]`.

    `round` is one local step of the participants; every H-th ends with an average. The model
    given lends its structure and keeps the buffers; its parameters are only those that
    `global_model` writes there to be evaluated.

    Args:
        model: called as `model(images, blocks)`; its weights are where all devices start.
        groups: its parameters, as for `SynchronousSGD`.
        settings: of the local steps.
        federated: of everything else.
        num_devices: D.
        devices_per_round: m, the devices that take part in a round; None is all.
        image_counts: n_d, images that each of the D devices holds, to weigh its part in the
            averages; None weighs all alike.
        class_counts: images of each class that each of the D devices holds, D rows of as many
            numbers as the model has logits; virtual features need it.
        classifier: as for `SynchronousSGD`.
        autocast_dtype: of the forward pass; None leaves it in the parameters' own.
        stacked_forward: the same as mapping `model` over the devices, in a faster way: from their
            parameters `[m, ...]`, their buffers `[m, 1, ...]`, written in place, and the batch's
            images to its logits. None maps.

    Raises:
        ValueError: a setting is not known, the model has layers whose statistics all devices
            share in every step, or the local optimizer is LARS.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, Sequence[nn.Parameter]],
        settings: SGDSettings,
        federated: FederatedSettings,
        *,
        num_devices: int,
        devices_per_round: int | None = None,
        image_counts: Sequence[int] | None = None,
        class_counts: Sequence[Sequence[int]] | None = None,
        classifier: Collection[nn.Parameter] = (),
        autocast_dtype: torch.dtype | None = None,
        stacked_forward: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor], Tensor]
        | None = None,
    ) -> None:
        m = num_devices if devices_per_round is None else devices_per_round
        _check(model, federated, num_devices, m, image_counts)
        self._model = model
        self._settings = federated
        self._clip = settings.clip_grad_norm
        self._agc = settings.agc_clip_factor
        self._label_smoothing = settings.label_smoothing
        self._autocast_dtype = autocast_dtype
        self._stacked_forward = stacked_forward
        self._num_devices = num_devices
        self._devices_per_round = m
        self._steps = 0
        # Of each parameter, in the order of `model.parameters()`: x, and the m copies of it.
        self._global = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._local = {
            name: torch.stack([x] * m).requires_grad_() for name, x in self._global.items()
        }
        # Views: what the devices' passes write there, the model has.
        self._buffers = {name: b.unsqueeze(1) for name, b in model.named_buffers()}
        device = next(iter(self._global.values())).device
        self._participants = torch.arange(m, device=device)
        self._image_counts = (
            None
            if image_counts is None
            else torch.tensor(list(image_counts), dtype=torch.float64, device=device)
        )
        names = {p: name for name, p in model.named_parameters()}
        self._first_channels = next((p.shape[0] for p in names if p.ndim == 4), 1)
        self._num_parameters = sum(p.numel() for p in names)
        self._classifier = {names[p] for p in classifier}
        stacked = {
            group: [self._local[names[p]] for p in parameters]
            for group, parameters in groups.items()
        }
        self._optimizer = optimizer_of(
            stacked,
            settings,
            {id(self._local[name]) for name in self._classifier},
            dtype=autocast_dtype,
            stacked=True,
        )
        # The L2 penalty, a part of what a device minimises; that of Muon's matrices is none.
        self._weight_decay = {
            p: 0.0 if group.get("matrices") else group["weight_decay"]
            for group in self._optimizer.param_groups
            for p in group["params"]
        }
        self._server = Server(
            self._global,
            optimizer=federated.server_optimizer,
            lr=federated.server_lr,
            momentum=federated.server_momentum,
            beta2=federated.server_beta2,
            epsilon=federated.server_epsilon,
        )
        self._variates = (
            ControlVariates(self._global, num_devices, m) if federated.control_variates else None
        )
        self._virtual: VirtualFeatures | None = None
        if federated.virtual_features:
            if len(self._classifier) != 2:
                raise ValueError("virtual features need the classifier: its weight and its bias")
            self._virtual = VirtualFeatures(
                self._global[self._head("weight")], class_counts, image_counts or [1] * num_devices
            )

    def round(self, batch: DeviceBatch, lr: float) -> Tensor:
        """Take one local step on every participant, and average after every H-th.

        Args:
            batch: the participants' local batches, equally large. Where m < D its one block
                names them; they are the same m devices in all H steps from one average to the
                next.
            lr: learning rate of the local steps; under Muon of the classifier's, of which the
                others have their share.

        Returns:
            The cross-entropy of the images averaged over participants, a 0-d tensor on the
            training device.

        Raises:
            ValueError: the devices bring different numbers of images, or another number of
                devices than m takes part.
        """
        per_device = self._take_part(batch)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._optimizer.zero_grad(set_to_none=True)
        losses = self._backward(batch, per_device)
        if self._virtual is not None:
            if self._steps % self._settings.local_steps == 0:
                self._virtual.observe(self._features(batch), batch.labels)
            weight, bias = (self._local[self._head(p)] for p in ("weight", "bias"))
            virtual = self._virtual.losses(weight, bias, self._participants)
            (self._settings.virtual_features * virtual.sum()).backward()
        with torch.no_grad():
            self._change_gradients()
            self._optimizer.step()
            self._steps += 1
            if self._steps % self._settings.local_steps == 0:
                self._update_global()
                if self._variates is not None:
                    self._variates.update(self._participants, self._settings.local_steps)
                self._update_momentum()
        return losses.mean()

    @torch.no_grad()
    def global_model(self) -> nn.Module:
        """The model to evaluate: the participants' weights as they are now, averaged.

        Right after an average those are the server's; in between, what plain averaging would
        give. No state of the training changes.
        """
        for name, parameter in self._model.named_parameters():
            parameter.copy_(self._mean(self._local[name]))
        return self._model

    def state_dict(self) -> dict[str, Any]:
        """Every weight vector, buffer and memory, of the devices and of the server."""
        return {
            "steps": self._steps,
            "participants": self._participants,
            "global": self._global,
            "local": {name: y.detach() for name, y in self._local.items()},
            "buffers": dict(self._model.named_buffers()),
            "optimizer": self._optimizer.state_dict(),
            "server": self._server.memory,
            "variates": {} if self._variates is None else self._variates.state,
            "virtual": {} if self._virtual is None else self._virtual.statistics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._steps = state["steps"]
        self._participants = state["participants"].to(self._participants.device, copy=True)
        with torch.no_grad():
            _copy(self._global, state["global"])
            _copy(self._local, state["local"])
            _copy(dict(self._model.named_buffers()), state["buffers"])
            for memory, ours in self._server.memory.items():
                _copy(ours, state["server"][memory])
            if self._variates is not None:
                for variates, ours in self._variates.state.items():
                    _copy(ours, state["variates"][variates])
            if self._virtual is not None:
                _copy(self._virtual.statistics, state["virtual"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _take_part(self, batch: DeviceBatch) -> int:
        """Note who brought a batch; return how many images each did."""
        D, m = self._num_devices, self._devices_per_round
        ids, per_device = batch.blocks[0]
        taking_part = D if ids is None else ids.shape[0]
        if len(batch.blocks) != 1 or taking_part != m:
            who = f"num_devices = {D}" if m == D else f"the {m} devices of a round"
            raise ValueError(
                f"a batch of {batch.labels.shape[0]} images is not of {m} devices that bring "
                f"equally many: with algorithm = 'fedavg' or 'scaffold' global_batch_size must be "
                f"a multiple of {who}"
            )
        if ids is not None:
            self._participants = ids
        return int(per_device)

    def _mean(self, y: Tensor) -> Tensor:
        """The participants' average of `[m, ...]`."""
        if self._image_counts is None:
            return y.mean(dim=0)
        counts = self._image_counts.index_select(0, self._participants)
        mean: Tensor = torch.tensordot((counts / counts.sum()).to(y.dtype), y, dims=1)
        return mean

    def _backward(self, batch: DeviceBatch, per_device: int) -> Tensor:
        """Give the copies the gradients of their own batches' losses; return these, [m]."""
        m = self._devices_per_round
        # Sample i * m + j is participant j's.
        images = batch.images.unflatten(0, (per_device, m))
        labels = batch.labels.unflatten(0, (per_device, m))
        # To its own pass a device is the only one, whatever its number.
        blocks = ((None, per_device),)
        buffers = {name: rows_of(self._participants, b) for name, b in self._buffers.items()}

        def logits_of(parameters: Tensors, own: Tensors, x: Tensor) -> Tensor:
            logits: Tensor = functional_call(self._model, (parameters, own), (x, blocks))
            return logits

        if images.device.type == "cpu" and self._is_large(batch, per_device):
            losses = self._one_by_one(logits_of, buffers, images, labels)
        else:
            with self._autocast():
                if self._stacked_forward is not None:
                    logits = self._stacked_forward(self._local, buffers, batch.images)
                    logits = logits.unflatten(0, (per_device, m))
                else:
                    mapped = vmap(logits_of, in_dims=(0, 0, 1), out_dims=1)
                    logits = mapped(self._local, buffers, images)
                losses = self._mean_losses(logits, labels)
            losses.sum().backward()
        if m < self._num_devices:
            for name, rows in buffers.items():
                self._buffers[name].index_copy_(0, self._participants, rows)
        return losses.detach()

    def _is_large(self, batch: DeviceBatch, per_device: int) -> bool:
        """Whether one device's part is work enough for a pass of its own."""
        first_maps = per_device * batch.images[0, 0].numel() * self._first_channels
        products = per_device * self._num_parameters
        return first_maps > LARGE_MAPS or products > LARGE_PRODUCTS

    def _one_by_one(
        self,
        logits_of: Callable[[Tensors, Tensors, Tensor], Tensor],
        buffers: Tensors,
        images: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """Do `_backward` device by device, so that the maps of one are there at a time."""
        m = self._devices_per_round
        of_devices = zip(
            _unbind({name: y.detach() for name, y in self._local.items()}, m),
            _unbind(buffers, m),
            images.unbind(1),
            labels.unbind(1),
            strict=True,
        )
        losses: list[Tensor] = []
        gradients: list[tuple[Tensor, ...]] = []
        for parameters, own, x, targets in of_devices:
            leaves = {name: p.requires_grad_() for name, p in parameters.items()}
            with self._autocast():
                logits = logits_of(leaves, own, x)
                loss = self._mean_losses(logits.unsqueeze(1), targets.unsqueeze(1)).squeeze(0)
            gradients.append(
                torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            )
            losses.append(loss.detach())
        for y, of_y in zip(self._local.values(), zip(*gradients, strict=True), strict=True):
            y.grad = torch.stack(of_y)
        return torch.stack(losses)

    def _mean_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Each device's mean cross-entropy, [m], from `[b, m, classes]` and `[b, m]`."""
        of_images = F.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            label_smoothing=self._label_smoothing,
            reduction="none",
        )
        return of_images.view(labels.shape).mean(dim=0)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self._participants.device.type,
            dtype=self._autocast_dtype,
            enabled=self._autocast_dtype is not None,
        )

    def _head(self, parameter: str) -> str:
        """The name of the classifier's weight or bias."""
        (found,) = (n for n in self._classifier if n.rpartition(".")[2] == parameter)
        return found

    @torch.no_grad()
    def _features(self, batch: DeviceBatch) -> Tensor:
        """What the classifier sees of a batch with the server's weights, `[B, F]`."""
        classifier_inputs: list[Tensor] = []
        head = self._model.get_submodule(self._head("weight").rpartition(".")[0])
        hook = head.register_forward_pre_hook(lambda _, args: classifier_inputs.append(args[0]))
        # The pass of the same images that trains is the one to change running statistics.
        buffers = {name: b.clone() for name, b in self._model.named_buffers()}
        try:
            with self._autocast():
                functional_call(self._model, (self._global, buffers), (batch.images, batch.blocks))
        finally:
            hook.remove()
        return classifier_inputs[0]

    def _change_gradients(self) -> None:
        """Clip every device's gradient, then add what FedProx and SCAFFOLD add."""
        gradients = {name: _gradient(y) for name, y in self._local.items()}
        if self._agc is not None:
            clip_units_(
                ((self._local[n], g) for n, g in gradients.items() if n not in self._classifier),
                self._agc,
                stacked=True,
            )
        if self._clip is not None:
            _clip_each(list(gradients.values()), self._clip)
        mu = self._settings.proximal_mu
        for name, gradient in gradients.items():
            y = self._local[name]
            if mu:
                gradient.add_(y - self._global[name], alpha=mu)
            if self._variates is not None:
                self._variates.correct_(
                    name, gradient, y, self._weight_decay[y], self._participants
                )

    def _update_global(self) -> None:
        """Make the server's new weights of the devices', and hand them back to all."""
        self._server.step({name: self._mean(y) for name, y in self._local.items()})
        for name, y in self._local.items():
            y.copy_(self._global[name].expand_as(y))

    def _update_momentum(self) -> None:
        for y in self._local.values():
            momentum = self._optimizer.state[y].get("momentum_buffer")
            if momentum is None or self._settings.local_momentum == "keep":
                continue
            if self._settings.local_momentum == "average":
                momentum.copy_(self._mean(momentum).expand_as(momentum))
            else:
                momentum.zero_()


def _check(
    model: nn.Module,
    settings: FederatedSettings,
    num_devices: int,
    devices_per_round: int,
    image_counts: Sequence[int] | None,
) -> None:
    for name, value, accepted in (
        ("local_momentum", settings.local_momentum, LOCAL_MOMENTA),
        ("server_optimizer", settings.server_optimizer, SERVER_OPTIMIZERS),
    ):
        if value not in accepted:
            raise ValueError(f"{name} = {value!r} is unknown; accepted: {', '.join(accepted)}")
    if settings.local_steps < 1:
        raise ValueError(f"local_steps = {settings.local_steps} is too small; accepted: from 1")
    if not 1 <= devices_per_round <= num_devices:
        raise ValueError(
            f"devices_per_round = {devices_per_round} is out of range; accepted: 1 to "
            f"num_devices = {num_devices}"
        )
    if settings.local_momentum == "keep" and devices_per_round < num_devices:
        raise ValueError(
            f"local_momentum = 'keep' has no meaning where {devices_per_round} of {num_devices} "
            "devices take part in a round; accepted: average, reset"
        )
    if image_counts is not None and (
        len(image_counts) != num_devices or any(count < 1 for count in image_counts)
    ):
        raise ValueError(
            f"image_counts = {list(image_counts)} is not accepted; accepted: a number from 1 for "
            f"each of the {num_devices} devices"
        )
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ValueError(
            "norm = 'sync-batch' needs all devices' statistics in every layer of every step, "
            "which devices that average their weights now and then do not exchange; accepted: "
            "norm = 'batch', or one without statistics of batches"
        )
    for name, buffer in model.named_buffers():
        if buffer.ndim < 1 or buffer.shape[0] != num_devices:
            raise ValueError(
                f"the model's buffer {name} has shape {list(buffer.shape)}; accepted: one row "
                f"for each of the {num_devices} devices"
            )


def _unbind(stacked: Mapping[str, Tensor], num_devices: int) -> list[dict[str, Tensor]]:
    rows = {name: tensor.unbind() for name, tensor in stacked.items()}
    return [{name: row[d] for name, row in rows.items()} for d in range(num_devices)]


def _gradient(y: Tensor) -> Tensor:
    assert y.grad is not None
    return y.grad


def _clip_each(gradients: Sequence[Tensor], limit: float) -> None:
    """Do `torch.nn.utils.clip_grad_norm_` for each device; gradients are `[D, ...]`."""
    squares = [g.flatten(1).square().sum(dim=1) for g in gradients]
    norms = torch.stack(squares).sum(dim=0).sqrt()
    scales = (limit / (norms + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(scales.view(-1, *[1] * (g.ndim - 1)))


def _copy(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])
