"""A SQLite file on a network folder, which one machine at a time may use."""

from pathlib import Path
from typing import Any

import pytest
from commands import PROCESSES
from helpers import together

from storage import network_folder
from storage.engine import open_storage
from storage.errors import StorageError
from storage.network_folder import network_type

MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:40 / /home rw,relatime shared:20 master:3 - nfs4 server:/home rw,vers=4.2
41 40 254:1 / /home/me/scratch rw,relatime - xfs /dev/vdb rw
42 22 0:41 / /mnt/a\040b rw,relatime - fuse.sshfs me@host:/ rw
43 22 254:2 / /data rw,relatime - ext4 /dev/vdc rw
44 43 0:42 / /data rw,relatime - lustre mgs@tcp:/data rw,flock
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/tmp/sweep.db", None),
        ("/home/me/sweep.db", "nfs4"),
        ("/homes/sweep.db", None),
        ("/home/me/scratch/sweep.db", None),
        ("/mnt/a b/sweep.db", "fuse.sshfs"),
        ("/data/sweep.db", "lustre"),
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
    network_folder._this_machine = lambda: f"{name}|boot"
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
    except StorageError as error:
        return str(error)
    return ""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    file = tmp_path / "mounts"
    file.write_text("40 22 0:40 / / rw,relatime shared:20 - nfs4 server:/ rw\n")
    return file


def test_a_second_machine_is_kept_out_until_the_first_has_ended(
    tmp_path: Path, mounts: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'sweep.db'}"
    here, there = PROCESSES.Pipe()
    first = PROCESSES.Process(target=open_and_wait, args=(url, "node1", mounts, there))
    first.start()
    try:
        assert here.poll(60)
        assert here.recv() == "open"
        for read_only in (False, True):
            (refused,) = together(open_as, [(url, "node2", mounts, read_only)])
            assert "network folder (nfs4) and is in use on node1" in refused
            assert "sweep serve" in refused
        # Others of its own machine come in.
        assert together(open_as, [(url, "node1", mounts)]) == [""]
    finally:
        first.kill()
        first.join(30)
    assert together(open_as, [(url, "node2", mounts)]) == [""]
    assert (tmp_path / "sweep.db.host").read_text() == "node2|boot"


def test_processes_of_one_machine_do_not_keep_each_other_out(tmp_path: Path, mounts: Path) -> None:
    url = f"sqlite:///{tmp_path / 'sweep.db'}"
    assert together(open_as, [(url, "node1", mounts)]) == [""]
    assert together(open_as, [(url, "node2", mounts, True)] * 6) == [""] * 6


def test_on_a_local_folder_nothing_is_held(tmp_path: Path) -> None:
    open_storage(f"sqlite:///{tmp_path / 'sweep.db'}")
    assert not (tmp_path / "sweep.db.host").exists()
