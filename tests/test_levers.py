"""What helps large batches, against plain and slow references, and as settings of a trial."""

import copy
import io
import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import optuna
import pytest
import torch
from helpers import TRAIN, begin, clip_units_slowly, make_spec, make_worker, save_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR

from models import build_model, classifier_parameters, parameter_groups
from storage.checkpoints import CheckpointStore
from sweeps import config, search, specfiles
from sweeps.assembly import Assembly, open_dataset
from sweeps.config import TrialConfig
from sweeps.errors import SpecError
from sweeps.figures import make_figures
from sweeps.findings import read_findings
from sweeps.objective import Objective, Progress
from sweeps.page import results_csv, table_markdown
from sweeps.progress import describe_params
from sweeps.spec import SweepSpec
from sweeps.studies import stored_sweep
from sweeps.training import clipping, schedule
from sweeps.training.lars import LARS
from sweeps.training.loop import Diverged, EpochResult, Training
from sweeps.training.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalised
from sweeps.training.rounds import SGDSettings, SynchronousSGD
from sweeps.training.schedule import Schedule

CLASSES = 5


class Batch:
    """Random images of one device."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(0, CLASSES, (6,), generator=generator)
        self.blocks = ((None, 6),)


def make_model(norm: str) -> nn.Module:
    return (
        build_model(
            "resnet8", norm=norm, num_classes=CLASSES, image_size=8, width_factor=0.25,
            num_groups=2, seed=3,
        ).double().train()
    )  # fmt: skip


def make_algorithm(model: nn.Module, settings: SGDSettings) -> SynchronousSGD:
    groups, classifier = parameter_groups(model), classifier_parameters(model)
    return SynchronousSGD(model, groups, settings, classifier=classifier)


def backward(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """The loss by its definition: -Σ q log p, with q the smoothed labels."""
    model.zero_grad()
    log_p = F.log_softmax(model(batch.images, batch.blocks), dim=1)
    q = torch.full_like(log_p, label_smoothing / CLASSES)
    for row, label in enumerate(batch.labels.tolist()):
        q[row, label] += 1 - label_smoothing
    loss = -(q * log_p).sum(dim=1).mean()
    loss.backward()
    return loss.detach()


def learning_rate(update: int) -> float:
    return 0.05 + 0.02 * (update % 3)


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


class SlowOptimizer(Protocol):
    def __init__(self, model: nn.Module, settings: SGDSettings) -> None: ...

    def step(self, lr: float) -> None: ...


def assert_steps_equal(norm: str, settings: SGDSettings, slow: type[SlowOptimizer]) -> None:
    ours, theirs = make_model(norm), make_model(norm)
    algorithm, reference = make_algorithm(ours, settings), slow(theirs, settings)
    for update in range(3):
        batch = Batch(update)
        algorithm.round(batch, learning_rate(update))
        backward(theirs, batch)
        reference.step(learning_rate(update))
        assert_equal(ours, theirs)


# --- LARS ---------------------------------------------------------------------------------------


class SlowLARS:
    """Algorithm 1 of the paper, one parameter after the other, in Python's numbers."""

    def __init__(self, model: nn.Module, settings: SGDSettings) -> None:
        self.model, self.settings = model, settings
        self.velocities = {n: torch.zeros_like(p) for n, p in model.named_parameters()}

    def step(self, lr: float) -> None:
        s = self.settings
        assert s.lars_trust_coefficient is not None
        for name, p in self.model.named_parameters():
            assert p.grad is not None
            weight, gradient = p.detach().clone(), p.grad
            scalar = p.ndim <= 1
            decay = 0.0 if scalar and not s.decay_scalars else s.weight_decay
            rate = lr * (s.scalar_lr_factor if scalar else 1.0)
            w, g = math.sqrt((weight**2).sum()), math.sqrt((gradient**2).sum())
            if not scalar and w > 0 and g > 0:
                rate *= s.lars_trust_coefficient * w / (g + decay * w)
            step = rate * (gradient + decay * weight)
            velocity = s.momentum * self.velocities[name] + step
            self.velocities[name] = velocity
            p.data = weight - (s.momentum * velocity + step if s.nesterov else velocity)


@pytest.mark.parametrize("norm", ["group", "fixup"])  # Fixup has weights that start at zero
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.0},
        {"weight_decay": 0.0},
        {"decay_scalars": False, "scalar_lr_factor": 0.1},
        {"nesterov": True},
    ],
    ids=str,
)
def test_lars_is_the_papers(norm: str, changes: dict[str, Any]) -> None:
    settings = replace(
        SGDSettings(momentum=0.9, weight_decay=5e-3, lars_trust_coefficient=0.05), **changes
    )
    assert_steps_equal(norm, settings, SlowLARS)


def test_lars_takes_steps_of_one_size_whatever_the_gradients() -> None:
    """Without weight decay the first step is η |w| long, in each layer."""
    model = make_model("group")
    before = copy.deepcopy(dict(model.named_parameters()))
    settings = SGDSettings(momentum=0.9, weight_decay=0.0, lars_trust_coefficient=0.01)
    make_algorithm(model, settings).round(Batch(0), 2.0)
    for name, after in model.named_parameters():
        if after.ndim > 1 and not torch.equal(after, before[name]):
            step, length = (after - before[name]).norm(), before[name].norm()
            assert step.item() == pytest.approx(0.02 * length.item(), rel=1e-9), name


def test_lars_leaves_parameters_without_a_gradient() -> None:
    moved, left = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    moved.grad = torch.ones(2, 2)
    optimizer = LARS([left, moved], lr=1.0, momentum=0.9, trust_coefficient=0.5)
    assert optimizer.step() is None
    assert torch.equal(left, torch.ones(2, 2))
    assert torch.equal(moved.detach(), torch.full((2, 2), 0.5))
    assert list(optimizer.state) == [moved]
    assert optimizer.step(lambda: 3.0) == 3.0


def test_lars_at_a_constant_rate_is_sgd_where_it_is_not_layerwise() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    lars, sgd = LARS([ours], layerwise=False, **options), torch.optim.SGD([theirs], **options)
    for _ in range(4):
        ours.grad = torch.randn(3, generator=generator, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        lars.step()
        sgd.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# --- Muon ---------------------------------------------------------------------------------------


def orthogonalised_slowly(matrix: Tensor) -> Tensor:
    """The polynomial on the singular values of one matrix."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / math.sqrt((s**2).sum()) if s.any() else s
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


class SlowMuon:
    """One parameter after the other; what is no matrix is left to PyTorch's SGD."""

    def __init__(self, model: nn.Module, settings: SGDSettings) -> None:
        self.model, self.settings = model, settings
        classifier = {id(p) for p in classifier_parameters(model)}
        self.matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in classifier]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        matrices = {id(p) for p in self.matrices}
        scalars = [p for p in model.parameters() if p.ndim <= 1]
        weights = [p for p in model.parameters() if p.ndim > 1 and id(p) not in matrices]
        decay = settings.weight_decay
        self.sgd = torch.optim.SGD(
            [
                {"params": weights, "weight_decay": decay, "factor": 1.0},
                {
                    "params": scalars,
                    "weight_decay": decay if settings.decay_scalars else 0.0,
                    "factor": settings.scalar_lr_factor,
                },
            ],
            lr=0.0,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
        )

    def step(self, lr: float) -> None:
        s = self.settings
        assert s.muon_lr_factor is not None
        for group in self.sgd.param_groups:
            group["lr"] = lr * group["factor"]
        self.sgd.step()
        lr *= s.muon_lr_factor
        for p, momentum in zip(self.matrices, self.momenta, strict=True):
            assert p.grad is not None
            gradient = p.grad.flatten(1)
            b = momentum.flatten(1).mul_(s.momentum).add_(gradient)
            direction = orthogonalised_slowly(gradient + s.momentum * b if s.nesterov else b)
            size = math.sqrt(max(1, direction.shape[0] / direction.shape[1]))
            p.data -= lr * (size * direction.view_as(p) + s.muon_weight_decay * p.data)


@pytest.mark.parametrize("norm", ["group", "fixup"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.0},
        {"muon_weight_decay": 0.0, "nesterov": True},
        {"decay_scalars": False, "scalar_lr_factor": 0.1},
    ],
    ids=str,
)
def test_muon_is_its_authors(norm: str, changes: dict[str, Any]) -> None:
    settings = SGDSettings(weight_decay=5e-3, muon_lr_factor=0.3, muon_weight_decay=0.2)
    settings = replace(settings, **changes)
    assert_steps_equal(norm, settings, SlowMuon)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_muon_is_pytorchs(memory_format: torch.memory_format) -> None:
    """But for the dtype: theirs is bfloat16 within."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4, 3, 3), (40, 4, 1, 1), (6, 4, 3, 3)]
    ours = [nn.Parameter(torch.ones(s).to(memory_format=memory_format)) for s in shapes]
    theirs = [nn.Parameter(torch.ones(len(p), p[0].numel())) for p in ours]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    muon = Muon([{"params": ours}], dtype=torch.bfloat16, **options)
    pytorchs = torch.optim.Muon(theirs, **options)
    for _ in range(3):
        for p, other in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(memory_format=memory_format)
            other.grad = p.grad.flatten(1).clone()
        muon.step()
        pytorchs.step()
    for p, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach().flatten(1), other.detach(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(1, 5, 40), (2, 40, 5), (3, 1, 7), (2, 8, 8)], ids=str)
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = orthogonalised(matrices)
    values = torch.linalg.svdvals(made)
    before = torch.linalg.svdvals(matrices)
    above = before > 0.01 * torch.linalg.matrix_norm(matrices)[:, None]
    assert above.sum() >= above.numel() - 1
    assert values[above].min() > 0.67
    assert values.max() < 1.14
    for of, matrix in zip(made, matrices, strict=True):
        torch.testing.assert_close(of, orthogonalised_slowly(matrix), rtol=1e-9, atol=1e-9)
    assert not orthogonalised(torch.zeros(shape)).any()


def test_muon_leaves_parameters_without_a_gradient() -> None:
    moved, left = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    moved.grad = torch.eye(2)
    optimizer = Muon([{"params": [left, moved]}, {"params": [], "matrices": False}], lr=0.5)
    assert optimizer.step() is None
    assert torch.equal(left, torch.ones(2, 2))
    assert not torch.equal(moved.detach(), torch.ones(2, 2))
    assert optimizer.step(lambda: 3.0) == 3.0


# --- adaptive gradient clipping -----------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group", "fixup"])
@pytest.mark.parametrize("clip_grad_norm", [None, 0.1])
def test_adaptive_clipping_is_the_papers_and_comes_first(
    norm: str, clip_grad_norm: float | None
) -> None:
    settings = SGDSettings(agc_clip_factor=0.03, clip_grad_norm=clip_grad_norm)
    ours, theirs = make_model(norm), make_model(norm)
    algorithm = make_algorithm(ours, settings)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    for update in range(3):
        batch = Batch(update)
        algorithm.round(batch, learning_rate(update))
        backward(theirs, batch)
        clip_units_slowly(theirs, 0.03)
        if clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(update)
        optimizer.step()
        assert_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 3), (4, 3, 3, 3)])
@pytest.mark.parametrize("stacked", [False, True])
def test_units_of_weights_of_any_shape_are_clipped(shape: tuple[int, ...], stacked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (5, *shape) if stacked else shape
    weight = torch.randn(rows, generator=generator) * 0.1
    gradient = torch.randn(rows, generator=generator) * torch.logspace(-4, 1, 5).view(
        5, *[1] * len(shape)
    ) if stacked else torch.randn(rows, generator=generator)  # fmt: skip
    wanted = gradient.clone()
    for w, g in zip(weight, wanted, strict=True) if stacked else [(weight, wanted)]:
        units = zip(w, g, strict=True) if g.ndim >= 2 else []
        for unit, of_unit in units:
            longest = 0.1 * max(unit.norm().item(), 1e-3)
            of_unit.mul_(min(1.0, longest / of_unit.norm().item()))
    clipping.clip_units_([(weight, gradient)], 0.1, stacked=stacked)
    torch.testing.assert_close(gradient, wanted)


def test_a_gradient_of_zero_stays() -> None:
    gradient = torch.zeros(3, 2)
    gradient[1] = 100.0
    clipping.clip_units_([(torch.zeros(3, 2), gradient)], 0.5)
    assert torch.equal(gradient[[0, 2]], torch.zeros(2, 2))
    assert gradient[1].norm().item() == pytest.approx(0.5e-3)


# --- label smoothing and Nesterov ---------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
def test_smoothed_labels_and_nesterov_by_their_definition(label_smoothing: float) -> None:
    settings = SGDSettings(nesterov=True, label_smoothing=label_smoothing)
    ours, theirs = make_model("group"), make_model("group")
    algorithm = make_algorithm(ours, settings)
    optimizer = torch.optim.SGD(
        theirs.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    for update in range(4):
        batch = Batch(update)
        loss = algorithm.round(batch, learning_rate(update))
        wanted = backward(theirs, batch, label_smoothing)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
        optimizer.param_groups[0]["lr"] = learning_rate(update)
        optimizer.step()
        assert_equal(ours, theirs)


def make_assembly(values: dict[str, Any]) -> tuple[Assembly, TrialConfig]:
    made = TrialConfig.build({**TRAIN, **values})
    return Assembly(open_dataset(made, None), torch.device("cpu")), made


def make_objective(values: dict[str, Any]) -> tuple[Objective, TrialConfig]:
    assembly, made = make_assembly(values)
    return Objective(assembly), made


def training_of(label_smoothing: float) -> tuple[Training, nn.Module, Tensor]:
    """A trial's training, its model, and the labels that it trains on."""
    values = {"label_smoothing": label_smoothing, "norm": "fixup", "epochs": 6}
    assembly, made = make_assembly(values)
    training = assembly.training(made, 0)
    algorithm = training._algorithm
    assert isinstance(algorithm, SynchronousSGD)
    return training, algorithm.global_model(), assembly.prepared(made).train_labels


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_the_best_constant_guess_is_that_of_the_smoothed_labels(label_smoothing: float) -> None:
    """Found by descent over constant logits, on the digits that a trial trains on."""
    training, _, labels = training_of(label_smoothing)
    logits = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        guess = logits.expand(len(labels), 10)
        loss = F.cross_entropy(guess, labels, label_smoothing=label_smoothing)
        loss.backward()
        return loss

    optimizer.step(closure)
    confident = torch.full((1, 10), label_smoothing / 10, dtype=torch.float64)
    confident[0, 3] += 1 - label_smoothing
    least = F.cross_entropy(
        confident.log().clamp(min=-1e3), torch.tensor([3]), label_smoothing=label_smoothing
    )
    wanted = least.item() + 0.98 * (closure().item() - least.item())
    assert training._dead_loss == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_a_dead_network_is_found_whatever_its_labels(label_smoothing: float) -> None:
    training, model, _ = training_of(label_smoothing)

    def kill(*_: object) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()

    model.register_forward_pre_hook(kill)
    with pytest.raises(Diverged, match="dead"):
        list(training.run())
    assert len(training.history) == 3


def test_smoothed_labels_that_are_learnt_are_not_dead() -> None:
    """At ε = 0.9 the least loss there is lies within 2 % of a constant guess's."""
    training, _, _ = training_of(0.9)
    perfect, guess = -0.19 * math.log(0.19) - 0.81 * math.log(0.09), math.log(10)
    assert 0.98 * guess < perfect < training._dead_loss
    training.history = [EpochResult(e, perfect, 1.0, 0.1, 1, 0.1, 1.0, 1.0) for e in (1, 2, 3)]
    training._raise_if_dead()
    training.history = [replace(r, train_loss=guess) for r in training.history]
    with pytest.raises(Diverged, match="dead"):
        training._raise_if_dead()


# --- warmup shapes and the exponential schedule -------------------------------------------------


def make_schedule(**changes: Any) -> Schedule:
    settings: dict[str, Any] = {
        "peak_lr": 2.0, "warmup_start_factor": 0.0625, "warmup_updates": 8,
        "total_updates": 48, "kind": "constant",
    }  # fmt: skip
    return Schedule(**{**settings, **changes})


@pytest.mark.parametrize(
    ("shape", "middle", "quarter"),
    [
        ("linear", 0.53125, 0.296875),
        ("cosine", 0.53125, 0.0625 + 0.9375 * (1 - math.sqrt(0.5)) / 2),
        ("exponential", 0.25, 0.125),
    ],
)
def test_warmup_shapes_by_hand(shape: str, middle: float, quarter: float) -> None:
    s = make_schedule(warmup_shape=shape)
    assert s.lr(0) == pytest.approx(2.0 * 0.0625, rel=1e-12)
    assert s.lr(2) == pytest.approx(2.0 * quarter, rel=1e-12)
    assert s.lr(4) == pytest.approx(2.0 * middle, rel=1e-12)
    assert s.lr(8) == s.lr(47) == 2.0
    rates = [s.lr(u) for u in range(9)]
    assert rates == sorted(set(rates))


@pytest.mark.parametrize("shape", schedule.WARMUP_SHAPES)
def test_a_warmup_from_the_peak_is_flat(shape: str) -> None:
    s = make_schedule(warmup_shape=shape, warmup_start_factor=1.0)
    assert [s.lr(u) for u in range(9)] == pytest.approx([2.0] * 9, rel=1e-12)


def test_the_exponential_schedule_is_pytorchs() -> None:
    s = make_schedule(kind="exponential", exponential_gamma=0.9, updates_per_epoch=5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    reference = ExponentialLR(optimizer, gamma=0.9)
    for update in range(8, 48):
        if update > 8 and (update - 8) % 5 == 0:
            optimizer.step()
            reference.step()
        wanted = optimizer.param_groups[0]["lr"]
        assert s.lr(update) == pytest.approx(wanted, rel=1e-12), update
    assert s.lr(7) < 2.0


def test_an_unknown_warmup_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted: 'linear', 'cosine', 'exponential'"):
        make_schedule(warmup_shape="quadratic")


def test_names_are_those_of_the_schedule() -> None:
    assert config.SCHEDULES == schedule.SCHEDULES
    assert config.WARMUP_SHAPES == schedule.WARMUP_SHAPES


# --- all of them as settings of a trial ---------------------------------------------------------

SGD_LEVERS: dict[str, Any] = {
    "nesterov": True, "agc_clip_factor": 0.08, "clip_grad_norm": 1.0, "label_smoothing": 0.1,
    "warmup_epochs": 1.5, "warmup_shape": "cosine", "schedule": "exponential",
    "exponential_gamma": 0.8, "epochs": 4,
}  # fmt: skip
LEVERS = {
    "sgd": SGD_LEVERS,
    "lars": {
        **SGD_LEVERS, "optimizer": "lars", "lars_trust_coefficient": 0.02, "peak_lr": 1.0,
        "warmup_shape": "exponential",
    },
    "muon": {**SGD_LEVERS, "optimizer": "muon", "muon_lr_factor": 0.1, "peak_lr": 0.3},
    "fedavg": {**SGD_LEVERS, "algorithm": "fedavg", "local_steps": 3},
    "scaffold": {
        **SGD_LEVERS, "algorithm": "scaffold", "local_steps": 3, "optimizer": "muon",
        "muon_lr_factor": 0.1,
    },
}  # fmt: skip


class Stop(Exception):
    pass


def stop_after(epochs: int) -> Callable[[Progress], None]:
    def on_epoch(progress: Progress) -> None:
        if progress.step == epochs:
            raise Stop

    return on_epoch


def curve(results: list[EpochResult]) -> list[tuple[float, ...]]:
    return [(r.train_loss, r.val_loss, r.val_accuracy, r.lr) for r in results]


@pytest.mark.parametrize("name", LEVERS)
def test_a_trial_with_every_lever_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    run, made = make_objective(LEVERS[name])
    whole: list[EpochResult] = []
    accuracy = run.run(made, seeds=1, on_epoch=lambda p: whole.append(p.result))
    assert whole[-1].train_loss < whole[0].train_loss
    checkpoints = CheckpointStore(tmp_path)
    with pytest.raises(Stop):
        run.run(made, seeds=1, on_epoch=stop_after(2), checkpoints=checkpoints, key="trial")
    again, _ = make_objective(LEVERS[name])
    assert again.completed_steps(made, checkpoints, "trial") == 2
    resumed: list[EpochResult] = []
    value = again.run(
        made,
        seeds=1,
        on_epoch=lambda p: resumed.append(p.result),
        checkpoints=checkpoints,
        key="trial",
    )
    assert value == accuracy
    assert curve(resumed) == curve(whole)


def test_a_checkpoint_from_before_a_setting_existed_is_gone_on_with(tmp_path: Path) -> None:
    run, made = make_objective({})
    checkpoints = CheckpointStore(tmp_path)
    with pytest.raises(Stop):
        run.run(made, seeds=1, on_epoch=stop_after(2), checkpoints=checkpoints, key="trial")
    state = checkpoints.load("trial")
    assert state is not None
    # As they once were kept.
    state["config"] = json.loads(state["config"])
    del state["config"]["compile"]
    state["finished"] = json.loads(state["finished"])
    state["training"]["history"] = json.loads(state["training"]["history"])
    save_checkpoint(checkpoints, "trial", state)
    assert run.completed_steps(made, checkpoints, "trial") == 2
    del state["config"]["momentum"]
    state["config"]["weight_decay"] = 0.25
    save_checkpoint(checkpoints, "trial", state)
    assert run.completed_steps(made, checkpoints, "trial") == 0


def without(state: dict[str, Any], name: str) -> None:
    del state["training"][name]


def with_another_measure(state: dict[str, Any], name: str) -> None:
    history = json.loads(state["training"]["history"])
    state["training"]["history"] = json.dumps([{**result, name: 1.0} for result in history])


def with_other_weights(state: dict[str, Any], name: str) -> None:
    state["training"]["algorithm"]["model"][name] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (without, "algorithm"),
        (without, "history"),
        (with_another_measure, "new"),
        (with_other_weights, "fc.bias"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_begun_anew(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, Any], str], None],
    name: str,
) -> None:
    run, made = make_objective({})
    checkpoints = CheckpointStore(tmp_path)
    with pytest.raises(Stop):
        run.run(made, seeds=1, on_epoch=stop_after(2), checkpoints=checkpoints, key="trial")
    state = checkpoints.load("trial")
    assert state is not None
    change(state, name)
    save_checkpoint(checkpoints, "trial", state)
    steps: list[int] = []
    value = run.run(
        made, seeds=1, on_epoch=lambda p: steps.append(p.step), checkpoints=checkpoints, key="trial"
    )
    assert "the checkpoint of trial does not fit" in caplog.text
    assert steps == list(range(1, made.epochs + 1))
    assert value == run.run(made, seeds=1, on_epoch=lambda p: None)


class Unwritable(Assembly):
    """Its networks have a bias that PyTorch refuses to write to, as it does where memory ends."""

    def model(self, config: TrialConfig, seed: int) -> nn.Module:
        model = super().model(config, seed)
        with torch.inference_mode():
            model.get_submodule("fc").bias = nn.Parameter(torch.zeros(10))
        return model


def test_a_checkpoint_that_fits_and_cannot_be_loaded_is_kept(tmp_path: Path) -> None:
    run, made = make_objective({})
    checkpoints = CheckpointStore(tmp_path)
    with pytest.raises(Stop):
        run.run(made, seeds=1, on_epoch=stop_after(2), checkpoints=checkpoints, key="trial")
    before = checkpoints.path("trial").read_bytes()
    unwritable = Objective(Unwritable(open_dataset(made, None), torch.device("cpu")))
    with pytest.raises(RuntimeError, match="an exception occurred"):
        unwritable.run(made, seeds=1, on_epoch=stop_after(1), checkpoints=checkpoints, key="trial")
    assert checkpoints.path("trial").read_bytes() == before


@pytest.mark.parametrize(
    "settings", [{}, {"lars_trust_coefficient": 0.02}, {"muon_lr_factor": 0.1}], ids=str
)
def test_a_step_goes_on_from_a_state_in_the_middle(settings: dict[str, Any]) -> None:
    made = SGDSettings(nesterov=True, agc_clip_factor=0.1, label_smoothing=0.1, **settings)
    whole, resumed = (make_algorithm(make_model("fixup"), made) for _ in range(2))
    for update in range(3):
        whole.round(Batch(update), learning_rate(update))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed.round(Batch(9), 0.3)  # must leave no trace
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for update in range(3, 6):
        losses = [a.round(Batch(update), learning_rate(update)) for a in (whole, resumed)]
        assert torch.equal(*losses)
    for name, value in whole.global_model().state_dict().items():
        assert torch.equal(value, resumed.global_model().state_dict()[name]), name


def test_levers_that_are_off_change_nothing() -> None:
    off = {"agc_clip_factor": "off", "label_smoothing": 0.0, "nesterov": False}
    off |= {"optimizer": "sgd", "warmup_shape": "linear"}
    losses: list[list[float]] = [[], []]
    for values, seen in zip(({}, off), losses, strict=True):
        run, made = make_objective(values)
        run.run(made, seeds=1, on_epoch=lambda p, seen=seen: seen.append(p.result.train_loss))  # type: ignore[misc]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nesterov": 1}, "nesterov = 1 is not accepted; accepted: true | false"),
        ({"nesterov": "yes"}, "accepted: true | false"),
        ({"nesterov": True, "momentum": 0.0}, "no meaning for momentum = 0"),
        ({"optimizer": "lamb"}, "accepted: lars, muon, sgd"),
        ({"optimizer": "lars", "algorithm": "fedavg"}, "belongs to algorithm = 'sync-sgd'"),
        ({"lars_trust_coefficient": 0}, "above 0"),
        ({"muon_lr_factor": 0}, "above 0"),
        ({"agc_clip_factor": 0.0}, "above 0, or 'off'"),
        ({"label_smoothing": 1.0}, "to 0.9999"),
        ({"warmup_shape": "cosin"}, "did you mean 'cosine'"),
        ({"schedule": "exponental"}, "did you mean 'exponential'"),
        ({"exponential_gamma": 1.1}, "to 1"),
    ],
)
def test_a_wrong_lever_is_explained(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        TrialConfig.build(values)
    assert said in str(caught.value)


# --- settings that are true or false ------------------------------------------------------------


def bool_spec() -> SweepSpec:
    return make_spec(
        search={"nesterov": {"choices": [True, False]}, "peak_lr": {"low": 0.1, "high": 0.2}},
        **{"try": [{"label": "plain", "nesterov": False, "peak_lr": 0.1}]},
    )


def test_a_setting_of_true_or_false_survives_toml_and_json() -> None:
    made = bool_spec()
    assert made.search["nesterov"].choices == (True, False)
    assert made.tries[0].params["nesterov"] is False
    assert SweepSpec.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    read = SweepSpec.from_table(tomllib.loads(made.as_toml()), name=made.name)
    assert read == made
    assert made.lowest_params()["nesterov"] is False
    assert str(made.search["nesterov"]) == "one of true, false"
    assert describe_params({"nesterov": True, "peak_lr": 0.1}) == "nesterov=true peak_lr=0.1"


def test_optuna_suggests_true_and_false() -> None:
    made = bool_spec()
    study = optuna.create_study(sampler=search.build_sampler(made, "s", 0))
    seen = set()
    for _ in range(12):
        trial = study.ask()
        params = search.suggest(trial, made.search)
        assert isinstance(params["nesterov"], bool)
        assert made.config({}, params).nesterov is params["nesterov"]
        seen.add(params["nesterov"])
        study.tell(trial, 0.5)
    assert seen == {True, False}


def test_an_enumerated_setting_of_true_or_false_names_studies_as_files_do() -> None:
    made = make_spec(each={"nesterov": [True, False]})
    assert [made.study_name(cell) for cell in made.cells] == [
        "tiny/nesterov=true",
        "tiny/nesterov=false",
    ]


def test_a_sweep_over_true_and_false_runs_and_is_reported(tmp_path: Path) -> None:
    made = make_spec(
        train={"epochs": 1},
        each={"nesterov": [True, False]},
        search={"peak_lr": {"low": 0.1, "high": 0.2}},
        budget={"trials": 1},
    )
    searched = make_spec(
        "searched",
        train={"epochs": 1},
        search={"nesterov": {"choices": [True, False]}},
        budget={"trials": 2},
        **{"try": [{"label": "with", "nesterov": True}, {"label": "without", "nesterov": False}]},
    )
    found = []
    for sweep in (made, searched):
        store = begin(tmp_path, sweep)
        make_worker(tmp_path, sweep.name).run()
        found.append(read_findings(store, stored_sweep(store, sweep.name)))
    enumerated, suggested = found
    assert [s.name for s in enumerated.studies] == ["nesterov=true", "nesterov=false"]
    params = {t.label: t.params for t in suggested.studies[0].status.trials}
    assert params == {"with": {"nesterov": True}, "without": {"nesterov": False}}
    rows = results_csv([suggested]).splitlines()[1:]
    assert [row.split(",")[3:5] for row in rows] == [["with", "true"], ["without", "false"]]
    assert "| nesterov=true |" in table_markdown([suggested])
    figures = {figure.key: figure for figure in make_figures([suggested])}
    plot = figures["settings"].panels[0].plot.to_plotly_json()
    assert plot["layout"]["xaxis"]["ticktext"] == ["true", "false"]
    assert {round(x) for trace in plot["data"] for x in trace["x"]} == {0, 1}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("nesterov=true", True), ("train.nesterov=true", True), ("nesterov=false", False)],
)
def test_true_and_false_can_be_set(text: str, wanted: bool, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(make_spec("mine").as_toml(), encoding="utf-8")
    assert specfiles.load(str(path), overrides=[text]).train["nesterov"] is wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"nesterov": "true"}}, "nesterov = 'true' is not accepted; accepted: true | "),
        ({"search": {"nesterov": {"low": False, "high": True}}}, "choices = [true, false]"),
        ({"search": {"nesterov": {"choices": [True, True]}}}, "twice"),
        ({"search": {"nesterov": {"choices": [0, 1]}}}, "accepted: true | false"),
        (
            {"search": {"nesterov": {"choices": [True]}}, "try": [{"nesterov": False}]},
            "accepted: one of true",
        ),
        (
            {"search": {"nesterov": {"choices": [True, False]}}, "train": {"momentum": 0.0}},
            "reaches nesterov = true",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_with_true_and_false_is_explained(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        make_spec(**change)
    assert said in str(caught.value)
