"""Images of a user's own, in a folder or a zip with train/<class>/<image> and test/<class>/<image>.

Files are listed by class and name, so that folder and zip are the same data set, and decoded by
Pillow in several threads. A mistake in the layout is named with the file or folder that shows it.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data.cache import Progress, cached, outlined, stamp
from data.dataset import Dataset, Outline, dataset_of
from data.errors import DataError, one_line


@dataclass(frozen=True)
class _Part:
    """The files of train/ or test/, ordered by class, then name."""

    files: list[str]
    labels: NDArray[np.int64]


# The bit of a zip entry's flags that says so.
_ENCRYPTED = 0x1

# Files by part ("train" or "test") and class; classes without files are there too.
_Tree = dict[str, dict[str, list[str]]]


def load(data_dir: Path | None, image_size: int, report: Progress) -> Dataset:
    """Decode the images, or read them from the cache.

    Args:
        data_dir: the folder or the zip.
        image_size: side in pixels that images are scaled and cut to, from 1.
        report: receives lines on what takes long.

    Raises:
        DataError: it is missing, of another layout, or holds what is no image.
    """
    tree, classes, source = _listed(data_dir, image_size)
    assert data_dir is not None
    train, test = (_part(tree[name], classes) for name in ("train", "test"))

    def decode() -> Dataset:
        with _reader(data_dir) as read:
            return dataset_of(
                "images",
                (_decode(data_dir, train, read, image_size, "training", report), train.labels),
                (_decode(data_dir, test, read, image_size, "test", report), test.labels),
                classes,
            )

    return cached(source, report, decode)


def outline(data_dir: Path | None, image_size: int) -> Outline:
    """Say what `load` would load, from names and sizes of files alone.

    Arguments and errors are its own.
    """
    tree, classes, source = _listed(data_dir, image_size)
    counts = [[len(tree[part][label]) for label in classes] for part in ("train", "test")]
    return outlined("images", data_dir, (3, image_size, image_size), counts, source=source)


def _listed(data_dir: Path | None, image_size: int) -> tuple[_Tree, list[str], dict[str, Any]]:
    """List a folder or a zip: its files, its classes, and what the cache file depends on."""
    if image_size < 1:
        raise DataError(f"image_size is {image_size}: it must be at least 1 pixel")
    if data_dir is None:
        raise DataError(
            "dataset 'images' needs --data-dir, or SWEEP_DATA_DIR: a folder or .zip with "
            "train/<class>/<image> and test/<class>/<image>"
        )
    if not data_dir.exists():
        raise DataError(f"data_dir {data_dir} does not exist: give an existing folder or .zip")
    try:
        stamps = [] if data_dir.is_dir() else [["", *stamp(data_dir)]]
        tree = _list_folder(data_dir) if data_dir.is_dir() else _list_zip(data_dir)
        classes = _check_tree(data_dir, tree)
        if data_dir.is_dir():
            names = [
                name
                for part in ("train", "test")
                for label in classes
                for name in tree[part][label]
            ]
            stamps = [[name, *stamp(data_dir / name)] for name in names]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"data_dir {data_dir} cannot be read ({one_line(error)}): "
            "give a readable folder or an intact .zip"
        ) from error
    source = {
        "name": "images",
        "path": str(data_dir.resolve()),
        "files": stamps,
        "image_size": image_size,
    }
    return tree, classes, source


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
        entries = archive.infolist()
    for entry in entries:
        if entry.flag_bits & _ENCRYPTED:
            raise DataError(
                f"{data_dir} is encrypted: give a .zip without a password, or the folder that it "
                "unpacks to"
            )
    # What stands in it twice is, as for whoever unpacks it, the later one alone. Some programs
    # write ./train/ for train/.
    names = {entry.filename.removeprefix("./"): entry.filename for entry in entries}
    names = {path: name for path, name in names.items() if path and not _is_hidden(path)}
    top = {path.split("/")[0] for path in names if "/" in path}
    prefix = f"{top.pop()}/" if len(top) == 1 and not top & {"train", "test"} else ""
    tree: _Tree = {"train": {}, "test": {}}
    for path, name in sorted(names.items()):
        part, *rest = path.removeprefix(prefix).split("/")
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
    if len(classes) < 2:
        raise DataError(
            f"{data_dir} has images of one class alone, {classes[0]!r}: there must be two or more "
            "to tell apart, as train/<class>/<image> and test/<class>/<image>"
        )
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
                reason = "of no image format that Pillow knows" if unknown else one_line(error)
                raise DataError(
                    f"{part.files[i]} in {data_dir} is not a readable image ({reason}): "
                    "replace or remove it"
                ) from error

    chunk = 256
    starts = range(0, len(part.files), chunk)
    step = max(1, len(starts) // 10)
    with ThreadPoolExecutor(_num_threads()) as pool:
        # Results come in order, so that of several broken files the first is named.
        for done, _ in enumerate(pool.map(decode_from, starts), start=1):
            if done % step == 0 or done == len(starts):
                count = min(done * chunk, len(part.files))
                report(f"decoded {count:,} of {len(part.files):,} {what} images")
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
        image = _in_rgb(opened)
    if image.size != (size, size):
        short = min(image.size)
        width, height = (max(size, round(side * size / short)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def _in_rgb(image: Image.Image) -> Image.Image:
    """Convert what was opened into 8 bits of red, green and blue.

    Raises:
        ValueError: nothing says which of its values is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow would cut all values above 255. Of 16-bit colours it takes the upper byte, too.
        grey = (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, accepted are 8 and 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # else Pillow warns; the colours are the same
    return image.convert("RGB")
