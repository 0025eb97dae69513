"""Fixup: residual networks without normalisation (Zhang et al. 2019, arXiv 1901.09321).

Follows the authors' code (github.com/hongyi-zhang/Fixup):

* ResNet-8 and ResNet-20: ``cifar/models/fixup_resnet_cifar.py``, shortcut without parameters;
* ResNet-18: block and projection shortcut of ``imagenet/models/fixup_resnet_imagenet.py``, under a
  3x3 stem of stride 1 without max-pooling, which is ours.

Initialisation, with L residual blocks of m = 2 convolutions: the first convolution of a block is
N(0, 2 / (C_out k²)) scaled by L^(-1/(2m-2)) = L^(-1/2), the second and the classifier are zero,
scalar biases 0, scales 1 (paper, section 3, rules 1 to 3); projections are N(0, 2 / (C_out k²));
the stem keeps PyTorch's default, as the authors' does. Every residual branch therefore starts at
exactly zero, and the loss at ln(classes).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.norms import DeviceBlocks
from models.resnet import Layout, check_images, conv3x3, normalise_features, subsample_and_pad


class FixupBlock(nn.Module):
    """Residual block with scalar biases and one scalar scale in place of norms.

    ``[B, in_channels, H, W]`` to ``[B, out_channels, ceil(H / stride), ceil(W / stride)]``. The
    scalars have shape ``[1]``. ``num_blocks`` is L, the residual blocks in the whole network.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        projection: bool,
        num_blocks: int,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stride = stride
        self.bias1a = nn.Parameter(torch.zeros(1))
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bias1b = nn.Parameter(torch.zeros(1))
        self.bias2a = nn.Parameter(torch.zeros(1))
        self.conv2 = conv3x3(out_channels, out_channels)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias2b = nn.Parameter(torch.zeros(1))
        self.shortcut_conv: nn.Conv2d | None = None
        if projection and stride != 1:
            self.shortcut_conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            _init_normal(self.shortcut_conv)
        _init_normal(self.conv1, gain=num_blocks**-0.5)
        nn.init.zeros_(self.conv2.weight)

    def branch(self, shifted: Tensor) -> Tensor:
        """Return the residual branch for an input that ``bias1a`` was already added to.

        Scale and biases behind a convolution are given to it, which spares passes over its maps.
        """
        out = F.relu(_convolve(self.conv1, shifted, self.bias1b))
        return _convolve(self.conv2, _add(out, self.bias2a), self.bias2b, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: the shifted input feeds a changing shortcut, the plain one passes."""
        shifted = _add(x, self.bias1a)
        if self.shortcut_conv is not None:
            identity = self.shortcut_conv(shifted)
        elif self.stride != 1:
            identity = subsample_and_pad(shifted, self.out_channels, self.stride)
        else:
            identity = x
        return F.relu(self.branch(shifted) + identity)


class FixupResNet(nn.Module):
    """A ResNet with Fixup; see the module's docstring for its source and initialisation."""

    def __init__(
        self,
        layout: Layout,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        feature_norm: str = "none",
    ) -> None:
        super().__init__()
        self.feature_norm = feature_norm
        self.in_channels = in_channels
        self.image_size = image_size
        self.conv = conv3x3(in_channels, layout.stage_channels[0])
        self.bias1 = nn.Parameter(torch.zeros(1))
        self.residual_blocks = nn.ModuleList(
            FixupBlock(*shape, projection=layout.projection, num_blocks=layout.num_blocks)
            for shape in layout.block_shapes()
        )
        self.bias2 = nn.Parameter(torch.zeros(1))
        self.fc = nn.Linear(layout.stage_channels[-1], num_classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor, blocks: DeviceBlocks | None = None) -> Tensor:
        """Return logits ``[B, num_classes]`` for images ``[B, in_channels, H, W]``.

        ``blocks`` is accepted so that all models are called alike, and ignored: samples do not
        meet in the forward pass.

        Raises:
            ValueError: images of another shape than the model was built for.
        """
        check_images(x, self.in_channels, self.image_size)
        out = F.relu(_convolve(self.conv, x, self.bias1))
        for block in self.residual_blocks:
            out = block(out)
        features = normalise_features(_add(out.mean(dim=(2, 3)), self.bias2), self.feature_norm)
        logits: Tensor = self.fc(features)
        return logits


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Split a model's parameters into ``{"weights": [...], "scalars": [...]}``.

    Scalars are the parameters of at most one dimension. For Fixup these are exactly the ones whose
    name contains "bias" or "scale", which ``cifar/cifar_train.py`` of the authors trains at a tenth
    of the base learning rate; the classifier's bias is among them, as it is there. For the
    normalised models they are the norms' scales and shifts and the classifier's bias. Each
    parameter appears once, in the order of ``model.parameters()``.
    """
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "scalars": []}
    for parameter in model.parameters():
        groups["scalars" if parameter.ndim <= 1 else "weights"].append(parameter)
    return groups


def classifier_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weight and the bias of a model's last linear layer."""
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    return list(last.parameters())


def _add(x: Tensor, scalar: Tensor) -> Tensor:
    # Unlike shape [1], a 0-dim float32 tensor leaves bfloat16 activations in bfloat16.
    return x + (scalar if x.dtype == scalar.dtype else scalar.squeeze(0))


def _convolve(conv: nn.Conv2d, x: Tensor, bias: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return ``scale * conv(x) + bias`` for scalars of shape ``[1]``."""
    weight = conv.weight if scale is None else conv.weight * scale
    return F.conv2d(x, weight, bias.expand(conv.out_channels), conv.stride, conv.padding)


def _init_normal(conv: nn.Conv2d, gain: float = 1.0) -> None:
    fan_out = conv.out_channels * math.prod(conv.kernel_size)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out) * gain)
