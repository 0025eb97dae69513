"""The fixed part of a data set's training images that is held out for validation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def split_train(
    labels: ArrayLike,
    *,
    num_images: int | None,
    validation_fraction: float,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose training and validation images among a data set's training images.

    First num_images are chosen, then a part of these is held out, both by class: each class has
    its share of the images to within one.

    Args:
        labels: integer class of each image, [N].
        num_images: images in both parts together, from the number of classes to N; None for all.
        validation_fraction: part held out, from 0 up to but not including 1. Every class must
            keep an image to train on.
        seed: non-negative integer.

    Returns:
        Indices of training and of validation images, sorted, int64.

    Raises:
        ValueError: an argument is outside what is accepted.
    """
    values = np.asarray(labels)
    if values.ndim != 1 or values.size == 0 or values.dtype.kind not in "iu":
        raise ValueError(
            f"labels have shape {values.shape} and dtype {values.dtype}: "
            "they must be a non-empty list of integers"
        )
    names, ranks, sizes = np.unique(values, return_inverse=True, return_counts=True)
    total = len(values) if num_images is None else num_images
    if not len(names) <= total <= len(values):
        raise ValueError(
            f"num_images is {total}: it must be from {len(names)}, one per class, "
            f"to {len(values)}, the number of training images"
        )
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}: it must be from 0 to below 1"
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}: it must be 0 or more")

    chosen = _apportion(total, sizes)
    num_held_out = round(total * validation_fraction)
    held_out = _apportion(num_held_out, chosen)
    if (chosen == held_out).any():
        left = int((chosen - held_out).argmin())
        raise ValueError(
            f"validation_fraction is {validation_fraction} of {total} images: class {names[left]} "
            "would have no image to train on, so lower it or raise num_images"
        )
    if validation_fraction > 0 and num_held_out == 0:
        raise ValueError(
            f"validation_fraction is {validation_fraction} of {total} images: "
            "that is less than one image, so raise it or set it to 0"
        )
    rng = np.random.default_rng(seed)
    train, validation = [], []
    for c in range(len(names)):
        members = rng.permutation(np.flatnonzero(ranks == c))[: chosen[c]]
        validation.append(members[: held_out[c]])
        train.append(members[held_out[c] :])
    return _sorted(train), _sorted(validation)


def _sorted(parts: Sequence[NDArray[np.intp]]) -> NDArray[np.int64]:
    return np.sort(np.concatenate(parts)).astype(np.int64)


def _apportion(total: int, sizes: NDArray[np.intp]) -> NDArray[np.intp]:
    """Divide total in proportion to sizes, by largest remainders; ties go to the first."""
    exact, remainder = np.divmod(total * sizes, sizes.sum())
    first = np.argsort(-remainder, kind="stable")[: total - exact.sum()]
    exact[first] += 1
    return exact
