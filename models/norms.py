"""Normalisation layers, and the statistics that simulated devices keep apart.

Devices that train together never share a BatchNorm batch: each one normalises by the mean and
variance of its own samples (Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1, run once per
device). ``DeviceBatchNorm2d`` reproduces that on the fused batch of all devices; it is what fails
under skewed labels (Hsieh et al. 2020, arXiv 1910.00189). Group, layer and instance normalisation
(Wu & He 2018, arXiv 1803.08494, section 3.1) look at one sample at a time, so fusing devices does
not concern them.

Shapes: B samples in the fused batch, C channels, H and W pixels, D simulated devices, D_b of them
in one block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("batch", "sync-batch", "group", "layer", "instance", "fixup")
BATCH_STATISTICS = ("mean", "total")

DeviceBlocks: TypeAlias = tuple[tuple[Tensor | None, int], ...]
"""Which device every sample of a fused batch belongs to: ``((device_ids, per_device), ...)``.

``device_ids`` is int64 ``[D_b]`` without repeats, or None for all devices in order 0..D-1. A block
takes ``D_b * per_device`` consecutive samples, and its sample ``i * D_b + j`` belongs to device
``device_ids[j]``. Devices in no block sit the step out.
"""


@dataclass(frozen=True, eq=False)
class DeviceRuns:
    """A fused batch in the order of its devices, so that each one's samples are one slice.

    Attributes:
        runs: devices and how many samples of each follow one another, ``((device, count), ...)``.
        order: int64 ``[B]``, the place in the fused batch of each sample in this order.
        places: int64 ``[B]``, the place in this order of each sample of the fused batch.
    """

    runs: tuple[tuple[int, int], ...]
    order: Tensor
    places: Tensor

    @classmethod
    def of(cls, blocks: DeviceBlocks, num_devices: int) -> "DeviceRuns":
        """Lay out blocks whose ids are on the CPU."""
        runs: list[tuple[int, int]] = []
        order, places = [], []
        start = 0
        for device_ids, per_device in blocks:
            devices = range(num_devices) if device_ids is None else device_ids.tolist()
            runs += [(device, per_device) for device in devices]
            block = torch.arange(start, start + len(devices) * per_device)
            order.append(block.view(per_device, -1).T.flatten())
            places.append(block.view(-1, per_device).T.flatten())
            start += len(block)
        return cls(tuple(runs), torch.cat(order), torch.cat(places))

    def take(self, images: Tensor) -> Tensor:
        """Put channels-last images ``[B, C, H, W]`` into this order."""
        return images.permute(0, 2, 3, 1).index_select(0, self.order).permute(0, 3, 1, 2)

    def give_back(self, logits: Tensor) -> Tensor:
        """Put ``[B, ...]`` into the order of the fused batch again."""
        return logits.index_select(0, self.places)


class _BatchNormOfRuns(torch.autograd.Function):
    """Batch Normalization of every run by itself, by PyTorch's own kernels.

    They write into slices of one result: pieces put together afterwards are one more copy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        runs: tuple[tuple[int, int], ...],
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Normalise ``[B, C, H, W]``, and update the devices' rows of ``[D, C]``."""
        output = torch.empty_like(x)
        mean, inverse_std = (weight.new_empty(len(runs), len(weight)) for _ in range(2))
        start = 0
        for run, (device, count) in enumerate(runs):
            own = slice(start, start + count)
            torch.native_batch_norm(
                x[own], weight, bias, running_mean[device], running_var[device], True, momentum,
                eps, out=(output[own], mean[run], inverse_std[run]),
            )  # fmt: skip
            start += count
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.runs, ctx.eps = runs, eps
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of x, weight and bias."""
        x, weight, mean, inverse_std = ctx.saved_tensors
        if is_channels_last_only(x):  # of mixed layouts the kernel is slow
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = torch.empty_like(x)
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        start = 0
        for run, (_, count) in enumerate(ctx.runs):
            own = slice(start, start + count)
            of_run, of_its_weight, of_its_bias = torch.ops.aten.native_batch_norm_backward(
                gradient[own], x[own], weight, None, None, mean[run], inverse_std[run], True,
                ctx.eps, [True, True, True],
            )  # fmt: skip
            of_x[own] = of_run
            of_weight += of_its_weight
            of_bias += of_its_bias
            start += count
        return of_x, of_weight, of_bias, None, None, None, None, None


class DeviceBatchNorm2d(nn.Module):
    """BatchNorm with statistics of its own for each of D simulated devices.

    Training on ``[B, C, H, W]`` equals D separate ``nn.BatchNorm2d`` replicas, each on its own
    samples, that share the affine parameters. The running statistics ``running_mean`` and
    ``running_var`` are ``[D, C]``, one exponential average per device (weight ``momentum`` for the
    new value, unbiased variance, as in PyTorch). Scale starts at one and shift at zero.

    Evaluation has one model, so it normalises by an aggregate over the devices d that have trained:

    * ``"mean"``: ``mean_d(mu_d)`` and ``mean_d(var_d)``, what a server gets by averaging buffers;
    * ``"total"``: the variance is ``mean_d(var_d) + var_d(mu_d)`` (biased over devices), that of
      the pooled data by the law of total variance.

    Before any has, it is the initial mean 0 and variance 1.
    """

    running_mean: Tensor
    running_var: Tensor
    blocks: DeviceBlocks | None = None
    """Those of the next call, for a network that hands its layers nothing but maps."""

    def __init__(
        self,
        channels: int,
        num_devices: int,
        *,
        batch_statistics: str = "mean",
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.batch_statistics = batch_statistics
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(num_devices, channels))
        self.register_buffer("running_var", torch.ones(num_devices, channels))

    @property
    def num_devices(self) -> int:
        """Rows of the running statistics; `torch.func.functional_call` may pass one device's."""
        return self.running_mean.shape[0]

    def aggregated_statistics(self) -> tuple[Tensor, Tensor]:
        """Return the mean and variance used for evaluation, both ``[C]`` in the buffers' dtype."""
        # The first batch of a device moves its variances away from exactly one.
        trained = (self.running_var != 1).any(dim=1)
        counted = (trained | ~trained.any()).to(self.running_var.dtype)
        number = counted.sum()
        # Autocast would take the products, and with them all statistics, in bfloat16.
        with torch.autocast(counted.device.type, enabled=False):
            mean = counted @ self.running_mean / number
            var = counted @ self.running_var / number
            if self.batch_statistics == "total":
                var = var + counted @ (self.running_mean - mean).square() / number
        return mean, var

    def forward(self, x: Tensor, blocks: DeviceBlocks | DeviceRuns | None = None) -> Tensor:
        """Normalise ``[B, C, H, W]``; ``blocks``, here or before, are needed in training alone.

        With ``DeviceRuns`` the samples are in their order.

        Raises:
            ValueError: training without ``blocks``.
        """
        if not self.training:
            mean, var = self.aggregated_statistics()
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        blocks = self.blocks if blocks is None else blocks
        if blocks is None:
            raise ValueError(
                "norm='batch' needs to know each sample's device in training, got blocks=None; "
                "pass model(x, blocks) with blocks=((device_ids, per_device), ...), or "
                "((None, per_device),) for all devices in order"
            )
        if isinstance(blocks, DeviceRuns):
            output: Tensor = _BatchNormOfRuns.apply(
                x, self.weight, self.bias, self.running_mean, self.running_var, blocks.runs,
                self.momentum, self.eps,
            )  # fmt: skip
            return output
        if len(blocks) == 1:  # a split would copy all gradients
            return self._normalise_block(x, blocks[0][0])
        pieces = torch.split(x, [_num_samples(block, self.num_devices) for block in blocks])
        outputs = [
            self._normalise_block(piece, device_ids)
            for piece, (device_ids, _) in zip(pieces, blocks, strict=True)
        ]
        return torch.cat(outputs)

    def _normalise_block(self, x: Tensor, device_ids: Tensor | None) -> Tensor:
        if device_ids is None:
            num_devices, mean, var = self.num_devices, self.running_mean, self.running_var
        else:
            num_devices = device_ids.shape[0]
            mean = self.running_mean.index_select(0, device_ids)
            var = self.running_var.index_select(0, device_ids)
        # Sample-major order lets a view turn the devices into channels, and BatchNorm already
        # keeps channels apart: one call, no loop over devices, no copy in the NCHW layout.
        output = F.batch_norm(
            x.contiguous().view(-1, num_devices * self.channels, *x.shape[2:]),
            mean.view(-1),
            var.view(-1),
            self.weight.repeat(num_devices),
            self.bias.repeat(num_devices),
            True,
            self.momentum,
            self.eps,
        ).view(x.shape)
        if device_ids is not None:
            self.running_mean.index_copy_(0, device_ids, mean)
            self.running_var.index_copy_(0, device_ids, var)
        if is_channels_last_only(x):
            # Otherwise the residual sum would mix layouts, slower than this copy.
            output = output.contiguous(memory_format=torch.channels_last)
        return output

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return (
            f"{self.channels}, num_devices={self.num_devices}, "
            f"batch_statistics={self.batch_statistics!r}"
        )


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that stays in the activations' dtype under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]`` within each sample and group; keeps shape and dtype."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise ``[B, C, H, W]`` within each sample and group; keeps shape and dtype.

    ``weight`` and ``bias`` are ``[C]``, in float32 also where the maps are bfloat16. Autocast would
    compute and return float32 then, doubling the memory traffic of the residual stream.
    """
    if x.dtype == weight.dtype:
        return F.group_norm(x, num_groups, weight, bias, eps)
    if not x.is_cpu:  # the kernels of GPUs take one dtype, and keep their statistics in float32
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    # Those of CPUs keep the statistics in the dtype of the weight.
    with torch.autocast(x.device.type, enabled=False):
        # Under torch.func.vmap the kernel is taken apart, and float32 comes out.
        return F.group_norm(x, num_groups, weight, bias, eps).to(x.dtype)


def make_norm(
    norm: str, channels: int, *, num_devices: int, num_groups: int, batch_statistics: str
) -> nn.Module:
    """Return the layer for ``[B, channels, H, W]``; every kind but "fixup" has one.

    All are affine with eps 1e-5. "sync-batch" is one ``nn.BatchNorm2d`` over the whole fused
    batch, as if devices exchanged their statistics in every layer.

    Raises:
        ValueError: ``norm`` names no layer.
    """
    if norm == "batch":
        return DeviceBatchNorm2d(channels, num_devices, batch_statistics=batch_statistics)
    if norm == "sync-batch":
        return nn.BatchNorm2d(channels)
    return GroupNorm(_groups(norm, channels, num_groups), channels)


def normalise(layer: nn.Module, x: Tensor, blocks: DeviceBlocks | DeviceRuns | None) -> Tensor:
    """Apply a layer from ``make_norm``, passing ``blocks`` to the one kind that uses them."""
    output: Tensor = layer(x, blocks) if isinstance(layer, DeviceBatchNorm2d) else layer(x)
    return output


def is_per_sample(norm: str) -> bool:
    """Tell whether ``norm`` is a layer that treats every sample on its own."""
    return norm in ("group", "layer", "instance")


def check_groups(norm: str, channels: Sequence[int], num_groups: int) -> None:
    """Check that ``num_groups`` splits every layer evenly; only "group" has a choice to check.

    Raises:
        ValueError: ``num_groups`` does not divide one of ``channels``.
    """
    if norm != "group":
        return
    uneven = sorted({c for c in channels if num_groups < 1 or c % num_groups})
    if uneven:
        common = math.gcd(*channels)
        accepted = [g for g in range(1, common + 1) if common % g == 0]
        raise ValueError(
            f"num_groups={num_groups} does not divide the layers with "
            f"{', '.join(map(str, uneven))} channels; accepted here: "
            f"{', '.join(map(str, accepted))}"
        )


def single_value_layer(
    norm: str, layers: Sequence[tuple[int, int]], num_groups: int
) -> tuple[int, int] | None:
    """Find a layer that would normalise one value by itself, leaving a constant.

    ``layers`` lists (channels, side of the square map in pixels). Returns the first such pair, or
    None if all have two values or more to normalise over. Batch normalisation also depends on the
    batch: ``check_blocks`` and ``check_batch`` look at it in the forward pass.
    """
    if is_per_sample(norm):
        for channels, side in layers:
            if channels // _groups(norm, channels, num_groups) * side * side == 1:
                return channels, side
    return None


def check_batch(num_samples: int, side: int) -> None:
    """Check that training BatchNorm on ``num_samples`` maps of ``side``² pixels has a variance.

    Raises:
        ValueError: there is a single value per channel.
    """
    if num_samples * side * side < 2:
        raise ValueError(
            f"batch normalisation needs at least 2 values per channel in training, got "
            f"{num_samples} sample(s) in maps of {side}x{side} pixels; use 2 samples or more (per "
            f"device for norm='batch'), or a larger image_size"
        )


def check_blocks(
    blocks: DeviceBlocks, *, num_devices: int, batch_size: int, side: int
) -> DeviceBlocks:
    """Check a fused batch's blocks before any statistics change; return them.

    Looks at sizes only: reading the ids would make the host wait for an accelerator. ``side`` is
    that of the smallest map in pixels.

    Raises:
        ValueError: ids of the wrong shape, a block without samples, a batch of another size, or a
            device with a single value per channel.
    """
    for device_ids, per_device in blocks:
        if device_ids is not None and (device_ids.ndim != 1 or device_ids.dtype != torch.int64):
            raise ValueError(
                f"device_ids must be an int64 tensor [D_b] or None, got {device_ids.dtype} "
                f"{list(device_ids.shape)}"
            )
        if per_device < 1:
            raise ValueError(
                f"per_device must be at least 1, got {per_device}; leave devices without samples "
                f"out of the blocks"
            )
        check_batch(per_device, side)
    counted = sum(_num_samples(block, num_devices) for block in blocks)
    if counted != batch_size:
        sizes = [
            (num_devices if device_ids is None else device_ids.shape[0], per_device)
            for device_ids, per_device in blocks
        ]
        raise ValueError(
            f"blocks of (devices, per_device) {sizes} hold {counted} samples, but the batch has "
            f"{batch_size}; every sample must lie in exactly one block"
        )
    return blocks


def _groups(norm: str, channels: int, num_groups: int) -> int:
    if norm == "group":
        return num_groups
    if norm == "layer":
        return 1
    if norm == "instance":
        return channels
    raise ValueError(f"norm={norm!r} has no layer; accepted: {', '.join(NORMS[:-1])}")


def _num_samples(block: tuple[Tensor | None, int], num_devices: int) -> int:
    device_ids, per_device = block
    return (num_devices if device_ids is None else device_ids.shape[0]) * per_device


def is_channels_last_only(x: Tensor) -> bool:
    """Tell whether ``[N, C, H, W]`` is in the layout channels-last and in no other."""
    # By strides: torch.func.vmap cannot answer is_contiguous(memory_format=channels_last), nor
    # change to it. Maps of one pixel have no layout to keep.
    return x.stride(1) == 1 and not x.is_contiguous() and x.shape[2] * x.shape[3] > 1
