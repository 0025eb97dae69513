"""Federated algorithms against hand arithmetic, on models of a weight or two."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from slow_federated import CLASSES, LOCAL, Local
from torch import Tensor, nn
from torch.nn import functional as F

from models import classifier_parameters, parameter_groups
from sweeps.training.federated import FederatedAveraging, FederatedSettings
from sweeps.training.rounds import SGDSettings


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
    virtual = algorithm._virtual
    assert virtual is not None
    virtual.shares = torch.eye(CLASSES, dtype=torch.float64)[2:3]
    head = (model.fc.weight.unsqueeze(0), model.fc.bias.unsqueeze(0))
    bound = virtual.losses(*head, torch.arange(1)).item()
    statistics = virtual.statistics
    normal = torch.distributions.MultivariateNormal(statistics["mean"][2], statistics["covariance"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = normal.sample(torch.Size([20000]))
    drawn = F.cross_entropy(model.fc(draws), torch.full((20000,), 2)).item()
    assert drawn < bound < 1.1 * drawn


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
