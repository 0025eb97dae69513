"""Data sets as uint8 tensors: CIFAR-10 and -100, images in folders or zips, scikit-learn's digits.

Each is decoded once; a cache file of tensors, which later runs map into memory,
stands in the cache folder. `split_train` holds out a fixed, stratified part for validation.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import socket
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import platformdirs
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

DATASETS = ("cifar10", "cifar100", "digits", "images")

DATA_DIR_VARIABLE = "SWEEP_DATA_DIR"
CACHE_DIR_VARIABLE = "SWEEP_CACHE_DIR"

# Raised whenever decoding changes, so that files of older versions are not used.
_CACHE_FORMAT = 1

_DOWNLOAD_TIMEOUT = 60.0
"""Seconds that a download waits for a server's answer, or for its next bytes, before it fails."""

_DIGITS_SPLIT_SEED = 0
_DIGITS_NOISE_SEED = 5
# Room for noise on each side of the clean range, in standard deviations of the noise: about one
# pixel in 150,000 lies outside.
_DIGITS_NOISE_RANGE = 4.5

Progress = Callable[[str], None]


class DataError(Exception):
    """A data set cannot be had; the message is one line that says what to do next."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Attributes:
        name: one of `DATASETS`.
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


def cache_dir() -> Path:
    """Return the folder that decoded data sets are kept in.

    It is $SWEEP_CACHE_DIR where that is set, else the user's cache folder.
    """
    chosen = os.environ.get(CACHE_DIR_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("sweep"))


def default_data_dir() -> Path:
    """Return the folder for downloads.

    It is $SWEEP_DATA_DIR where that is set, else a folder in the cache.
    """
    chosen = os.environ.get(DATA_DIR_VARIABLE)
    return Path(chosen).expanduser() if chosen else cache_dir() / "datasets"


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
    report = progress if progress is not None else _ignore
    if name in _CIFAR:
        root = data_dir if data_dir is not None else default_data_dir()
        return _load_cifar(_CIFAR[name], root, report)
    if name == "digits":
        return _load_digits(noise_std)
    if name == "images":
        return _load_images(data_dir, image_size, report)
    accepted = ", ".join(repr(known) for known in DATASETS)
    raise DataError(f"dataset is {name!r}: it must be one of {accepted}")


@dataclass(frozen=True)
class Outline:
    """What is known of a data set without reading its images.

    Attributes:
        name: one of `DATASETS`.
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


def outline(
    name: str, *, data_dir: Path | None = None, image_size: int = 32, noise_std: float = 0.0
) -> Outline:
    """Say what `load_dataset` would load; nothing is downloaded, and no image file is read.

    Args:
        name, data_dir, image_size, noise_std: as of `load_dataset`.

    Raises:
        DataError: the data set is missing and cannot be downloaded, or is of another layout.
    """
    place: Path | None
    if name in _CIFAR:
        kind = _CIFAR[name]
        root = data_dir if data_dir is not None else default_data_dir()
        folder = _cifar_folder(kind, root)
        present = all((folder / part).is_file() for part in kind.files)
        classes = 100 if name == "cifar100" else 10
        counts = tuple((total // classes,) * classes for total in (50_000, 10_000))
        source = _cifar_source(kind, folder) if present else None
        shape, place = (3, 32, 32), root
        download_bytes = 0 if present else kind.download_bytes
    elif name == "images":
        tree, classes_found, source = _outline_images(data_dir, image_size)
        counts = tuple(
            tuple(len(tree[part][label]) for label in classes_found) for part in ("train", "test")
        )
        shape, place, present, download_bytes = (3, image_size, image_size), data_dir, True, 0
    else:
        dataset = load_dataset(name, noise_std=noise_std)  # digits, within a package
        labels = (dataset.train_labels, dataset.test_labels)
        counts = tuple(
            tuple(np.bincount(part.numpy(), minlength=len(dataset.classes)).tolist())
            for part in labels
        )
        source = _digits_source(noise_std)
        _, channels, height, width = dataset.train_images.shape
        shape, place, present, download_bytes = (channels, height, width), None, True, 0
    return Outline(
        name=name,
        place=place,
        present=present,
        decoded=source is not None and _cache_path(source).exists(),
        download_bytes=download_bytes,
        # A label is int64.
        cache_bytes=sum(map(sum, counts)) * (math.prod(shape) + 8),
        shape=shape,
        train_counts=counts[0],
        test_counts=counts[1],
    )


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


def _ignore(line: str) -> None:
    pass


# Cache files


def _cached(source: dict[str, Any], report: Progress, decode: Callable[[], Dataset]) -> Dataset:
    """Return the data set from its cache file, or decode it and write one.

    Args:
        source: everything that the result depends on, as JSON values. "name" is the data set's.
        report: receives lines on what takes long.
        decode: makes the data set.
    """
    path = _cache_path(source)
    found = _read_cache(path, source["name"])
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_suffix(".lock"))
        lock.acquire(blocking=False)
    except filelock.Timeout:
        report("waiting for another process that decodes the same data set")
        lock.acquire()
    except OSError as error:
        report(f"decoding without a cache: {path.parent} cannot be written ({error})")
        return decode()
    try:
        found = _read_cache(path, source["name"])
        if found is not None:
            return found
        if path.exists():
            report(f"discarding the broken cache file {path}")
            path.unlink(missing_ok=True)
        dataset = decode()
        try:
            _write_cache(path, dataset)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
            report(f"decoded, but {path} cannot be written ({error})")
        return dataset
    finally:
        lock.release()


def _cache_path(source: dict[str, Any]) -> Path:
    source = {**source, "format": _CACHE_FORMAT}
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "decoded" / f"{source['name']}-{key[:24]}.pt"


def _write_cache(path: Path, dataset: Dataset) -> None:
    content = {**vars(dataset), "classes": list(dataset.classes)}
    temporary = path.with_suffix(".tmp")  # one writer at a time: the lock is held
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_cache(path: Path, name: str) -> Dataset | None:
    """Return the data set in a cache file, or None if it is missing or broken."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        dataset = Dataset(**{**content, "classes": tuple(content["classes"])})
        intact = dataset.name == name and dataset.fingerprint == _fingerprint(
            dataset.train_images,
            dataset.train_labels,
            dataset.test_images,
            dataset.test_labels,
        )
    except Exception:  # whatever damage makes the reader raise, decoding again repairs it
        return None
    return dataset if intact else None


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.numpy()
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _dataset(
    name: str,
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    test: tuple[NDArray[np.uint8], NDArray[np.int64]],
    classes: Sequence[str],
) -> Dataset:
    a, b, c, d = (torch.from_numpy(np.ascontiguousarray(array)) for array in (*train, *test))
    return Dataset(name, a, b, c, d, tuple(classes), _fingerprint(a, b, c, d))


# CIFAR-10 and CIFAR-100


@dataclass(frozen=True)
class _Cifar:
    """One of the two; `loader` is the name of torchvision's class."""

    name: str
    title: str
    loader: str
    folder: str
    files: tuple[str, ...]
    download_bytes: int


_CIFAR = {
    kind.name: kind
    for kind in (
        _Cifar(
            name="cifar10",
            title="CIFAR-10",
            loader="CIFAR10",
            folder="cifar-10-batches-py",
            files=(*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
            download_bytes=170_498_071,
        ),
        _Cifar(
            name="cifar100",
            title="CIFAR-100",
            loader="CIFAR100",
            folder="cifar-100-python",
            files=("train", "test", "meta"),
            download_bytes=169_001_437,
        ),
    )
}


def _cifar_folder(kind: _Cifar, root: Path) -> Path:
    if root.is_file():
        raise DataError(
            f"data_dir for {kind.name} is the file {root}: it must be a folder, "
            "or choose dataset 'images' for a zip of images"
        )
    return root / kind.folder


def _cifar_source(kind: _Cifar, folder: Path) -> dict[str, Any]:
    return {
        "name": kind.name,
        "path": str(folder.resolve()),
        "files": [[name, *_stamp(folder / name)] for name in kind.files],
    }


def _load_cifar(kind: _Cifar, root: Path, report: Progress) -> Dataset:
    folder = _cifar_folder(kind, root)
    if not all((folder / name).is_file() for name in kind.files):
        _download_cifar(kind, root, report)
    source = _cifar_source(kind, folder)

    def decode() -> Dataset:
        report(f"decoding {kind.title} from {folder}")
        try:
            train, test = (_open_cifar(kind, root, train=part) for part in (True, False))
        except Exception:  # the pickles of a damaged download can raise anything
            _download_cifar(kind, root, report)
            train, test = (_open_cifar(kind, root, train=part) for part in (True, False))
        return _dataset(kind.name, _cifar_part(train), _cifar_part(test), train.classes)

    return _cached(source, report, decode)


def _open_cifar(kind: _Cifar, root: Path, *, train: bool) -> Any:
    import torchvision

    return getattr(torchvision.datasets, kind.loader)(str(root), train=train, download=False)


def _cifar_part(part: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return part.data.transpose(0, 3, 1, 2), np.array(part.targets, dtype=np.int64)


def _download_cifar(kind: _Cifar, root: Path, report: Progress) -> None:
    """Download what is missing or broken; a half of a download is replaced, not trusted."""
    import torchvision
    from torchvision.datasets.utils import download_and_extract_archive

    loader = getattr(torchvision.datasets, kind.loader)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / f"{kind.folder}.lock"):
            with suppress(Exception):  # another process may have been faster
                _open_cifar(kind, root, train=True)
                return
            size = f"{kind.download_bytes / 1e6:.0f} MB"
            report(f"downloading {kind.title} ({size}) to {root}")
            with _socket_timeout(_DOWNLOAD_TIMEOUT):
                # The loader's own download passes over a missing file of class names.
                download_and_extract_archive(
                    loader.url, str(root), filename=loader.filename, md5=loader.tgz_md5
                )
            _open_cifar(kind, root, train=True)
    except Exception as error:  # network, archive, checksum and disk each raise their own
        raise DataError(
            f"{kind.title} is not in {root} and could not be downloaded ({_one_line(error)}): "
            f"check the network and the disk, put {loader.filename} from elsewhere there, point "
            f"--data-dir at a folder with {kind.folder}/, or choose dataset 'images' or 'digits'"
        ) from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Limit how long new connections wait; torchvision's downloads take no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change, which stand for a file's content in cache keys."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


# Digits


def _load_digits(noise_std: float) -> Dataset:
    if not (0 <= noise_std < float("inf")):
        raise DataError(f"noise_std is {noise_std}: it must be a finite number, 0 or more")
    # Importing scikit-learn takes longer than reading the cache.
    return _cached(_digits_source(noise_std), _ignore, lambda: _make_digits(noise_std))


def _digits_source(noise_std: float) -> dict[str, Any]:
    return {
        "name": "digits",
        "noise_std": float(noise_std),
        "scikit-learn": metadata.version("scikit-learn"),
    }


def _make_digits(noise_std: float) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    train, test, train_labels, test_labels = train_test_split(
        bundle.images,
        bundle.target,
        test_size=0.25,
        random_state=_DIGITS_SPLIT_SEED,
        stratify=bundle.target,
    )
    # Pixels are whole numbers, 0 to 16. Their sums are exact, so that the last bit of std, and
    # with it the rounding below, does not depend on the order of additions.
    total, squares = int(train.sum()), int((train**2).sum())
    std = math.sqrt(train.size * squares - total**2) / train.size
    margin = _DIGITS_NOISE_RANGE * noise_std * std
    # In float64, as PyTorch's float32 noise differs in the last bit between processors.
    generator = torch.Generator().manual_seed(_DIGITS_NOISE_SEED)
    parts = []
    for images, labels in ((train, train_labels), (test, test_labels)):
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float64).numpy()
        noisy = images + noise_std * std * noise
        levels = np.rint((noisy + margin) / (16 + 2 * margin) * 255).clip(0, 255)
        parts.append((levels.astype(np.uint8)[:, None], labels.astype(np.int64)))
    return _dataset("digits", parts[0], parts[1], [str(c) for c in bundle.target_names])


# Folders and zips of images


@dataclass(frozen=True)
class _Part:
    """The files of train/ or test/, ordered by class, then name."""

    files: list[str]
    labels: NDArray[np.int64]


# Files by part ("train" or "test") and class; classes without files are there too.
_Tree = dict[str, dict[str, list[str]]]


def _outline_images(
    data_dir: Path | None, image_size: int
) -> tuple[_Tree, list[str], dict[str, Any]]:
    """List a folder or a zip: its files, its classes, and what the cache file depends on."""
    if image_size < 1:
        raise DataError(f"image_size is {image_size}: it must be at least 1 pixel")
    if data_dir is None:
        raise DataError(
            "dataset 'images' needs --data-dir: a folder or .zip with train/<class>/<image> "
            "and test/<class>/<image>"
        )
    if not data_dir.exists():
        raise DataError(f"data_dir {data_dir} does not exist: give an existing folder or .zip")
    try:
        tree = _list_folder(data_dir) if data_dir.is_dir() else _list_zip(data_dir)
        classes = _check_tree(data_dir, tree)
        if data_dir.is_dir():
            names = [
                name
                for part in ("train", "test")
                for label in classes
                for name in tree[part][label]
            ]
            stamps = [[name, *_stamp(data_dir / name)] for name in names]
        else:
            stamps = [["", *_stamp(data_dir)]]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"data_dir {data_dir} cannot be read ({_one_line(error)}): "
            "give a readable folder or an intact .zip"
        ) from error
    source = {
        "name": "images",
        "path": str(data_dir.resolve()),
        "files": stamps,
        "image_size": image_size,
    }
    return tree, classes, source


def _load_images(data_dir: Path | None, image_size: int, report: Progress) -> Dataset:
    tree, classes, source = _outline_images(data_dir, image_size)
    assert data_dir is not None
    train, test = (_part(tree[name], classes) for name in ("train", "test"))

    def decode() -> Dataset:
        with _reader(data_dir) as read:
            return _dataset(
                "images",
                (_decode(data_dir, train, read, image_size, "training", report), train.labels),
                (_decode(data_dir, test, read, image_size, "test", report), test.labels),
                classes,
            )

    return _cached(source, report, decode)


def _list_folder(data_dir: Path) -> _Tree:
    """List what is needed and no more: the folder may be a wrong one, with a whole disk in it."""
    root = data_dir
    if not any((root / part).is_dir() for part in ("train", "test")):
        folders = [p for p in root.iterdir() if p.is_dir() and not _is_hidden(p.name)]
        root = folders[0] if len(folders) == 1 else root
    tree: _Tree = {"train": {}, "test": {}}
    for part, classes in tree.items():
        if not (root / part).is_dir():
            continue
        for folder in (root / part).iterdir():
            if folder.is_dir() and not _is_hidden(folder.name):
                paths = [path for path in folder.iterdir() if not _is_hidden(path.name)]
                classes[folder.name] = sorted(p.relative_to(data_dir).as_posix() for p in paths)
                for path in paths:
                    if path.is_dir():
                        raise _too_deep(data_dir, path.relative_to(data_dir).as_posix())
    return tree


def _list_zip(data_dir: Path) -> _Tree:
    with zipfile.ZipFile(data_dir) as archive:
        names = [i.filename for i in archive.infolist() if not _is_hidden(i.filename)]
    top = {name.split("/")[0] for name in names if "/" in name}
    prefix = f"{top.pop()}/" if len(top) == 1 and not top & {"train", "test"} else ""
    tree: _Tree = {"train": {}, "test": {}}
    for name in sorted(names):
        part, *rest = name.removeprefix(prefix).split("/")
        # A folder's own entry ends in a slash; a file right in train/ is no class.
        if part not in tree or len(rest) < 2:
            continue
        files = tree[part].setdefault(rest[0], [])
        if len(rest) > 2:
            raise _too_deep(data_dir, name)
        if rest[1]:
            files.append(name)
    return tree


def _too_deep(data_dir: Path, name: str) -> DataError:
    return DataError(
        f"{data_dir} holds the folder {name}: images must stand right in the folder of their "
        "class, as train/<class>/<image>"
    )


def _is_hidden(name: str) -> bool:
    """Whether it is one of the files that operating systems leave behind."""
    parts = name.rstrip("/").split("/")
    return parts[-1] in ("Thumbs.db", "desktop.ini") or any(
        part.startswith(".") or part == "__MACOSX" for part in parts
    )


def _check_tree(data_dir: Path, tree: _Tree) -> list[str]:
    """Return the sorted class names, the same in both parts, or raise DataError."""
    for part, found in tree.items():
        if not found:
            raise DataError(
                f"{data_dir} has no {part}/<class>/<image>: "
                "it must hold train/<class>/<image> and test/<class>/<image>"
            )
    classes = sorted(tree["train"].keys() | tree["test"].keys())
    for label in classes:
        for part, found in tree.items():
            if not found.get(label):
                raise DataError(
                    f"class {label!r} has no images in {part}/ of {data_dir}: "
                    "train/ and test/ must hold images of the same classes"
                )
    return classes


def _part(found: dict[str, list[str]], classes: Sequence[str]) -> _Part:
    files = [name for label in classes for name in found[label]]
    sizes = [len(found[label]) for label in classes]
    return _Part(files, np.repeat(np.arange(len(classes), dtype=np.int64), sizes))


@contextmanager
def _reader(data_dir: Path) -> Iterator[Callable[[str], bytes]]:
    """Give a function from path in the data set to content; threads may share it."""
    if data_dir.is_dir():
        yield lambda name: (data_dir / name).read_bytes()
    else:
        with zipfile.ZipFile(data_dir) as archive:
            yield archive.read


def _decode(
    data_dir: Path,
    part: _Part,
    read: Callable[[str], bytes],
    image_size: int,
    what: str,
    report: Progress,
) -> NDArray[np.uint8]:
    """Decode the files of a part in their order, uint8 [N, 3, image_size, image_size]."""
    images = np.empty((len(part.files), 3, image_size, image_size), dtype=np.uint8)

    def decode_from(start: int) -> None:
        for i in range(start, min(start + chunk, len(part.files))):
            try:
                images[i] = _decode_image(read(part.files[i]), image_size)
            except Exception as error:  # decoders raise many kinds on damaged files
                # Pillow's own words would name the stream, not the file.
                unknown = isinstance(error, UnidentifiedImageError)
                reason = "of no image format that Pillow knows" if unknown else _one_line(error)
                raise DataError(
                    f"{part.files[i]} in {data_dir} is not a readable image ({reason}): "
                    "replace or remove it"
                ) from error

    chunk = 256
    starts = range(0, len(part.files), chunk)
    step = max(1, len(starts) // 10)
    with ThreadPoolExecutor(_num_threads()) as pool:
        try:
            # Results come in order, so that of several broken files the first is named.
            for done, _ in enumerate(pool.map(decode_from, starts), start=1):
                if done % step == 0 or done == len(starts):
                    count = min(done * chunk, len(part.files))
                    report(f"decoded {count:,} of {len(part.files):,} {what} images")
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise
    return images


def _num_threads() -> int:
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        available = os.cpu_count() or 1
    return min(available, 16)


def _decode_image(content: bytes, size: int) -> NDArray[np.uint8]:
    """Decode one image into RGB, uint8 [3, size, size]."""
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGB")
    if image.size != (size, size):
        short = min(image.size)
        width, height = (max(size, round(side * size / short)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)
