"""One machine at a time in a SQLite file that lies on a network folder.

The processes that use a file with a write-ahead log share memory, and so have to be on one
machine (https://www.sqlite.org/wal.html, "Overview"): workers of a second one would not see
what those of the first have written, run the same trials, and in the end break the file. On one
machine all is well there, as long as the folder has locks. So each process that opens such a file,
also to read, holds a shared lock on a file beside it, which says what machine's turn it is; only
where nobody holds it may another machine write its own name there.

That is on Linux, and as good as the folder's locks: where they do not reach other machines (NFS
mounted with `nolock`, Lustre with `localflock`, most file systems in user space), nothing does.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from storage.errors import ElsewhereError, StorageError

NETWORK = frozenset(
    {
        "9p", "afs", "beegfs", "ceph", "cifs", "dvs", "fakeowner", "fhgfs", "fuse", "gfs2", "gpfs",
        "lustre", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "vboxsf",
        "virtiofs", "wekafs",
    }
)  # fmt: skip
"""Types of file systems, as Linux names them, whose files other machines may have open too. Those
in user space ("fuse.sshfs") may be of any kind."""

MOUNTS = Path("/proc/self/mountinfo")

TRIES = 30
"""To take the lock, some hundredths of a second apart: others may be about to write their name."""

_BUSY = (errno.EACCES, errno.EAGAIN)
"""A lock that another descriptor holds; SMB has the first."""

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass
class _Held:
    """A lock that this process holds, and how many of its storages it is for."""

    descriptor: int
    storages: int


_held: dict[Path, _Held] = {}
"""By the path of the database."""


def keep_others_out(file: Path, *, writes: bool) -> None:
    """Keep other machines out of a database until `let_others_in`, or the end of this process.

    Does nothing on a folder that no other machine sees, or that has no locks at all (SQLite then
    refuses the file by itself).

    Args:
        file: the database, which need not exist; its folder does.
        writes: whether it is opened to write. Whoever may only read in the folder cannot keep
            anybody out, and is let in.

    Raises:
        ElsewhereError: a process of another machine has it open.
        StorageError: the lock cannot be written.
    """
    file = file.resolve()
    held = _held.get(file)
    if held is not None and _is_at(held.descriptor, _lock_file(file)):
        held.storages += 1
        return
    kind = network_type(file)
    if kind is None:
        return
    try:
        descriptor = os.open(_lock_file(file), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if not writes and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return
        raise _cannot_write(file, error) from error
    try:
        if _take(descriptor, file, kind):
            _held[file] = _Held(descriptor, 1)
            return
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)


def let_others_in(file: Path) -> None:
    """Give the lock of one storage back; with the last one, other machines may come in."""
    file = file.resolve()
    held = _held.get(file)
    if held is None:
        return
    held.storages -= 1
    if held.storages == 0:
        del _held[file]
        os.close(held.descriptor)


def network_type(file: Path) -> str | None:
    """Return the type of the file system if other machines may be in it too, else None."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None  # not Linux
    path = file.resolve()
    depth, kind = -1, ""
    for line in lines:
        # proc(5): the mount point is the fifth field, the type the first after a lone hyphen.
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5:
            continue
        place = Path(_unescaped(fields[4]))
        # Of several mounts on one place the last is in front.
        if path.is_relative_to(place) and len(place.parts) >= depth:
            depth, kind = len(place.parts), after.split(" ")[0]
    return kind if kind.partition(".")[0] in NETWORK else None


def _take(descriptor: int, file: Path, kind: str) -> bool:
    """Hold the lock with this machine's name under it; False where there are no locks."""
    import fcntl  # where there are mounts to read, there it is

    boot, ours = _this_boot(), f"{socket.gethostname()}|{_this_boot()}"
    written = ""
    for _ in range(TRIES):
        # Never from shared to exclusive: on SMB that waits for itself, and nowhere is it one step.
        lock = fcntl.LOCK_SH
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            written = os.pread(descriptor, 1000, 0).decode(errors="replace")
            if written.rpartition("|")[2] == boot:
                return True
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            lock = fcntl.LOCK_EX
            # Granted if no process of the machine before holds it any more.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if lock == fcntl.LOCK_SH and error.errno in _NO_LOCKS:
                return False
            if error.errno not in _BUSY:
                raise _cannot_write(file, error) from error
            time.sleep(random.uniform(0.02, 0.1))
            continue
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, ours.encode(), 0)
            os.fsync(descriptor)
        except OSError as error:
            raise _cannot_write(file, error) from error
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    host = written.rpartition("|")[0] or "another machine"
    raise ElsewhereError(
        f"{file} lies on a network folder ({kind}) and is in use on {host}; SQLite keeps the "
        f"processes of one machine apart, no more. Run sweep serve on {host} and give its grpc:// "
        "address here, use PostgreSQL, or end there what uses the file"
    )


def _cannot_write(file: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot lock {_lock_file(file)} ({error.strerror or error}), which keeps other machines "
        f"out of {file.name}; it needs the permissions of the database, or put that on a local disk"
    )


def _lock_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.host")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a descriptor is that of the file which a path names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _unescaped(text: str) -> str:
    for code in ("040", "011", "012", "134"):
        text = text.replace(f"\\{code}", chr(int(code, 8)))
    return text


def _this_boot() -> str:
    """What all processes share that share memory, those in containers too: a running kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
