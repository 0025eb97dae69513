"""Checkpoints: whatever happens to the process, the file or the disk."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import string
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PROCESSES
from helpers import save_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from storage import checkpoints
from storage.checkpoints import CheckpointError, CheckpointStore, default_checkpoint_dir

KEY = "fixup-largebatch/dataset=digits/12"


def state(step: int, size: int = 1000) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((size,), float(step))}, "lr": [0.1, 0.2]}


def is_whole(loaded: dict[str, Any] | None) -> bool:
    return loaded is not None and bool((loaded["model"]["weight"] == loaded["step"]).all())


def test_save_load_delete(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "a" / "b")
    assert store.load(KEY) is None
    assert store.disk_usage() == (0, 0)
    store.delete(KEY)
    for step in (1, 2):
        save_checkpoint(store, KEY, state(step))
        loaded = store.load(KEY)
        assert loaded is not None
        assert is_whole(loaded)
        assert (loaded["step"], loaded["lr"]) == (step, [0.1, 0.2])
    assert store.load(KEY + "0") is None
    (file,) = (tmp_path / "a" / "b").iterdir()
    assert store.disk_usage() == (1, file.stat().st_size)
    assert store.disk_usage(KEY[:-1]) == (1, store.path(KEY).stat().st_size)
    assert store.disk_usage("x" + KEY) == (0, 0)
    store.delete(KEY)
    assert store.load(KEY) is None
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_optimizer_state_survives(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    store = CheckpointStore(tmp_path)
    save_checkpoint(store, "k", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    loaded = store.load("k")
    assert loaded is not None
    torch.testing.assert_close(loaded["model"], dict(model.state_dict()), rtol=0, atol=0)
    momentum = loaded["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state_dict()["state"][0]["momentum_buffer"])


@pytest.mark.parametrize(
    "key",
    [
        "../x",
        "/etc/passwd",
        "..",
        ".",
        "a/../../b",
        "a\x00b",
        "C:\\x",
        ".hidden",
        "ä" * 300,
        "x" * 999,
    ],
)
def test_keys_stay_in_the_folder(tmp_path: Path, key: str) -> None:
    root = tmp_path / "root"
    store = CheckpointStore(root)
    save_checkpoint(store, key, state(1))
    (file,) = root.iterdir()
    assert file == store.path(key)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert is_whole(store.load(key))
    assert store.load(key + "2") is None


def test_empty_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        save_checkpoint(CheckpointStore(tmp_path), "", {})


@given(st.lists(st.text(string.printable, min_size=1), min_size=2, max_size=2, unique=True))
def test_different_keys_have_different_files(keys: list[str]) -> None:
    one, two = (CheckpointStore(Path("root")).path(key) for key in keys)
    assert one != two
    assert one.parent == two.parent == Path("root")
    assert not one.name.startswith(".")
    assert len(one.name) < 200


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "text", "pickle", "list"])
def test_damaged_file_counts_as_absent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    store = CheckpointStore(tmp_path)
    save_checkpoint(store, KEY, state(3))
    file = store.path(KEY)
    content = bytearray(file.read_bytes())
    if harm == "truncate":
        content = content[: len(content) // 2]
    elif harm == "flip":
        # Inside the tensor's data, which PyTorch itself would load without a word.
        where = content.index(torch.tensor([3.0, 3.0]).numpy().tobytes())
        content[where + 1000] ^= 1
    elif harm == "empty":
        content = bytearray()
    elif harm == "text":
        content = bytearray(b"not a checkpoint")
    if harm == "pickle":
        torch.save({"code": print}, file)  # Loading it would run a function of its choice.
    elif harm == "list":
        torch.save([1, 2], file)
    else:
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert store.load(KEY) is None
    assert "removed damaged checkpoint" in caplog.text
    assert not file.exists()
    save_checkpoint(store, KEY, state(4))
    assert is_whole(store.load(KEY))


def save_for_ever(root: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    store = CheckpointStore(root)
    step = 0
    while True:
        step += 1
        save_checkpoint(store, KEY, state(step, size=300_000))
        pipe.send(step)


def test_kill_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save_checkpoint(store, "other", state(7))
    leftovers = 0
    for _ in range(12):
        here, there = PROCESSES.Pipe()
        process = PROCESSES.Process(target=save_for_ever, args=(tmp_path, there))
        process.start()
        there.close()
        assert here.poll(60)
        confirmed = here.recv()
        time.sleep(random.uniform(0.0, 0.02))  # The point of the kill, not a wait for anything.
        process.kill()
        process.join(30)
        while here.poll():
            try:
                confirmed = here.recv()
            except EOFError:
                break
        loaded = store.load(KEY)
        assert loaded is not None
        assert is_whole(loaded)
        assert loaded["step"] in (confirmed, confirmed + 1)
        leftovers += sum(path.suffix == ".tmp" for path in tmp_path.iterdir())
        save_checkpoint(store, KEY, state(0))
        assert {path.suffix for path in tmp_path.iterdir()} == {".pt"}
    assert is_whole(store.load("other"))
    assert leftovers <= 12


def test_leftovers_of_other_keys_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    mine = tmp_path / f".{store.path('a').name}.{'0' * 16}.tmp"
    others = tmp_path / f".{store.path('a.pt.b').name}.{'0' * 16}.tmp"
    mine.touch()
    others.touch()
    save_checkpoint(store, "a", state(1))
    assert (mine.exists(), others.exists()) == (False, True)
    store.delete("a.pt.b")
    assert not others.exists()


def save_beyond_limit(root: Path, pipe: Any) -> None:
    # The kernel refuses to let a file grow beyond the limit, as it does on a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        save_checkpoint(CheckpointStore(root), KEY, state(2, size=100_000))
    except CheckpointError as error:
        pipe.send(str(error))
    else:
        pipe.send("saved")


def test_disk_without_space_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save_checkpoint(store, KEY, state(1))
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=save_beyond_limit, args=(tmp_path, there))
    process.start()
    assert here.poll(60)
    answer = here.recv()
    process.join(30)
    assert answer.startswith(f"cannot save checkpoint {store.path(KEY)} (File too large); free")
    assert "\n" not in answer
    loaded = store.load(KEY)
    assert loaded is not None
    assert loaded["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [store.path(KEY).name]


def test_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot save checkpoint"):
        save_checkpoint(CheckpointStore(tmp_path / "file"), KEY, state(1))
    store = CheckpointStore(tmp_path)
    store.path(KEY).mkdir()
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        store.load(KEY)


def unwritable(tmp_path: Path) -> CheckpointStore:
    (tmp_path / "file").touch()
    return CheckpointStore(tmp_path / "file")


def writers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("checkpoint")]


def test_a_writer_saves_the_state_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the caller does next, and while the disk keeps it waiting."""
    store = CheckpointStore(tmp_path)
    changed = threading.Event()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        assert changed.wait(60)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    changing = state(1)
    with store.writer(KEY) as writer:
        writer.save(changing)
        changing["model"]["weight"].fill_(2.0)
        changing["lr"].append(0.3)
        changing["step"] = 2
        changed.set()
        writer.wait()
        loaded = store.load(KEY)
        assert loaded is not None
        assert is_whole(loaded)
        assert (loaded["step"], loaded["lr"]) == (1, [0.1, 0.2])
        writer.save(changing)
        assert writers()
    assert not writers()
    loaded = store.load(KEY)
    assert loaded is not None
    assert is_whole(loaded)
    assert (loaded["step"], loaded["lr"]) == (2, [0.1, 0.2, 0.3])


def test_a_disk_that_is_slower_than_the_caller_makes_it_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    order: list[str] = []
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        order.append("written")
        fsync(descriptor)

    def copied(value: Any) -> Any:
        if isinstance(value, dict) and "step" in value:
            order.append("copied")
        return copy(value)

    copy = checkpoints._copied
    monkeypatch.setattr(checkpoints, "_copied", copied)
    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(checkpoints, "sync_folder", lambda folder: None)
    with store.writer(KEY) as writer:
        for step in (1, 2, 3):
            writer.save(state(step))
    assert order == ["copied", "written"] * 3


def test_states_that_come_faster_than_they_are_written_are_passed_over(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with store.writer(KEY, every=3600) as writer:
        for step in (1, 2, 3):
            writer.save(state(step))
            if step == 2:
                first = store.load(KEY)
    last = store.load(KEY)
    assert first is not None
    assert last is not None
    assert (first["step"], last["step"]) == (1, 3)


def test_a_write_that_failed_is_told_with_the_next_or_at_the_end(tmp_path: Path) -> None:
    store = unwritable(tmp_path)
    refused = r"cannot save checkpoint .* \(File exists\); .*file has to be a folder"
    writer = store.writer(KEY)
    writer.save(state(1))
    with pytest.raises(CheckpointError, match=refused):
        writer.save(state(2))
    writer.wait()  # told once
    writer.save(state(3))
    with pytest.raises(CheckpointError, match=refused):
        writer.close()
    assert not writers()


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt])
def test_a_write_that_failed_is_told_instead_of_what_ended_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, end: type[BaseException]
) -> None:
    told = CheckpointError if issubclass(end, Exception) else end

    def work() -> None:
        with unwritable(tmp_path).writer(KEY) as writer:
            writer.save(state(1))
            raise end

    with pytest.raises(told):
        work()
    assert ("cannot save checkpoint" in caplog.text) == (told is end)
    assert not writers()


def test_a_writer_that_may_not_replace_leaves_what_is_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save_checkpoint(store, KEY, state(5))
    allowed = [True, False]
    with store.writer(KEY, may_replace=lambda: allowed.pop()) as writer:
        writer.save(state(3))
        writer.wait()
        loaded = store.load(KEY)
        assert loaded is not None
        assert loaded["step"] == 5
        writer.save(state(4))
    loaded = store.load(KEY)
    assert loaded is not None
    assert loaded["step"] == 4
    assert [path.name for path in tmp_path.iterdir()] == [store.path(KEY).name]


def odd_state() -> dict[str, Any]:
    """What states may hold beside weights in rows."""
    images = torch.randn(2, 3, 4, 5)
    return {
        "module": torch.nn.BatchNorm2d(3).state_dict(),
        "channels last": images.to(memory_format=torch.channels_last),
        "part": images[:, ::2, 1:, ::2],
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "kinds": [torch.tensor([1, -(2**62)]), torch.tensor([0.1, float("nan")]).bfloat16()],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "pair": (1, (2.5, "x")),
        3: {0: {"momentum": torch.arange(4.0)}, (1, 2): "key"},
    }


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(
            ours, theirs.detach(), rtol=0, atol=0, equal_nan=True, check_layout=True
        )
        if theirs.layout is torch.strided and theirs.nbytes == theirs.untyped_storage().nbytes():
            assert ours.stride() == theirs.stride()
        assert not ours.requires_grad
        return
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
        assert vars(ours) == vars(theirs) if isinstance(theirs, OrderedDict) else True
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


def test_whatever_a_state_holds_comes_back_as_it_was(tmp_path: Path) -> None:
    store, odd = CheckpointStore(tmp_path), odd_state()
    with store.writer(KEY) as writer:
        writer.save(odd)
    loaded = store.load(KEY)
    assert_same(loaded, odd)


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_checkpoint_dir("sqlite:////data/s.db") == Path("/data/s.db.checkpoints")
    one = default_checkpoint_dir("postgresql+psycopg://me:secret@host/one")
    assert default_checkpoint_dir("postgresql+psycopg://you@host/one") == one
    assert default_checkpoint_dir("postgresql+psycopg://me:secret@host/two") != one
    assert one.parent.name == "checkpoints"
    assert "secret" not in str(one)


def test_the_environment_names_a_folder_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEP_CHECKPOINT_DIR", str(tmp_path / "shared"))
    for store in ("sqlite:///a.db", "postgresql+psycopg://h/a", "grpc://h:1"):
        assert default_checkpoint_dir(store) == tmp_path / "shared"
