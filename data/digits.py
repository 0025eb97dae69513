"""The 1,797 handwritten digits within scikit-learn, with noise if wanted: the same each time."""

from __future__ import annotations

import math
from importlib import metadata
from typing import Any

import numpy as np
import torch

from data.cache import cached, outlined
from data.dataset import Dataset, Outline, dataset_of
from data.errors import DataError

_SPLIT_SEED = 0
_NOISE_SEED = 5
# Room for noise on each side of the clean range, in standard deviations of the noise: about one
# pixel in 150,000 lies outside.
_NOISE_RANGE = 4.5


def load(noise_std: float) -> Dataset:
    """Make the data set, or read it from the cache.

    Args:
        noise_std: in standard deviations of the training pixels, 0 or more.

    Raises:
        DataError: noise_std is outside that.
    """
    if not (0 <= noise_std < float("inf")):
        raise DataError(f"noise_std is {noise_std}: it must be a finite number, 0 or more")
    # Importing scikit-learn takes longer than reading the cache.
    return cached(_source(noise_std), lambda _: None, lambda: _made(noise_std))


def outline(noise_std: float) -> Outline:
    """Say what `load` loads, by loading it; arguments and errors are its own."""
    dataset = load(noise_std)
    _, channels, height, width = dataset.train_images.shape
    return outlined(
        "digits",
        None,
        (channels, height, width),
        [
            np.bincount(labels.numpy(), minlength=len(dataset.classes)).tolist()
            for labels in (dataset.train_labels, dataset.test_labels)
        ],
        source=_source(noise_std),
    )


def _source(noise_std: float) -> dict[str, Any]:
    return {
        "name": "digits",
        "noise_std": float(noise_std),
        "scikit-learn": metadata.version("scikit-learn"),
    }


def _made(noise_std: float) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    train, test, train_labels, test_labels = train_test_split(
        bundle.images,
        bundle.target,
        test_size=0.25,
        random_state=_SPLIT_SEED,
        stratify=bundle.target,
    )
    # Pixels are whole numbers, 0 to 16. Their sums are exact, so that the last bit of std, and
    # with it the rounding below, does not depend on the order of additions.
    total, squares = int(train.sum()), int((train**2).sum())
    std = math.sqrt(train.size * squares - total**2) / train.size
    margin = _NOISE_RANGE * noise_std * std
    # In float64, as PyTorch's float32 noise differs in the last bit between processors.
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    parts = []
    for images, labels in ((train, train_labels), (test, test_labels)):
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float64).numpy()
        noisy = images + noise_std * std * noise
        levels = np.rint((noisy + margin) / (16 + 2 * margin) * 255).clip(0, 255)
        parts.append((levels.astype(np.uint8)[:, None], labels.astype(np.int64)))
    return dataset_of("digits", parts[0], parts[1], [str(c) for c in bundle.target_names])
