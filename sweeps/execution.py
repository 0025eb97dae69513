"""How a trial's network is computed on the device at hand: number format, layout, compiler."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from models.resnet import LAYOUTS
from sweeps.config import TrialConfig

CPUINFO = Path("/proc/cpuinfo")


def memory_format(config: TrialConfig, device: torch.device, side: int) -> torch.memory_format:
    """The layout of a trial's images, of `side` pixels, and of its network."""
    if config.algorithm != "sync-sgd":
        return torch.contiguous_format  # torch.func.vmap handles no other throughout
    if ":" in config.model:
        return torch.contiguous_format  # a user's own code may view a tensor as another shape
    if device.type != "cpu":
        return torch.channels_last
    if autocast_dtype(config, device, side) is torch.bfloat16:
        return _memory_format_of_bfloat16(config)
    narrow = config.model != "resnet18" or config.width_factor < 1
    # On CPUs PyTorch's Group Normalization is slower on channels-last tensors, which narrow
    # networks do not win back in their convolutions.
    if config.norm in ("group", "layer", "instance") and narrow:
        return torch.contiguous_format
    # Each device's own Batch Normalization is a call for each of them there, and small maps take
    # longer. A contiguous step of ResNet-18 against a channels-last one, as devices x images: 1.05
    # (10x8) and 1.22 (100x2) with images of 32x32, 0.86 (10x8) of 16x16, 0.83 and 0.75 of 8x8; of
    # width 0.25 1.10 with 32x32, of 0.5 0.83 with 8x8; ResNet-20 with 32x32 0.99.
    if config.norm == "batch" and (narrow or side < 32):
        return torch.contiguous_format
    return torch.channels_last


def _memory_format_of_bfloat16(config: TrialConfig) -> torch.memory_format:
    """The faster layout on CPUs that multiply in bfloat16.

    Images of 16x16 and 32x32, 80 and 320 of them, ResNet-8, 20 and 18 of several widths, AMX: a
    contiguous step against a channels-last one took 1.2 to 1.5 times as long with Fixup and 0.2 to
    0.9 with Group and Instance Normalization, those of full width with their 32 groups too. The
    others lie between: Layer Normalization 0.6 to 1.0 below 16 channels and 1.1 to 1.5 from there
    on, each device's Batch Normalization 0.7 to 0.9 in ResNet-8 and 1.0 to 1.3 in the deeper ones,
    one over all devices 0.9 to 1.3.
    """
    if config.norm == "layer":
        channels = LAYOUTS[config.model].scaled(config.width_factor).stage_channels
        last = channels[0] >= 16
    elif config.norm == "batch":
        last = config.model != "resnet8"
    else:
        last = config.norm in ("fixup", "sync-batch")
    return torch.channels_last if last else torch.contiguous_format


def compiles(config: TrialConfig, device: torch.device) -> bool:
    """Whether a trial's network is compiled."""
    if config.compile != "auto":
        return config.compile == "on"
    # On CPUs it takes as long as a short trial, and Fixup is slower with it.
    return device.type == "cuda" and config.algorithm == "sync-sgd" and ":" not in config.model


def autocast_dtype(config: TrialConfig, device: torch.device, side: int) -> torch.dtype | None:
    """What a config's forward passes over images of `side` pixels are computed in.

    Returns:
        None for the parameters' own.
    """
    if config.precision == "float32":
        return None
    if config.precision == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":  # those before Ampere emulate it
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # On smaller images, what the products gain goes into the casts: with AMX, float32 took 0.87
        # to 1.24 of the time with 8x8 pixels, and 1.03 (a small FedAvg) to 2.8 times from 16x16 on.
        # A user's own code may do what autocast does not know on CPUs.
        faster = side >= 16 and ":" not in config.model and has_matrix_units()
    return torch.bfloat16 if faster else None


@functools.cache
def has_matrix_units() -> bool:
    """Whether this machine's CPU has AMX for bfloat16, and Linux offers it.

    Without, bfloat16 was 1.6 times (AVX-512's instructions for it) to 80 times slower than float32.
    """
    # PyTorch tells of the CPU alone; an older kernel leaves the units off.
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags: list[str] = next((line.split() for line in lines if line.startswith("flags")), [])
    return "amx_bf16" in flags and "amx_tile" in flags
