"""The residual networks with weights of their own for each of D devices, in one pass.

The devices' channels lie side by side, ``[b, D * C, H, W]``: a convolution is one of D groups,
Group Normalization one of D times the groups, Batch Normalization one over D times the channels.
So small networks pay the overhead of one pass for D of them, and no map is copied or moved.
``torch.func.vmap`` takes any network, and twice as long here, since it moves the devices in front
of the samples at every norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.fixup import FixupBlock, FixupResNet
from models.norms import DeviceBatchNorm2d, group_norm
from models.resnet import ResidualBlock, ResNet, check_images, normalise_features

Tensors = Mapping[str, Tensor]
StackedForward = Callable[[Tensors, Tensors, Tensor], Tensor]


def stacked_forward(model: nn.Module) -> StackedForward | None:
    """The training pass of D copies of a model at once, or None for a network it does not know.

    The function takes the copies' parameters, each ``[D, ...]`` under its name in the model, their
    buffers ``[D, 1, ...]`` (one device's row each, as the model has them; running statistics are
    updated in place), and images ``[b * D, C, H, W]`` of which ``i * D + j`` is device j's. It
    returns logits ``[b * D, classes]`` in the same order, equal to those of D separate passes in
    training mode.
    """
    if not isinstance(model, ResNet | FixupResNet):
        return None

    def forward(parameters: Tensors, buffers: Tensors, images: Tensor) -> Tensor:
        check_images(images, model.in_channels, model.image_size)
        return _Stack(model, parameters, buffers).logits(images)

    return forward


class _Stack:
    """D copies of a model; maps are ``[b, D * C, H, W]``."""

    def __init__(self, model: ResNet | FixupResNet, parameters: Tensors, buffers: Tensors) -> None:
        self._model = model
        self._tensors = {**parameters, **buffers}
        self._devices = next(iter(parameters.values())).shape[0]

    def logits(self, images: Tensor) -> Tensor:
        D, model = self._devices, self._model
        x = images.contiguous().view(-1, D * images.shape[1], *images.shape[2:])
        if isinstance(model, FixupResNet):
            x = F.relu(self._conv("conv", model.conv, x, bias="bias1"))
        else:
            x = F.relu(self._norm("norm", model.norm, self._conv("conv", model.conv, x)))
        for place, block in enumerate(model.residual_blocks):
            at = f"residual_blocks.{place}."
            if isinstance(block, FixupBlock):
                x = self._fixup_block(at, block, x)
            elif isinstance(block, ResidualBlock):
                x = self._block(at, block, x)
        features = x.mean(dim=(2, 3)).unflatten(1, (D, -1))  # [b, D, F]
        if isinstance(model, FixupResNet):
            features = features + self._scalar("bias2", features.dtype)
        features = normalise_features(features.flatten(0, 1), model.feature_norm)
        features = features.unflatten(0, (-1, D)).transpose(0, 1)  # [D, b, F]
        weight, bias = self._tensors["fc.weight"], self._tensors["fc.bias"]
        logits = torch.baddbmm(bias.unsqueeze(1), features, weight.mT)  # [D, b, classes]
        return logits.transpose(0, 1).flatten(0, 1)

    def _block(self, at: str, block: ResidualBlock, x: Tensor) -> Tensor:
        out = F.relu(
            self._norm(at + "norm1", block.norm1, self._conv(at + "conv1", block.conv1, x))
        )
        out = self._norm(at + "norm2", block.norm2, self._conv(at + "conv2", block.conv2, out))
        if block.shortcut_conv is not None and block.shortcut_norm is not None:
            x = self._conv(at + "shortcut_conv", block.shortcut_conv, x)
            x = self._norm(at + "shortcut_norm", block.shortcut_norm, x)
        else:
            x = self._subsample_and_pad(x, block.out_channels, block.stride)
        return F.relu(out + x)

    def _fixup_block(self, at: str, block: FixupBlock, x: Tensor) -> Tensor:
        shifted = self._add(x, at + "bias1a")
        out = F.relu(self._conv(at + "conv1", block.conv1, shifted, bias=at + "bias1b"))
        out = self._add(out, at + "bias2a")
        out = self._conv(at + "conv2", block.conv2, out, bias=at + "bias2b", scale=at + "scale")
        if block.shortcut_conv is not None:
            x = self._conv(at + "shortcut_conv", block.shortcut_conv, shifted)
        elif block.stride != 1:
            x = self._subsample_and_pad(shifted, block.out_channels, block.stride)
        return F.relu(out + x)

    def _conv(
        self, at: str, conv: nn.Conv2d, x: Tensor, *, bias: str = "", scale: str = ""
    ) -> Tensor:
        weight = self._tensors[at + ".weight"]  # [D, C_out, C_in, k, k]
        if scale:
            weight = weight * self._tensors[scale].view(-1, 1, 1, 1, 1)
        of_channels = (
            self._tensors[bias].expand(self._devices, conv.out_channels).flatten() if bias else None
        )
        return F.conv2d(
            x, weight.flatten(0, 1), of_channels, conv.stride, conv.padding, groups=self._devices
        )

    def _norm(self, at: str, norm: nn.Module, x: Tensor) -> Tensor:
        weight, bias = (self._tensors[f"{at}.{name}"].flatten() for name in ("weight", "bias"))
        if isinstance(norm, DeviceBatchNorm2d):
            mean = self._tensors[at + ".running_mean"].view(-1)
            var = self._tensors[at + ".running_var"].view(-1)
            return F.batch_norm(x, mean, var, weight, bias, True, norm.momentum, norm.eps)
        assert isinstance(norm, nn.GroupNorm)
        return group_norm(x, self._devices * norm.num_groups, weight, bias, norm.eps)

    def _add(self, x: Tensor, scalar: str) -> Tensor:
        added = self._scalar(scalar, x.dtype).view(-1, 1, 1, 1)
        out: Tensor = x.unflatten(1, (self._devices, -1)) + added
        return out.flatten(1, 2)

    def _scalar(self, name: str, dtype: torch.dtype) -> Tensor:
        return self._tensors[name].to(dtype)  # [D, 1]

    def _subsample_and_pad(self, x: Tensor, out_channels: int, stride: int) -> Tensor:
        if stride == 1:
            return x
        x = x[:, :, ::stride, ::stride].unflatten(1, (self._devices, -1))
        return F.pad(x, (0, 0, 0, 0, 0, out_channels - x.shape[2])).flatten(1, 2)
