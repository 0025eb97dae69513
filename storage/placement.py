"""Many checkpoint files put in their places at once, all of them or none."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from storage.checkpoints import CheckpointStore, cannot, sync_folder, temporary_of


class CheckpointPlacement:
    """Puts checkpoint files in their places, all of them or none.

    As a context manager: leaving it with an error, or without :meth:`keep`, puts back what was
    there.

    Args:
        checkpoints: where they go.
    """

    def __init__(self, checkpoints: CheckpointStore) -> None:
        self._checkpoints = checkpoints
        self._staged: list[tuple[Path, Path]] = []
        self._placed: list[tuple[Path, Path | None]] = []
        self._created = False

    def __enter__(self) -> CheckpointPlacement:
        return self

    def stage(self, key: str, content: bytes) -> None:
        """Write a checkpoint file beside the place of its key.

        Raises:
            CheckpointError: the folder cannot be written, or the disk is full.
        """
        path = self._checkpoints.path(key)
        # Named as what a killed save leaves, so that it is cleared away as such.
        temporary = temporary_of(path)
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True)
                self._created = True
            self._staged.append((temporary, path))
            with temporary.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise cannot("save", path, error) from error

    def place(self) -> None:
        """Give the staged files their names.

        Raises:
            CheckpointError: one of them cannot have it.
        """
        for temporary, path in self._staged:
            backup = temporary_of(path)
            try:
                if path.exists():
                    path.replace(backup)
                    self._placed.append((path, backup))
                else:
                    self._placed.append((path, None))
                temporary.replace(path)
            except OSError as error:
                raise cannot("save", path, error) from error
        if self._staged:
            sync_folder(self._checkpoints.root)

    def keep(self) -> None:
        """What was placed is there to stay."""
        for _, backup in self._placed:
            if backup is not None:
                backup.unlink(missing_ok=True)
        self._placed, self._staged, self._created = [], [], False

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            for path, backup in reversed(self._placed):
                if backup is None:
                    path.unlink(missing_ok=True)
                elif backup.exists():
                    backup.replace(path)
            for temporary, _ in self._staged:
                temporary.unlink(missing_ok=True)
            if self._created:
                self._checkpoints.root.rmdir()
