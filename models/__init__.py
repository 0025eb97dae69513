"""ResNets for training with or without BatchNorm on simulated devices.

``build_model`` is the only entry; ``parameter_groups`` splits what it returns for the optimizer,
``classifier_parameters`` names those of the last layer, and ``stacked_forward`` passes images
through copies with weights of their own.
A model is called as ``model(x, blocks)`` with the fused batch of all devices; ``DeviceBlocks``
says which sample belongs to which device.
"""

import functools

import torch
from torch import nn

from models.fixup import FixupResNet, classifier_parameters, parameter_groups
from models.norms import (
    BATCH_STATISTICS,
    NORMS,
    DeviceBlocks,
    check_groups,
    is_per_sample,
    make_norm,
    single_value_layer,
)
from models.own import build_own
from models.resnet import FEATURE_NORMS, LAYOUTS, MODELS, Layout, ResNet
from models.stacked import stacked_forward

__all__ = [
    "FEATURE_NORMS", "MODELS", "NORMS", "DeviceBlocks", "build_model", "classifier_parameters",
    "parameter_groups", "stacked_forward",
]  # fmt: skip


def build_model(
    name: str,
    *,
    norm: str,
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    num_devices: int = 1,
    width_factor: float = 1.0,
    num_groups: int = 32,
    batch_statistics: str = "mean",
    feature_norm: str = "none",
    seed: int,
) -> nn.Module:
    """Build a freshly initialised model, float32 on the CPU and in training mode.

    The model's ``forward(x, blocks=None)`` maps images ``[B, in_channels, image_size, image_size]``
    to logits ``[B, num_classes]``. The same arguments give the same weights, and the global random
    state is left alone. ``models.resnet`` and ``models.fixup`` name the papers and initialisations.

    Args:
        name: one of ``MODELS``, or ``"module:function"``, see ``models.own``; the latter takes
            its classifier and width from the user's code, so that ``width_factor`` and
            ``feature_norm`` are left alone.
        norm: one of ``NORMS``. "batch" keeps statistics per simulated device and needs ``blocks``
            in training; "sync-batch" shares them over the fused batch; "group", "layer" and
            "instance" work within a sample; "fixup" has no normalisation.
        num_classes: number of logits, at least 2.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels.
        num_devices: simulated devices D; only norm="batch" depends on it.
        width_factor: multiplies the channels of every stage; must give whole numbers.
        num_groups: groups for norm="group"; must divide the channels of every stage.
        batch_statistics: how norm="batch" evaluates: "mean" averages the devices' running means
            and variances, "total" adds the variance between their means.
        feature_norm: "rms" normalises what the classifier sees, "none" does not; see
            ``models.resnet.normalise_features``.
        seed: of the initial weights, 0 to 2**64 - 1.

    Raises:
        ValueError: a name that is not listed or cannot be imported, a number out of range, a width
            that gives no whole number of channels, groups that do not divide them, or images so
            small that a layer would normalise a single value.
    """
    own = ":" in name
    if not own:
        _check_choice("name", name, MODELS)
    elif width_factor != 1 or feature_norm != "none":
        raise ValueError(
            f"model={name!r} decides itself on its width and its classifier; leave width_factor "
            f"({width_factor:g}) and feature_norm ({feature_norm!r}) out"
        )
    _check_choice("norm", norm, NORMS)
    _check_choice("batch_statistics", batch_statistics, BATCH_STATISTICS)
    _check_choice("feature_norm", feature_norm, FEATURE_NORMS)
    _check_at_least("num_classes", num_classes, 2)
    _check_at_least("in_channels", in_channels, 1)
    _check_at_least("image_size", image_size, 1)
    _check_at_least("num_devices", num_devices, 1)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} is out of range; accepted: 0 to 2**64 - 1")
    if not own:
        layout = LAYOUTS[name].scaled(width_factor)
        check_groups(norm, layout.stage_channels, num_groups)
        _check_image_size(name, norm, layout, image_size, num_groups)

    # torch.manual_seed would reseed the accelerators too, and fork_rng restores none of them here.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        if own:
            return build_own(
                name,
                norm=norm,
                num_classes=num_classes,
                in_channels=in_channels,
                image_size=image_size,
                num_devices=num_devices,
                num_groups=num_groups,
                batch_statistics=batch_statistics,
            )
        if norm == "fixup":
            return FixupResNet(
                layout,
                num_classes=num_classes,
                in_channels=in_channels,
                image_size=image_size,
                feature_norm=feature_norm,
            )
        return ResNet(
            layout,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
            make_norm=functools.partial(
                make_norm,
                norm,
                num_devices=num_devices,
                num_groups=num_groups,
                batch_statistics=batch_statistics,
            ),
            zero_last_scale=is_per_sample(norm),
            feature_norm=feature_norm,
        )


def _check_choice(argument: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{argument}={value!r} is not known; accepted: {', '.join(accepted)}")


def _check_at_least(argument: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{argument}={value} is too small; accepted: {minimum} or more")


def _check_image_size(
    name: str, norm: str, layout: Layout, image_size: int, num_groups: int
) -> None:
    def single_value(side: int) -> tuple[int, int] | None:
        layers = list(zip(layout.stage_channels, layout.map_sides(side), strict=True))
        return single_value_layer(norm, layers, num_groups)

    found = single_value(image_size)
    if found is not None:
        channels, side = found
        smallest = next(s for s in range(image_size + 1, 2**16) if single_value(s) is None)
        raise ValueError(
            f"image_size={image_size} is too small for norm={norm!r}: {name} shrinks it to maps "
            f"of {side}x{side} with {channels} channels, where each value would be normalised by "
            f"itself; accepted: image_size of {smallest} or more, or another norm"
        )
