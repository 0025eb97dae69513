"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), by torchvision's own files and download.

Several processes may ask at once: one downloads. What is half there or damaged is downloaded again.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray

from data.cache import Progress, cached, outlined, stamp
from data.dataset import Dataset, Outline, dataset_of
from data.errors import DataError, one_line
from data.folders import default_data_dir

_DOWNLOAD_TIMEOUT = 60.0
"""Seconds that a download waits for a server's answer, or for its next bytes, before it fails."""


@dataclass(frozen=True)
class _Kind:
    """One of the two; `loader` is the name of torchvision's class."""

    name: str
    title: str
    loader: str
    folder: str
    files: tuple[str, ...]
    download_bytes: int


_KINDS = {
    kind.name: kind
    for kind in (
        _Kind(
            name="cifar10",
            title="CIFAR-10",
            loader="CIFAR10",
            folder="cifar-10-batches-py",
            files=(*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
            download_bytes=170_498_071,
        ),
        _Kind(
            name="cifar100",
            title="CIFAR-100",
            loader="CIFAR100",
            folder="cifar-100-python",
            files=("train", "test", "meta"),
            download_bytes=169_001_437,
        ),
    )
}

NAMES = tuple(_KINDS)
"""Those of `data.sources.DATASETS` that are loaded here."""


def load(name: str, data_dir: Path | None, report: Progress) -> Dataset:
    """Load one of the two, downloading it where it is not.

    Args:
        name: one of `NAMES`.
        data_dir: the folder that holds torchvision's; None for the default one.
        report: receives lines on what takes long.

    Raises:
        DataError: it could not be downloaded, or data_dir is a file.
    """
    kind = _KINDS[name]
    root = data_dir if data_dir is not None else default_data_dir()
    folder = _folder(kind, root)
    if not _is_there(kind, folder):
        _download(kind, root, report)
    source = _source(kind, folder)

    def decode() -> Dataset:
        report(f"decoding {kind.title} from {folder}")
        try:
            train, test = (_open(kind, root, train=part) for part in (True, False))
        except Exception:  # the pickles of a damaged download can raise anything
            _download(kind, root, report)
            train, test = (_open(kind, root, train=part) for part in (True, False))
        return dataset_of(kind.name, _part(train), _part(test), train.classes)

    return cached(source, report, decode)


def outline(name: str, data_dir: Path | None) -> Outline:
    """Say what `load` would load; arguments and errors are its own."""
    kind = _KINDS[name]
    root = data_dir if data_dir is not None else default_data_dir()
    folder = _folder(kind, root)
    present = _is_there(kind, folder)
    classes = 100 if name == "cifar100" else 10
    return outlined(
        name,
        root,
        (3, 32, 32),
        [(total // classes,) * classes for total in (50_000, 10_000)],
        source=_source(kind, folder) if present else None,
        download_bytes=0 if present else kind.download_bytes,
    )


def _folder(kind: _Kind, root: Path) -> Path:
    if root.is_file():
        raise DataError(
            f"data_dir for {kind.name} is the file {root}: it must be a folder, "
            "or choose dataset 'images' for a zip of images"
        )
    return root / kind.folder


def _is_there(kind: _Kind, folder: Path) -> bool:
    return all((folder / name).is_file() for name in kind.files)


def _source(kind: _Kind, folder: Path) -> dict[str, Any]:
    return {
        "name": kind.name,
        "path": str(folder.resolve()),
        "files": [[name, *stamp(folder / name)] for name in kind.files],
    }


def _open(kind: _Kind, root: Path, *, train: bool) -> Any:
    import torchvision

    return getattr(torchvision.datasets, kind.loader)(str(root), train=train, download=False)


def _part(part: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return part.data.transpose(0, 3, 1, 2), np.array(part.targets, dtype=np.int64)


def _download(kind: _Kind, root: Path, report: Progress) -> None:
    """Download what is missing or broken; a half of a download is replaced, not trusted."""
    import torchvision
    from torchvision.datasets.utils import download_and_extract_archive

    loader = getattr(torchvision.datasets, kind.loader)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / f"{kind.folder}.lock"):
            with suppress(Exception):  # another process may have been faster
                _open(kind, root, train=True)
                return
            size = f"{kind.download_bytes / 1e6:.0f} MB"
            report(f"downloading {kind.title} ({size}) to {root}")
            with _socket_timeout(_DOWNLOAD_TIMEOUT):
                # The loader's own download passes over a missing file of class names.
                download_and_extract_archive(
                    loader.url, str(root), filename=loader.filename, md5=loader.tgz_md5
                )
            _open(kind, root, train=True)
    except Exception as error:  # network, archive, checksum and disk each raise their own
        raise DataError(
            f"{kind.title} is not in {root} and could not be downloaded ({one_line(error)}): "
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
