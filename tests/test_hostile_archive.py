"""A file that is damaged, or made to do harm, is refused in one line and changes nothing."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import url
from transfers import bring, compute, create, export

from storage.checkpoints import CheckpointStore, default_checkpoint_dir
from storage.errors import StorageError
from storage.leases import LEASE_ATTR
from sweeps.attributes import CURVES


class Executed:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def members(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(file: Path, parts: dict[str, bytes], extra: list[tuple[Any, bytes]] | None = None) -> None:
    """Write members, checkpoints uncompressed; `extra` is added as it is."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in [*parts.items(), *(extra or ())]:
            stored = not str(name).endswith(".json")
            kind = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            archive.writestr(name, content, kind)


def signed(parts: dict[str, bytes], change: Callable[[Any], None] | None = None) -> None:
    """Make the manifest fit what its members have become."""
    manifest = json.loads(parts["manifest.json"])
    manifest["members"] = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in parts.items()
        if name != "manifest.json"
    }
    if change is not None:
        change(manifest)
    parts["manifest.json"] = json.dumps(manifest).encode()


def rewrite(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the study's rows, with a manifest that fits."""

    def hostile(file: Path) -> None:
        parts = members(file)
        study = json.loads(parts["studies/0.json"])
        change(study)
        parts["studies/0.json"] = json.dumps(study).encode()
        signed(parts)
        pack(file, parts)

    return hostile


def rewrite_text(old: str, new: str) -> Callable[[Path], None]:
    def hostile(file: Path) -> None:
        parts = members(file)
        content = parts["studies/0.json"].decode()
        assert old in content
        parts["studies/0.json"] = content.replace(old, new, 1).encode()
        signed(parts)
        pack(file, parts)

    return hostile


def remanifest(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def hostile(file: Path) -> None:
        parts = members(file)
        signed(parts, change)
        pack(file, parts)

    return hostile


def with_checkpoint(content: Callable[[], bytes]) -> Callable[[Path], None]:
    def hostile(file: Path) -> None:
        parts = members(file)
        parts["checkpoints/0.pt"] = content()
        signed(parts)
        pack(file, parts)

    return hostile


def with_extra(name: str, content: bytes = b"{}") -> Callable[[Path], None]:
    return lambda file: pack(file, members(file), [(zipfile.ZipInfo(name), content)])


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def deflated(content: bytes) -> bytes:
    """The same zip, its members compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def wrong_checksum(file: Path) -> None:
    parts = members(file)
    parts["studies/0.json"] = parts["studies/0.json"].replace(b"0.02", b"0.03", 1)
    pack(file, parts)


def prefixed(file: Path) -> None:
    file.write_bytes(b"#!/bin/sh\n" + file.read_bytes())


def lacking(file: Path) -> None:
    parts = members(file)
    del parts["studies/0.json"]
    pack(file, parts)


def bomb(file: Path) -> None:
    parts = members(file)
    parts["studies/0.json"] = b" " * 50_000_000 + parts["studies/0.json"]
    signed(parts)
    pack(file, parts)


def lying_about_its_size(file: Path) -> None:
    """The directory and the manifest say ten bytes; the data go on for 50 million."""
    parts = members(file)
    parts["studies/0.json"] = b" " * 50_000_000
    signed(parts, lambda m: m["members"]["studies/0.json"].update(size=10))
    pack(file, parts)
    file.write_bytes(
        file.read_bytes().replace(struct.pack("<L", 50_000_000), struct.pack("<L", 10))
    )


def nested(file: Path) -> None:
    parts = members(file)
    parts["studies/0.json"] = b"[" * 200_000
    signed(parts)
    pack(file, parts)


def nested_attribute(study: dict[str, Any]) -> None:
    study["user_attrs"]["x"] = "[" * 200_000


def spec_of(study: dict[str, Any], **changes: Any) -> None:
    spec = json.loads(study["user_attrs"]["sweep_spec"])
    study["user_attrs"]["sweep_spec"] = json.dumps({**spec, **changes})


def set_param(study: dict[str, Any], value: Any) -> None:
    study["trials"][0]["params"]["peak_lr"][0] = value


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda file: file.write_bytes(b"") and None, "not a whole archive"),
    "no zip": (lambda file: file.write_bytes(b"SQLite format 3\0" * 99) and None, "not a whole"),
    "truncated": (cut, "not a whole archive"),
    "something before it": (prefixed, "not a whole archive"),
    "a flipped bit": (flip, "not a whole archive|damaged|not JSON"),
    "wrong checksum": (wrong_checksum, "SHA-256"),
    "a missing member": (lacking, "lacks 'studies/0.json'"),
    "an extra member": (with_extra("studies/1.json"), "has 'studies/1.json', unlisted"),
    "a path that leaves": (with_extra("../../evil.json"), "named '../../evil.json'"),
    "an absolute path": (with_extra("/etc/evil"), "named '/etc/evil'"),
    "a windows path": (with_extra("C:\\evil.json"), "named"),
    "a duplicate member": (with_extra("studies/0.json"), "twice"),
    "a second manifest": (with_extra("manifest.json"), "twice"),
    "a decompression bomb": (bomb, "would be 50,0"),
    "a member longer than it says": (lying_about_its_size, "not a whole|longer|as long|damaged"),
    "a member longer than the file": (
        remanifest(lambda m: m["members"]["checkpoints/0.pt"].update(size=10**12)),
        "as long",
    ),
    "another version": (remanifest(lambda m: m.update(format_version=2)), "format is version 2"),
    "another program": (remanifest(lambda m: m.update(format="x")), "another program"),
    "no manifest": (
        lambda file: pack(file, {k: v for k, v in members(file).items() if k[0] != "m"}),
        "no manifest",
    ),
    "a manifest of the wrong types": (remanifest(lambda m: m.update(studies={})), "no studies"),
    "another sweep's name": (remanifest(lambda m: m.update(sweep="other")), "not of the sweep"),
    "absurd counts": (
        remanifest(lambda m: m["studies"][0].update(trials=10**15)), "not the study"
    ),
    "a checkpoint of no trial": (
        remanifest(lambda m: m["checkpoints"][0].update(number=77)), "no unfinished trial"
    ),
    "a checkpoint of a finished trial": (
        remanifest(lambda m: m["checkpoints"][0].update(number=0)), "no unfinished trial"
    ),
    "nested too deeply": (nested, "nested too deeply|not JSON"),
    "an attribute nested too deeply": (rewrite(nested_attribute), "is not JSON"),
    "a key twice": (rewrite_text('"state":', '"state":"FAIL","state":'), "twice"),
    "NaN": (rewrite(lambda s: s["trials"][0].update(values=[float("nan")])), "NaN"),
    "infinity": (rewrite(lambda s: set_param(s, float("inf"))), "Infinity"),
    "overflow": (rewrite_text('"values":[', '"values":[1e999,'), "not a finite number"),
    "a huge integer": (rewrite_text('"number":0', '"number":' + "9" * 5000), "not JSON|number"),
    "a text for a number": (rewrite(lambda s: set_param(s, "0.1")), "not a finite number"),
    "a value outside its distribution": (rewrite(lambda s: set_param(s, 7.0)), "not in"),
    "an unknown state": (rewrite(lambda s: s["trials"][0].update(state="DONE")), "accepted:"),
    "a gap in the numbers": (rewrite(lambda s: s["trials"][0].update(number=5)), "without gaps"),
    "a step twice": (
        rewrite(lambda s: s["trials"][0].update(steps=[1, 1, 2])), "a step twice"
    ),
    "an attribute that is not JSON": (
        rewrite(lambda s: s["trials"][0]["user_attrs"].update(x="{")), "is not JSON"
    ),
    "a NUL": (rewrite(lambda s: s["trials"][0]["user_attrs"].update({"a\0": "1"})), "characters"),
    "half a character": (
        rewrite(lambda s: s["user_attrs"].update({"a\ud800": "1"})), "characters"
    ),
    "a name too long": (
        rewrite(lambda s: s["user_attrs"].update({"a" * 513: "1"})), "1 to 512"
    ),
    "an unknown table": (rewrite(lambda s: s["trials"][0].update(x=1)), "unknown keys: 'x'"),
    "a note of another trial": (
        rewrite(lambda s: s["system_attrs"].update({"dashboard:9:note_ver": "1"})), "another data"
    ),
    "a curve that is not finite": (
        rewrite(lambda s: s["trials"][0]["system_attrs"].update({CURVES: '{"lr": [NaN]}'})),
        "an invalid attribute",
    ),
    "a sweep's name of two lines": (
        remanifest(lambda m: m.update(sweep="a\nb" * 999, studies=[])), "listed|lists|no sweep"
    ),
    "a lease that is none": (
        rewrite(lambda s: s["trials"][0]["system_attrs"].update({LEASE_ATTR: "[]"})),
        "an invalid attribute",
    ),
    "an attribute for another's": (
        rewrite(lambda s: s["trials"][0]["study_attrs"].update({"sweep": "1"})), "not one of"
    ),
    "a study of another name": (rewrite(lambda s: s.update(name="other")), "not the study"),
    "no number of images": (
        rewrite(lambda s: s["user_attrs"].update(scored_images='"many"')), "score a trial"
    ),
    "a spec of another name": (rewrite(lambda s: spec_of(s, name="x")), "is of 'x'"),
    "a spec of nonsense": (rewrite(lambda s: spec_of(s, train=[1])), "spec"),
    "a spec without its end": (rewrite(lambda s: spec_of(s, budget={"trials": -1})), "budget"),
    "another direction": (
        rewrite(lambda s: s.update(directions=["MINIMIZE"])), "does not maximize"
    ),
    "code in a checkpoint": (with_checkpoint(lambda: saved({"x": Executed()})), "weights|plain"),
    "a bare pickle": (with_checkpoint(lambda: pickle.dumps(Executed())), "not a checkpoint"),
    "a list for a checkpoint": (with_checkpoint(lambda: saved([1])), "not a dict"),
    "half a checkpoint": (with_checkpoint(lambda: saved({"x": 1})[:-30]), "not a checkpoint"),
    "a bomb in a checkpoint": (
        with_checkpoint(lambda: deflated(saved({"x": torch.zeros(10**6)}))), "compressed"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    create(url(folder))
    compute(url(folder), 2, low=0.02)
    compute(url(folder), 1, low=0.1, finish=False)
    return export(url(folder), folder / "tiny.sweep")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_or_hostile_file_changes_nothing(
    tmp_path: Path, good: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, reason = HOSTILE[kind]
    file = tmp_path / "tiny.sweep"
    shutil.copy(good, file)
    change(file)
    before = set(tmp_path.iterdir())
    with pytest.raises(StorageError, match=reason) as refusal:
        bring(file, url(tmp_path))
    message = str(refusal.value)
    assert message.startswith(str(file))
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(file)) + 300
    assert set(tmp_path.iterdir()) == before


def test_the_file_that_the_hostile_ones_are_made_from_is_good(tmp_path: Path, good: Path) -> None:
    file = tmp_path / "tiny.sweep"
    parts = members(good)
    signed(parts)
    pack(file, parts)
    result, _ = bring(file, url(tmp_path))
    assert "3 trials, 1 checkpoint; 1 interrupted trial to go on" in result
    assert CheckpointStore(default_checkpoint_dir(url(tmp_path))).load("tiny/2") == {"of": 0.1}
