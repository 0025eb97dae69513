"""Federated algorithms as D models, D optimizers and a loop: what the fast ones are held to."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from helpers import clip_units_slowly
from torch import Tensor, nn
from torch.nn import functional as F

from models import build_model, classifier_parameters, parameter_groups, stacked_forward
from sweeps.training.federated import FederatedAveraging, FederatedSettings
from sweeps.training.muon import Muon
from sweeps.training.rounds import SGDSettings

D, PER_DEVICE, CLASSES = 3, 4, 5


@dataclass(frozen=True)
class Local:
    images: Tensor
    labels: Tensor
    blocks: Any


def make_batches(updates: int, seed: int = 1) -> list[Local]:
    """Batches whose devices see classes of their own."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(updates):
        count = D * PER_DEVICE
        images = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
        labels = (torch.arange(count) % D + torch.randint(0, 2, (count,), generator=generator)) % 5
        made.append(Local(images, labels, ((None, PER_DEVICE),)))
    return made


ALL, COUNTS = 5, [40, 7, 13, 100, 28]
"""Devices of which some take part, and the images that they hold."""

CLASS_COUNTS = [[5, 5, 0, 0, 0], [0, 6, 2, 0, 0], [0, 0, 3, 7, 0], [2, 2, 2, 2, 2], [9, 0, 0, 0, 1]]
"""Images by device and class. No batch of `make_batches` shows the last class."""


def make_partial_batches(rounds: int, local_steps: int) -> list[Local]:
    """Batches of three of five devices, the same ones from one average to the next."""
    generator = torch.Generator().manual_seed(4)
    batches = make_batches(rounds * local_steps)
    for start in range(0, len(batches), local_steps):
        ids = torch.randperm(ALL, generator=generator)[:D].sort().values
        for u in range(start, start + local_steps):
            batches[u] = replace(batches[u], blocks=((ids, PER_DEVICE),))
    return batches


def make_model(norm: str, num_devices: int = D) -> nn.Module:
    model = build_model(
        "resnet8", norm=norm, num_classes=CLASSES, image_size=8, width_factor=0.25, num_groups=2,
        num_devices=num_devices, seed=3,
    )  # fmt: skip
    return model.double().train()


def make_algorithm(
    norm: str,
    settings: SGDSettings,
    rules: FederatedSettings,
    num_devices: int = D,
    image_counts: list[int] | None = None,
    stacked: bool = True,
) -> FederatedAveraging:
    """D devices a round, of `num_devices`; mapped over if not `stacked`."""
    model = make_model(norm, num_devices)
    return FederatedAveraging(
        model,
        parameter_groups(model),
        settings,
        rules,
        num_devices=num_devices,
        devices_per_round=D,
        image_counts=image_counts,
        class_counts=CLASS_COUNTS[:num_devices],
        classifier=classifier_parameters(model),
        stacked_forward=stacked_forward(model) if stacked else None,
    )


def learning_rate(update: int) -> float:
    return 0.05 + 0.01 * (update % 4)


Weights = dict[str, Tensor]


def mean_over_devices(weights: list[Weights], shares: list[float] | None = None) -> Weights:
    of_each = shares or [1 / len(weights)] * len(weights)
    return {
        name: sum(share * w[name] for share, w in zip(of_each, weights, strict=True))  # type: ignore[misc]
        for name in weights[0]
    }


def slow_shares(image_counts: list[int] | None, num_devices: int) -> list[list[float]]:
    """v_dk: what device d adds of class k."""
    p = [[n / sum(row) for n in row] for row in CLASS_COUNTS[:num_devices]]
    of_device = image_counts or [1] * num_devices
    q = [sum(w * row[k] for w, row in zip(of_device, p, strict=True)) for k in range(CLASSES)]
    q = [share / sum(of_device) for share in q]
    shares = []
    for row in p:
        least = max(a / b for a, b in zip(row, q, strict=True) if b)
        shares.append([least * b - a for a, b in zip(row, q, strict=True)])
    return shares


def slow_statistics(
    models: list[nn.Module], batch: Local, means: dict[int, Tensor]
) -> tuple[dict[int, Tensor], Tensor]:
    """Means by class and the covariance within the classes, of what the classifiers see."""
    features: list[Tensor] = []
    for place, model in enumerate(models):
        surveyed = copy.deepcopy(model)
        surveyed.get_submodule("fc").register_forward_pre_hook(
            lambda _, args: features.extend(args[0].detach())
        )
        surveyed(batch.images[place :: len(models)], ((None, PER_DEVICE),))
    labels = [
        k for place in range(len(models)) for k in batch.labels[place :: len(models)].tolist()
    ]
    by_class = {k: [f for f, of in zip(features, labels, strict=True) if of == k] for k in labels}
    means = {**means, **{k: torch.stack(fs).mean(dim=0) for k, fs in by_class.items()}}
    residuals = torch.stack([f - means[k] for f, k in zip(features, labels, strict=True)])
    return means, residuals.T @ residuals / (len(labels) - len(by_class))


def slow_virtual_loss(
    model: nn.Module, shares: list[float], means: dict[int, Tensor], covariance: Tensor
) -> Tensor:
    w, b = model.get_parameter("fc.weight"), model.get_parameter("fc.bias")
    total = torch.zeros((), dtype=torch.float64)
    for k, mean in means.items():
        z = []
        for j in range(CLASSES):
            apart = w[j] - w[k]
            z.append(w[j] @ mean + b[j] + apart @ covariance @ apart / 2)
        total = total + shares[k] * F.cross_entropy(torch.stack(z), torch.tensor(k))
    return total


def slow_reference(
    norm: str,
    batches: list[Local],
    settings: SGDSettings,
    rules: FederatedSettings,
    *,
    literal_option_two: bool = False,
    constant_lr: float | None = None,
    num_devices: int = D,
    image_counts: list[int] | None = None,
) -> tuple[Weights, list[float]]:
    """Separate models and optimizers in a loop: the papers' algorithms, written for reading.

    Returns:
        The participants' weights after the last update, averaged, with the mean of all devices'
        buffers; and the losses.
    """
    devices = [make_model(norm, num_devices=1) for _ in range(num_devices)]
    # Of each device one optimizer for the group "weights" and one for "scalars", and Muon.
    optimizers: list[list[torch.optim.Optimizer]] = []
    for model in devices:
        groups = {name: list(of_group) for name, of_group in parameter_groups(model).items()}
        decays = {"weights": True, "scalars": settings.decay_scalars}
        classifier = {id(p) for p in classifier_parameters(model)}
        matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in classifier]
        if settings.muon_lr_factor is not None:
            spared = {id(p) for p in matrices}
            groups = {n: [p for p in ps if id(p) not in spared] for n, ps in groups.items()}
        optimizers.append(
            [
                torch.optim.SGD(
                    groups[name],
                    lr=0.0,
                    momentum=settings.momentum,
                    nesterov=settings.nesterov,
                    weight_decay=settings.weight_decay if decays[name] else 0.0,
                )
                for name in ("weights", "scalars")
            ]
        )
        if settings.muon_lr_factor is not None:
            decay = settings.muon_weight_decay
            muon = Muon(
                [{"params": matrices}], lr=0.0, momentum=settings.momentum,
                nesterov=settings.nesterov, weight_decay=decay,
            )  # fmt: skip
            optimizers[-1].append(muon)
    lr_factors = (1.0, settings.scalar_lr_factor, settings.muon_lr_factor)
    start = {name: p.detach().clone() for name, p in devices[0].named_parameters()}
    zero = {name: torch.zeros_like(p) for name, p in start.items()}
    velocity, m = copy.deepcopy(zero), copy.deepcopy(zero)
    v = {name: torch.full_like(p, rules.server_epsilon**2) for name, p in start.items()}
    c = copy.deepcopy(zero)
    c_device = [copy.deepcopy(zero) for _ in devices]
    gradients_seen = [copy.deepcopy(zero) for _ in devices]
    shares_of_classes = slow_shares(image_counts, num_devices)
    class_means: dict[int, Tensor] = {}
    losses = []
    who = list(range(num_devices))
    for update, batch in enumerate(batches):
        lr = learning_rate(update) if constant_lr is None else constant_lr
        ids = batch.blocks[0][0]
        if update % rules.local_steps == 0 and ids is not None:
            who = ids.tolist()
        shares = [1 / len(who)] * len(who)
        if image_counts is not None:
            shares = [image_counts[d] / sum(image_counts[k] for k in who) for d in who]
        if rules.virtual_features and update % rules.local_steps == 0:
            class_means, covariance = slow_statistics([devices[d] for d in who], batch, class_means)
        device_losses = []
        for place, d in enumerate(who):
            model = devices[d]
            model.zero_grad()
            images, labels = batch.images[place :: len(who)], batch.labels[place :: len(who)]
            logits = model(images, ((None, PER_DEVICE),))
            loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
            device_losses.append(loss.item())
            if rules.virtual_features:
                virtual = slow_virtual_loss(model, shares_of_classes[d], class_means, covariance)
                loss = loss + rules.virtual_features * virtual
            loss.backward()
            if settings.agc_clip_factor is not None:
                clip_units_slowly(model, settings.agc_clip_factor)
            if settings.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
            for name, p in model.named_parameters():
                assert p.grad is not None
                p.grad += rules.proximal_mu * (p.detach() - start[name])
                penalised = settings.muon_lr_factor is None or name.startswith("fc.")
                decays_p = penalised if p.ndim > 1 else settings.decay_scalars
                decay = settings.weight_decay * p.detach() if decays_p else 0.0
                gradients_seen[d][name] += p.grad + decay
                if rules.control_variates:
                    p.grad += c[name] - c_device[d][name]
            for optimizer, factor in zip(optimizers[d], lr_factors, strict=False):
                assert factor is not None
                optimizer.param_groups[0]["lr"] = lr * factor
                optimizer.step()
        losses.append(sum(device_losses) / len(who))
        ends = [
            {name: p.detach().clone() for name, p in devices[d].named_parameters()} for d in who
        ]
        mean = mean_over_devices(ends, shares)
        if (update + 1) % rules.local_steps:
            continue
        change = {name: mean[name] - start[name] for name in start}
        if rules.control_variates:
            variate_changes = []
            for d, end in zip(who, ends, strict=True):
                before = c_device[d]
                c_device[d] = {
                    name: before[name]
                    - c[name]
                    + (start[name] - end[name]) / rules.local_steps / lr
                    if literal_option_two
                    else gradients_seen[d][name] / rules.local_steps
                    for name in start
                }
                variate_changes.append({n: c_device[d][n] - before[n] for n in start})
            moved = mean_over_devices(variate_changes)
            c = {name: c[name] + len(who) / num_devices * moved[name] for name in start}
        gradients_seen = [copy.deepcopy(zero) for _ in devices]
        for name in start:
            if rules.server_optimizer == "adam":
                b1, b2 = rules.server_momentum, rules.server_beta2
                m[name] = b1 * m[name] + (1 - b1) * change[name]
                v[name] = b2 * v[name] + (1 - b2) * change[name] ** 2
                step = m[name] / (v[name].sqrt() + rules.server_epsilon)
                start[name] = start[name] + rules.server_lr * step
            else:
                velocity[name] = rules.server_momentum * velocity[name] - change[name]
                start[name] = start[name] - rules.server_lr * velocity[name]
        mean = start
        for model in devices:
            model.load_state_dict(start, strict=False)
        if len(who) == num_devices:
            buffers = mean_over_devices([dict(model.named_buffers()) for model in devices])
            for model in devices:
                model.load_state_dict(buffers, strict=False)
        if not settings.momentum or rules.local_momentum == "keep":
            continue
        for group in range(len(optimizers[0])):
            parameters = [
                optimizers[d][group].param_groups[0]["params"] for d in range(num_devices)
            ]
            for of_devices in zip(*parameters, strict=True):
                momentum = sum(
                    share * optimizers[d][group].state[of_devices[d]]["momentum_buffer"]
                    for share, d in zip(shares, who, strict=True)
                )
                for d, p in enumerate(of_devices):
                    optimizers[d][group].state[p]["momentum_buffer"] = (
                        momentum.clone()
                        if rules.local_momentum == "average"
                        else torch.zeros_like(p)
                    )
    buffers = mean_over_devices([dict(model.named_buffers()) for model in devices])
    return {**mean, **buffers}, losses


def assert_equal_weights(model: nn.Module, wanted: Weights, tolerance: float = 1e-10) -> None:
    for name, value in model.state_dict().items():
        if value.shape != wanted[name].shape:  # Batch Normalization: a row for each device
            value = value.mean(dim=0, keepdim=True)
        torch.testing.assert_close(value, wanted[name], rtol=tolerance, atol=tolerance, msg=name)


LOCAL = SGDSettings(momentum=0.9, weight_decay=5e-4)
RULES = {
    "fedavg": FederatedSettings(),
    "fedavg, momentum kept": FederatedSettings(local_momentum="keep"),
    "fedavg, momentum reset": FederatedSettings(local_momentum="reset"),
    "fedavg, server_lr": FederatedSettings(server_lr=0.7),
    "fedprox": FederatedSettings(proximal_mu=0.3),
    "fedavgm": FederatedSettings(server_momentum=0.8, server_lr=0.5),
    "fedadam": FederatedSettings(
        server_optimizer="adam", server_lr=0.01, server_momentum=0.9, server_beta2=0.98
    ),
    "scaffold": FederatedSettings(control_variates=True),
    "virtual features": FederatedSettings(virtual_features=0.7),
    "all at once": FederatedSettings(
        control_variates=True,
        proximal_mu=0.1,
        server_momentum=0.5,
        server_lr=0.9,
        virtual_features=1.0,
    ),
}
