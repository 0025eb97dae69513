"""Decoded data sets in files of tensors, which later runs map into memory.

A file is named after all that the tensors depend on, written by one process at a time, and checked
against the data set's fingerprint whenever it is read: a broken one is decoded anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import torch

from data.dataset import Dataset, Outline, fingerprint_of
from data.errors import DataError
from data.folders import cache_dir

# Raised whenever decoding changes, so that files of older versions are not used.
_CACHE_FORMAT = 2

Progress = Callable[[str], None]
"""Called with one line of text at steps that take long."""


def cached(source: dict[str, Any], report: Progress, decode: Callable[[], Dataset]) -> Dataset:
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
            with suppress(OSError):  # told below, where another cannot take its place
                path.unlink(missing_ok=True)
        dataset = decode()
        try:
            _write_cache(path, dataset)
        except (OSError, RuntimeError) as error:
            # torch.save raises an error of its own over that of the disk.
            cause = error if isinstance(error, OSError) else error.__context__ or error
            words = getattr(cause, "strerror", None) or cause
            report(
                f"decoded, but {path} cannot be written ({words}); free some space there, or the "
                "next run decodes it again"
            )
        return dataset
    finally:
        lock.release()


def outlined(
    name: str,
    place: Path | None,
    shape: tuple[int, int, int],
    counts: Sequence[Sequence[int]],
    *,
    source: dict[str, Any] | None,
    download_bytes: int = 0,
) -> Outline:
    """The outline of a data set, with what is known of its cache file.

    Args:
        name: one of `data.sources.DATASETS`.
        place: where its files are or would go; None for one within a package.
        shape: (C, H, W) of an image.
        counts: images of each class, of the training and of the test part.
        source: as of `cached`; None if the data set is not there.
        download_bytes: what loading it would download.
    """
    train, test = map(tuple, counts)
    return Outline(
        name=name,
        place=place,
        present=source is not None,
        decoded=source is not None and _cache_path(source).exists(),
        download_bytes=download_bytes,
        # A label is int64.
        cache_bytes=(sum(train) + sum(test)) * (math.prod(shape) + 8),
        shape=shape,
        train_counts=train,
        test_counts=test,
    )


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of change, which stand for a file's content in cache keys.

    Raises:
        DataError: it is no file; whoever reads a pipe waits for ever.
        OSError: there is none.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is neither a file nor a folder: remove it, or name another")
    return status.st_size, status.st_mtime_ns


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
        intact = dataset.name == name and dataset.fingerprint == fingerprint_of(
            dataset.train_images,
            dataset.train_labels,
            dataset.test_images,
            dataset.test_labels,
        )
    except Exception:  # whatever damage makes the reader raise, decoding again repairs it
        return None
    return dataset if intact else None
