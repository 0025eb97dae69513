"""Batches for simulated devices that take one synchronous step together.

The data set lives on the training device as uint8 tensors. For each epoch the order of all
images, their crop offsets and flips are planned at once with NumPy and copied there; the loop
over updates then only gathers, crops, flips and normalises whole batches, without waiting for
the accelerator.

Everything is a function of (constructor arguments, epoch): a resumed run needs no saved state.
Random numbers come from a counter-based generator (SplitMix64; Steele, Lea and Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014) keyed by hashes of (seed, device, pass),
(seed, epoch) and (seed, round), so they depend neither on library versions nor on the order of
calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

AUGMENTATIONS = ("crop-flip", "crop", "none")

_STREAM_ORDER, _STREAM_AUGMENT, _STREAM_ROUND = range(3)

_DRAWN_AT_ONCE = 2**20
"""Random numbers that one pass over rounds or updates of the past may hold in memory."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One global batch of B images, all devices together.

    Attributes:
        images: float32 [B, C, H, W], augmented and normalised, on the training device.
        labels: int64 [B], on the training device.
        blocks: consecutive parts of the batch as (devices, images per device). devices is an
            int64 tensor [D_b] of device numbers on the training device, or None for all devices
            in order 0..D-1. Sample i*D_b + j of a block belongs to its j-th device.
    """

    images: Tensor
    labels: Tensor
    blocks: tuple[tuple[Tensor | None, int], ...]


class DeviceBatches:
    """Training batches dealt from every device's own images.

    A global batch of B images is dealt to m devices like cards: to all D, or to those that take
    part in the round. With q, r = divmod(B, m), every one of them gives q images to an update, and
    the r left over come from numbers (u*r + j) mod m of them, j < r, where u counts updates from
    the start of training: over time all devices give the same number, however many images they
    hold. The first block of a batch is the r devices that give q + 1 images, the second the
    others; with r = 0 there is a single block of all m in ascending order, and with q = 0 a single
    block of r devices.

    With devices_per_round = m < D, the devices of a round are drawn uniformly without replacement,
    anew for each round, as the set S_t of McMahan et al. 2017 (arXiv 1602.05629, algorithm 1).
    A round is steps_per_round consecutive updates, counted from the start of training; it runs on
    where an epoch ends.

    Each device walks through its own images in an endless stream of fresh permutations that runs
    on across updates and epochs, and from one round that it takes part in to its next: none
    repeats before all of its images were seen.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        shards: for each device, the indices of its images; they may be of different sizes, may
            have images in common, and need not cover all images.
        global_batch_size: B, images per update over all devices that take part.
        devices_per_round: m, from 1 to D; None for all devices.
        steps_per_round: updates in a round, at least 1; without effect where all devices take
            part.
        seed: from 0 to 2^63 - 1.
        augment: "crop-flip" pads with black, crops at a random offset and mirrors every other
            image on average, as torchvision's RandomCrop(padding=...) and RandomHorizontalFlip
            do; "crop" leaves out the mirroring; "none" changes nothing.
        crop_padding: pixels added on each side before cropping.
        device: the training device.
        channels_last: give images in torch.channels_last memory format.
        mean, std: per channel, in units of 0..1; see `channel_statistics`.

    Attributes:
        updates_per_epoch: max(1, round(images / B)), of the images that are on any device, each
            counted once: devices that share images do not make an epoch longer.
        images_per_epoch: updates_per_epoch * B.

    Raises:
        ValueError: an argument is outside what is accepted.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        shards: Sequence[NDArray[np.int64]],
        *,
        global_batch_size: int,
        devices_per_round: int | None = None,
        steps_per_round: int = 1,
        seed: int,
        augment: str = "crop-flip",
        crop_padding: int = 4,
        device: torch.device,
        channels_last: bool = False,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        _check_images(images)
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}: "
                f"they must be int64 of shape ({len(images)},)"
            )
        _check_shards(shards, len(images))
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size is {global_batch_size}: it must be at least 1")
        if devices_per_round is not None and not 1 <= devices_per_round <= len(shards):
            raise ValueError(
                f"devices_per_round is {devices_per_round}: it must be from 1 to {len(shards)}, "
                "the number of devices, or None for all"
            )
        if steps_per_round < 1:
            raise ValueError(f"steps_per_round is {steps_per_round}: it must be at least 1")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}: it must be from 0 to 2^63 - 1")
        if augment not in AUGMENTATIONS:
            accepted = ", ".join(repr(name) for name in AUGMENTATIONS)
            raise ValueError(f"augment is {augment!r}: it must be one of {accepted}")
        if crop_padding < 0:
            raise ValueError(f"crop_padding is {crop_padding}: it must be 0 or more")

        self._seed = seed
        self._device = device
        self._channels_last = channels_last
        self._batch_size = global_batch_size
        self._per_round = len(shards) if devices_per_round is None else devices_per_round
        self._steps_per_round = steps_per_round
        self._offsets = 2 * crop_padding + 1 if augment != "none" else 1
        self._flip = augment == "crop-flip"
        self._members = np.concatenate([np.asarray(shard, dtype=np.int64) for shard in shards])
        self._sizes = np.array([len(shard) for shard in shards], dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._normaliser = _normaliser(mean, std, images.shape[1], device)
        # An update, and what each device has given before it; see _given_before.
        self._given = (0, np.zeros(len(shards), dtype=np.int64))

        height, width = images.shape[2:]
        images = images.to(device)
        if self._offsets > 1:
            images = F.pad(images, (crop_padding,) * 4)
        self._crops = _Crops(images, height, width, channels_last)
        self._labels = labels.to(device)

        held = np.zeros(len(images), dtype=np.bool_)
        held[self._members] = True
        self.updates_per_epoch = updates_per_epoch(int(held.sum()), global_batch_size)
        self.images_per_epoch = self.updates_per_epoch * global_batch_size

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the updates_per_epoch batches of an epoch, counted from 0.

        Raises:
            ValueError: epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}: it must be 0 or more")
        return self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[Batch]:
        order, devices = self._plan_order(epoch)
        rows, columns, flips = self._plan_augmentation(epoch)
        each, extra = divmod(self._batch_size, self._per_round)
        everyone = self._per_round == len(self._sizes)
        index = torch.from_numpy(order).to(self._device)
        start = torch.from_numpy(self._crops.starts(order, rows, columns)).to(self._device)
        mirrored = torch.from_numpy(np.nonzero(flips)[1]).to(self._device)
        mirrored_of = mirrored.split(flips.sum(axis=1).tolist())
        # Places in a batch with its mirrored images behind it.
        behind = self._batch_size - 1 + np.cumsum(flips, axis=1)
        place = torch.from_numpy(np.where(flips, behind, np.arange(self._batch_size)))
        place = place.to(self._device)
        device_ids = torch.from_numpy(devices).to(self._device)
        labels = self._labels[index]

        for u in range(self.updates_per_epoch):
            images = self._crops.gather(start[u])
            if self._flip:
                images = self._crops.mirror(images, mirrored_of[u], place[u])
            if extra == 0:
                ids = None if everyone else device_ids[u]
                blocks: tuple[tuple[Tensor | None, int], ...] = ((ids, each),)
            elif each == 0:
                blocks = ((device_ids[u, :extra], 1),)
            else:
                blocks = ((device_ids[u, :extra], each + 1), (device_ids[u, extra:], each))
            yield Batch(
                _apply(self._crops.as_maps(images), self._normaliser, self._channels_last),
                labels[u],
                blocks,
            )

    def _plan_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Plan which image stands where.

        Returns:
            Image indices, [updates, B], and numbers of the devices that take part, [updates, m],
            of which the first B mod m give one image more than the others.
        """
        num_devices, updates = len(self._sizes), self.updates_per_epoch
        each, extra = divmod(self._batch_size, self._per_round)
        begin = epoch * updates
        update = begin + np.arange(updates + 1)[:, None]  # [updates + 1, 1]
        turn = (update[:-1] * extra + np.arange(self._per_round)) % self._per_round
        if self._per_round == num_devices:
            # Images a device has given before an update: extra image number e went to device
            # e mod D.
            devices = np.arange(num_devices)
            given = update * each + (update * extra + num_devices - 1 - devices) // num_devices
        else:
            taking_part, gives = self._taking_part(begin, begin + updates)
            given = np.zeros((updates + 1, num_devices), dtype=np.int64)
            given[0] = self._given_before(begin)
            np.put_along_axis(given[1:], taking_part, gives, axis=1)
            given = np.cumsum(given, axis=0)
            turn = np.take_along_axis(taking_part, turn, axis=1)
        streams, stream_starts = self._streams(given[0], given[-1])
        at = given[:-1] - given[0] + stream_starts  # [updates, D]

        at = np.take_along_axis(at, turn, axis=1)
        first = at[:, None, :extra] + np.arange(each + 1)[:, None]
        second = at[:, None, extra:] + np.arange(each)[:, None]
        places = np.concatenate([first.reshape(updates, -1), second.reshape(updates, -1)], axis=1)
        return streams[places], turn

    def _taking_part(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw who takes part in the updates from begin up to but not including end.

        Returns:
            Device numbers, ascending, and how many images each gives, both [end - begin, m].
        """
        update = np.arange(begin, end)
        of_round = update // self._steps_per_round
        rounds = np.arange(of_round[0], of_round[-1] + 1)
        keys = _hash(self._seed, _STREAM_ROUND, rounds, np.zeros_like(rounds))
        counter = np.arange(len(self._sizes), dtype=np.uint64)
        random = _mix(keys[:, None] + counter * _GOLDEN)
        m = self._per_round
        devices = np.sort(np.argpartition(random, m - 1, axis=1)[:, :m], axis=1)
        each, extra = divmod(self._batch_size, m)
        gives = each + ((np.arange(m) - update[:, None] * extra) % m < extra)
        return devices[of_round - rounds[0]], gives

    def _given_before(self, update: int) -> NDArray[np.int64]:
        """Count the images that each device has given before an update, [D].

        That takes all rounds since the first; the last answer is kept to go on from.
        """
        at, given = self._given if self._given[0] <= update else (0, np.zeros_like(self._sizes))
        step = max(1, _DRAWN_AT_ONCE // len(self._sizes))
        while at < update:
            end = min(at + step, update)
            devices, gives = self._taking_part(at, end)
            # Sums in float64, exact up to 2^53.
            weights = gives.reshape(-1).astype(np.float64)
            added = np.bincount(devices.reshape(-1), weights, minlength=len(given))
            given = given + added.astype(np.int64)
            at = end
        self._given = (update, given)
        return given

    def _streams(
        self, begin: NDArray[np.int64], end: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Lay out every device's stream of image indices from position begin to end.

        Returns:
            The devices' whole passes that cover those positions, one after the other, and the
            place of position begin of each device in them, [D]. A device with nothing to give has
            none, and its place means nothing.
        """
        first_pass = begin // self._sizes
        num_passes = np.where(end > begin, -(-end // self._sizes) - first_pass, 0)
        # One entry per (device, pass), ordered by device, then pass.
        device = np.repeat(np.arange(len(self._sizes)), num_passes)
        within = np.arange(len(device)) - np.repeat(np.cumsum(num_passes) - num_passes, num_passes)
        keys = _hash(self._seed, _STREAM_ORDER, device, first_pass[device] + within)
        sizes = self._sizes[device]
        ends = np.cumsum(sizes)
        # One entry per image of a pass. Sorting random numbers within a pass permutes it.
        part = np.repeat(np.arange(len(device)), sizes)
        place = np.arange(int(ends[-1])) - np.repeat(ends - sizes, sizes)
        bits = np.uint64(max(1, len(device).bit_length()))
        random = _mix(keys[part] + place.astype(np.uint64) * _GOLDEN) >> bits
        order = np.argsort(part.astype(np.uint64) << (np.uint64(64) - bits) | random, kind="stable")
        streams = self._members[self._starts[device[part]] + place[order]]
        lengths = num_passes * self._sizes
        return streams, np.cumsum(lengths) - lengths + begin - first_pass * self._sizes

    def _plan_augmentation(
        self, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Draw crop offsets, 0 to 2 * padding, and flips, each [updates, B]."""
        key = _hash(self._seed, _STREAM_AUGMENT, np.array([epoch]), np.array([0]))
        counter = np.arange(self.images_per_epoch, dtype=np.uint64)
        random = _mix(key + counter * _GOLDEN).reshape(self.updates_per_epoch, -1)
        low, span = np.uint64(2**31 - 1), np.uint64(self._offsets)
        rows = ((random & low) * span) >> np.uint64(31)
        columns = ((random >> np.uint64(31) & low) * span) >> np.uint64(31)
        return rows.astype(np.int64), columns.astype(np.int64), random >> np.uint64(63) == 1


def updates_per_epoch(images: int, global_batch_size: int) -> int:
    """Count the updates of an epoch over so many images, each counted once."""
    return max(1, round(images / global_batch_size))


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], *, channels_last: bool
) -> Tensor:
    """Return (images / 255 - mean) / std as float32 [N, C, H, W] on the images' device.

    Args:
        images: uint8 [N, C, H, W].
        mean, std: per channel, in units of 0..1.
        channels_last: give the result in torch.channels_last memory format.

    Raises:
        ValueError: images are not uint8 [N, C, H, W], or mean or std does not fit them.
    """
    _check_images(images)
    normaliser = _normaliser(mean, std, images.shape[1], images.device)
    return _apply(images, normaliser, channels_last)


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of every channel over all pixels, in units of 0..1.

    Grey levels are counted, so the result does not depend on device, threads or order of sums.
    A constant channel is given the standard deviation 1/255, one grey level, to be divisible by.

    Args:
        images: uint8 [N, C, H, W], N > 0.

    Raises:
        ValueError: images are not as described.
    """
    _check_images(images)
    if images.numel() == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}: there must be at least one")
    count = images.numel() // images.shape[1]
    grey = np.arange(256)
    means, deviations = [], []
    for channel in images.unbind(1):
        histogram = np.zeros(256, dtype=np.int64)
        for start in range(0, len(channel), 1024):  # bincount makes int64 copies
            part = channel[start : start + 1024].flatten()
            histogram += torch.bincount(part, minlength=256).cpu().numpy()
        total, squares = int(histogram @ grey), int(histogram @ grey**2)
        variance = (count * squares - total**2) / count**2  # one rounding: Python's integers
        means.append(total / count / 255)
        deviations.append(math.sqrt(variance) / 255 if variance > 0 else 1 / 255)
    return means, deviations


def _normaliser(
    mean: Sequence[float], std: Sequence[float], channels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and std in units of 0..255, float32 [C, 1, 1] each."""
    if len(mean) != channels or len(std) != channels or not all(s > 0 for s in std):
        raise ValueError(
            f"mean is {list(mean)} and std is {list(std)}: they need {channels} numbers each, "
            "one per channel, and std must be above 0"
        )
    scaled_mean = torch.tensor([255 * m for m in mean], dtype=torch.float32, device=device)
    scaled_std = torch.tensor([255 * s for s in std], dtype=torch.float32, device=device)
    return scaled_mean.view(-1, 1, 1), scaled_std.view(-1, 1, 1)


def _apply(images: Tensor, normaliser: tuple[Tensor, Tensor], channels_last: bool) -> Tensor:
    mean, std = normaliser
    if not channels_last:
        return images.float().sub_(mean).div_(std)
    # Whole rows at a time: broadcasting over three interleaved channels is six times slower on
    # a CPU (246k against 1,480k images of 32x32 a second on one core).
    B, C, H, W = images.shape
    rows = images.permute(0, 2, 3, 1).reshape(B, H, W * C)
    result = rows.float().sub_(mean.view(C).repeat(W)).div_(std.view(C).repeat(W))
    return result.view(B, H, W, C).permute(0, 3, 1, 2)


class _Crops:
    """All crops of resident images, without a copy of any until it is asked for.

    What lies together in memory is copied together: rows of a crop (of one channel, or of all with
    channels_last), or whole images where there is one crop. Indexing pixel by pixel takes fifteen
    times as long on a CPU.

    Args:
        images: uint8 [N, C, H + padding, W + padding], on the training device.
        height, width: H and W, of a crop.
        channels_last: the layout of what is gathered.
    """

    def __init__(self, images: Tensor, height: int, width: int, channels_last: bool) -> None:
        N, C, padded_height, padded_width = images.shape
        if channels_last:
            images, self._shape = images.permute(0, 2, 3, 1), (height, width, C)
            of_image, of_row, of_column = padded_height * padded_width * C, padded_width * C, C
            lines, length = np.arange(height) * of_row, width * C
        else:
            self._shape = (C, height, width)
            of_image, of_row, of_column = C * padded_height * padded_width, padded_width, 1
            planes = np.arange(C)[:, None] * padded_height * padded_width
            lines, length = (planes + np.arange(height) * of_row).reshape(-1), width
        if (height, width) == (padded_height, padded_width):
            lines, length = np.zeros(1, dtype=np.int64), of_image
        self._strides = (of_image, of_row, of_column)
        self._channels_last = channels_last
        self._lines = torch.from_numpy(lines).to(images.device)
        pixels = images.contiguous().flatten()
        # Every place as the start of a line.
        self._at = pixels.as_strided((N * of_image - length + 1, length), (1, 1))

    def starts(
        self, index: NDArray[np.int64], row: NDArray[np.int64], column: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Where crops begin in memory, from their image and their upper left corner."""
        of_image, of_row, of_column = self._strides
        return index * of_image + row * of_row + column * of_column

    def gather(self, starts: Tensor) -> Tensor:
        """Copy B crops, uint8 [B, *shape in memory]."""
        lines = (starts[:, None] + self._lines).flatten()
        return self._at.index_select(0, lines).view(-1, *self._shape)

    def mirror(self, images: Tensor, mirrored: Tensor, places: Tensor) -> Tensor:
        """Mirror some of what was gathered, and put each image in its place.

        Writing the mirrored ones over the others takes a CPU seven times as long.
        """
        flipped = images.index_select(0, mirrored).flip(2 if self._channels_last else 3)
        return torch.cat([images, flipped]).index_select(0, places)

    def as_maps(self, images: Tensor) -> Tensor:
        """View what was gathered as [B, C, H, W]."""
        return images.permute(0, 3, 1, 2) if self._channels_last else images


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and dtype {images.dtype}: "
            "they must be uint8 of shape (N, C, H, W)"
        )


def _check_shards(shards: Sequence[NDArray[np.int64]], num_images: int) -> None:
    if not shards:
        raise ValueError("shards is empty: there must be at least one device")
    for d, shard in enumerate(shards):
        indices = np.asarray(shard)
        if indices.ndim != 1 or indices.size == 0 or indices.dtype.kind not in "iu":
            raise ValueError(
                f"the shard of device {d} has shape {indices.shape} and dtype {indices.dtype}: "
                "every device needs a list of at least one image index"
            )
        if indices.min() < 0 or indices.max() >= num_images:
            raise ValueError(
                f"the shard of device {d} has indices from {indices.min()} to {indices.max()}: "
                f"they must be from 0 to {num_images - 1}"
            )


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (variant 13 of Stafford's mixers), modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(seed: int, stream: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash (seed, stream, a, b) into one uint64 per element of a and b."""
    key = np.zeros(len(a), dtype=np.uint64)
    for word in (np.uint64(seed), np.uint64(stream), a.astype(np.uint64), b.astype(np.uint64)):
        key = _mix((key ^ word) + _GOLDEN)
    return key
