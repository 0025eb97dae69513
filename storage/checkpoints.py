"""Training states on disk: saved atomically, loaded without running code from the file.

A checkpoint is a plain ``torch.save`` file under its final name only when it is complete: it is
written to a temporary file in the same folder, flushed to the disk and then renamed. Whoever
kills the process, and whenever, leaves the previous checkpoint or the new one.
"""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import io
import logging
import math
import os
import re
import secrets
import time
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from storage.retries import reason
from storage.urls import sqlite_path

_logger = logging.getLogger(__name__)

# File systems allow 255 bytes; the temporary file's name is the longest.
_MAX_STEM = 180

_TEMPORARY = re.compile(r"\.(.*\.pt)\.[0-9a-f]{16}\.tmp", re.DOTALL)
"""What a checkpoint of this name is written to before it is whole."""


class CheckpointError(Exception):
    """A checkpoint could not be written, read or removed; the message is one line."""


def default_checkpoint_dir(url: str) -> Path:
    """Return where the checkpoints of the storage at ``url`` belong.

    The folder that the environment variable ``SWEEP_CHECKPOINT_DIR`` names, if any: shared between
    machines, it lets a trial go on where another worked on it. Else ``FILE.checkpoints`` beside a
    SQLite database, so that the two move together; for a database server a folder of this user,
    one for each database.
    """
    if named := os.environ.get("SWEEP_CHECKPOINT_DIR"):
        return Path(named).expanduser().absolute()
    file = sqlite_path(url)
    if file is not None:
        return file.with_name(file.name + ".checkpoints")
    from platformdirs import user_data_path

    # The account is not part of the name: two users of one database mean the same studies.
    place = re.sub(r"//[^/]*@", "//", url)
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    return user_data_path("sweep", appauthor=False) / "checkpoints" / name


def trial_key(study: str, number: int) -> str:
    """The key of a trial's checkpoint, by its study's name and its own number."""
    return f"{study}/{number}"


class CheckpointStore:
    """The checkpoints in one folder, by key.

    A key is any text, such as a study name and a trial number; keys never leave the folder. One
    process writes a key at a time: a second one (a worker that was frozen and lost its trial)
    may get a :class:`CheckpointError`, or put back an older state, but never a broken file.

    Args:
        root: the folder; created by the first save.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        # Files that this process alone has written since it looked for what a killed save left.
        self._clean: set[str] = set()

    def path(self, key: str) -> Path:
        """Return the file that holds ``key``, which need not exist.

        Raises:
            ValueError: the key is empty.
        """
        return self.root / _file_name(key)

    def writer(
        self, key: str, *, every: float = 0.0, may_replace: Callable[[], bool] = lambda: True
    ) -> CheckpointWriter:
        """Return what saves one state of ``key`` after the other while the caller goes on.

        Args:
            key: see the class.
            every: seconds from the begin of one write to that of the next, at the least.
            may_replace: asked, in a thread of the writer's, when a state is on the disk and
                about to replace what the key holds. False drops it instead.

        Raises:
            ValueError: the key is empty.
        """
        path = self.path(key)
        temporary = temporary_of(path)
        write = functools.partial(self._write, path, temporary, may_replace)
        return CheckpointWriter(write, every)

    def _write(
        self,
        path: Path,
        temporary: Path,
        may_replace: Callable[[], bool],
        content: dict[str, Any],
    ) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            known = path.name in self._clean
            if not known:
                self._remove_temporaries(path.name)
            try:
                with temporary.open("xb") as stream:
                    _save_to(stream, content)
                    stream.flush()
                    os.fsync(stream.fileno())
                if not may_replace():
                    # Whoever may has perhaps removed it already.
                    temporary.unlink(missing_ok=True)
                    return
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            # After a power failure either checkpoint of a key may be the one that is there.
            if not known:
                sync_folder(self.root)
                self._clean.add(path.name)
        except OSError as error:
            raise cannot("save", path, error) from error

    def load(self, key: str) -> dict[str, Any] | None:
        """Return the state of ``key`` with its tensors on the CPU, or None if there is none.

        A damaged file, found by the checksums in it, counts as none: it is removed, with a
        warning in the log, so that the trial starts over.

        Raises:
            CheckpointError: the file exists but cannot be read, e.g. for lack of permission.
        """
        path = self.path(key)
        # Whoever loads goes on from another process's work, which may have left something.
        self._clean.discard(path.name)
        content = self._content(path)
        if content is None:
            return None
        try:
            return state_in(content)
        except MemoryError:
            raise
        except Exception as error:
            _logger.warning("removed damaged checkpoint %s: %s", path, reason(error))
            self.delete(key)
            return None

    def read(self, key: str) -> bytes | None:
        """Return the file of ``key`` as it is; None where there is no undamaged one.

        Raises:
            CheckpointError: the file exists but cannot be read.
        """
        content = self._content(self.path(key))
        if content is not None:
            try:
                check_whole(content)
            except ValueError:
                return None
        return content

    def _content(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise cannot("read", path, error) from error

    def delete(self, key: str) -> None:
        """Remove the checkpoint of ``key`` and what a killed save may have left of it.

        Raises:
            CheckpointError: the file cannot be removed.
        """
        path = self.path(key)
        self._clean.discard(path.name)
        try:
            path.unlink(missing_ok=True)
            self._remove_temporaries(path.name)
        except OSError as error:
            raise cannot("remove", path, error) from error

    def delete_all(self, prefix: str, keys: Iterable[str] = ()) -> None:
        """Remove all checkpoints whose keys begin with ``prefix``, and what killed saves left.

        Args:
            prefix: of the keys.
            keys: some of them: of a very long one the file's name has not even the whole prefix.

        Raises:
            CheckpointError: a file cannot be removed. Those before it are.
        """
        start, names = _escaped(prefix), {_file_name(key) for key in keys}
        try:
            for entry in self._entries():
                leftover = _TEMPORARY.fullmatch(entry.name)
                name = leftover[1] if leftover else entry.name
                if name in names or (name.endswith(".pt") and name.startswith(start)):
                    self._clean.discard(name)
                    Path(entry.path).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot remove checkpoints in {self.root} ({error.strerror or error})"
            ) from error

    def disk_usage(self, prefix: str = "") -> tuple[int, int]:
        """Return how many checkpoints there are, and the bytes that they hold.

        Args:
            prefix: count only keys that begin with it.
        """
        start = _escaped(prefix)
        count = total = 0
        for entry in self._entries():
            if not entry.name.endswith(".pt") or not entry.name.startswith(start):
                continue
            try:
                total += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
            count += 1
        return count, total

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root) as entries:
                return [entry for entry in entries if entry.is_file(follow_symlinks=False)]
        except FileNotFoundError:
            return []

    def _remove_temporaries(self, name: str) -> None:
        for entry in self._entries():
            leftover = _TEMPORARY.fullmatch(entry.name)
            if leftover and leftover[1] == name:
                Path(entry.path).unlink(missing_ok=True)


class CheckpointWriter:
    """Saves the states of one key, one after the other, while the caller changes them further.

    :meth:`save` takes a copy and returns. It is written in a thread of the writer's, unless a
    write began less than ``every`` seconds before: then it waits, and the next one takes its
    place. There is one copy at a time: a disk that is slower than the caller makes it wait. Use
    the writer as a context: at its end the last state is on the disk and the thread has ended.
    From :meth:`CheckpointStore.writer`.

    Args:
        write: brings a state to the disk.
        every: seconds between the begins of two writes, at the least.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None], every: float) -> None:
        self._write = write
        self._every = every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._waiting: dict[str, Any] | None = None
        self._under_way: Future[None] | None = None
        self._began = -math.inf

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            # Whoever is told to end at once is not to hear of this instead.
            if kind is not None and not issubclass(kind, Exception):
                _logger.warning("%s", error)
                return
            raise

    def save(self, state: dict[str, Any]) -> None:
        """Have ``state``, as it is now, replace what the key holds.

        Args:
            state: tensors, numbers, text, and lists and dicts of them: what
                ``torch.load(weights_only=True)`` accepts.

        Raises:
            CheckpointError: the state *before* could not be saved (the disk is full or the folder
                not writable), and the one before that is intact. Nothing is done with this one.
        """
        self._end_write()
        self._waiting = None  # before there is another
        self._waiting = _copied(state)
        if time.monotonic() - self._began >= self._every:
            self._begin_write()

    def wait(self) -> None:
        """Return when the last state is on the disk.

        Raises:
            CheckpointError: it could not be saved; the one before is intact. It is raised once.
        """
        self._end_write()
        if self._waiting is not None:
            self._begin_write()
            self._end_write()

    def close(self) -> None:
        """Wait for the last state, and end the thread.

        Raises:
            CheckpointError: as :meth:`wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _begin_write(self) -> None:
        self._began = time.monotonic()
        state, self._waiting = self._waiting, None
        assert state is not None
        self._under_way = self._thread.submit(self._write, state)

    def _end_write(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()


def cannot(what: str, path: Path, error: OSError) -> CheckpointError:
    """The error of whoever could not save, read or remove a checkpoint."""
    advice = "free some space there"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None):
        advice = f"{path.parent} has to be a folder of files that you may write to"
    return CheckpointError(f"cannot {what} checkpoint {path} ({error.strerror or error}); {advice}")


def temporary_of(path: Path) -> Path:
    """What a file is written to before it is whole, beside its place; another one each time."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copied(value: Any) -> Any:
    """Return a copy of a state, its tensors on the CPU."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # a module's state has its versions as an attribute
        for name, part in value.items():
            copied[name] = _copied(part)
        return copied
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)


def state_in(content: bytes) -> dict[str, Any]:
    """Return the state in a checkpoint file, its tensors on the CPU.

    Raises:
        Exception: it is no checkpoint, is damaged, or would run code.
    """
    import torch

    # torch.load does not verify the checksums that torch.save writes.
    check_whole(content)
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"holds a {type(state).__name__}, not a dict")
    return state


def check_whole(content: bytes) -> None:
    """Check a checkpoint file by the checksums in it; nothing is loaded.

    Raises:
        ValueError: it is not a zip of stored members, is damaged, or larger inside than outside.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise ValueError("a part of it is compressed")
            if sum(info.file_size for info in infos) > len(content):
                raise ValueError("its parts are longer together than the file")
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"checksum of {damaged} is wrong")
    except MemoryError:
        raise
    except Exception as error:  # zipfile has many for what is none
        raise ValueError(reason(error)) from error


class _Unfailing:
    """A file for PyTorch's writer, which aborts the process on some errors of a file.

    Attributes:
        error: the first one; what is written after it is lost.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.error: Exception | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._stream.write(data)
            except Exception as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def _save_to(stream: IO[bytes], content: dict[str, Any]) -> None:
    import torch

    file = _Unfailing(stream)
    torch.save(content, file)  # type: ignore[arg-type]
    if file.error is not None:
        raise file.error


def _file_name(key: str) -> str:
    if not key:
        raise ValueError("a checkpoint key must not be empty")
    stem = _escaped(key)
    if len(stem) > _MAX_STEM:
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        # "%%" stands in no escaped key.
        stem = f"{stem[: _MAX_STEM - 34]}%%{digest}"
    return f"{stem}.pt"


def _escaped(key: str) -> str:
    # Percent signs are escaped as well, so different keys have different names. A leading dot
    # is for temporary files.
    stem = quote(key, safe="=+,@ ")
    return "%2E" + stem[1:] if stem.startswith(".") else stem
