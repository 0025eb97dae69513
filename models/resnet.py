"""ResNets for small images with a normalisation layer after every convolution.

Layouts (He et al. 2016, arXiv 1512.03385):

* ResNet-18 (table 1) with the usual CIFAR stem: 3x3 convolution of stride 1 and no max-pooling;
  a projection shortcut (option B: 1x1 convolution and norm) where a stage halves the maps.
* ResNet-8 and ResNet-20 (section 4.2): stages of 16, 32, 64 channels, n = 1 and n = 3 blocks each,
  6n + 2 layers; a shortcut without parameters (option A: every other pixel, zero channels).

Initialisation: convolutions Kaiming normal with fan-out and ReLU gain (He et al. 2015, arXiv
1502.01852), classifier PyTorch's default. The last scale of each residual block starts at zero for
group, layer and instance normalisation (Goyal et al. 2017, arXiv 1706.02677, section 5.1); without
that, group normalisation does not train at a learning rate of 0.1 here. Batch normalisation keeps
PyTorch's ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.norms import (
    DeviceBatchNorm2d,
    DeviceBlocks,
    DeviceRuns,
    check_batch,
    check_blocks,
    is_channels_last_only,
    normalise,
)


@dataclass(frozen=True)
class Layout:
    """Channels per stage, residual blocks per stage, and the kind of shortcut between stages.

    The first stage keeps the image's resolution, each later one halves it (rounding up).
    """

    stage_channels: tuple[int, ...]
    blocks_per_stage: int
    projection: bool

    @property
    def num_blocks(self) -> int:
        """Number of residual blocks."""
        return len(self.stage_channels) * self.blocks_per_stage

    def scaled(self, width_factor: float) -> "Layout":
        """Return this layout with ``width_factor`` times the channels in every stage.

        Raises:
            ValueError: the factor does not give a whole, positive number of channels.
        """
        narrowest = self.stage_channels[0]
        channels = round(narrowest * width_factor) if 0 < width_factor < float("inf") else 0
        if channels < 1 or abs(narrowest * width_factor - channels) > 1e-6:
            raise ValueError(
                f"width_factor={width_factor} does not give whole numbers of channels; accepted: "
                f"positive multiples of 1/{narrowest} (the first stage has {narrowest} channels)"
            )
        stages = tuple(c // narrowest * channels for c in self.stage_channels)
        return Layout(stages, self.blocks_per_stage, self.projection)

    def map_sides(self, image_side: int) -> tuple[int, ...]:
        """Return the side in pixels of each stage's square maps."""
        return tuple(-(-image_side // 2**stage) for stage in range(len(self.stage_channels)))

    def block_shapes(self) -> list[tuple[int, int, int]]:
        """Return (input channels, output channels, stride) of every residual block in order."""
        shapes = []
        in_channels = self.stage_channels[0]
        for stage, channels in enumerate(self.stage_channels):
            for index in range(self.blocks_per_stage):
                shapes.append((in_channels, channels, 2 if stage > 0 and index == 0 else 1))
                in_channels = channels
        return shapes


LAYOUTS = {
    "resnet8": Layout((16, 32, 64), blocks_per_stage=1, projection=False),
    "resnet18": Layout((64, 128, 256, 512), blocks_per_stage=2, projection=True),
    "resnet20": Layout((16, 32, 64), blocks_per_stage=3, projection=False),
}
MODELS = tuple(LAYOUTS)
FEATURE_NORMS = ("none", "rms")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with norms, added to the shortcut before the last ReLU.

    ``[B, in_channels, H, W]`` to ``[B, out_channels, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        projection: bool,
        make_norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stride = stride
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.norm1 = make_norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.norm2 = make_norm(out_channels)
        self.shortcut_conv: nn.Conv2d | None = None
        self.shortcut_norm: nn.Module | None = None
        if projection and stride != 1:
            self.shortcut_conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut_norm = make_norm(out_channels)

    def forward(self, x: Tensor, blocks: DeviceBlocks | DeviceRuns | None = None) -> Tensor:
        """Apply the block; ``blocks`` as in ``ResNet.forward``."""
        out = F.relu(normalise(self.norm1, self.conv1(x), blocks))
        out = normalise(self.norm2, self.conv2(out), blocks)
        if self.shortcut_conv is not None and self.shortcut_norm is not None:
            identity = normalise(self.shortcut_norm, self.shortcut_conv(x), blocks)
        else:
            identity = subsample_and_pad(x, self.out_channels, self.stride)
        return F.relu(out + identity)


class ResNet(nn.Module):
    """A ResNet with normalisation; see the module's docstring for layout and initialisation.

    ``make_norm`` gives the layer for a number of channels. ``zero_last_scale`` starts the second
    norm of every residual block at scale zero.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        make_norm: Callable[[int], nn.Module],
        zero_last_scale: bool,
        feature_norm: str = "none",
    ) -> None:
        super().__init__()
        self.feature_norm = feature_norm
        self.in_channels = in_channels
        self.image_size = image_size
        self.smallest_side = layout.map_sides(image_size)[-1]
        self.conv = conv3x3(in_channels, layout.stage_channels[0])
        self.norm = make_norm(layout.stage_channels[0])
        self.residual_blocks = nn.ModuleList(
            ResidualBlock(*shape, projection=layout.projection, make_norm=make_norm)
            for shape in layout.block_shapes()
        )
        self.fc = nn.Linear(layout.stage_channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ResidualBlock) and zero_last_scale:
                scale = module.norm2.weight
                assert isinstance(scale, Tensor)
                nn.init.zeros_(scale)

    def forward(self, x: Tensor, blocks: DeviceBlocks | None = None) -> Tensor:
        """Return logits ``[B, num_classes]`` for images ``[B, in_channels, H, W]``.

        ``blocks`` assigns samples to devices; only norm="batch" in training uses them.

        Raises:
            ValueError: images of another shape than the model was built for; in training with
                batch normalisation also missing or unfitting ``blocks``, or a batch that leaves
                a single value per channel.
        """
        check_images(x, self.in_channels, self.image_size)
        if self.training:
            blocks = self._check_batch(x, blocks)
        runs = self._runs(x, blocks)
        if runs is not None:
            x = runs.take(x)
        of_samples = blocks if runs is None else runs
        out = F.relu(normalise(self.norm, self.conv(x), of_samples))
        for block in self.residual_blocks:
            out = block(out, of_samples)
        logits: Tensor = self.fc(normalise_features(out.mean(dim=(2, 3)), self.feature_norm))
        return logits if runs is None else runs.give_back(logits)

    def _runs(self, x: Tensor, blocks: DeviceBlocks | None) -> DeviceRuns | None:
        """The order of devices, where layers are faster in it: on channels-last maps of a CPU."""
        if not isinstance(self.norm, DeviceBatchNorm2d) or not self.training or blocks is None:
            return None
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        # The maps are in the layout of the weights.
        first = self.residual_blocks[0]
        assert isinstance(first, ResidualBlock)
        if not is_channels_last_only(first.conv1.weight):
            return None
        return DeviceRuns.of(blocks, self.norm.num_devices)

    def _check_batch(self, x: Tensor, blocks: DeviceBlocks | None) -> DeviceBlocks | None:
        # Here and not in the layers: a late failure would leave earlier statistics updated.
        if isinstance(self.norm, DeviceBatchNorm2d) and blocks is not None:
            check_blocks(
                blocks,
                num_devices=self.norm.num_devices,
                batch_size=x.shape[0],
                side=self.smallest_side,
            )
            # Once for all layers; nothing to do if the ids already lie beside the images.
            return tuple((None if ids is None else ids.to(x.device), n) for ids, n in blocks)
        if isinstance(self.norm, nn.BatchNorm2d):
            check_batch(x.shape[0], self.smallest_side)
        return blocks


def normalise_features(features: Tensor, feature_norm: str) -> Tensor:
    """Bring what the classifier sees, ``[B, C]``, to a root mean square of one per sample.

    That is ``x / |x| * sqrt(C)``, without parameters: the feature normalisation of Zhang et al.
    2024 (arXiv 2308.09565), which keeps a federated device from lowering its loss by stretching
    the features of its own classes. "none" returns ``features`` as they are.
    """
    if feature_norm == "none":
        return features
    return F.normalize(features, dim=1) * math.sqrt(features.shape[1])


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without bias that keeps the map's size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def subsample_and_pad(x: Tensor, out_channels: int, stride: int) -> Tensor:
    """Match ``[B, C, H, W]`` to a block's output without parameters (He et al., option A).

    Takes every ``stride``-th pixel and appends channels of zeros; the identity at stride 1.
    """
    if stride == 1:
        return x
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, out_channels - x.shape[1]))


def check_images(x: Tensor, in_channels: int, image_size: int) -> None:
    """Check that ``x`` is a batch of the images a model was built for.

    Raises:
        ValueError: any other shape than ``[B, in_channels, image_size, image_size]``, or integers.
    """
    expected = (in_channels, image_size, image_size)
    if x.ndim != 4 or tuple(x.shape[1:]) != expected or not torch.is_floating_point(x):
        raise ValueError(
            f"the model takes floating-point images [B, {in_channels}, {image_size}, "
            f"{image_size}], got {x.dtype} {list(x.shape)}"
        )
