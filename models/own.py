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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

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
            returns cannot be trained here (see :class:`OwnModel`; or it has dropout, whose random
            numbers no checkpoint keeps).
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
        dropout = [m for m in network.modules() if isinstance(m, _DropoutNd) and m.p > 0]
        if dropout:
            raise ValueError(f"it has dropout ({dropout[0]}); build it with a probability of 0")
        model = OwnModel(
            network,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
        )
        _try(model, num_classes)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"model={name!r} cannot be used: {lines[0]}") from error
    return model


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(
            f"model={name!r} cannot be imported ({error}); install its package where the workers "
            "run, or put its folder on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(f"model={name!r} is no function")
    return found  # type: ignore[no-any-return]


def _try(model: OwnModel, num_classes: int) -> None:
    side, was_training = model.image_size, model.training
    model.eval()
    with torch.inference_mode():
        logits = model(torch.zeros(2, model.in_channels, side, side))
    model.train(was_training)
    if logits.shape != (2, num_classes):
        raise ValueError(f"it maps 2 images to {list(logits.shape)}, not to [2, {num_classes}]")
