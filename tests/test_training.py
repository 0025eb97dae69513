"""The training engine: exact on problems small enough to check, and able to go on anywhere."""

import copy
import functools
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_spec
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode

from data.batches import DeviceBatches
from models import build_model, parameter_groups
from sweeps.assembly import Assembly, open_dataset
from sweeps.config import TrialConfig
from sweeps.objective import Objective
from sweeps.training import rounds
from sweeps.training.compiled import CompiledNetwork
from sweeps.training.gpu_errors import breaks_device, gpu_is_full
from sweeps.training.loop import (
    Diverged,
    EpochResult,
    Evaluation,
    Interrupted,
    Training,
    evaluate,
)
from sweeps.training.optimizers import SGD
from sweeps.training.rounds import SGDSettings, SynchronousSGD
from sweeps.training.schedule import Schedule

NO_COMPILER = """
import sys
from helpers import make_spec
from sweeps.assembly import Assembly, open_dataset
from sweeps.objective import Objective
import torch
config = make_spec(train={"epochs": 1}).config({}, {"peak_lr": 0.1})
Objective(Assembly(open_dataset(config, None), torch.device("cpu"))).run(
    config, seeds=1, on_epoch=lambda _: None
)
assert "torch._dynamo" not in sys.modules
"""


def test_a_training_starts_without_importing_the_compiler() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", NO_COMPILER], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}]
)
def test_steps_and_state_are_those_of_torch_optim(settings: dict[str, Any]) -> None:
    def parameters() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(5, generator=generator)) for _ in range(3)]

    ours, theirs = parameters(), parameters()
    optimizers = (SGD(ours, lr=0.1, **settings), torch.optim.SGD(theirs, lr=0.1, **settings))
    for step in range(3):
        for optimizer, both in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            sum(((p - step) ** 2).sum() for p in both).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    again = SGD(ours, lr=0.5, **settings)
    again.load_state_dict(states[1])
    assert again.param_groups[0]["lr"] == 0.1


def schedule(**changes: Any) -> Schedule:
    settings: dict[str, Any] = {
        "peak_lr": 0.8, "warmup_start_factor": 0.125, "warmup_updates": 10,
        "total_updates": 110, "kind": "constant",
    }  # fmt: skip
    return Schedule(**{**settings, **changes})


def test_warmup_starts_at_the_factor_and_reaches_the_peak() -> None:
    s = schedule()
    assert s.lr(0) == pytest.approx(0.1, rel=1e-12)
    assert s.lr(5) == pytest.approx(0.45, rel=1e-12)
    assert s.lr(9) == pytest.approx(0.1 + 0.9 * 0.7, rel=1e-12)
    assert s.lr(10) == s.lr(109) == 0.8


def test_no_warmup_starts_at_the_peak() -> None:
    assert schedule(warmup_updates=0).lr(0) == 0.8


def test_cosine_falls_from_the_peak_to_zero() -> None:
    s = schedule(kind="cosine")
    assert s.lr(9) < 0.8
    assert s.lr(10) == 0.8
    assert s.lr(60) == pytest.approx(0.4)
    assert s.lr(110) == pytest.approx(0.0, abs=1e-12)


def test_plateau_is_pytorchs_and_waits_for_the_warmup() -> None:
    s = schedule(kind="plateau", plateau_patience=1, plateau_factor=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
    reference = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=1)
    s.end_epoch(0, 0.99)  # within the warmup: must not set the mark to beat
    for epoch, accuracy in enumerate([0.1, 0.2, 0.2, 0.2, 0.2, 0.3, 0.1, 0.1, 0.1]):
        s.end_epoch(10 + 10 * epoch, accuracy)
        reference.step(accuracy)
        assert s.lr(20 + 10 * epoch) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert s.lr(100) < 0.8


def test_plateau_goes_on_from_its_state() -> None:
    accuracies = [0.1, 0.3, 0.2, 0.2, 0.2, 0.2, 0.25]
    whole = schedule(kind="plateau", plateau_patience=1, warmup_updates=0)
    rates = []
    for epoch, accuracy in enumerate(accuracies):
        whole.end_epoch(epoch, accuracy)
        rates.append(whole.lr(epoch + 1))
    for cut in range(len(accuracies)):
        first = schedule(kind="plateau", plateau_patience=1, warmup_updates=0)
        for epoch, accuracy in enumerate(accuracies[:cut]):
            first.end_epoch(epoch, accuracy)
        second = schedule(kind="plateau", plateau_patience=1, warmup_updates=0)
        second.load_state_dict(first.state_dict())
        for epoch, accuracy in enumerate(accuracies[cut:], start=cut):
            second.end_epoch(epoch, accuracy)
            assert second.lr(epoch + 1) == rates[epoch]


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted: 'plateau', 'cosine', 'exponential', 'cons"):
        schedule(kind="step")


@dataclass(frozen=True)
class Local:
    images: Tensor
    labels: Tensor
    blocks: Any


def fused_batch(sizes: list[int], generator: torch.Generator) -> tuple[Local, Tensor]:
    """A batch of devices with sizes n+1 (the first ones) and n, and each sample's device."""
    big = [d for d, size in enumerate(sizes) if size == max(sizes)]
    small = [d for d, size in enumerate(sizes) if size != max(sizes)]
    blocks, owner = [], []
    for devices in (big, small):
        if devices:
            blocks.append((torch.tensor(devices), sizes[devices[0]]))
            owner += devices * sizes[devices[0]]
    count = sum(sizes)
    images = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return Local(images, labels, tuple(blocks)), torch.tensor(owner)


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "fixup"])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [5, 5, 4, 4]])
def test_the_fused_step_is_the_average_of_the_devices_gradients(
    norm: str, sizes: list[int]
) -> None:
    """Against D models with D backward passes, averaged by hand, over five updates."""
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {
        "norm": norm, "num_classes": 10, "image_size": 8, "width_factor": 0.25,
        "num_groups": 2, "num_devices": len(sizes), "seed": 3,
    }  # fmt: skip
    fused = build_model("resnet8", **options).double().train()
    separate = copy.deepcopy(fused)
    settings = SGDSettings(
        momentum=0.9, weight_decay=5e-4, scalar_lr_factor=0.1, clip_grad_norm=0.5
    )
    algorithm = SynchronousSGD(fused, parameter_groups(fused), settings)
    groups = parameter_groups(separate)
    optimizers = {
        name: torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=5e-4)
        for name, parameters in groups.items()
    }
    for update in range(5):
        batch, owner = fused_batch(sizes, generator)
        lr = 0.05 * (update + 1)
        algorithm.round(batch, lr)
        sums = [torch.zeros_like(p) for p in separate.parameters()]
        for d, size in enumerate(sizes):
            mine = owner == d
            logits = separate(batch.images[mine], ((torch.tensor([d]), size),))
            loss = F.cross_entropy(logits, batch.labels[mine])
            gradients = torch.autograd.grad(loss, list(separate.parameters()))
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient * size / sum(sizes)
        for parameter, total in zip(separate.parameters(), sums, strict=True):
            parameter.grad = total
        torch.nn.utils.clip_grad_norm_(separate.parameters(), 0.5)
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = lr * (0.1 if name == "scalars" else 1.0)
            optimizer.step()
    for (name, ours), (_, theirs) in zip(
        fused.state_dict().items(), separate.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)


def test_weight_decay_can_spare_the_scalars() -> None:
    model = build_model("resnet8", norm="group", num_classes=10, image_size=8, num_groups=2, seed=0)
    before = copy.deepcopy(model.state_dict())
    settings = SGDSettings(momentum=0.0, weight_decay=0.1, decay_scalars=False)
    algorithm = SynchronousSGD(model, parameter_groups(model), settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in algorithm._optimizer.param_groups:
        group["lr"] = 1.0
    algorithm._optimizer.step()
    for name, value in model.state_dict().items():
        factor = 0.9 if value.ndim > 1 else 1.0
        torch.testing.assert_close(value, before[name] * factor, msg=name)


def training(
    epochs: int = 4,
    *,
    norm: str = "group",
    peak_lr: float = 0.1,
    kind: str = "plateau",
    should_stop: Callable[[], bool] = lambda: False,
    seed: int = 0,
    settings: SGDSettings | None = None,
    compiled: bool = False,
) -> tuple[Training, nn.Module]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(200) % 10
    centres = torch.randint(0, 255, (10, 3, 8, 8), generator=generator)
    noise = torch.randint(-60, 60, (200, 3, 8, 8), generator=generator)
    images = (centres[labels] + noise).clamp(0, 255).to(torch.uint8)
    model = build_model(
        "resnet8", norm=norm, num_classes=10, image_size=8, num_groups=2, width_factor=0.25,
        num_devices=4, seed=seed,
    ).train()  # fmt: skip
    shards = [np.flatnonzero((labels.numpy() // 3) == d) for d in range(4)]
    batches = DeviceBatches(
        images, labels, shards, global_batch_size=22, seed=seed, augment="crop-flip",
        crop_padding=1, device=torch.device("cpu"), mean=[0.5] * 3, std=[0.25] * 3,
    )  # fmt: skip
    val = (images[:50].float() / 255 - 0.5) / 0.25
    return Training(
        algorithm=SynchronousSGD(
            model, parameter_groups(model), settings or SGDSettings(), compiled=compiled
        ),
        batches=batches,
        evaluate=lambda: evaluate(model, [val[:30], val[30:]], labels[:50]),
        schedule=Schedule(
            peak_lr=peak_lr, warmup_start_factor=0.1, warmup_updates=5,
            total_updates=epochs * batches.updates_per_epoch, kind=kind, plateau_patience=0,
        ),
        epochs=epochs,
        guess_loss=math.log(10),
        untrained_loss=math.log(10),
        should_stop=should_stop,
    ), model  # fmt: skip


def without_times(results: list[EpochResult]) -> list[tuple[Any, ...]]:
    return [
        (r.epoch, r.train_loss, r.val_loss, r.val_accuracy, r.predicted_classes, r.lr)
        for r in results
    ]


@pytest.mark.parametrize(("norm", "meant", "other"), [("fixup", 0.1, 1.0), ("group", 1.0, 0.1)])
def test_scalars_learn_as_the_authors_of_each_network_have_them(
    norm: str, meant: float, other: float
) -> None:
    def losses(factor: float | str) -> list[float]:
        train = {"norm": norm, "scalar_lr_factor": factor, "epochs": 1}
        config = make_spec(train=train).config({}, {"peak_lr": 0.1})
        objective = Objective(Assembly(open_dataset(config, None), torch.device("cpu")))
        heard: list[float] = []
        objective.run(config, seeds=1, on_epoch=lambda p: heard.append(p.result.train_loss))
        return heard

    assert losses("auto") == losses(meant) != losses(other)


@pytest.mark.parametrize("norm", ["batch", "group", "fixup"])
@pytest.mark.parametrize("cut", [1, 3])
def test_a_resumed_training_equals_one_never_stopped(norm: str, cut: int, tmp_path: Any) -> None:
    whole, whole_model = training(norm=norm)
    assert len(list(whole.run())) == 4
    first, _ = training(norm=norm)
    running = first.run()
    for _ in range(cut):
        next(running)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second, second_model = training(norm=norm, seed=0)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert len(list(second.run())) == 4 - cut
    assert without_times(second.history) == without_times(whole.history)
    for name, value in whole_model.state_dict().items():
        assert torch.equal(value, second_model.state_dict()[name]), name


def test_a_training_goes_on_where_its_tensors_have_another_layout() -> None:
    """As on a GPU, which is given channels-last ones, after a CPU."""
    whole, _ = training(2, kind="constant")
    expected = [r.train_loss for r in whole.run()]
    first, _ = training(2, kind="constant")
    next(first.run())
    second, model = training(2, kind="constant")
    model.to(memory_format=torch.channels_last)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [r.train_loss for r in second.run()] == pytest.approx(expected[1:], rel=1e-5)


def test_equal_seeds_give_equal_numbers_and_others_do_not() -> None:
    runs = [training(2, seed=seed)[0] for seed in (0, 0, 1)]
    curves = []
    for run in runs:
        list(run.run())
        curves.append(without_times(run.history))
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_it_learns() -> None:
    run, _ = training(25, kind="constant")
    results = list(run.run())
    assert results[-1].val_accuracy > 0.4
    assert results[-1].train_loss < results[0].train_loss
    assert all(r.images_per_second > 0 and r.seconds > 0 for r in results)


def test_a_loss_that_is_not_finite_ends_it_within_the_epoch() -> None:
    run, _ = training(3, norm="fixup", peak_lr=1e4)
    with pytest.raises(Diverged, match=r"not finite|exploded") as caught:
        list(run.run())
    assert caught.value.epoch == 0
    assert run.history == []


def test_a_dead_network_ends_it() -> None:
    run, model = training(10, norm="fixup")

    def kill(*_: object) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()

    model.register_forward_pre_hook(kill)
    with pytest.raises(Diverged, match="dead") as caught:
        list(run.run())
    # The warmup's epoch does not count; three after it do, and all of them were yielded.
    assert caught.value.epoch == 4
    assert len(run.history) == 4


def test_a_dead_network_is_dead_after_a_resume_too() -> None:
    run, model = training(10, norm="fixup")

    def kill(*_: object) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()

    model.register_forward_pre_hook(kill)
    with pytest.raises(Diverged):
        list(run.run())
    again, _ = training(10, norm="fixup")
    again.load_state_dict(run.state_dict())
    with pytest.raises(Diverged, match="dead"):
        next(again.run())


def test_fixup_that_is_slow_to_leave_its_constant_guess_is_not_dead() -> None:
    """It ends above 60 %; its first epochs name one class at the loss of a guess."""
    config = TrialConfig(
        dataset="digits", noise_std=1.0, augment="none", model="resnet8", width_factor=0.125,
        norm="fixup", num_devices=10, split="classes", classes_per_device=2, assignment="pairs",
        global_batch_size=160, epochs=5, peak_lr=0.1, schedule="constant",
        validation_fraction=0.2, scalar_lr_factor=1.0,
    )  # fmt: skip
    heard: list[EpochResult] = []
    objective = Objective(Assembly(open_dataset(config, None), torch.device("cpu")))
    objective.run(config, seeds=1, on_epoch=lambda progress: heard.append(progress.result))
    assert [r.predicted_classes for r in heard[:3]] == [1, 1, 1]
    assert all(abs(r.train_loss - math.log(10)) < 1e-2 for r in heard[:3])
    assert len(heard) == 5


def test_a_validation_loss_that_is_not_finite_ends_it() -> None:
    run, _ = training(3)
    run._evaluate = lambda: Evaluation(math.nan, 0.1, 1, 0.0)
    with pytest.raises(Diverged, match="validation loss is not finite"):
        next(run.run())


def test_a_network_that_only_ranks_badly_is_not_dead() -> None:
    """Validation at chance with a falling training loss: Batch Normalization on label skew."""
    run, _ = training(6)
    run._evaluate = lambda: Evaluation(2.3, 0.1, 1, 0.0)
    assert len(list(run.run())) == 6


def test_a_stop_takes_effect_between_two_updates() -> None:
    calls = iter([False] * 12 + [True])
    run, _ = training(3, should_stop=lambda: next(calls))
    results: Iterator[EpochResult] = run.run()
    next(results)
    with pytest.raises(Interrupted):
        next(results)
    assert len(run.history) == 1


def test_evaluation_is_exact_and_leaves_the_model_in_training_mode() -> None:
    model = nn.Linear(4, 3)
    images = torch.randn(7, 4)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    scored = evaluate(model, [images[:5], images[5:]], labels)
    loss, accuracy, classes, logit_range, class_correct = scored
    logits = model(images)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item())
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert classes == logits.argmax(1).unique().numel()
    right = labels[logits.argmax(1) == labels].tolist()
    assert class_correct == [right.count(k) for k in range(3)]
    assert logit_range == max((logits[:, c].max() - logits[:, c].min()).item() for c in range(3))
    assert model.training


# Compiling. "aot_eager" does all of it but the last step, the code for the machine.


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many graphs were compiled since."""
    torch._dynamo.reset()
    counters.clear()
    quick = functools.partial(CompiledNetwork, backend="aot_eager")
    monkeypatch.setattr(rounds, "CompiledNetwork", quick)
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("norm", ["batch", "fixup"])
def test_trials_of_one_shape_are_compiled_once(norm: str, graphs: Callable[[], int]) -> None:
    """Whatever their seeds, rates and smoothing; and they learn what uncompiled ones do."""
    for seed, peak_lr, smoothing in ((0, 0.1, 0.0), (1, 0.05, 0.1)):
        settings = SGDSettings(label_smoothing=smoothing)
        runs = [
            training(2, norm=norm, seed=seed, peak_lr=peak_lr, settings=settings, compiled=way)[0]
            for way in (True, False)
        ]
        losses = [[result.train_loss for result in run.run()] for run in runs]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert graphs() == 1


def test_a_resumed_training_that_is_compiled_equals_one_never_stopped(
    graphs: Callable[[], int],
) -> None:
    whole, _ = training(2, compiled=True)
    list(whole.run())
    first, _ = training(2, compiled=True)
    next(first.run())
    second, _ = training(2, compiled=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    list(second.run())
    assert without_times(second.history) == without_times(whole.history)


def fails(*_: object) -> Any:
    raise RuntimeError("no compiler is here\nand none was found there")


@pytest.mark.parametrize(
    "backend", [fails, aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=fails)]
)
def test_what_cannot_be_compiled_trains_all_the_same(
    backend: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever direction fails: one line, and the numbers of an uncompiled training."""
    torch._dynamo.reset()
    monkeypatch.setattr(
        rounds, "CompiledNetwork", functools.partial(CompiledNetwork, backend=backend)
    )
    with caplog.at_level(logging.WARNING, logger="sweeps.training.compiled"):
        compiled, _ = training(2, norm="batch", compiled=True)
        list(compiled.run())
    (line,) = (r.getMessage() for r in caplog.records if r.name == "sweeps.training.compiled")
    assert "not compiled" in line
    assert "\n" not in line
    plain, _ = training(2, norm="batch")
    list(plain.run())
    assert without_times(compiled.history) == without_times(plain.history)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
    ],
    ids=["Triton", "launcher"],
)
def test_a_gpu_that_is_full_says_nothing_of_what_can_be_compiled(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the worker's matter, and the next trial's network is compiled."""
    assert gpu_is_full(error)
    assert breaks_device(error)
    calls = 0

    def full_at_first(graph: Any, _: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise error
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(
        rounds, "CompiledNetwork", functools.partial(CompiledNetwork, backend=full_at_first)
    )
    with pytest.raises(type(error), match="out of memory"):
        list(training(1, compiled=True)[0].run())
    list(training(1, compiled=True)[0].run())
    assert calls == 2
    torch._dynamo.reset()


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: values of tensors, and sizes from them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
        assert not name.startswith(waits), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["batch", "group", "fixup"])
@pytest.mark.parametrize(
    "settings",
    [
        SGDSettings(clip_grad_norm=1.0, agc_clip_factor=0.1, label_smoothing=0.1),
        SGDSettings(lars_trust_coefficient=0.01),
        SGDSettings(muon_lr_factor=0.1),
    ],
)
def test_no_step_waits_for_the_device(norm: str, settings: SGDSettings) -> None:
    """From the planned epoch to the stepped weights."""
    run, _ = training(norm=norm, settings=settings)
    batches = run._batches.epoch(0)
    next(batches)
    with NoWaiting():
        for batch in batches:
            run._algorithm.round(batch, 0.1)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        torch.ones(()).item()
