"""Networks of users' own, named by an import path, with the normalisation that a sweep chooses.

A user's function is called with keyword arguments alone::

    def mobilenet(*, norm_layer, num_classes, in_channels, image_size):
        return torchvision.models.mobilenet_v2(
            num_classes=num_classes, norm_layer=norm_layer, dropout=0.0
        )

``norm_layer(channels)`` returns the layer for ``[B, channels, H, W]``, as torchvision's builders
take it. Every kind of ``models.NORMS`` that is a layer can be asked for; "fixup" cannot, being an
initialisation of the residual networks here.
"""

import functools
import importlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from models.norms import DeviceBatchNorm2d, DeviceBlocks, make_norm
from models.resnet import check_images


class OwnModel(nn.Module):
    """A user's network, called as the models here are: ``model(x, blocks)``.

    ``network`` maps images ``[B, in_channels, image_size, image_size]`` to logits
    ``[B, num_classes]`` by a linear layer at its end, the classifier.
    """

    def __init__(
        self, network: nn.Module, *, num_classes: int, in_channels: int, image_size: int
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.image_size = image_size
        linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
        if not linear or linear[-1].out_features != num_classes or linear[-1].bias is None:
            raise ValueError(
                f"it has no linear layer with a bias and num_classes={num_classes} outputs at "
                "its end; give it one"
            )
        self.network = network
        self._own_statistics = [m for m in network.modules() if isinstance(m, DeviceBatchNorm2d)]

    def forward(self, x: Tensor, blocks: DeviceBlocks | None = None) -> Tensor:
        """Return logits ``[B, num_classes]`` for images ``[B, in_channels, H, W]``.

        ``blocks`` assigns samples to devices; only norm="batch" in training uses them.

        Raises:
            ValueError: images of another shape than the model was built for.
        """
        check_images(x, self.in_channels, self.image_size)
        if self._own_statistics and blocks is not None:
            blocks = tuple((None if ids is None else ids.to(x.device), n) for ids, n in blocks)
        for layer in self._own_statistics:
            layer.blocks = blocks
        logits: Tensor = self.network(x)
        return logits


def build_own(
    name: str,
    *,
    norm: str,
    num_classes: int,
    in_channels: int,
    image_size: int,
    num_devices: int,
    num_groups: int,
    batch_statistics: str,
) -> OwnModel:
    """Import ``name``, ``"module:function"``, and build its network; see the module's docstring.

    Raises:
        ValueError: there is nothing to import, norm="fixup", the function fails, or what it
            returns cannot be trained here: it does not fit :class:`OwnModel`, draws random numbers
            in training (no checkpoint keeps them), or has frozen or unused parameters.
    """
    if norm == "fixup":
        raise ValueError(
            f"norm='fixup' is an initialisation of the ResNets here, not a layer for "
            f"model={name!r}; accepted with it: batch, sync-batch, group, layer, instance"
        )
    build = _imported(name)
    norm_layer = functools.partial(
        make_norm,
        norm,
        num_devices=num_devices,
        num_groups=num_groups,
        batch_statistics=batch_statistics,
    )
    try:
        network = build(
            norm_layer=norm_layer,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
        )
        if not isinstance(network, nn.Module):
            raise TypeError(f"it returned {type(network).__name__}, not a torch.nn.Module")
        model = OwnModel(
            network,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
        )
        _try(model, num_classes, num_devices)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"model={name!r} cannot be used: {lines[0]}") from error
    return model


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module does when it is imported
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model={name!r} cannot be imported ({reason}); install its package where the workers "
            "run, or put its folder on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(f"model={name!r} is no function")
    return found  # type: ignore[no-any-return]


def _try(model: OwnModel, num_classes: int, num_devices: int) -> None:
    """Pass images through a copy, as training does and as evaluation does."""
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise ValueError("it has lazy layers, whose sizes are not known; name their sizes")
    frozen = [name for name, p in model.network.named_parameters() if not p.requires_grad]
    if frozen:
        raise ValueError(f"{frozen[0]} is frozen; every parameter is trained here")
    copy, side = deepcopy(model).train(), model.image_size
    images = torch.randn(2 * num_devices, model.in_channels, side, side)
    before = torch.get_rng_state()
    logits = copy(images, ((None, 2),))
    if not torch.equal(before, torch.get_rng_state()):
        raise ValueError(
            "it draws random numbers in training, as dropout does, which no checkpoint keeps; "
            "build it without"
        )
    _check_logits(logits, (2 * num_devices, num_classes))
    logits.sum().backward()
    unused = [name for name, p in copy.network.named_parameters() if p.grad is None]
    if unused:
        raise ValueError(f"{unused[0]} takes no part in the logits; leave it out")
    copy.eval()
    with torch.no_grad():
        _check_logits(copy(images[:2]), (2, num_classes))


def _check_logits(logits: object, shape: tuple[int, int]) -> None:
    if not isinstance(logits, Tensor):
        raise ValueError(f"it returns {type(logits).__name__}, not a tensor of logits")
    if tuple(logits.shape) != shape:
        raise ValueError(f"it maps {shape[0]} images to {list(logits.shape)}, not to {list(shape)}")
