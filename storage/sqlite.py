"""A SQLite file that many worker processes of one machine may use at once.

Optuna's own SQLite storage is not safe for that: its transactions start as readers, so two
workers can both find a trial waiting and both run it, and processes that create the same new
file crash each other. :func:`open_sqlite` creates a file under a lock beside it, turns on
write-ahead logging, and starts every transaction of a worker as a writer (``BEGIN IMMEDIATE``),
which makes each of Optuna's operations atomic. One machine owns a file at a time
(:mod:`storage.network_folder`), on a local disk at best.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from filelock import FileLock, Timeout
from optuna.storages._rdb.models import BaseModel
from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from storage.database import CachedDatabase, open_database
from storage.errors import HELD, EmptyStorageError, StorageError
from storage.network_folder import keep_others_out
from storage.readers import READ_ONLY_OPTION, is_reading
from storage.urls import check_file

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from sqlalchemy.engine import Connection, Engine

LOCK_TIMEOUT_SECONDS = 60.0
"""How long one SQLite operation waits for other processes before it fails as "locked"."""


def open_sqlite(file: Path, url: URL, lock_seconds: float) -> BaseStorage:
    """Open a file to write, creating it if it does not exist.

    Args:
        file: the database.
        url: what names it; its options hold.
        lock_seconds: how long one operation waits for other processes.

    Raises:
        StorageError: as :func:`storage.engine.open_storage`.
    """
    check_file(file)
    keep_others_out(file, writes=True)
    lock_file = file.with_name(file.name + ".lock")
    try:
        with FileLock(lock_file, timeout=LOCK_TIMEOUT_SECONDS):
            _prepare_file(file)
            storage = open_database(
                url.set(database=str(file)).render_as_string(hide_password=False),
                {"connect_args": {"timeout": lock_seconds, "isolation_level": None}},
                place=str(file),
            )
    except Timeout as error:
        raise StorageError(
            f"{lock_file} has been held by another process for {LOCK_TIMEOUT_SECONDS:.0f} s; "
            "find the process that hangs while it opens this database"
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot write in {file.parent} ({error.strerror or error}); "
            "choose a folder that you may write to"
        ) from error
    _refuse_another_file(storage.engine, file)
    event.listen(storage.engine, "connect", _set_synchronous)
    event.listen(storage.engine, "begin", _begin)
    # The pooled connection from construction has not seen the events.
    storage.engine.dispose()
    return CachedDatabase(storage)


def open_sqlite_read_only(file: Path) -> BaseStorage:
    """Open a file whose every transaction is a reader's; create nothing in it.

    Raises:
        StorageError: as :func:`storage.engine.open_storage`; :class:`EmptyStorageError` where
            the file holds no sweep yet.
    """
    if not file.is_file():
        check_file(file)
        raise StorageError(f"{file} does not exist; check the path, or start a sweep there first")
    check_file(file)
    keep_others_out(file, writes=False)
    uri = f"file:{quote(str(file))}"
    try:
        with closing(sqlite3.connect(f"{uri}?mode=ro", uri=True)) as connection:
            names = _table_names(connection)
    except sqlite3.Error as error:
        _refuse_unreadable(file, error)
        raise StorageError(
            f"cannot read {file} ({error}); copy it to a folder of your own"
        ) from error
    _check_tables(file, names)
    if "alembic_version" not in names:
        raise EmptyStorageError(f"{file} holds no sweep yet; start one there first")
    url = URL.create("sqlite", database=uri, query={"mode": "ro", "uri": "true"})
    storage = open_database(
        url.render_as_string(),
        {"connect_args": {"timeout": LOCK_TIMEOUT_SECONDS, "isolation_level": None}},
        place=str(file),
        create=False,
    )
    _refuse_another_file(storage.engine, file)
    event.listen(storage.engine, "begin", _begin_reading)
    storage.engine.dispose()
    return CachedDatabase(storage)


def _refuse_another_file(engine: Engine, file: Path) -> None:
    """Have every transaction fail once the file is not where it was when it was opened.

    SQLite goes on in a file that was removed, and all of it is gone with the process; a new
    connection would begin an empty one in its place.
    """
    opened = _identity(file)

    def check(*_: object) -> None:
        if _identity(file) != opened:
            raise StorageError(
                f"{file} was moved, removed, replaced or emptied while it was in use; put it back, "
                f"with {file.name}-wal if there is one, and start again"
            )

    event.listen(engine, "do_connect", check)
    event.listen(engine, "begin", check)


def _identity(file: Path) -> tuple[int, int] | None:
    """What tells a file from another of its name; None if there is none, or nothing in it."""
    try:
        status = file.stat()
    except OSError:
        return None
    if status.st_size == 0:
        return None
    return status.st_dev, status.st_ino


def _refuse_unreadable(file: Path, error: sqlite3.Error) -> None:
    if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
        raise StorageError(f"{file} is not a SQLite database; name another file") from error
    if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_CORRUPT:
        raise StorageError(
            f"{file} is damaged ({error}); restore a copy of it, save what sqlite3's .recover "
            "finds, or name another file"
        ) from error


def _check_tables(file: Path, names: set[str]) -> None:
    # Other programs have studies too; Optuna's stand beside the version of their schema.
    if names and not {"studies", "version_info"} <= names:
        raise StorageError(f"{file} is the database of another program; name another file")


def _table_names(connection: sqlite3.Connection) -> set[str]:
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return {str(name) for (name,) in rows}


def _prepare_file(file: Path) -> None:
    """Make the file a writable WAL database that holds all of Optuna's tables, or none."""
    try:
        with closing(
            sqlite3.connect(file, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)
        ) as connection:
            _check_tables(file, _table_names(connection))
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            complete = "version_info" in _table_names(connection)
    except sqlite3.Error as error:
        _refuse_unreadable(file, error)
        advice = "choose a folder that you may write to"
        if "locked" in str(error):
            advice = HELD
        elif "full" in str(error) or "I/O" in str(error):
            advice = "free some space there, or check the disk"
        raise StorageError(f"cannot write to {file} ({error}); {advice}") from error
    if mode != "wal":
        raise StorageError(f"{file} cannot be shared by processes there; put it on a local disk")
    if not complete:
        _create_tables(file)


def _create_tables(file: Path) -> None:
    # Optuna commits table by table. A process killed half-way would leave a table without its
    # unique index, which no later start would add: so all tables come in one transaction.
    engine = create_engine(
        URL.create("sqlite", database=str(file)),
        connect_args={"timeout": LOCK_TIMEOUT_SECONDS, "isolation_level": None},
    )
    event.listen(engine, "begin", _begin)
    try:
        with engine.begin() as connection:
            BaseModel.metadata.create_all(connection)
    finally:
        engine.dispose()


def _set_synchronous(connection: sqlite3.Connection, record: object) -> None:
    # In WAL mode NORMAL cannot corrupt the file; only a power cut can lose the last commits.
    connection.execute("PRAGMA synchronous = NORMAL")


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    if options.get(READ_ONLY_OPTION) or is_reading():
        _begin_reading(connection)
    else:
        _execute(connection, "BEGIN IMMEDIATE")


def _begin_reading(connection: Connection) -> None:
    # One snapshot for all queries of a read, so that no trial is seen half-written.
    _execute(connection, "BEGIN")


def _execute(connection: Connection, statement: str) -> None:
    """Execute a statement without SQLAlchemy's preparations, which take ten times as long."""
    try:
        connection.connection.execute(statement)
    except sqlite3.Error as error:
        raise DBAPIError.instance(statement, (), error, sqlite3.Error) from error
