"""A data set in memory, its fingerprint, and one of random pixels in its place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Attributes:
        name: one of `data.sources.DATASETS`.
        train_images: uint8 [N, C, H, W].
        train_labels: int64 [N], indices into classes.
        test_images: uint8 [M, C, H, W].
        test_labels: int64 [M].
        classes: names of the classes.
        fingerprint: SHA-256 of images and labels in hexadecimal, equal on all machines.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True)
class Outline:
    """What is known of a data set without reading its images.

    Attributes:
        name: one of `data.sources.DATASETS`.
        place: where its files are or would go; None for one within a package.
        present: whether they are there.
        decoded: whether its cache file is there too.
        download_bytes: what `load_dataset` would download, 0 where nothing is missing.
        cache_bytes: size of the cache file, there or not.
        shape: (C, H, W) of an image.
        train_counts, test_counts: images of each class.
    """

    name: str
    place: Path | None
    present: bool
    decoded: bool
    download_bytes: int
    cache_bytes: int
    shape: tuple[int, int, int]
    train_counts: tuple[int, ...]
    test_counts: tuple[int, ...]


def dataset_of(
    name: str,
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    test: tuple[NDArray[np.uint8], NDArray[np.int64]],
    classes: Sequence[str],
) -> Dataset:
    """A data set from arrays: images uint8 [N, C, H, W], labels int64 [N], each part a pair."""
    a, b, c, d = (torch.from_numpy(np.ascontiguousarray(array)) for array in (*train, *test))
    return Dataset(name, a, b, c, d, tuple(classes), fingerprint_of(a, b, c, d))


def fingerprint_of(*tensors: Tensor) -> str:
    """SHA-256 of types, shapes and values in hexadecimal, equal on all machines."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.numpy()
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def made_dataset(of: Outline) -> Dataset:
    """Make a data set of random pixels, alike in its sizes: trained on, it takes as long.

    Its fingerprint is no real data set's.
    """
    rng = np.random.default_rng(0)

    def part(counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        total = sum(counts)
        pixels = np.frombuffer(bytearray(rng.bytes(total * math.prod(of.shape))), dtype=np.uint8)
        images = torch.from_numpy(pixels).view(total, *of.shape)
        labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        return images, torch.from_numpy(labels)

    train, test = part(of.train_counts), part(of.test_counts)
    classes = tuple(map(str, range(len(of.train_counts))))
    return Dataset(of.name, *train, *test, classes, "made")
