"""A storage URL becomes an Optuna storage that many worker processes may use at once.

One machine owns a SQLite file (:mod:`storage.sqlite`) at a time, on a local disk; workers on
several machines use PostgreSQL (:mod:`storage.database_server`), or reach the file through
`sweep serve` (:mod:`storage.serve`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

from storage.errors import StorageError
from storage.network_folder import let_others_in
from storage.urls import check_url, is_grpc, sqlite_path

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from sqlalchemy.engine import Engine

_ADVISORY_KEY = 0x5357_4545_50  # "SWEEP"


def open_storage(
    url: str, *, read_only: bool = False, lock_seconds: float | None = None
) -> BaseStorage:
    """Open the storage at ``url``, creating the database if it does not exist yet.

    Safe to call from any number of processes at once, also for a database that does not exist.

    Args:
        url: ``sqlite:///file.db``, ``postgresql+psycopg://user@host/name``, another SQLAlchemy
            URL that Optuna supports, or ``grpc://host:port`` for one that `sweep serve` serves.
        read_only: for status displays. Never creates a database; on SQLite it never takes the
            write lock either, so it cannot hold up a worker nor be held up by one.
        lock_seconds: how long one SQLite operation waits for other processes; None is
            :data:`storage.sqlite.LOCK_TIMEOUT_SECONDS`. Short where failures are retried
            anyway: no signal is handled during the wait.

    Raises:
        StorageError: the URL is not usable, nobody serves it
            (:class:`storage.errors.StorageAwayError`), the database is missing (``read_only``),
            is locked for longer than :data:`storage.sqlite.LOCK_TIMEOUT_SECONDS`, belongs to
            another program or to another version of Optuna, or its driver is not installed.
    """
    parsed = check_url(url)
    if is_grpc(url):
        from storage.remote import open_remote

        return open_remote(url, read_only=read_only)
    file = sqlite_path(url)
    if file is None:
        from storage.database_server import open_server

        return open_server(parsed, read_only=read_only)
    from storage.sqlite import LOCK_TIMEOUT_SECONDS, open_sqlite, open_sqlite_read_only

    if read_only:
        return open_sqlite_read_only(file)
    return open_sqlite(file, parsed, lock_seconds or LOCK_TIMEOUT_SECONDS)


@contextmanager
def exclusive(storage: BaseStorage, url: str) -> Iterator[None]:
    """Keep other processes out of a block that creates studies.

    A lock file beside a SQLite database; an advisory lock of the server on PostgreSQL; through
    `sweep serve`, that lock of the database behind it. On other databases nothing keeps two
    creations of the same sweep apart.

    Args:
        storage: the open storage.
        url: what it was opened with.
    """
    from filelock import FileLock
    from sqlalchemy import text

    file = sqlite_path(url)
    if file is not None:
        # The empty lock file stays behind: whoever removed it while another process waits at it
        # would let a third lock a new one of the same name, beside the second.
        with FileLock(f"{file}.lock"):
            yield
    elif is_grpc(url):
        with storage.exclusive():  # type: ignore[attr-defined]  # storage.remote.RemoteStorage
            yield
    elif sql_engine(storage).dialect.name == "postgresql":
        with sql_engine(storage).connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _ADVISORY_KEY})
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _ADVISORY_KEY})
    else:
        yield


def close_storage(storage: BaseStorage, url: str) -> None:
    """Give up a storage's connections; leave a SQLite database whole in its one file.

    While a database is in use, its latest writes stand in `FILE-wal` beside it. Whoever copies
    the file alone after a sweep has ended should not lose them.
    """
    from optuna.storages import RDBStorage

    backend = getattr(storage, "_backend", storage)
    if isinstance(backend, RDBStorage):
        backend.remove_session()
        backend.engine.dispose()
    elif is_grpc(url):
        backend.close()  # type: ignore[union-attr]  # storage.remote.RemoteStorage
    file = sqlite_path(url)
    if file is None:
        return
    if file.exists():  # to connect would create one that was removed
        # If others still work on it, the last of them to leave does this.
        with suppress(sqlite3.Error), closing(sqlite3.connect(file, timeout=5)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    let_others_in(file)


def own_url(storage: BaseStorage, url: str) -> str:
    """Return a URL that names a store by itself, whatever address it is reached at.

    For what is kept beside it: two stores that are reached through ``grpc://localhost:13000``,
    one after the other, are two.
    """
    return f"grpc://{storage.store_id}" if is_grpc(url) else url  # type: ignore[attr-defined]


def sql_engine(storage: BaseStorage) -> Engine:
    """Return the SQLAlchemy engine under an Optuna storage.

    Raises:
        StorageError: the storage is not a database of our own (a gRPC proxy, a journal,
            in-memory). This is the one place that says so.
    """
    from optuna.storages import RDBStorage

    backend = getattr(storage, "_backend", storage)
    if not isinstance(backend, RDBStorage):
        raise StorageError(
            f"workers cannot claim trials through {type(backend).__name__}; "
            "give them the URL of the database itself (sqlite:/// or postgresql+psycopg://), or "
            "run sweep serve beside it and give them grpc://HOST:PORT"
        )
    return backend.engine
