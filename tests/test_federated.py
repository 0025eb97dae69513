"""Federated algorithms against D models, D optimizers and a loop, and against hand arithmetic."""

import copy
import io
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import TRAIN, clip_units_slowly
from torch import Tensor, nn
from torch.nn import functional as F

from models import (
    FEATURE_NORMS,
    build_model,
    classifier_parameters,
    parameter_groups,
    stacked_forward,
)
from sweeps import config, objective
from sweeps.config import TrialConfig
from sweeps.errors import SpecError
from sweeps.training import federated
from sweeps.training.federated import FederatedAveraging, FederatedSettings
from sweeps.training.loop import evaluate
from sweeps.training.rounds import SGDSettings, SynchronousSGD

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
    # Of each device one optimizer for the group "weights" and one for "scalars".
    optimizers: list[list[torch.optim.SGD]] = []
    for model in devices:
        groups = parameter_groups(model)
        decays = {"weights": True, "scalars": settings.decay_scalars}
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
                decays_p = p.ndim > 1 or settings.decay_scalars
                decay = settings.weight_decay * p.detach() if decays_p else 0.0
                gradients_seen[d][name] += p.grad + decay
                if rules.control_variates:
                    p.grad += c[name] - c_device[d][name]
            for optimizer, factor in zip(
                optimizers[d], (1.0, settings.scalar_lr_factor), strict=True
            ):
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
        for group in (0, 1):
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


@pytest.mark.parametrize("norm", ["group", "fixup"])
@pytest.mark.parametrize("name", RULES)
def test_it_equals_separate_devices(norm: str, name: str) -> None:
    """Three rounds of three local steps and one more step, with momentum and a moving rate."""
    rules = replace(RULES[name], local_steps=3)
    settings = replace(LOCAL, scalar_lr_factor=0.1)
    batches = make_batches(10)
    algorithm = make_algorithm(norm, settings, rules)
    losses = [algorithm.round(b, learning_rate(u)).item() for u, b in enumerate(batches)]
    wanted, wanted_losses = slow_reference(norm, batches, settings, rules)
    assert_equal_weights(algorithm.global_model(), wanted)
    assert losses == pytest.approx(wanted_losses, rel=1e-10)


@pytest.mark.parametrize(
    ("norm", "name", "image_counts"),
    [
        ("batch", "fedavg", None),
        ("batch", "fedavg", COUNTS),
        ("batch", "scaffold", COUNTS),
        ("fixup", "fedavg", COUNTS),
        ("fixup", "fedavg, momentum reset", COUNTS),
        ("fixup", "fedprox", None),
        ("fixup", "fedavgm", COUNTS),
        ("fixup", "fedadam", COUNTS),
        ("fixup", "scaffold", None),
        ("batch", "virtual features", COUNTS),
        ("fixup", "all at once", COUNTS),
    ],
)
def test_it_equals_separate_devices_of_which_some_take_part(
    norm: str, name: str, image_counts: list[int] | None
) -> None:
    """Four rounds of two local steps, and evaluation one step into the last."""
    rules = replace(RULES[name], local_steps=2)
    settings = replace(LOCAL, scalar_lr_factor=0.1)
    batches = make_partial_batches(4, 2)[:-1]
    algorithm = make_algorithm(norm, settings, rules, ALL, image_counts)
    losses = [algorithm.round(b, learning_rate(u)).item() for u, b in enumerate(batches)]
    wanted, wanted_losses = slow_reference(
        norm, batches, settings, rules, num_devices=ALL, image_counts=image_counts
    )
    assert_equal_weights(algorithm.global_model(), wanted)
    assert losses == pytest.approx(wanted_losses, rel=1e-10)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "scaffold"])
def test_all_devices_weighed_by_their_images(name: str) -> None:
    rules = replace(RULES[name], local_steps=3)
    batches = make_batches(7)
    counts = [3, 50, 20]
    algorithm = make_algorithm("group", LOCAL, rules, image_counts=counts)
    for u, b in enumerate(batches):
        algorithm.round(b, learning_rate(u))
    wanted, _ = slow_reference("group", batches, LOCAL, rules, image_counts=counts)
    alike, _ = slow_reference("group", batches, LOCAL, rules)
    assert_equal_weights(algorithm.global_model(), wanted)
    assert not torch.allclose(wanted["fc.weight"], alike["fc.weight"], rtol=1e-3)


def test_weights_by_images_minimise_the_mean_over_all_images() -> None:
    """With one plain step on whole devices, the average is a step on the union of their images."""
    counts = [6, 2]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 2, 1, 1, 1, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (6, 2), generator=generator)
    # Equal shares of every step: the smaller device brings each of its two images three times.
    images[2:, 1], labels[2:, 1] = images[:2, 1].repeat(2, 1, 1, 1), labels[:2, 1].repeat(2)
    model = OneWeight()
    algorithm = FederatedAveraging(
        model, {"weights": [model.weight]}, SGDSettings(momentum=0.0, weight_decay=0.0),
        FederatedSettings(), num_devices=2, image_counts=counts,
    )  # fmt: skip
    batch = Local(images.flatten(0, 1), labels.flatten(), ((None, 6),))
    _, stepped = weights_after(algorithm, batch)
    union = OneWeight()
    all_images = torch.cat([images[:, 0], images[:2, 1]])
    F.cross_entropy(union(all_images), torch.cat([labels[:, 0], labels[:2, 1]])).backward()  # type: ignore[no-untyped-call]
    assert union.weight.grad is not None
    assert stepped == pytest.approx(-union.weight.grad.item(), rel=1e-12)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_batch_normalization_keeps_each_devices_statistics(norm: str, name: str) -> None:
    """Averaging the buffers with the weights, as the reference does, changes no mean of them."""
    rules = replace(RULES[name], local_steps=2)
    batches = make_batches(7)
    algorithm = make_algorithm(norm, LOCAL, rules)
    for u, b in enumerate(batches):
        algorithm.round(b, learning_rate(u))
    assert_equal_weights(algorithm.global_model(), slow_reference(norm, batches, LOCAL, rules)[0])


@pytest.mark.parametrize(
    ("norm", "partial"), [("batch", False), ("batch", True), ("group", False), ("fixup", False)]
)
def test_large_steps_take_the_devices_one_by_one(
    norm: str, partial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same numbers, and so does the map over devices that users' networks go through."""
    rules = replace(RULES["all at once"], local_steps=3)
    batches = make_partial_batches(2, 3) if partial else make_batches(7)
    all_devices = ALL if partial else D
    stacked, single = (make_algorithm(norm, LOCAL, rules, all_devices) for _ in range(2))
    mapped = make_algorithm(norm, LOCAL, rules, all_devices, stacked=False)
    for u, batch in enumerate(batches):
        monkeypatch.setattr(federated, "LARGE_STEP", 10**9)
        losses = [way.round(batch, learning_rate(u)) for way in (stacked, mapped)]
        monkeypatch.setattr(federated, "LARGE_STEP", 0)
        wanted = single.round(batch, learning_rate(u))
        for loss in losses:
            torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    for name, value in single.global_model().state_dict().items():
        for way in (stacked, mapped):
            other = way.global_model().state_dict()[name]
            torch.testing.assert_close(other, value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("feature_norm", FEATURE_NORMS)
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance", "fixup"])
@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_a_stacked_pass_equals_a_pass_for_each_network(
    name: str, norm: str, feature_norm: str
) -> None:
    """Logits, gradients and statistics, of networks that are not alike."""
    side = 16 if norm == "instance" else 8
    models = [
        build_model(
            name, norm=norm, num_classes=CLASSES, image_size=side, width_factor=0.125,
            num_groups=2, feature_norm=feature_norm, seed=seed,
        ).double().train()
        for seed in range(D)
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for model in models for p in model.parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.1 * noise  # weights and scales that start at zero hide the others
    images = torch.randn(2 * D, 3, side, side, generator=generator, dtype=torch.float64)
    parameters = {
        n: torch.stack([m.get_parameter(n).detach() for m in models]).requires_grad_()
        for n, _ in models[0].named_parameters()
    }
    buffers = {
        n: torch.stack([m.get_buffer(n).clone() for m in models])
        for n, _ in models[0].named_buffers()
    }
    forward = stacked_forward(models[0])
    assert forward is not None
    logits = forward(parameters, buffers, images)
    logits.square().sum().backward()
    for d, model in enumerate(models):
        own = model(images[d::D], ((None, 2),))
        torch.testing.assert_close(logits[d::D], own, rtol=1e-10, atol=1e-10)
        own.square().sum().backward()
        for n, p in model.named_parameters():
            stacked = parameters[n].grad
            assert stacked is not None
            torch.testing.assert_close(stacked[d], p.grad, rtol=1e-9, atol=1e-9, msg=n)
        for n, b in model.named_buffers():
            torch.testing.assert_close(buffers[n][d], b, rtol=1e-10, atol=1e-10, msg=n)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "all at once"])
def test_each_devices_gradient_is_clipped_by_its_own_norm(name: str) -> None:
    rules = replace(RULES[name], local_steps=2)
    settings = replace(LOCAL, clip_grad_norm=0.8, decay_scalars=False)
    batches = make_batches(5)
    algorithm = make_algorithm("group", settings, rules)
    for u, b in enumerate(batches):
        algorithm.round(b, learning_rate(u))
    wanted, _ = slow_reference("group", batches, settings, rules)
    unclipped, _ = slow_reference("group", batches, replace(settings, clip_grad_norm=None), rules)
    assert_equal_weights(algorithm.global_model(), wanted)
    assert not torch.allclose(wanted["fc.weight"], unclipped["fc.weight"], rtol=1e-3)


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
@pytest.mark.parametrize(
    "levers",
    [
        {"agc_clip_factor": 0.02},
        {"label_smoothing": 0.1},
        {"nesterov": True},
        {"agc_clip_factor": 0.05, "label_smoothing": 0.2, "nesterov": True, "clip_grad_norm": 0.3},
    ],
    ids=lambda levers: "+".join(levers),
)
@pytest.mark.parametrize("norm", ["group", "fixup"])
def test_levers_work_on_every_device_by_itself(
    norm: str, levers: dict[str, Any], name: str
) -> None:
    rules = replace(RULES[name], local_steps=2)
    settings = replace(LOCAL, **levers)
    batches = make_batches(5)
    algorithm = make_algorithm(norm, settings, rules)
    losses = [algorithm.round(b, learning_rate(u)).item() for u, b in enumerate(batches)]
    wanted, wanted_losses = slow_reference(norm, batches, settings, rules)
    plain, _ = slow_reference(norm, batches, LOCAL, rules)
    assert_equal_weights(algorithm.global_model(), wanted)
    assert losses == pytest.approx(wanted_losses, rel=1e-10)
    assert not torch.allclose(wanted["conv.weight"], plain["conv.weight"], rtol=1e-3)


def test_lars_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be LARS"):
        make_algorithm("group", replace(LOCAL, lars_trust_coefficient=0.01), FederatedSettings())


@pytest.mark.parametrize("norm", ["group", "fixup"])
def test_scaffold_is_the_papers_option_two(norm: str) -> None:
    """With plain SGD, (x - y) / (H η) is the mean gradient that is kept here."""
    rules = FederatedSettings(local_steps=4, control_variates=True, server_lr=0.8)
    settings = SGDSettings(momentum=0.0, weight_decay=5e-3)
    batches = make_batches(13)
    algorithm = make_algorithm(norm, settings, rules)
    for b in batches:
        algorithm.round(b, 0.05)
    wanted, _ = slow_reference(
        norm, batches, settings, rules, literal_option_two=True, constant_lr=0.05
    )
    assert_equal_weights(algorithm.global_model(), wanted)


@pytest.mark.parametrize("norm", ["batch", "group", "fixup"])
@pytest.mark.parametrize(
    ("momentum", "local_momentum"), [(0.0, "reset"), (0.9, "average"), (0.9, "keep")]
)
def test_averaging_in_every_step_is_synchronous_sgd(
    norm: str, momentum: float, local_momentum: str
) -> None:
    settings = SGDSettings(momentum=momentum, weight_decay=5e-4, scalar_lr_factor=0.1)
    rules = FederatedSettings(local_steps=1, local_momentum=local_momentum)
    algorithm = make_algorithm(norm, settings, rules)
    model = make_model(norm)
    synchronous = SynchronousSGD(model, parameter_groups(model), settings)
    for u, batch in enumerate(make_batches(6)):
        ours = algorithm.round(batch, learning_rate(u))
        theirs = synchronous.round(batch, learning_rate(u))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert_equal_weights(algorithm.global_model(), synchronous.global_model().state_dict())


class OneWeight(nn.Module):
    """Logits (w·x, 0): at w = 0 the loss's slope is -x/2 for class 0 and x/2 for class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, images: Tensor, blocks: Any = None) -> Tensor:
        score = images.flatten(1) * self.weight
        return torch.cat([score, torch.zeros_like(score)], dim=1)


def hand_sized(
    momentum: float = 0.0, clip_grad_norm: float | None = None, **rules: Any
) -> tuple[FederatedAveraging, Local, Local]:
    """Two devices at w = 0 with slopes -2 and 1, then batches of nothing, whose slope is 0."""
    model = OneWeight()
    settings = SGDSettings(momentum=momentum, weight_decay=0.0, clip_grad_norm=clip_grad_norm)
    algorithm = FederatedAveraging(
        model, {"weights": [model.weight]}, settings, FederatedSettings(**rules), num_devices=2
    )
    first = torch.tensor([4.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1)
    labels = torch.tensor([0, 1])
    return (
        algorithm,
        Local(first, labels, ((None, 1),)),
        Local(torch.zeros_like(first), labels, ((None, 1),)),
    )


def weights_after(algorithm: FederatedAveraging, *batches: Local) -> tuple[list[float], float]:
    """Each device's weight, and their mean, after steps at learning rate 1."""
    for batch in batches:
        algorithm.round(batch, 1.0)
    mean = algorithm.global_model().get_parameter("weight").item()
    return algorithm.state_dict()["local"]["weight"].flatten().tolist(), mean


def test_fedavg_by_hand() -> None:
    algorithm, first, nothing = hand_sized(local_steps=2)
    assert weights_after(algorithm, first) == ([2.0, -1.0], 0.5)
    assert weights_after(algorithm, nothing) == ([0.5, 0.5], 0.5)


def test_fedprox_by_hand() -> None:
    algorithm, first, nothing = hand_sized(local_steps=2, proximal_mu=0.25)
    assert weights_after(algorithm, first) == ([2.0, -1.0], 0.5)
    # 2 - 0.25 * 2 and -1 + 0.25 * 1
    assert weights_after(algorithm, nothing) == ([0.375, 0.375], 0.375)


def test_fedavgm_by_hand() -> None:
    algorithm, first, nothing = hand_sized(server_momentum=0.5, server_lr=2.0)
    assert weights_after(algorithm, first) == ([1.0, 1.0], 1.0)  # v = -0.5
    assert weights_after(algorithm, nothing) == ([1.5, 1.5], 1.5)  # v = -0.25


def test_fedadam_by_hand() -> None:
    algorithm, first, _ = hand_sized(
        server_optimizer="adam", server_lr=0.2, server_momentum=0.9, server_beta2=0.99,
        server_epsilon=0.1,
    )  # fmt: skip
    # Δ = 0.5: m = 0.1 * 0.5, v = 0.99 * 0.1² + 0.01 * 0.5²
    wanted = 0.2 * 0.05 / (math.sqrt(0.0124) + 0.1)
    assert weights_after(algorithm, first)[1] == pytest.approx(wanted, rel=1e-12)


def test_scaffold_by_hand() -> None:
    algorithm, first, nothing = hand_sized(local_steps=1, control_variates=True)
    assert weights_after(algorithm, first) == ([0.5, 0.5], 0.5)
    # c_d = (-2, 1), c = -0.5: corrections 1.5 and -1.5, which cancel in the mean.
    variates = algorithm.state_dict()["variates"]
    assert variates["device"]["weight"].flatten().tolist() == [-2.0, 1.0]
    assert variates["server"]["weight"].tolist() == [-0.5]
    assert weights_after(algorithm, nothing) == ([0.5, 0.5], 0.5)
    algorithm, first, nothing = hand_sized(local_steps=2, control_variates=True)
    weights_after(algorithm, first, nothing)  # mean gradients -1 and 0.5, their mean -0.25
    assert weights_after(algorithm, nothing) == ([0.5 - 0.75, 0.5 + 0.75], 0.5)


class OnlyAClassifier(nn.Module):
    """Features are the pixels."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, classes, dtype=torch.float64)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor, blocks: Any = None) -> Tensor:
        logits: Tensor = self.fc(images.flatten(1))
        return logits


def test_virtual_features_by_hand() -> None:
    """Two devices with a class each, and two images of one pixel: 1 and 3, -2 and -4."""
    model = OnlyAClassifier(1, 2)
    algorithm = FederatedAveraging(
        model, parameter_groups(model), SGDSettings(momentum=0.0, weight_decay=0.0),
        FederatedSettings(local_steps=3, virtual_features=1.0), num_devices=2,
        class_counts=[[2, 0], [0, 2]],
        classifier=classifier_parameters(model),
    )  # fmt: skip
    images = torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64).view(4, 1, 1, 1)
    batch = Local(images, torch.tensor([0, 1, 0, 1]), ((None, 2),))
    algorithm.round(batch, 0.1)
    state = algorithm.state_dict()
    assert state["virtual"]["mean"].tolist() == [[2.0], [-3.0]]
    assert state["virtual"]["covariance"].tolist() == [[2.0]]  # (1 + 1 + 1 + 1) / (4 - 2)
    # At w = b = 0 all softmaxes are a half. Both devices see both classes with weight 1:
    # the slope of w_0 is -0.5 * 2 + 0.5 * -3.
    w = state["local"]["fc.weight"].flatten().tolist()
    assert w == pytest.approx([0.25, -0.25, 0.25, -0.25], rel=1e-12)
    algorithm.round(batch, 0.1)
    # For device 0 the class 1 is virtual: z_0 - z_1 = -3 (w_0 - w_1) + (w_0 - w_1)² with 2 / 2.
    gap = 0.5
    virtual = 1 / (1 + math.exp(-(-3 * gap + gap**2)))  # softmax_0 of it
    own = [1 / (1 + math.exp(gap * x)) for x in (1, 3)]  # softmax_1 of its images
    slope = -(own[0] * 1 + own[1] * 3) / 2 + virtual * (-3 + 2 * gap)
    w = algorithm.state_dict()["local"]["fc.weight"][0].flatten().tolist()
    assert w == pytest.approx([0.25 - 0.1 * slope, -0.25 + 0.1 * slope], rel=1e-12)


def test_virtual_features_stand_for_draws_from_a_normal_distribution() -> None:
    """Their loss is an upper bound of the draws' mean loss, and a close one."""
    generator = torch.Generator().manual_seed(0)
    model = OnlyAClassifier(6, CLASSES)
    nn.init.normal_(model.fc.weight, std=0.2, generator=generator)
    algorithm = FederatedAveraging(
        model, parameter_groups(model), LOCAL, FederatedSettings(virtual_features=1.0),
        num_devices=1, class_counts=[[1] * CLASSES],
        classifier=classifier_parameters(model),
    )  # fmt: skip
    images = torch.randn(40, 6, 1, 1, generator=generator, dtype=torch.float64)
    labels = torch.arange(40) % CLASSES
    algorithm.round(Local(images, labels, ((None, 40),)), 0.0)
    algorithm._virtual_shares = torch.eye(CLASSES, dtype=torch.float64)[2:3]
    bound = algorithm._virtual_losses().item()
    statistics = algorithm.state_dict()["virtual"]
    normal = torch.distributions.MultivariateNormal(statistics["mean"][2], statistics["covariance"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = normal.sample(torch.Size([20000]))
    drawn = F.cross_entropy(model.fc(draws), torch.full((20000,), 2)).item()
    assert drawn < bound < 1.1 * drawn


def test_devices_that_hold_all_classes_alike_need_no_virtual_features() -> None:
    batches = make_batches(5)
    algorithms = []
    for factor in (0.0, 1.0):
        model = make_model("group")
        algorithms.append(
            FederatedAveraging(
                model, parameter_groups(model), LOCAL,
                FederatedSettings(local_steps=2, virtual_features=factor), num_devices=D,
                class_counts=[[4, 2, 2, 2, 6]] * D, classifier=classifier_parameters(model),
            )
        )  # fmt: skip
    for u, batch in enumerate(batches):
        plain, virtual = (a.round(batch, learning_rate(u)) for a in algorithms)
        torch.testing.assert_close(plain, virtual, rtol=1e-12, atol=1e-12)
    assert_equal_weights(algorithms[1].global_model(), algorithms[0].global_model().state_dict())


@pytest.mark.parametrize(
    "counts", [None, [[1, 2, 3, 4, 5]], [[1] * 4] * 3, [[1] * 5, [0] * 5, [1] * 5]]
)
def test_virtual_features_need_every_devices_classes(counts: list[list[int]] | None) -> None:
    model = make_model("group")
    with pytest.raises(ValueError, match="accepted: numbers of images of 3 devices by 5 classes"):
        FederatedAveraging(
            model, parameter_groups(model), LOCAL, FederatedSettings(virtual_features=1.0),
            num_devices=D, class_counts=counts,
            classifier=classifier_parameters(model),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("local_momentum", "devices"),
    [("average", [0.75, 0.75]), ("keep", [1.5, 0.0]), ("reset", [0.5, 0.5])],
)
def test_momentum_by_hand(local_momentum: str, devices: list[float]) -> None:
    algorithm, first, nothing = hand_sized(momentum=0.5, local_momentum=local_momentum)
    assert weights_after(algorithm, first) == ([0.5, 0.5], 0.5)  # momenta -2 and 1
    algorithm._settings = replace(algorithm._settings, local_steps=100)
    assert weights_after(algorithm, nothing)[0] == devices


def test_clipping_by_hand() -> None:
    algorithm, first, _ = hand_sized(local_steps=2, clip_grad_norm=1.5)
    devices, mean = weights_after(algorithm, first)
    assert devices == pytest.approx([1.5, -1.0], rel=1e-6)
    assert mean == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["fedavg", "fedprox", "fedavgm", "fedadam", "scaffold", "virtual features"]
)
@pytest.mark.parametrize(("norm", "partial"), [("batch", True), ("batch", False), ("fixup", False)])
def test_it_goes_on_from_any_step(norm: str, partial: bool, name: str) -> None:
    rules = replace(RULES[name], local_steps=3)
    batches = make_partial_batches(3, 3)[:8] if partial else make_batches(8)
    devices: tuple[int, list[int] | None] = (ALL, COUNTS) if partial else (D, None)
    whole = make_algorithm(norm, LOCAL, rules, *devices)
    files, losses, evaluated = [], [], {}
    for u, batch in enumerate(batches):
        evaluated[u] = copy.deepcopy(whole.global_model().state_dict())
        file = io.BytesIO()
        torch.save(whole.state_dict(), file)
        files.append(file)
        losses.append(whole.round(batch, learning_rate(u)))
    for cut in (1, 3, 4, 5):
        resumed = make_algorithm(norm, LOCAL, rules, *devices)
        # What was trained before a resume must leave no trace.
        resumed.round(batches[-1], 0.1)
        files[cut].seek(0)
        resumed.load_state_dict(torch.load(files[cut], weights_only=True))
        for n, value in resumed.global_model().state_dict().items():
            assert torch.equal(value, evaluated[cut][n]), n
        for u, batch in enumerate(batches[cut:], start=cut):
            assert torch.equal(resumed.round(batch, learning_rate(u)), losses[u])
        for n, value in whole.global_model().state_dict().items():
            assert torch.equal(value, resumed.global_model().state_dict()[n]), n


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_evaluation_leaves_the_training_alone(norm: str) -> None:
    rules = replace(RULES["all at once"], local_steps=3)
    watched, alone = (make_algorithm(norm, LOCAL, rules) for _ in range(2))
    images, labels = make_batches(1, seed=9)[0].images, make_batches(1, seed=9)[0].labels
    for u, batch in enumerate(make_batches(5)):
        ours = watched.round(batch, learning_rate(u))
        evaluate(watched.global_model(), [images], labels)
        assert torch.equal(ours, alone.round(batch, learning_rate(u)))
    before, after = alone.state_dict(), watched.state_dict()
    for part in ("global", "local", "buffers"):
        for name, value in before[part].items():
            assert torch.equal(value, after[part][name]), (part, name)


def test_the_global_model_is_the_mean_of_the_devices() -> None:
    algorithm = make_algorithm("group", LOCAL, FederatedSettings(local_steps=5))
    for u, batch in enumerate(make_batches(3)):
        algorithm.round(batch, learning_rate(u))
    local = algorithm.state_dict()["local"]
    assert not torch.equal(local["fc.weight"][0], local["fc.weight"][1])
    for name, parameter in algorithm.global_model().named_parameters():
        torch.testing.assert_close(parameter.detach(), local[name].mean(dim=0))


def test_unequal_local_batches_are_refused() -> None:
    algorithm = make_algorithm("group", LOCAL, FederatedSettings())
    batch = make_batches(1)[0]
    blocks = ((torch.tensor([0]), 6), (torch.tensor([1, 2]), 3))
    with pytest.raises(ValueError, match="multiple of num_devices = 3"):
        algorithm.round(replace(batch, blocks=blocks), 0.1)


@pytest.mark.parametrize(
    "blocks", [((None, 4),), ((torch.arange(4), 3),), ((torch.arange(2), 4), (torch.arange(2), 2))]
)
def test_another_number_of_participants_is_refused(blocks: Any) -> None:
    algorithm = make_algorithm("group", LOCAL, FederatedSettings(), ALL)
    with pytest.raises(ValueError, match="multiple of the 3 devices of a round"):
        algorithm.round(replace(make_batches(1)[0], blocks=blocks), 0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"devices_per_round": 4}, "devices_per_round = 4 is out of range; accepted: 1 to"),
        ({"devices_per_round": 0}, "devices_per_round = 0 is out of range"),
        ({"devices_per_round": 2, "local_momentum": "keep"}, "accepted: average, reset"),
        ({"image_counts": [5, 5]}, "a number from 1 for each of the 3 devices"),
        ({"image_counts": [5, 0, 5]}, "a number from 1 for each of the 3 devices"),
    ],
)
def test_participants_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    model = make_model("group")
    rules = FederatedSettings(local_momentum=options.pop("local_momentum", "average"))
    with pytest.raises(ValueError, match=said):
        FederatedAveraging(model, parameter_groups(model), LOCAL, rules, num_devices=D, **options)


@pytest.mark.parametrize(
    ("norm", "rules", "said"),
    [
        ("sync-batch", {}, "norm = 'sync-batch'"),
        ("group", {"local_momentum": "mean"}, "accepted: average, keep, reset"),
        ("group", {"server_optimizer": "yogi"}, "accepted: sgd, adam"),
        ("group", {"local_steps": 0}, "accepted: from 1"),
    ],
)
def test_what_it_cannot_do_is_refused(norm: str, rules: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_algorithm(norm, LOCAL, FederatedSettings(**rules))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"algorithm": "sync-sgd", "local_steps": 10}, "local_steps = 10 has no meaning"),
        ({"algorithm": "sync-sgd", "virtual_features": 1}, "virtual_features = 1 has no meaning"),
        ({"algorithm": "fedavg", "global_batch_size": 322}, "equal local batches"),
        ({"algorithm": "scaffold", "norm": "sync-batch"}, "norm = 'sync-batch'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        TrialConfig.build(values)


def test_names_are_those_of_the_algorithms() -> None:
    assert config.LOCAL_MOMENTA == federated.LOCAL_MOMENTA
    assert config.SERVER_OPTIMIZERS == federated.SERVER_OPTIMIZERS
    assert config.FEATURE_NORMS == FEATURE_NORMS


@pytest.mark.parametrize(
    ("norm", "algorithm"), [("batch", "scaffold"), ("group", "fedavg"), ("fixup", "scaffold")]
)
def test_a_trial_trains(norm: str, algorithm: str) -> None:
    """From the config on: rounds run on across epochs, whose ends fall within them."""
    made = TrialConfig.build(
        {**TRAIN, "norm": norm, "algorithm": algorithm, "local_steps": 7, "peak_lr": 0.05,
         "epochs": 4, "global_batch_size": 32},
    )  # fmt: skip
    losses: list[float] = []
    run = objective.Objective(objective.open_dataset(made, None), torch.device("cpu"))
    accuracy = run.run(made, seeds=1, on_epoch=lambda p: losses.append(p.result.train_loss))
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert accuracy > 0.3


def test_a_trial_trains_some_devices_at_a_time() -> None:
    """Of different sizes, which speak to each other of the classes that they lack."""
    made = TrialConfig.build(
        {**TRAIN, "norm": "batch", "algorithm": "scaffold", "local_steps": 7, "peak_lr": 0.05,
         "epochs": 4, "global_batch_size": 32, "num_devices": 8, "participation": 0.5,
         "split": "dirichlet", "average_weights": "images", "virtual_features": 1.0,
         "shared_images": 20},
    )  # fmt: skip
    runs: list[list[float]] = []
    for _ in range(2):
        losses: list[float] = []
        runs.append(losses)
        run = objective.Objective(objective.open_dataset(made, None), torch.device("cpu"))
        run.run(made, seeds=1, on_epoch=lambda p: losses.append(p.result.val_loss))  # noqa: B023
    assert runs[0] == runs[1]
    assert runs[0][-1] < min(runs[0][0], math.log(10))


@pytest.mark.parametrize("norm", ["group", "fixup"])
def test_normalised_features_have_a_root_mean_square_of_one(norm: str) -> None:
    options: dict[str, Any] = {
        "norm": norm, "num_classes": 5, "image_size": 8, "num_groups": 2, "seed": 0
    }  # fmt: skip
    model = build_model("resnet8", feature_norm="rms", **options)
    plain = build_model("resnet8", **options)
    seen: list[Tensor] = []
    for network in (model, plain):
        network.get_submodule("fc").register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        network(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    normalised, features = seen
    torch.testing.assert_close(normalised.square().mean(dim=1), torch.ones(6))
    torch.testing.assert_close(F.cosine_similarity(normalised, features), torch.ones(6))
