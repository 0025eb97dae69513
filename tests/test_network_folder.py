"""A SQLite file on a network folder, which one machine at a time may use."""

import errno
import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import PROCESSES
from helpers import together

from storage import network_folder
from storage.engine import close_storage, open_storage
from storage.errors import ElsewhereError, StorageError
from storage.network_folder import network_type

MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:40 / /nowhere rw,relatime shared:20 master:3 - nfs4 server:/home rw,vers=4.2
41 40 254:1 / /nowhere/me/scratch rw,relatime - xfs /dev/vdb rw
42 22 0:41 / /nowhere3/a\040b rw,relatime - fuse.sshfs me@host:/ rw
43 22 254:2 / /nowhere2 rw,relatime - ext4 /dev/vdc rw
44 43 0:42 / /nowhere2 rw,relatime - lustre mgs@tcp:/data rw,flock
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/elsewhere/sweep.db", None),
        ("/nowhere/me/sweep.db", "nfs4"),
        ("/nowheres/sweep.db", None),
        ("/nowhere/me/scratch/sweep.db", None),
        ("/nowhere3/a b/sweep.db", "fuse.sshfs"),
        ("/nowhere2/sweep.db", "lustre"),
    ],
)
def test_the_mount_in_front_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, kind: str | None
) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(network_folder, "MOUNTS", tmp_path / "mounts")
    assert network_type(Path(path)) == kind


def test_where_no_mounts_can_be_read_a_folder_counts_as_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_folder, "MOUNTS", tmp_path / "none")
    assert network_type(tmp_path / "sweep.db") is None


def as_machine(name: str, mounts: Path) -> None:
    """From now on this process is one of that machine, on which all of `/` is a network folder."""
    network_folder.MOUNTS = mounts
    network_folder._this_boot = lambda: f"boot of {name}"
    network_folder.socket.gethostname = lambda: name
    network_folder._held.clear()


def open_and_wait(url: str, name: str, mounts: Path, pipe: Any) -> None:
    as_machine(name, mounts)
    open_storage(url)
    pipe.send("open")
    pipe.recv()


def open_as(url: str, name: str, mounts: Path, read_only: bool = False) -> str:
    as_machine(name, mounts)
    try:
        open_storage(url, read_only=read_only)
    except ElsewhereError as error:
        return str(error)
    return ""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    file = tmp_path / "mounts"
    file.write_text("40 22 0:40 / / rw,relatime shared:20 - nfs4 server:/ rw\n\n")
    return file


@contextmanager
def opened_by(name: str, url: str, mounts: Path) -> Iterator[None]:
    """A process of a machine that has a store open."""
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=open_and_wait, args=(url, name, mounts, there))
    process.start()
    try:
        assert here.poll(60)
        assert here.recv() == "open"
        yield
    finally:
        process.kill()
        process.join(30)


def test_a_second_machine_is_kept_out_until_the_first_has_ended(
    tmp_path: Path, mounts: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'sweep.db'}"
    (tmp_path / "link.db").symlink_to("sweep.db")
    by_link = f"sqlite:///{tmp_path / 'link.db'}"
    with opened_by("node1", url, mounts):
        for where, read_only in ((url, False), (url, True), (by_link, False)):
            (refused,) = together(open_as, [(where, "node2", mounts, read_only)])
            assert "network folder (nfs4) and is in use on node1" in refused
            assert "sweep serve" in refused
        # Others of its own machine come in.
        assert together(open_as, [(url, "node1", mounts)]) == [""]
    assert together(open_as, [(url, "node2", mounts)]) == [""]
    assert (tmp_path / "sweep.db.host").read_text() == "node2|boot of node2"


def test_processes_of_one_machine_do_not_keep_each_other_out(tmp_path: Path, mounts: Path) -> None:
    url = f"sqlite:///{tmp_path / 'sweep.db'}"
    assert together(open_as, [(url, "node1", mounts)]) == [""]
    assert together(open_as, [(url, "node2", mounts, True)] * 6) == [""] * 6


def close_and_wait(url: str, mounts: Path) -> list[int]:
    """How many storages of this process keep others out, as it opens and closes two."""
    as_machine("node1", mounts)
    counts = []
    first, second = open_storage(url), open_storage(url, read_only=True)
    for store in (first, second):
        counts += [held.storages for held in network_folder._held.values()]
        close_storage(store, url)
    return [*counts, len(network_folder._held)]


def test_the_last_storage_that_is_closed_lets_others_in(tmp_path: Path, mounts: Path) -> None:
    assert together(close_and_wait, [(f"sqlite:///{tmp_path / 'sweep.db'}", mounts)]) == [[2, 1, 0]]


def under_locks(file: Path, mounts: Path, flock: Callable[[int, int], None]) -> tuple[str, int]:
    """What comes of taking the lock where locks are so; how many are then held."""
    as_machine("node1", mounts)
    fcntl.flock = flock  # type: ignore[assignment]
    try:
        network_folder.keep_others_out(file, writes=True)
    except StorageError as error:
        return str(error), len(network_folder._held)
    return "", len(network_folder._held)


def mandatory(descriptor: int, operation: int) -> None:
    """As SMB's: an exclusive lock waits for the same descriptor's shared one, too."""
    blocked = _taken and operation & fcntl.LOCK_EX
    if blocked:
        raise PermissionError(errno.EACCES, "Permission denied")
    _taken.clear()
    if not operation & fcntl.LOCK_UN:
        _taken.append(operation)


_taken: list[int] = []


def none_there(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def another_has_it(descriptor: int, operation: int) -> None:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def broken(descriptor: int, operation: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("flock", "said", "held"),
    [
        (mandatory, "", 1),
        (none_there, "", 0),
        (another_has_it, "is in use on another machine", 0),
        (broken, "cannot lock", 0),
    ],
)
def test_locks_of_other_kinds(
    tmp_path: Path, mounts: Path, flock: Callable[[int, int], None], said: str, held: int
) -> None:
    ((found, count),) = together(under_locks, [(tmp_path / "sweep.db", mounts, flock)])
    assert (said in found, bool(found), count) == (True, bool(said), held)


def test_on_a_local_folder_nothing_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text("22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n")
    monkeypatch.setattr(network_folder, "MOUNTS", tmp_path / "mounts")
    open_storage(f"sqlite:///{tmp_path / 'sweep.db'}")
    assert not (tmp_path / "sweep.db.host").exists()
