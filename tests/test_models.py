"""Models: exact statements about initialisation, statistics and which samples may meet."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import MODELS, NORMS, DeviceBlocks, build_model, parameter_groups
from models.fixup import FixupBlock, FixupResNet
from models.norms import DeviceBatchNorm2d, DeviceRuns, GroupNorm, group_norm
from models.resnet import ResidualBlock, ResNet

PER_SAMPLE_NORMS = ("group", "layer", "instance")
NARROW = {"resnet8": 0.25, "resnet18": 0.0625, "resnet20": 0.25}  # 4 channels in the first stage


def small(name: str, norm: str, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "num_classes": 5,
        "image_size": 16,
        "width_factor": NARROW[name],
        "num_groups": 2,
        "num_devices": 2,
        "seed": 0,
    }
    return build_model(name, norm=norm, **(settings | options))


def images(count: int, side: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator, dtype=dtype)


def labels(count: int, classes: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def scramble(model: nn.Module, seed: int = 7) -> None:
    """Move every parameter off its initial value, so that nothing is zero by design."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.2)


# --- every model with every norm ------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_and_evaluates(name: str, norm: str) -> None:
    model = small(name, norm)
    scramble(model)
    x, y = images(6), labels(6)
    logits = model(x, ((None, 3),))
    assert logits.shape == (6, 5)
    assert logits.dtype == torch.float32
    F.cross_entropy(logits, y).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
    model.eval()
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    ("name", "norm", "count"),
    [
        # Convolutions 11,159,232 + classifier 5,130 + norms 9,600: the figure usually quoted.
        ("resnet18", "batch", 11_173_962),
        ("resnet18", "sync-batch", 11_173_962),
        ("resnet18", "group", 11_173_962),
        ("resnet18", "fixup", 11_173_962 - 9_600 + 5 * 8 + 2),
        # He et al., table 6: 0.27 M.
        ("resnet20", "batch", 269_722),
        ("resnet20", "fixup", 269_722 - 1_376 + 5 * 9 + 2),
        ("resnet8", "layer", 75_290),
        ("resnet8", "fixup", 75_290 - 480 + 5 * 3 + 2),
    ],
)
def test_parameter_counts(name: str, norm: str, count: int) -> None:
    model = build_model(name, norm=norm, num_classes=10, seed=0)
    if norm == "group":
        assert any(isinstance(m, GroupNorm) and m.num_groups == 32 for m in model.modules())
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", MODELS)
def test_maps_shrink_as_in_the_papers(name: str) -> None:
    sides: list[tuple[int, int]] = []
    model = small(name, "layer", image_size=15)
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(lambda _, __, out: sides.append(tuple(out.shape[1:3])))
    model(images(1, side=15))
    per_stage = {"resnet8": 1, "resnet18": 2, "resnet20": 3}[name]
    stages = [(4, 15), (8, 8), (16, 4), (32, 2)][: len(sides) // per_stage]
    assert sides == [stage for stage in stages for _ in range(per_stage)]


# --- parameter groups -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_parameter_groups_are_complete_disjoint_and_follow_the_names(name: str, norm: str) -> None:
    model = small(name, norm)
    groups = parameter_groups(model)
    assert list(groups) == ["weights", "scalars"]
    owners = {
        id(parameter): isinstance(module, DeviceBatchNorm2d | nn.BatchNorm2d | nn.GroupNorm)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    }
    expected: dict[str, list[int]] = {"weights": [], "scalars": []}
    for parameter_name, parameter in model.named_parameters():
        if norm == "fixup":
            scalar = "bias" in parameter_name or "scale" in parameter_name
        else:
            scalar = owners[id(parameter)] or parameter_name == "fc.bias"
        expected["scalars" if scalar else "weights"].append(id(parameter))
    assert {key: [id(p) for p in group] for key, group in groups.items()} == expected
    assert id(dict(model.named_parameters())["fc.bias"]) in expected["scalars"]


# --- Fixup ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("name", MODELS)
def test_fixup_starts_at_ln_classes_with_gradient_only_in_the_classifier(
    name: str, classes: int
) -> None:
    model = small(name, "fixup", num_classes=classes)
    logits = model(images(8))
    assert torch.equal(logits, torch.zeros(8, classes))
    loss = F.cross_entropy(logits.double(), labels(8, classes))
    assert loss.item() == pytest.approx(math.log(classes), abs=1e-14)
    loss.backward()
    moving = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moving == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("name", MODELS)
def test_fixup_branches_are_zero_at_initialisation(name: str) -> None:
    model = small(name, "fixup")
    inputs: dict[FixupBlock, Tensor] = {}
    blocks = [m for m in model.modules() if isinstance(m, FixupBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]}))
    model(images(4))
    for block in blocks:
        assert inputs[block].abs().sum() > 0
        assert not block.branch(inputs[block]).any()


@pytest.mark.parametrize(("name", "num_blocks"), [("resnet8", 3), ("resnet18", 8), ("resnet20", 9)])
def test_fixup_initial_values(name: str, num_blocks: int) -> None:
    model = build_model(name, norm="fixup", num_classes=10, width_factor=0.5, seed=3)
    blocks = [m for m in model.modules() if isinstance(m, FixupBlock)]
    assert len(blocks) == num_blocks
    for block in blocks:
        weight = block.conv1.weight
        expected = math.sqrt(2 / (weight.shape[0] * 9)) / math.sqrt(num_blocks)
        tolerance = 4 / math.sqrt(2 * weight.numel())  # 4 standard errors
        assert weight.std().item() == pytest.approx(expected, rel=tolerance)
        if block.shortcut_conv is not None:
            weight = block.shortcut_conv.weight
            tolerance = 4 / math.sqrt(2 * weight.numel())
            assert weight.std().item() == pytest.approx(
                math.sqrt(2 / weight.shape[0]), rel=tolerance
            )
    shortcuts = [block.shortcut_conv is not None for block in blocks]
    assert sum(shortcuts) == (3 if name == "resnet18" else 0)
    for parameter_name, parameter in model.named_parameters():
        if "scale" in parameter_name:
            assert parameter.tolist() == [1.0]
        elif "bias" in parameter_name or "conv2" in parameter_name or "fc" in parameter_name:
            assert not parameter.any(), parameter_name


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_fixup_block_computes_the_published_formula(stride: int, projection: bool) -> None:
    block = FixupBlock(4, 4 * stride, stride, projection=projection, num_blocks=3).double()
    scramble(block)
    x = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = dict(block.named_parameters())
    out = F.relu(F.conv2d(x + p["bias1a"], p["conv1.weight"], None, stride, 1) + p["bias1b"])
    out = F.conv2d(out + p["bias2a"], p["conv2.weight"], None, 1, 1) * p["scale"] + p["bias2b"]
    identity = x
    if stride == 2 and projection:
        identity = F.conv2d(x + p["bias1a"], p["shortcut_conv.weight"], None, stride)
    elif stride == 2:
        identity = F.avg_pool2d(x + p["bias1a"], 1, stride)
        identity = torch.cat((identity, torch.zeros_like(identity)), dim=1)
    torch.testing.assert_close(block(x), F.relu(out + identity), rtol=1e-12, atol=1e-12)


def test_fixup_network_adds_its_biases_around_the_stem_and_before_the_classifier() -> None:
    model = small("resnet8", "fixup").double()
    assert isinstance(model, FixupResNet)
    scramble(model)
    x = images(3, dtype=torch.float64)
    out = F.relu(F.conv2d(x, model.conv.weight, None, 1, 1) + model.bias1)
    for block in model.residual_blocks:
        out = block(out)
    pooled = F.adaptive_avg_pool2d(out, 1).flatten(1)
    expected = F.linear(pooled + model.bias2, model.fc.weight, model.fc.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


# --- normalisation within a sample ----------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [*PER_SAMPLE_NORMS, "fixup"])
def test_a_samples_output_does_not_depend_on_the_batch(norm: str, training: bool) -> None:
    model = small("resnet18", norm).double().train(training)
    scramble(model)
    x = images(4, dtype=torch.float64)
    alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x, ((None, 2),)), alone, rtol=1e-11, atol=1e-11)
    other = x.clone()
    other[1:] = 100 * images(3, seed=5, dtype=torch.float64)
    torch.testing.assert_close(model(other)[0], alone[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", ["batch", "sync-batch"])
def test_batch_norm_lets_samples_meet(norm: str) -> None:
    """The control of the test above: it can fail."""
    model = small("resnet18", norm, num_devices=1).double()
    x = images(4, dtype=torch.float64)
    other = x.clone()
    other[1:] = 100 * images(3, seed=5, dtype=torch.float64)
    blocks = ((None, 4),)
    assert not torch.allclose(model(x, blocks)[0], model(other, blocks)[0], rtol=1e-3)


@pytest.mark.parametrize(("norm", "groups"), [("group", 2), ("layer", 1), ("instance", 4)])
def test_groups_of_each_kind(norm: str, groups: int) -> None:
    model = small("resnet8", norm).double()
    assert isinstance(model, ResNet)
    scramble(model)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    split = x.view(2, groups, -1)
    mean, var = split.mean(-1, keepdim=True), split.var(-1, correction=0, keepdim=True)
    expected = ((split - mean) / (var + 1e-5).sqrt()).view_as(x)
    weight, bias = model.norm.weight, model.norm.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    expected = expected * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    torch.testing.assert_close(model.norm(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [n for n in NORMS if n != "fixup"])
@pytest.mark.parametrize("name", MODELS)
def test_last_scale_starts_at_zero_only_for_per_sample_norms(name: str, norm: str) -> None:
    model = small(name, norm)
    for module_name, module in model.named_modules():
        if isinstance(module, DeviceBatchNorm2d | nn.BatchNorm2d | nn.GroupNorm):
            last = module_name.endswith("norm2") and norm in PER_SAMPLE_NORMS
            assert torch.equal(module.weight, torch.full_like(module.weight, 0.0 if last else 1.0))
            assert not module.bias.any()


def test_normalised_convolutions_are_kaiming_normal_with_fan_out() -> None:
    model = build_model("resnet18", norm="layer", num_classes=10, width_factor=0.25, seed=0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            expected = math.sqrt(2 / (weight.shape[0] * weight.shape[2] * weight.shape[3]))
            tolerance = 4 / math.sqrt(2 * weight.numel())
            assert weight.std().item() == pytest.approx(expected, rel=tolerance)


# --- BatchNorm with statistics per device ---------------------------------------------------------

Assignment = list[tuple[list[int] | None, int]]


def device_blocks(assignment: Assignment) -> DeviceBlocks:
    return tuple((None if ids is None else torch.tensor(ids), n) for ids, n in assignment)


def samples_by_device(assignment: Assignment, num_devices: int) -> dict[int, list[int]]:
    """List each device's positions in the fused batch, by the interface's definition."""
    positions: dict[int, list[int]] = {}
    start = 0
    for ids, per_device in assignment:
        devices = list(range(num_devices)) if ids is None else ids
        for i in range(per_device):
            for j, device in enumerate(devices):
                positions.setdefault(device, []).append(start + i * len(devices) + j)
        start += len(devices) * per_device
    return positions


def plain_replica(model: nn.Module) -> nn.Module:
    """Copy ``model`` with every per-device BatchNorm replaced by PyTorch's own."""
    replica = copy.deepcopy(model)
    for name, module in list(replica.named_modules()):
        if isinstance(module, DeviceBatchNorm2d):
            plain = nn.BatchNorm2d(module.channels).double()
            plain.load_state_dict({"weight": module.weight, "bias": module.bias}, strict=False)
            parent, _, attribute = name.rpartition(".")
            setattr(replica.get_submodule(parent), attribute, plain)
    return replica


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([[(None, 4)]] * 4, id="equal"),
        pytest.param(
            [  # 23 samples on 5 devices; who gets the larger share moves on with the rounds
                [([0, 1, 2], 5), ([3, 4], 4)],
                [([3, 4, 0], 5), ([1, 2], 4)],
                [([1, 2, 3], 5), ([4, 0], 4)],
                [([4, 0, 1], 5), ([2, 3], 4)],
            ],
            id="unequal-rolled",
        ),
        pytest.param([[([3, 1], 3)], [(None, 2)], [([4], 1), ([2, 0], 2)]], id="some-absent"),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_batch_norm_equals_separate_replicas(
    name: str, steps: list[Assignment], layout: torch.memory_format
) -> None:
    num_devices = 5
    fused = small(name, "batch", num_devices=num_devices).double()
    replicas = [plain_replica(fused) for _ in range(num_devices)]
    fused.to(memory_format=layout)
    assert not any(isinstance(m, DeviceBatchNorm2d) for m in replicas[0].modules())
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    fused_optimizer = torch.optim.SGD(fused.parameters(), **settings)
    optimizers = [torch.optim.SGD(r.parameters(), **settings) for r in replicas]

    for step, assignment in enumerate(steps):
        positions = samples_by_device(assignment, num_devices)
        count = sum(map(len, positions.values()))
        x, y = images(count, seed=step, dtype=torch.float64), labels(count, seed=100 + step)

        fused_optimizer.zero_grad()
        logits = fused(x.contiguous(memory_format=layout), device_blocks(assignment))
        F.cross_entropy(logits, y).backward()
        fused_optimizer.step()

        average = [torch.zeros_like(p) for p in fused.parameters()]
        for device, own in positions.items():
            loss = F.cross_entropy(replicas[device](x[own]), y[own])
            gradients = torch.autograd.grad(loss, list(replicas[device].parameters()))
            for total, gradient in zip(average, gradients, strict=True):
                total += gradient * len(own) / count
        for replica, optimizer in zip(replicas, optimizers, strict=True):
            for parameter, gradient in zip(replica.parameters(), average, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    for replica in replicas:
        for expected, actual in zip(replica.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    buffers = dict(fused.named_buffers())
    for device, replica in enumerate(replicas):
        for buffer_name, expected in replica.named_buffers():
            if "running" in buffer_name:
                actual = buffers[buffer_name][device]
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
                if "var" in buffer_name:
                    assert not torch.equal(expected, torch.ones_like(expected))

    # Averaging the replicas' buffers is what "mean" promises for evaluation.
    server = copy.deepcopy(replicas[0])
    for buffer_name, buffer in server.named_buffers():
        if "running" in buffer_name:
            buffer.copy_(torch.stack([r.get_buffer(buffer_name) for r in replicas]).mean(0))
    x = images(6, seed=50, dtype=torch.float64)
    torch.testing.assert_close(fused.eval()(x), server.eval()(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_of_devices_are_normalised_as_by_layers_of_their_own(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, 3, 3, generator=generator).to(dtype, memory_format=torch.channels_last)
    gradient = torch.randn(x.shape, generator=generator).to(x)
    blocks = device_blocks([([3, 0], 2), ([1], 3)])
    positions = samples_by_device([([3, 0], 2), ([1], 3)], 4)
    layer, replicas = DeviceBatchNorm2d(4, 4), [nn.BatchNorm2d(4) for _ in range(4)]
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.copy_(torch.randn(4, generator=generator))
    for replica in replicas:
        replica.load_state_dict({"weight": layer.weight, "bias": layer.bias}, strict=False)

    runs = DeviceRuns.of(blocks, num_devices=4)
    assert runs.runs == ((3, 2), (0, 2), (1, 3))
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    ordered = layer(runs.take(leaf), runs)
    assert ordered.is_contiguous(memory_format=torch.channels_last)
    fused = runs.give_back(ordered)
    fused.backward(gradient)

    assert leaf.grad is not None
    total = torch.zeros(4)
    for device, own in positions.items():
        alone = x[own].contiguous(memory_format=torch.channels_last).requires_grad_()
        expected = replicas[device](alone)
        expected.backward(gradient[own].contiguous(memory_format=torch.channels_last))
        assert torch.equal(fused[own], expected)
        assert alone.grad is not None
        assert torch.equal(leaf.grad[own], alone.grad)
        total += replicas[device].weight.grad
    torch.testing.assert_close(layer.weight.grad, total)
    for device, replica in enumerate(replicas):
        assert torch.equal(layer.running_mean[device], replica.running_mean)
        assert torch.equal(layer.running_var[device], replica.running_var)


def test_channels_last_devices_stand_together_in_training_alone() -> None:
    model = small("resnet8", "batch").to(memory_format=torch.channels_last)
    seen: list[type] = []
    layer = model.get_submodule("residual_blocks.1.norm1")
    layer.register_forward_pre_hook(lambda _, args: seen.append(type(args[1])))
    blocks = ((None, 3),)
    model(images(6), blocks)
    model.eval()(images(6), blocks)
    model.to(memory_format=torch.contiguous_format).train()(images(6), blocks)
    assert seen == [DeviceRuns, tuple, tuple]


def test_absent_devices_keep_their_statistics() -> None:
    layer = DeviceBatchNorm2d(2, 3)
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    layer(x, device_blocks([([2, 0], 2)]))
    assert torch.equal(layer.running_mean[1], torch.zeros(2))
    assert torch.equal(layer.running_var[1], torch.ones(2))
    # Device 2 is listed first, so samples 0 and 2 are its own.
    torch.testing.assert_close(layer.running_mean[2], 0.1 * x[0::2].mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_mean[0], 0.1 * x[1::2].mean((0, 2, 3)))


@pytest.mark.parametrize(("statistics", "variance"), [("mean", 3.0), ("total", 3.0 + 4.0)])
def test_aggregated_statistics_by_hand(statistics: str, variance: float) -> None:
    layer = DeviceBatchNorm2d(1, 2, batch_statistics=statistics, eps=1e-12).eval()
    layer.running_mean.copy_(torch.tensor([[1.0], [5.0]]))  # mean 3, biased variance 4
    layer.running_var.copy_(torch.tensor([[2.0], [4.0]]))  # mean 3
    mean, var = layer.aggregated_statistics()
    assert mean.tolist() == [3.0]
    assert var.tolist() == [variance]
    x = torch.tensor([3.0, 10.0]).view(2, 1, 1, 1)
    expected = torch.tensor([0.0, 7 / math.sqrt(variance)])
    torch.testing.assert_close(layer(x).flatten(), expected)


@pytest.mark.parametrize("statistics", ["mean", "total"])
def test_autocast_leaves_the_statistics_of_the_evaluation_as_they_are(statistics: str) -> None:
    layer = DeviceBatchNorm2d(4, 3, batch_statistics=statistics).eval()
    generator = torch.Generator().manual_seed(0)
    layer.running_mean.normal_(generator=generator)
    layer.running_var.uniform_(0.5, 2.0, generator=generator)
    expected = layer.aggregated_statistics()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.aggregated_statistics()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("statistics", ["mean", "total"])
def test_devices_that_never_trained_have_no_part_in_evaluation(statistics: str) -> None:
    x = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 3 + 7
    of_two = DeviceBatchNorm2d(2, 2, batch_statistics=statistics)
    of_many = DeviceBatchNorm2d(2, 100, batch_statistics=statistics)
    assert [s.tolist() for s in of_many.aggregated_statistics()] == [[0.0, 0.0], [1.0, 1.0]]
    of_two(x, ((None, 4),))
    of_many(x, device_blocks([([91, 17], 4)]))
    torch.testing.assert_close(of_many.eval()(x), of_two.eval()(x))


def test_total_statistics_are_those_of_the_pooled_samples() -> None:
    layer = DeviceBatchNorm2d(2, 3, batch_statistics="total", momentum=1.0).double()
    x = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x += torch.arange(12.0, dtype=torch.float64).remainder(3).view(-1, 1, 1, 1)
    layer(x, ((None, 4),))
    mean, var = layer.aggregated_statistics()
    unbiased = 64 / 63  # 4 samples of 16 pixels a device
    within = torch.stack([x[d::3].var((0, 2, 3), correction=0) for d in range(3)]).mean(0)
    pooled = x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(var, pooled + within * (unbiased - 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("statistics", ["mean", "total"])
def test_build_model_passes_the_statistics_on(statistics: str) -> None:
    model = small("resnet8", "batch", batch_statistics=statistics, num_devices=4)
    layers = [m for m in model.modules() if isinstance(m, DeviceBatchNorm2d)]
    assert len(layers) == 7
    assert {m.batch_statistics for m in layers} == {statistics}
    assert {m.running_mean.shape[0] for m in layers} == {4}


@pytest.mark.parametrize("name", MODELS)
def test_sync_batch_is_plain_batch_norm_over_the_fused_batch(name: str) -> None:
    model = small(name, "sync-batch").double()
    assert isinstance(model, ResNet)
    kinds = {type(m) for m in model.modules() if "Norm" in type(m).__name__}
    assert kinds == {nn.BatchNorm2d}
    x = images(6, dtype=torch.float64)
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    one_device = small(name, "batch", num_devices=1).double()
    torch.testing.assert_close(
        model(x, ((None, 3),)), one_device(x, ((None, 6),)), rtol=1e-12, atol=1e-12
    )
    mean = seen[0].mean((0, 2, 3), keepdim=True)
    var = seen[0].var((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(seen[1], (seen[0] - mean) / (var + 1e-5).sqrt())


# --- seeds, state, layouts ------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_weights_depend_on_the_seed_alone(norm: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small("resnet8", norm, seed=11).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = small("resnet8", norm, seed=11).state_dict()
    other = small("resnet8", norm, seed=12).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv.weight"], other["conv.weight"])


@pytest.mark.parametrize("norm", NORMS)
def test_state_dict_carries_everything(norm: str) -> None:
    model = small("resnet18", norm, num_devices=3)
    scramble(model)
    model(images(6), ((None, 2),))
    restored = small("resnet18", norm, num_devices=3, seed=9)
    restored.load_state_dict(model.state_dict())
    if norm == "batch":
        assert model.state_dict()["norm.running_mean"].shape == (3, 4)
        assert restored.get_buffer("norm.running_mean").abs().sum() > 0
    x = images(4, seed=3)
    assert torch.equal(model.eval()(x), restored.eval()(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_channels_last_gives_the_same_result(name: str, norm: str) -> None:
    model = small(name, norm).double()
    scramble(model)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x, blocks = images(5, dtype=torch.float64), device_blocks([([1], 3), ([0], 2)])
    expected = model(x, blocks)
    actual = twin(x.contiguous(memory_format=torch.channels_last), blocks)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    actual.square().sum().backward()
    expected.square().sum().backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["batch", "fixup"])
def test_channels_last_survives_every_block(norm: str) -> None:
    model = small("resnet20", norm).to(memory_format=torch.channels_last)
    kept: list[bool] = []
    for module in model.modules():
        if isinstance(module, ResidualBlock | FixupBlock):
            module.register_forward_hook(
                lambda _, __, out: kept.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    model(images(4).contiguous(memory_format=torch.channels_last), ((None, 2),))
    assert kept == [True] * 9


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_keeps_activations_in_bfloat16(norm: str) -> None:
    model = small("resnet8", norm)
    scramble(model)
    dtypes: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, ResidualBlock | FixupBlock):
            module.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    x, blocks = images(6), ((None, 3),)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x, blocks)
    assert dtypes == {torch.bfloat16}
    F.cross_entropy(logits.float(), labels(6)).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    exact = model(x, blocks)
    assert (logits.float() - exact).norm() < 0.1 * exact.norm()


def test_group_norm_keeps_its_statistics_in_float32_beside_bfloat16_maps() -> None:
    layer, exact = GroupNorm(4, 16), GroupNorm(4, 16).double()
    # Statistics in bfloat16 would lose most where the means are large.
    x = (images(192, side=8).view(36, 16, 8, 8) + 5).bfloat16()
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    output.backward(gradient)
    exact(x.double()).backward(gradient.double())
    assert output.dtype == torch.bfloat16
    for parameter, expected in zip(layer.parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        assert (parameter.grad - expected.grad).norm() < 1e-5 * expected.grad.norm()


def test_group_norm_keeps_its_dtype_under_vmap() -> None:
    x = images(8).view(2, 4, 3, 16, 16).bfloat16()
    weight, bias = torch.ones(2, 3), torch.zeros(2, 3)
    normalised = torch.func.vmap(lambda x, w, b: group_norm(x, 3, w, b, 1e-5))(x, weight, bias)
    assert normalised.dtype == torch.bfloat16


@pytest.mark.parametrize("norm", NORMS)
def test_different_models_run_under_vmap(norm: str) -> None:
    """Devices whose models have drifted apart can be evaluated side by side."""
    models_apart = [small("resnet18", norm, num_devices=1, seed=seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(models_apart)
    x, blocks = images(12).view(3, 4, 3, 16, 16), ((None, 4),)

    def forward(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(models_apart[0], (p, b), (x, blocks))
        return logits

    together = torch.func.vmap(forward)(parameters, buffers, x)
    alone = torch.stack([model(own, blocks) for model, own in zip(models_apart, x, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    for name, buffer in buffers.items():
        for model, row in zip(models_apart, buffer, strict=True):
            torch.testing.assert_close(row, model.get_buffer(name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group", "fixup"])
def test_one_graph_without_breaks(norm: str) -> None:
    model = small("resnet8", norm)
    x, blocks = images(5), device_blocks([([1], 3), ([0], 2)])
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, blocks), model(x, blocks))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet50"}, "name='resnet50'.*resnet8, resnet18, resnet20"),
        ({"norm": "weight"}, "norm='weight'.*batch, sync-batch, group, layer, instance, fixup"),
        ({"batch_statistics": "median"}, "batch_statistics='median'.*mean, total"),
        ({"num_classes": 1}, "num_classes=1.*2 or more"),
        ({"in_channels": 0}, "in_channels=0.*1 or more"),
        ({"image_size": 0}, "image_size=0.*1 or more"),
        ({"num_devices": 0}, "num_devices=0.*1 or more"),
        ({"seed": -1}, "seed=-1.*0 to 2"),
        ({"width_factor": 0.1}, "width_factor=0.1.*multiples of 1/16"),
        ({"width_factor": 0.0}, "width_factor=0.0.*multiples of 1/16"),
        ({"width_factor": math.nan}, "width_factor=nan.*multiples of 1/16"),
        ({"norm": "group"}, "num_groups=32.*16 channels; accepted here: 1, 2, 4, 8, 16$"),
        ({"norm": "group", "num_groups": 12}, "num_groups=12.*16, 32, 64 channels"),
        ({"norm": "group", "num_groups": 0}, "num_groups=0.*accepted here: 1, 2, 4, 8, 16$"),
        (
            {"name": "resnet18", "norm": "instance", "image_size": 8},
            "image_size=8.*'instance'.*1x1 with 512 channels.*image_size of 9 or more",
        ),
        ({"norm": "instance", "image_size": 4}, "image_size=4.*image_size of 5 or more"),
        (
            {"norm": "group", "num_groups": 16, "image_size": 1},
            "image_size=1.*'group'.*1x1 with 16 channels.*image_size of 2 or more",
        ),
    ],
)
def test_build_model_refuses(options: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"name": "resnet8", "norm": "batch", "num_classes": 10, "seed": 0}
    with pytest.raises(ValueError, match=message):
        build_model(**(settings | options))


def test_the_smallest_accepted_images_work() -> None:
    """What the refusals above call accepted is accepted."""
    model = small("resnet18", "instance", image_size=9)
    scramble(model)
    assert model(images(2, side=9)).std(dim=0).min() > 0


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (None, "blocks=None; pass"),
        (((None, 2),), r"\[\(2, 2\)\] hold 4 samples, but the batch has 6"),
        ((), "hold 0 samples, but the batch has 6"),
        (((torch.tensor([0, 1]), 2), (torch.tensor([0]), 1)), "hold 5 samples"),
        (((None, 3), (torch.tensor([0]), 0)), "at least 1, got 0"),
        (((torch.tensor([0.0, 1.0]), 3),), r"int64.*float32 \[2\]"),
        (((torch.tensor([[0, 1]]), 3),), r"int64.*\[1, 2\]"),
    ],
)
def test_batch_norm_refuses_unfitting_blocks(blocks: DeviceBlocks | None, message: str) -> None:
    model = small("resnet8", "batch")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model(images(6), blocks)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("norm", ["batch", "sync-batch"])
def test_batch_norm_refuses_a_single_value_per_channel(norm: str) -> None:
    model = small("resnet18", norm, image_size=8, num_devices=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"at least 2 values per channel.*1 sample.*1x1"):
        model(images(1, side=8), ((None, 1),))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.eval()
    assert model(images(1, side=8)).shape == (1, 5)


@pytest.mark.parametrize("norm", ["sync-batch", "fixup"])
def test_other_images_are_refused(norm: str) -> None:
    model = small("resnet8", norm)
    for x in (images(2, side=8), images(2)[0], images(2).to(torch.uint8)):
        with pytest.raises(ValueError, match=r"images \[B, 3, 16, 16\], got torch"):
            model(x)
