"""One machine at a time in a SQLite file that lies on a network folder.

The processes that use a file with a write-ahead log share memory, and so have to be on one
machine (https://www.sqlite.org/wal.html, "Overview"): workers of a second one would not see
what those of the first have written, run the same trials, and in the end break the file. On one
machine all is well there, as long as its locks work. So each process that opens such a file
holds a lock that other machines see, on a file beside it which says whose turn it is.
"""

from __future__ import annotations

import os
import random
import socket
import time
from pathlib import Path

from storage.errors import StorageError

NETWORK = frozenset(
    {
        "9p", "afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs",
        "pvfs2", "smb3", "smbfs", "vboxsf", "virtiofs", "wekafs",
    }
)  # fmt: skip
"""Types of file systems, as Linux names them, whose files other machines may have open too."""

MOUNTS = Path("/proc/self/mountinfo")

TRIES = 20
"""To take the lock, some hundredths of a second apart."""

_held: dict[Path, int] = {}
"""Descriptors of the locks that this process holds until its end, by database."""


def hold(file: Path) -> None:
    """Keep other machines out of a database until this process ends, if they could come in.

    Args:
        file: the database; its folder exists.

    Raises:
        StorageError: a process of another machine has it open.
    """
    kind = network_type(file)
    if kind is None or file in _held:
        return
    import fcntl  # where there are mounts to read, there it is

    try:
        descriptor = os.open(f"{file}.host", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return  # whoever may only read here cannot say so
    owner = ""
    for _ in range(TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            owner = os.pread(descriptor, 1000, 0).decode(errors="replace")
            if owner != _this_machine():
                # Granted if no process of the machine before holds it any more.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, _this_machine().encode(), 0)
                os.fsync(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            _held[file] = descriptor
            return
        except BlockingIOError:
            # Perhaps others of this machine, which are about to write its name.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            time.sleep(random.uniform(0.02, 0.1))
        except OSError:
            break  # no locks at all there, without which SQLite refuses the file by itself
    os.close(descriptor)
    if not owner:
        return
    host = owner.partition("|")[0]
    raise StorageError(
        f"{file} lies on a network folder ({kind}) and is in use on {host}; SQLite keeps the "
        f"processes of one machine apart, no more. Run sweep serve on {host} and give its grpc:// "
        "address here, use PostgreSQL, or end there what uses the file"
    )


def network_type(file: Path) -> str | None:
    """Return the type of the file system if other machines may be in it too, else None.

    A file system in user space (`fuse.sshfs`) may be of any kind, and counts as such a one.
    """
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None  # not Linux
    path = file.resolve()
    depth, kind = -1, ""
    for line in lines:
        # proc(5): the mount point is the fifth field, the type the first after a lone hyphen.
        before, _, after = line.partition(" - ")
        place = Path(_unescaped(before.split(" ")[4]))
        # Of several mounts on one place the last is in front.
        if path.is_relative_to(place) and len(place.parts) >= depth:
            depth, kind = len(place.parts), after.split(" ")[0]
    return kind if kind in NETWORK or kind.partition(".")[0] == "fuse" else None


def _unescaped(text: str) -> str:
    for code in ("040", "011", "012", "134"):
        text = text.replace(f"\\{code}", chr(int(code, 8)))
    return text


def _this_machine() -> str:
    """Its name, and what tells it from others of that name and from itself before a restart."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()}|{boot}"
