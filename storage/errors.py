"""Why a storage cannot be used; every message is one line."""

from __future__ import annotations

HELD = "another process holds it; wait or find that process"
"""What to do about a SQLite file that is locked for long."""


class StorageError(Exception):
    """A storage that cannot be used as asked; the message is one line and says what to do."""


class StorageURLError(StorageError):
    """What was given as a storage URL names no storage, whatever stands where."""


class ElsewhereError(StorageError):
    """A SQLite file on a network folder that a process of another machine has open."""


class EmptyStorageError(StorageError):
    """A database that can be read and holds no sweep yet."""


class StorageAwayError(StorageError):
    """A server that does not answer, but may do so later: it restarts, or its network is gone."""

    transient = True
