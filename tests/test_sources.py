"""Sources: the same tensors from folder, zip, cache and download, and a clear word if not."""

import functools
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import resource
import shutil
import socket
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import folders
from data.dataset import Dataset
from data.errors import DataError
from data.holdout import split_train
from data.sources import load_dataset


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(folders.CACHE_DIR_VARIABLE, str(folder))
    monkeypatch.setenv(folders.DATA_DIR_VARIABLE, str(folder))
    return folder


def assert_equal(a: Dataset, b: Dataset) -> None:
    assert (a.name, a.classes, a.fingerprint) == (b.name, b.classes, b.fingerprint)
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(a, field), getattr(b, field))


def assert_form(dataset: Dataset) -> None:
    for images, labels in (
        (dataset.train_images, dataset.train_labels),
        (dataset.test_images, dataset.test_labels),
    ):
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert labels.dtype == torch.int64
        assert labels.shape == images.shape[:1]
        assert set(labels.tolist()) == set(range(len(dataset.classes)))


# Folders and zips of images


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Folder of PNG and JPEG images of 8x8: 3 + 2 of class "ant", 4 + 1 of class "bee"."""
    root = tmp_path / "images"
    sizes = {("train", "bee"): 4, ("train", "ant"): 3, ("test", "bee"): 1, ("test", "ant"): 2}
    for number, ((part, label), count) in enumerate(sizes.items()):
        folder = root / part / label
        folder.mkdir(parents=True)
        for i in reversed(range(count)):
            picture(10 * number + i).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


def zipped(folder: Path, target: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            name = prefix + path.relative_to(folder).as_posix()
            # Not by `write`, which would drop a leading ./.
            if path.is_dir():
                archive.writestr(zipfile.ZipInfo(f"{name}/"), b"")
            else:
                archive.writestr(zipfile.ZipInfo(name), path.read_bytes())
    return target


def load_images(path: Path, **options: Any) -> Dataset:
    return load_dataset("images", data_dir=path, **{"image_size": 8, **options})


def test_images_are_ordered_by_class_then_name(tree: Path) -> None:
    dataset = load_images(tree)
    assert_form(dataset)
    assert dataset.classes == ("ant", "bee")
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert dataset.test_labels.tolist() == [0, 0, 1]
    assert dataset.train_images.shape == (7, 3, 8, 8)
    with Image.open(tree / "train" / "bee" / "2.jpg") as image:
        expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    assert torch.equal(dataset.train_images[5], expected)


def test_folder_and_zip_are_the_same_data_set(tree: Path, tmp_path: Path) -> None:
    in_folder = load_images(tree)
    assert_equal(load_images(zipped(tree, tmp_path / "a.zip")), in_folder)
    for place, prefix in enumerate(("top/", "./", "./top/")):
        file = zipped(tree, tmp_path / f"{place}.zip", prefix)
        assert_equal(load_images(file), in_folder)
    shutil.copytree(tree, tmp_path / "enclosing" / "top")
    assert_equal(load_images(tmp_path / "enclosing"), in_folder)


def test_what_stands_twice_in_a_zip_is_the_later_one(tree: Path, tmp_path: Path) -> None:
    file = zipped(tree, tmp_path / "a.zip", "./")
    with zipfile.ZipFile(file, "a") as archive:
        for path in tree.rglob("*.png"):
            archive.write(path, path.relative_to(tree).as_posix())
    assert_equal(load_images(file), load_images(tree))


def test_files_of_operating_systems_are_passed_over(tree: Path, tmp_path: Path) -> None:
    expected = load_images(tree)
    for name in ("train/.DS_Store", "train/ant/Thumbs.db", "train/ant/._0.jpg", "read.me"):
        (tree / name).write_text("not an image")
    (tree / "__MACOSX" / "train" / "cow").mkdir(parents=True)
    (tree / "train" / ".cache").mkdir()
    assert_equal(load_images(tree), expected)
    assert_equal(load_images(zipped(tree, tmp_path / "a.zip")), expected)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (30, 16), (9, 25), (5, 4)])
def test_other_sizes_are_scaled_and_cut(tree: Path, size: tuple[int, int]) -> None:
    image = picture(0, size)
    image.save(tree / "train" / "ant" / "1.png")
    width, height = size
    scale = 8 / min(size)
    scaled = (round(width * scale), round(height * scale))
    left, top = (scaled[0] - 8) // 2, (scaled[1] - 8) // 2
    expected = image.resize(scaled, Image.Resampling.BILINEAR) if size != (8, 8) else image
    expected = expected.crop((left, top, left + 8, top + 8))
    found = load_images(tree).train_images[1]
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_colour_mode_becomes_rgb(tree: Path, mode: str) -> None:
    target = tree / "train" / "ant" / ("1.tif" if mode == "CMYK" else "1.png")
    (tree / "train" / "ant" / "1.png").unlink()
    picture(0).convert(mode).save(target)
    assert load_images(tree).train_images.shape == (7, 3, 8, 8)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_of_16_bit_greys_the_upper_byte_is_taken(tree: Path, ending: str) -> None:
    greys = np.arange(0, 2**16, 2**10, dtype=np.uint16).reshape(8, 8)
    (tree / "train" / "ant" / "1.png").unlink()
    Image.fromarray(greys).save(tree / "train" / "ant" / f"1.{ending}")
    for channel in load_images(tree).train_images[1].numpy():
        np.testing.assert_array_equal(channel, greys // 256)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_greys_of_no_known_range_are_refused(tree: Path, dtype: type[np.number[Any]]) -> None:
    Image.fromarray(np.ones((8, 8), dtype=dtype)).save(tree / "train" / "ant" / "3.tif")
    with pytest.raises(DataError, match=r"ant/3\.tif in .*32-bit numbers, accepted are 8 and 16"):
        load_images(tree)


def test_a_palette_with_transparency_keeps_its_colours(
    tree: Path, recwarn: pytest.WarningsRecorder
) -> None:
    image = picture(0).quantize(256)
    expected = np.asarray(image.convert("RGB"))
    image.save(tree / "train" / "ant" / "1.png", transparency=bytes(range(256)))
    found = load_images(tree).train_images[1]
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)
    assert not recwarn.list


def test_what_a_zip_holds_twice_counts_once(tree: Path, tmp_path: Path) -> None:
    path = zipped(tree, tmp_path / "a.zip")
    (tree / "train" / "ant" / "0.jpg").write_bytes((tree / "train" / "bee" / "0.jpg").read_bytes())
    with (
        zipfile.ZipFile(path, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.write(tree / "train" / "ant" / "0.jpg", "train/ant/0.jpg")
    assert_equal(load_images(path), load_images(tree))


def test_an_encrypted_zip_is_refused_before_anything_is_read(tree: Path, tmp_path: Path) -> None:
    content = bytearray(zipped(tree, tmp_path / "a.zip").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flags of the first entry
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip is encrypted: give a \.zip without a password"):
        load_images(tmp_path / "a.zip")


@pytest.mark.parametrize("place", ["train/ant/9.png", "pipe"])
def test_a_pipe_is_not_waited_at(tree: Path, place: str) -> None:
    os.mkfifo(tree / place)
    with pytest.raises(DataError, match=f"{place} is neither a file nor a folder: remove it"):
        load_images(tree / "pipe" if place == "pipe" else tree)


def test_many_images_keep_their_order_across_threads(tmp_path: Path) -> None:
    for part, count in (("train", 700), ("test", 2)):
        for i in range(count):
            folder = tmp_path / "many" / part / ("first" if i < count / 2 else "second")
            folder.mkdir(parents=True, exist_ok=True)
            pixel = Image.new("RGB", (1, 1), (i % 256, i // 256, 0))
            pixel.save(folder / f"{i:04}.png")
    lines: list[str] = []
    dataset = load_images(tmp_path / "many", image_size=1, progress=lines.append)
    red_green = dataset.train_images[:, :2, 0, 0].long()
    assert (red_green[:, 0] + 256 * red_green[:, 1]).tolist() == list(range(700))
    assert lines[-2:] == ["decoded 700 of 700 training images", "decoded 2 of 2 test images"]


def remove(name: str) -> Callable[[Path], object]:
    return lambda tree: shutil.rmtree(tree / name)


def empty(name: str) -> Callable[[Path], object]:
    return lambda tree: [path.unlink() for path in (tree / name).iterdir()]


def write(name: str, content: bytes = b"not an image") -> Callable[[Path], object]:
    return lambda tree: (tree / name).write_bytes(content)


def nest(tree: Path) -> None:
    (tree / "train" / "ant" / "deep").mkdir()
    picture(0).save(tree / "train" / "ant" / "deep" / "0.png")


def truncate(tree: Path) -> None:
    path = tree / "test" / "ant" / "1.png"
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("train"), r"has no train/<class>/<image>: it must hold"),
        (remove("test"), r"has no test/<class>/<image>: it must hold"),
        (remove("test/bee"), r"class 'bee' has no images in test/"),
        (remove("train/ant"), r"class 'ant' has no images in train/"),
        (empty("train/ant"), r"class 'ant' has no images in train/"),
        (write("train/bee/0.jpg"), r"train/bee/0\.jpg in .* is not a readable image .*: replace"),
        (
            write("train/bee/notes.txt"),
            r"train/bee/notes\.txt in .* is not a readable image \(of no image format that Pil",
        ),
        (
            lambda tree: [shutil.rmtree(tree / part / "ant") for part in ("train", "test")],
            r"has images of one class alone, 'bee': there must be two or more",
        ),
        (truncate, r"test/ant/1\.png in .* is not a readable image"),
        (nest, r"holds the folder train/ant/deep.*right in the folder of their class"),
    ],
)
def test_damage_is_named(
    tree: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    message: str,
    as_zip: bool,
) -> None:
    damage(tree)
    path = zipped(tree, tmp_path / "a.zip") if as_zip else tree
    with pytest.raises(DataError, match=message) as caught:
        load_images(path)
    assert "\n" not in str(caught.value)
    assert "BytesIO" not in str(caught.value)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.pt"))


def test_the_first_of_several_broken_images_is_named(tree: Path) -> None:
    for name in ("train/bee/3.png", "train/ant/2.jpg"):
        (tree / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"train/ant/2\.jpg"):
        load_images(tree)


def test_wrong_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs --data-dir"):
        load_dataset("images")
    with pytest.raises(DataError, match=r"nowhere does not exist: give an existing"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match=r"broken\.zip cannot be read .*BadZipFile.* intact"):
        load_images(tmp_path / "broken.zip")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none has no train/<class>/<image>"):
        load_images(tmp_path / "none")


def test_bad_arguments_are_named(tree: Path) -> None:
    with pytest.raises(DataError, match="'mnist': it must be one of 'cifar10', 'cifar100', 'di"):
        load_dataset("mnist")
    with pytest.raises(DataError, match="image_size is 0: it must be at least 1"):
        load_images(tree, image_size=0)
    for value in (-0.5, float("inf"), float("nan")):
        with pytest.raises(DataError, match=f"noise_std is {value}: it must be a finite"):
            load_dataset("digits", noise_std=value)


# Cache files


def cache_files(cache_dir: Path) -> list[Path]:
    return sorted((cache_dir / "decoded").glob("*.pt"))


def test_the_second_time_nothing_is_decoded(
    tree: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_images(tree)
    assert len(cache_files(cache_dir)) == 1
    monkeypatch.delattr("data.images._decode_image")
    lines: list[str] = []
    second = load_images(tree, progress=lines.append)
    assert_equal(second, first)
    assert_form(second)
    assert lines == []
    second.train_images[0] = 0  # a private copy: the file stays as it is
    assert_equal(load_images(tree), first)


def test_a_change_of_source_or_size_is_decoded_anew(tree: Path, cache_dir: Path) -> None:
    first = load_images(tree)
    picture(99).save(tree / "train" / "ant" / "1.png")
    changed = load_images(tree)
    assert changed.fingerprint != first.fingerprint
    assert load_images(tree, image_size=6).train_images.shape == (7, 3, 6, 6)
    assert len(cache_files(cache_dir)) == 3


def flip_a_pixel(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["train_images"][3, 1, 2, 0] ^= 1
    torch.save(content, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b"\0" * path.stat().st_size),
        lambda path: torch.save({"name": "images"}, path),
        lambda path: torch.save([1, 2], path),
        flip_a_pixel,
    ],
)
def test_a_broken_cache_file_is_replaced(
    tree: Path, cache_dir: Path, damage: Callable[[Path], object]
) -> None:
    first = load_images(tree)
    (path,) = cache_files(cache_dir)
    damage(path)
    lines: list[str] = []
    assert_equal(load_images(tree, progress=lines.append), first)
    assert lines[0].startswith(f"discarding the broken cache file {path}")
    lines.clear()
    assert_equal(load_images(tree, progress=lines.append), first)
    assert lines == []


def test_a_cache_file_that_cannot_be_replaced_costs_only_time(tree: Path, cache_dir: Path) -> None:
    expected = load_images(tree)
    (kept,) = (cache_dir / "decoded").glob("*.pt")
    kept.unlink()
    (kept / "folder").mkdir(parents=True)
    lines: list[str] = []
    assert_equal(load_images(tree, progress=lines.append), expected)
    assert any("cannot be written" in line for line in lines)


def test_an_unwritable_cache_folder_costs_only_time(tree: Path, cache_dir: Path) -> None:
    cache_dir.mkdir()
    (cache_dir / "decoded").write_text("a file where the folder should be")
    lines: list[str] = []
    assert len(load_images(tree, progress=lines.append).train_labels) == 7
    assert lines[0].startswith("decoding without a cache")


def test_a_full_disk_costs_only_time(tree: Path, cache_dir: Path) -> None:
    lines: list[str] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        dataset = load_images(tree, progress=lines.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written (File too large); free some space there" in lines[-1]
    assert [path.suffix for path in (cache_dir / "decoded").iterdir()] == [".lock"]
    assert_equal(load_images(tree), dataset)


def load_at_once(
    path: Path, barrier: Barrier, results: "multiprocessing.Queue[tuple[str, list[str]]]"
) -> None:
    lines: list[str] = []
    barrier.wait(timeout=60)
    results.put((load_images(path, progress=lines.append).fingerprint, lines))


def test_of_four_processes_one_decodes(tree: Path, cache_dir: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=load_at_once, args=(tree, barrier, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert len({fingerprint for fingerprint, _ in found}) == 1
    assert sum("decoded 7 of 7 training images" in lines for _, lines in found) == 1
    assert len(cache_files(cache_dir)) == 1


def test_default_folders(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    monkeypatch.delenv(folders.DATA_DIR_VARIABLE)
    assert folders.cache_dir() == cache_dir
    assert folders.default_data_dir() == cache_dir / "datasets"
    monkeypatch.setenv(folders.DATA_DIR_VARIABLE, "/elsewhere")
    assert folders.default_data_dir() == Path("/elsewhere")
    assert folders.cache_dir() == cache_dir
    monkeypatch.delenv(folders.CACHE_DIR_VARIABLE)
    default = folders.cache_dir()
    assert default.is_absolute()
    assert "sweep" in default.parts


# CIFAR-10 and -100, in small: the originals' layout and torchvision's code, with made data


@dataclass
class Server:
    """An archive as an HTTP server has it, and the number of requests for it.

    `files` are those within, training part first, then the test part and the names of classes.
    """

    name: str
    loader: Any
    archive: Path
    folder: str
    files: list[str]
    num_classes: int
    label_key: str
    requests: list[str]


def contents(server: Server, meta_key: str) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    C = server.num_classes
    content = {}
    for file in server.files[:-1]:
        batch = {
            "data": rng.integers(0, 256, (C, 3072), dtype=np.uint8),
            # CIFAR-100 has the classes' groups beside them.
            "coarse_labels": [0] * C,
            server.label_key: rng.permutation(C).tolist(),
        }
        content[file] = pickle.dumps(batch)
    names = {
        "coarse_label_names": ["group0"],
        meta_key: [f"class{c}" for c in range(C)],
    }
    content[server.files[-1]] = pickle.dumps(names)
    return content


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@pytest.fixture(params=["cifar10", "cifar100"])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    served = {
        "cifar10": Server(
            name="cifar10",
            loader=torchvision.datasets.CIFAR10,
            archive=folder / "cifar-10-python.tar.gz",
            folder="cifar-10-batches-py",
            files=[*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"],
            num_classes=10,
            label_key="labels",
            requests=[],
        ),
        "cifar100": Server(
            name="cifar100",
            loader=torchvision.datasets.CIFAR100,
            archive=folder / "cifar-100-python.tar.gz",
            folder="cifar-100-python",
            files=["train", "test", "meta"],
            num_classes=100,
            label_key="fine_labels",
            requests=[],
        ),
    }[request.param]
    loader, files = served.loader, served.files
    content = contents(served, loader.meta["key"])
    with tarfile.open(served.archive, "w:gz") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(f"{served.folder}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            served.requests.append(self.command)

    httpd = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(
        loader, "url", f"http://127.0.0.1:{httpd.server_port}/{served.archive.name}"
    )
    monkeypatch.setattr(loader, "tgz_md5", md5(served.archive.read_bytes()))
    monkeypatch.setattr(loader, "train_list", [[n, md5(content[n])] for n in files[:-2]])
    monkeypatch.setattr(loader, "test_list", [[files[-2], md5(content[files[-2]])]])
    monkeypatch.setitem(loader.meta, "md5", md5(content[files[-1]]))
    yield served
    httpd.shutdown()
    httpd.server_close()


def test_cifar_is_downloaded_once(server: Server, tmp_path: Path, cache_dir: Path) -> None:
    lines: list[str] = []
    dataset = load_dataset(server.name, progress=lines.append)
    assert [line.split()[0] for line in lines] == ["downloading", "decoding"]
    assert_form(dataset)
    assert dataset.name == server.name
    C, batches = server.num_classes, len(server.files) - 2
    assert dataset.train_images.shape == (batches * C, 3, 32, 32)
    assert dataset.test_images.shape == (C, 3, 32, 32)
    assert dataset.classes == tuple(f"class{c}" for c in range(C))
    last = (cache_dir / server.folder / server.files[batches - 1]).read_bytes()
    original = pickle.loads(last)  # noqa: S301
    expected = torch.from_numpy(original["data"]).view(C, 3, 32, 32)
    assert torch.equal(dataset.train_images[-C:], expected)
    assert dataset.train_labels[-C:].tolist() == original[server.label_key]

    requests = len(server.requests)
    lines.clear()
    assert_equal(load_dataset(server.name, progress=lines.append), dataset)
    assert lines == []
    assert len(server.requests) == requests
    # The same files elsewhere are the same data set.
    shutil.copytree(cache_dir / server.folder, tmp_path / "mine" / server.folder)
    assert_equal(load_dataset(server.name, data_dir=tmp_path / "mine"), dataset)
    assert len(server.requests) == requests


@pytest.mark.parametrize("missing", [0, -2, -1], ids=["train", "test", "names"])
def test_half_a_download_is_completed(server: Server, cache_dir: Path, missing: int) -> None:
    dataset = load_dataset(server.name)
    file = cache_dir / server.folder / server.files[missing]
    file.write_bytes(b"half")
    (cache_dir / server.archive.name).write_bytes(b"half")
    assert_equal(load_dataset(server.name), dataset)
    file.unlink()
    (cache_dir / server.archive.name).unlink()
    assert_equal(load_dataset(server.name), dataset)


def test_an_archive_brought_from_elsewhere_is_used(server: Server, cache_dir: Path) -> None:
    cache_dir.mkdir()
    shutil.copy(server.archive, cache_dir)
    assert load_dataset(server.name).name == server.name
    assert server.requests == []


def assert_advice(caught: pytest.ExceptionInfo[DataError], server: Server, cache_dir: Path) -> None:
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(cache_dir), "network", "--data-dir", "'images'", server.archive.name):
        assert word in message


def test_a_broken_archive_is_refused(server: Server, cache_dir: Path) -> None:
    server.archive.write_bytes(server.archive.read_bytes()[:-100])
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        load_dataset(server.name)
    assert_advice(caught, server, cache_dir)


def test_no_network_is_explained(
    server: Server, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.loader, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(DataError, match=r"could not be downloaded \(URLError") as caught:
        load_dataset(server.name)
    assert_advice(caught, server, cache_dir)


def test_a_network_that_swallows_packets_is_given_up_on(
    server: Server, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.cifar._DOWNLOAD_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cifar.tar.gz"
        monkeypatch.setattr(server.loader, "url", url)
        with pytest.raises(DataError, match=r"could not be downloaded \(.*timed out") as caught:
            load_dataset(server.name)
    assert_advice(caught, server, cache_dir)
    assert socket.getdefaulttimeout() is None


def test_a_damaged_file_without_network_is_explained(
    server: Server, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_dataset(server.name)
    (cache_dir / server.archive.name).unlink()
    (cache_dir / server.folder / server.files[0]).write_bytes(b"half")
    monkeypatch.setattr(server.loader, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        load_dataset(server.name)
    assert_advice(caught, server, cache_dir)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_zip_is_no_place_for_cifar(tree: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name} is the file .* or choose dataset 'images'"):
        load_dataset(name, data_dir=zipped(tree, tmp_path / "a.zip"))


# Digits


def test_clean_digits_keep_every_pixel() -> None:
    from sklearn.datasets import load_digits

    dataset = load_dataset("digits")
    assert_form(dataset)
    assert dataset.train_images.shape == (1347, 1, 8, 8)
    assert dataset.test_images.shape == (450, 1, 8, 8)
    assert dataset.classes == tuple("0123456789")
    images = torch.cat([dataset.train_images, dataset.test_images])[:, 0].double()
    originals = load_digits().images
    found = (images / 255 * 16).round().numpy().reshape(-1, 64)
    assert {row.tobytes() for row in found} == {row.tobytes() for row in originals.reshape(-1, 64)}
    counts = [torch.bincount(labels) for labels in (dataset.train_labels, dataset.test_labels)]
    assert all(abs(3 * test - train).max() <= 4 for train, test in [counts])
    assert_equal(load_dataset("digits"), dataset)


def test_noise_is_fixed_and_of_the_stated_size() -> None:
    clean, noisy = load_dataset("digits"), load_dataset("digits", noise_std=1.0)
    assert_equal(load_dataset("digits", noise_std=1.0), noisy)
    assert torch.equal(clean.train_labels, noisy.train_labels)
    assert noisy.train_images.shape == clean.train_images.shape
    assert noisy.fingerprint != clean.fingerprint
    pixels = clean.train_images.double() / 255 * 16
    mean, std = pixels.mean(), pixels.std(correction=0)
    low, high = (0 - mean) / std - 4.5, (16 - mean) / std + 4.5
    noise = low + noisy.train_images / 255 * (high - low) - (pixels - mean) / std
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    everything = torch.cat([noisy.train_images, noisy.test_images])
    assert int((everything == 0).sum() + (everything == 255).sum()) < 10


def test_fingerprints_are_the_same_on_every_machine() -> None:
    clean, noisy = load_dataset("digits"), load_dataset("digits", noise_std=1.0)
    assert clean.fingerprint.startswith("cb23fbe8198c18b8")
    assert noisy.fingerprint.startswith("a9c17dd419f1a897")


# The split of the training images


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(5, 60), min_size=1, max_size=8),
    share=st.floats(0.4, 1),
    fraction=st.floats(0, 0.5),
    seed=st.integers(0, 2**32),
)
def test_split_train_keeps_proportions(
    sizes: list[int], share: float, fraction: float, seed: int
) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    total = max(round(share * len(labels)), 2 * len(sizes))
    if 0 < fraction * total <= 0.5:
        fraction = 0.0
    train, validation = split_train(
        labels, num_images=total, validation_fraction=fraction, seed=seed
    )
    assert train.dtype == validation.dtype == np.int64
    assert len(train) + len(validation) == total
    assert len(validation) == round(fraction * total)
    both = np.concatenate([train, validation])
    assert len(set(both.tolist())) == total
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    for part in (both, validation):
        held = np.bincount(labels[part], minlength=len(sizes))
        assert (abs(held - len(part) * np.array(sizes) / len(labels)) < 2).all()
    held = np.bincount(labels[both], minlength=len(sizes))
    assert (abs(held - total * np.array(sizes) / len(labels)) < 1).all()
    again = split_train(
        torch.from_numpy(labels), num_images=total, validation_fraction=fraction, seed=seed
    )
    np.testing.assert_array_equal(train, again[0])
    np.testing.assert_array_equal(validation, again[1])


def test_split_train_takes_all_images_by_default() -> None:
    labels = np.arange(5000) % 10
    train, validation = split_train(labels, num_images=None, validation_fraction=0.1, seed=0)
    assert np.bincount(labels[train]).tolist() == [450] * 10
    assert np.bincount(labels[validation]).tolist() == [50] * 10
    other, _ = split_train(labels, num_images=None, validation_fraction=0.1, seed=1)
    assert not np.array_equal(train, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, r"labels have shape \(0,\)"),
        ({"num_images": 3}, r"num_images is 3: it must be from 4, one per class, to 40"),
        ({"num_images": 41}, r"num_images is 41: it must be from 4"),
        ({"validation_fraction": -0.1}, r"validation_fraction is -0.1: it must be from 0 to"),
        ({"validation_fraction": 1.0}, r"validation_fraction is 1.0: it must be from 0 to"),
        ({"validation_fraction": 0.99}, r"0.99 of 40 images: class 0 would have no image to"),
        ({"validation_fraction": 0.01}, r"0.01 of 40 images: that is less than one image"),
        ({"seed": -1}, r"seed is -1: it must be 0 or more"),
    ],
)
def test_split_train_says_what_is_accepted(arguments: dict[str, Any], message: str) -> None:
    options = {"num_images": None, "validation_fraction": 0.1, "seed": 0, **arguments}
    labels = options.pop("labels", np.arange(40) % 4)
    with pytest.raises(ValueError, match=message):
        split_train(labels, **options)
