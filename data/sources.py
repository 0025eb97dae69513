"""Data sets as uint8 tensors: CIFAR-10 and -100, images in folders or zips, scikit-learn's digits.

Each is decoded once (`data.cache`), and can be outlined without reading its images.
"""

from __future__ import annotations

from pathlib import Path

from data import cifar, digits, images
from data.cache import Progress
from data.dataset import Dataset, Outline
from data.errors import DataError

DATASETS = ("cifar10", "cifar100", "digits", "images")


def load_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    image_size: int = 32,
    noise_std: float = 0.0,
    progress: Progress | None = None,
) -> Dataset:
    """Load a data set by name.

    - "cifar10", "cifar100": the originals, 32x32, downloaded by torchvision into data_dir (the
      default folder if None) on first use. Of CIFAR-100's labels these are the 100 fine ones.
    - "images": data_dir is a folder or a zip with train/<class>/<image> and test/<class>/<image>,
      alone in an enclosing folder or not. Images become RGB; those of another size are scaled
      (bilinear, antialiased) until the shorter side is image_size, then cut to the central square.
    - "digits": the 1,797 digits of 8x8 pixels within scikit-learn, one channel, split 75/25 by
      class with seed 0. With noise_std s > 0, normal noise of s standard deviations of the
      training pixels is added to all images, the same each time (generator seed 5, float64).
      Grey levels 0 to 255 then stand for the clean range widened by 4.5 s on both sides.

    Args:
        name: one of `DATASETS`.
        data_dir: where the data set is, see above. "digits" does not need it.
        image_size: side in pixels for "images".
        noise_std: noise for "digits", in standard deviations of its pixels.
        progress: called with one line of text at steps that take long.

    Raises:
        DataError: the data set is missing, broken or of another layout, or an argument is outside
            what is accepted.
    """
    report = progress if progress is not None else (lambda _: None)
    if name in cifar.NAMES:
        return cifar.load(name, data_dir, report)
    if name == "digits":
        return digits.load(noise_std)
    if name == "images":
        return images.load(data_dir, image_size, report)
    accepted = ", ".join(repr(known) for known in DATASETS)
    raise DataError(f"dataset is {name!r}: it must be one of {accepted}")


def outline(
    name: str, *, data_dir: Path | None = None, image_size: int = 32, noise_std: float = 0.0
) -> Outline:
    """Say what `load_dataset` would load; nothing is downloaded, and no image file is read.

    Args:
        name, data_dir, image_size, noise_std: as of `load_dataset`.

    Raises:
        DataError: the data set is missing and cannot be downloaded, or is of another layout.
    """
    if name in cifar.NAMES:
        return cifar.outline(name, data_dir)
    if name == "images":
        return images.outline(data_dir, image_size)
    return digits.outline(noise_std)
