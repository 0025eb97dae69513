"""A storage URL becomes an Optuna storage that many worker processes may use at once.

Optuna's own SQLite storage is not safe for that: its transactions start as readers, so two
workers can both find a trial waiting and both run it, and processes that create the same new
file crash each other. :func:`open_storage` creates a file under a lock beside it, turns on
write-ahead logging, and starts every transaction of a worker as a writer (``BEGIN IMMEDIATE``),
which makes each of Optuna's operations atomic. One machine owns a SQLite file at a time, on a
local disk; workers on several machines use PostgreSQL, or reach the file through `sweep serve`
(:mod:`storage.serve`).
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from sqlalchemy.engine import URL, Connection, Engine

    from storage.database import Database

LOCK_TIMEOUT_SECONDS = 60.0
"""How long one SQLite operation waits for other processes before it fails as "locked"."""

READ_ONLY_OPTION = "sweep_read_only"
"""Connection execution option: this transaction reads, so it must not take the write lock."""

_PAUSE_SECONDS = 2.0
_reading = threading.local()

_CREATE_ATTEMPTS = 12
# Seconds, but for the last, in milliseconds.
_LIBPQ_LIMITS = {
    "connect_timeout": 8,
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
_ADVISORY_KEY = 0x5357_4545_50  # "SWEEP"


class StorageError(Exception):
    """A storage that cannot be used as asked; the message is one line and says what to do."""


class StorageURLError(StorageError):
    """What was given as a storage URL names no storage, whatever stands where."""


class EmptyStorageError(StorageError):
    """A database that can be read and holds no sweep yet."""


class StorageAwayError(StorageError):
    """A server that does not answer, but may do so later: it restarts, or its network is gone."""

    transient = True


def sqlite_path(url: str) -> Path | None:
    """Return the absolute path of the database file behind a SQLite URL.

    Returns None for any other URL, for an in-memory database and for text that is no URL.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return None
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
        return None
    return Path(parsed.database).absolute()


def open_storage(
    url: str, *, read_only: bool = False, lock_seconds: float | None = None
) -> BaseStorage:
    """Open the storage at ``url``, creating the database if it does not exist yet.

    Safe to call from any number of processes at once, also for a database that does not exist.

    Args:
        url: ``sqlite:///file.db``, ``postgresql+psycopg://user@host/name``, another SQLAlchemy
            URL that Optuna supports, or ``grpc://host:port`` for one that `sweep serve` serves.
        read_only: for status displays. Never creates anything; on SQLite it never takes the
            write lock either, so it cannot hold up a worker nor be held up by one.
        lock_seconds: how long one SQLite operation waits for other processes; None is
            :data:`LOCK_TIMEOUT_SECONDS`. Short where failures are retried anyway: no signal
            is handled during the wait.

    Raises:
        StorageError: the URL is not usable, nobody serves it (:class:`StorageAwayError`), the
            database is missing (``read_only``), is locked for longer than
            :data:`LOCK_TIMEOUT_SECONDS`, belongs to another program or to another version of
            Optuna, or its driver is not installed.
    """
    parsed = check_url(url)
    if is_grpc(url):
        from storage.remote import open_remote

        return open_remote(url, read_only=read_only)
    file = sqlite_path(url)
    if file is None:
        return _open_server(parsed, read_only=read_only)
    if read_only:
        return _open_sqlite_read_only(file)
    return _open_sqlite(file, parsed, lock_seconds or LOCK_TIMEOUT_SECONDS)


def check_url(url: str) -> URL:
    """Refuse a storage URL that cannot work, as far as that shows without opening anything.

    Raises:
        StorageURLError: it is no URL, or that of an in-memory database.
        StorageError: it is that of a file that cannot be there.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if "://" not in url:
        path = Path(url).expanduser().absolute()
        raise StorageURLError(f"{url!r} is not a storage URL; for a file write sqlite:///{path}")
    if is_grpc(url):
        grpc_address(url)
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise StorageURLError(
            f"{url!r} is not a storage URL; expected sqlite:///FILE or postgresql+psycopg://…"
        ) from error
    if parsed.get_backend_name() == "sqlite":
        file = sqlite_path(url)
        if file is None:
            raise StorageURLError(
                f"{url!r} is not a database file, and workers are processes that could not share "
                "an in-memory database; write sqlite:///FILE"
            )
        _check_file(file)
    return parsed


def is_grpc(url: str) -> bool:
    """Whether a URL is that of a store that another process serves."""
    return url.startswith("grpc://")


def grpc_address(url: str) -> tuple[str, int]:
    """Return host and port of a ``grpc://HOST:PORT`` URL.

    Raises:
        StorageURLError: it is not of that form.
        StorageError: gRPC is not installed.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.path not in ("", "/"):
        raise StorageURLError(f"{url!r} is not the address of a server; write grpc://HOST:PORT")
    require_grpc(url)
    return host, port


def require_grpc(purpose: str) -> None:
    """Refuse to go on without the packages of the extra ``grpc``.

    Raises:
        StorageError: they are not installed.
    """
    for name in ("grpc", "google", "google.protobuf"):
        if find_spec(name) is None:
            raise StorageError(f"{purpose} needs gRPC; run pip install grpcio protobuf")


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
    if file is not None:
        try:
            with closing(sqlite3.connect(file, timeout=5)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error:
            return  # others still work on it; the last of them to leave does this


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


@contextmanager
def reading() -> Iterator[None]:
    """Let the transactions that this thread begins within the block be readers.

    For those of Optuna's own sessions, which know no execution options.
    """
    before = is_reading()
    _reading.on = True
    try:
        yield
    finally:
        _reading.on = before


def is_reading() -> bool:
    """Whether this thread is within :func:`reading`."""
    return bool(getattr(_reading, "on", False))


def reader_options(engine: Engine) -> dict[str, Any]:
    """Return the execution options of a connection that only reads.

    On SQLite its queries see one moment; on a server each sees its own, in no transaction, which
    would be two more trips to it.
    """
    options: dict[str, Any] = {READ_ONLY_OPTION: True}
    if engine.dialect.name == "postgresql":
        options["isolation_level"] = "AUTOCOMMIT"
    return options


# --- SQLite -------------------------------------------------------------------------------------


def _open_sqlite(file: Path, url: URL, lock_seconds: float) -> BaseStorage:
    from filelock import FileLock, Timeout
    from sqlalchemy import event

    from storage.database import CachedDatabase

    _check_file(file)
    lock_file = file.with_name(file.name + ".lock")
    try:
        with FileLock(lock_file, timeout=LOCK_TIMEOUT_SECONDS):
            _prepare_file(file)
            storage = _rdb_storage(
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
    event.listen(storage.engine, "connect", _set_synchronous)
    event.listen(storage.engine, "begin", _begin)
    # The pooled connection from construction has not seen the events.
    storage.engine.dispose()
    return CachedDatabase(storage)


def _open_sqlite_read_only(file: Path) -> BaseStorage:
    from sqlalchemy import event
    from sqlalchemy.engine import URL

    from storage.database import CachedDatabase

    if not file.is_file():
        _check_file(file)
        raise StorageError(f"{file} does not exist; check the path, or start a sweep there first")
    _check_file(file)
    uri = f"file:{quote(str(file))}"
    try:
        with closing(sqlite3.connect(f"{uri}?mode=ro", uri=True)) as connection:
            names = _table_names(connection)
    except sqlite3.Error as error:
        _refuse_other_formats(file, error)
        raise StorageError(
            f"cannot read {file} ({error}); copy it to a folder of your own"
        ) from error
    _check_tables(file, names)
    if "alembic_version" not in names:
        raise EmptyStorageError(f"{file} holds no sweep yet; start one there first")
    url = URL.create("sqlite", database=uri, query={"mode": "ro", "uri": "true"})
    storage = _rdb_storage(
        url.render_as_string(),
        {"connect_args": {"timeout": LOCK_TIMEOUT_SECONDS, "isolation_level": None}},
        place=str(file),
        create=False,
    )
    event.listen(storage.engine, "begin", _begin_reading)
    storage.engine.dispose()
    return CachedDatabase(storage)


def _check_file(file: Path) -> None:
    if file.is_dir():
        raise StorageError(f"{file} is a folder; name a database file in it, such as sweep.db")
    if not file.parent.is_dir():
        raise StorageError(f"the folder {file.parent} does not exist; create it first")
    # The file's content is SQLite's to read: closing a descriptor of our own would drop the
    # locks that this process holds on the file through SQLite, and another process, believing
    # itself alone, would then delete the write-ahead log under us.
    if file.exists() and not os.access(file, os.R_OK):
        raise StorageError(f"cannot read {file} (permission denied)")


def _refuse_other_formats(file: Path, error: sqlite3.Error) -> None:
    if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
        raise StorageError(f"{file} is not a SQLite database; name another file") from error


def _check_tables(file: Path, names: set[str]) -> None:
    if names and "studies" not in names:
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
        _refuse_other_formats(file, error)
        advice = "choose a folder that you may write to"
        if "locked" in str(error):
            advice = "another process holds it; wait or find that process"
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
    from optuna.storages._rdb.models import BaseModel
    from sqlalchemy import create_engine, event
    from sqlalchemy.engine import URL

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
    from sqlalchemy.exc import DBAPIError

    try:
        connection.connection.execute(statement)
    except sqlite3.Error as error:
        raise DBAPIError.instance(statement, (), error, sqlite3.Error) from error


# --- database servers ---------------------------------------------------------------------------


def _open_server(url: URL, *, read_only: bool) -> BaseStorage:
    from storage.database import CachedDatabase

    options: dict[str, Any] = {"pool_pre_ping": False}  # but see _ping_after_a_pause
    if url.drivername in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"):
        # Nobody waits for ever for a machine that is gone.
        args = {k: v for k, v in _LIBPQ_LIMITS.items() if k not in url.query}
        options["connect_args"] = args
    if read_only and url.get_backend_name() == "postgresql":
        options["execution_options"] = {"postgresql_readonly": True}
    text = url.render_as_string(hide_password=False)
    place = url.render_as_string(hide_password=True)
    storage = _rdb_storage(text, options, place=place, create=not read_only)
    _ping_after_a_pause(storage.engine)
    return CachedDatabase(storage)


def _ping_after_a_pause(engine: Engine) -> None:
    """Ask a connection that nobody used for a while whether it still is one.

    SQLAlchemy would ask before each transaction, which is one more trip to the server. One that
    breaks between two transactions in a row fails as within one (:mod:`storage.retries`).
    """
    from sqlalchemy import event
    from sqlalchemy.exc import DBAPIError, InvalidatePoolError

    def used(connection: Any, record: Any) -> None:
        record.info["used"] = time.monotonic()

    def ask(connection: Any, record: Any, proxy: Any) -> None:
        if time.monotonic() - record.info.get("used", time.monotonic()) < _PAUSE_SECONDS:
            return
        driver = engine.dialect.dbapi
        assert driver is not None
        try:
            alive = engine.dialect.do_ping(connection)
        except (DBAPIError, driver.Error):
            alive = False
        if not alive:
            raise InvalidatePoolError

    event.listen(engine, "checkin", used)
    event.listen(engine, "checkout", ask)
    # The pooled connection from construction has not seen the events.
    engine.dispose()


def _rdb_storage(url: str, options: dict[str, Any], *, place: str, create: bool = True) -> Database:
    """Construct Optuna's storage; ``place`` names it in messages (no password)."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError, NoSuchModuleError

    from storage.database import Database

    # Optuna takes the URL for a format string.
    template = url.replace("{", "{{").replace("}", "}}")
    attempt = 0
    while True:
        attempt += 1
        try:
            return Database(template, engine_kwargs=options, skip_table_creation=not create)
        except (ImportError, NoSuchModuleError) as error:
            raise _missing_driver(url) from error
        except (DBAPIError, StorageInternalError, AssertionError) as error:
            # Two processes that create the same tables at once: one of them gets "already
            # exists" or a unique violation, and finds everything in place on its next try.
            if create and attempt < _CREATE_ATTEMPTS and _lost_creation_race(error):
                time.sleep(random.uniform(0.5, 1.0) * min(0.05 * 2**attempt, 2.0))
                continue
            raise _cannot_open(place, error, create=create) from error
        except RuntimeError as error:
            # Optuna's refusal of a foreign schema version, which names the upgrade command.
            advice = " ".join(str(error).split()).replace("$STORAGE_URL", repr(place))
            raise StorageError(f"{place}: {advice}") from error


def _lost_creation_race(error: BaseException) -> bool:
    from sqlalchemy.exc import IntegrityError

    cause = error.__cause__ if error.__cause__ is not None else error
    text = f"{error} {cause}".lower()
    words = ("already exists", "duplicate", "unique", "deadlock", "concurrent")
    return (
        isinstance(error, IntegrityError | AssertionError)
        or isinstance(cause, IntegrityError)
        or any(word in text for word in words)
    )


def _cannot_open(place: str, error: BaseException, *, create: bool) -> StorageError:
    from sqlalchemy.exc import OperationalError

    cause = error.__cause__ if error.__cause__ is not None else error
    reason = (str(getattr(cause, "orig", cause)).strip() or type(cause).__name__).splitlines()[0]
    missing = any(word in reason for word in ("does not exist", "doesn't exist", "no such table"))
    if not create and missing:
        return EmptyStorageError(f"{place} holds no sweep yet ({reason}); start one there first")
    refused = (
        "authentication", "password", "pg_hba", "does not exist", "not known", "denied",
        "Unknown database", "SSL",
    )  # fmt: skip
    # Only servers come back.
    lost = "://" in place and any(isinstance(e, OperationalError) for e in (error, cause))
    away = lost and not any(word in reason for word in refused)
    return (StorageAwayError if away else StorageError)(
        f"cannot open {place} ({reason}); check the address, the account and the network"
    )


def _missing_driver(url: str) -> StorageError:
    scheme = url.split("://", 1)[0]
    database = scheme.partition("+")[0]
    if database in ("postgres", "postgresql"):
        return StorageError(
            f"no driver for {scheme}; run pip install 'psycopg[binary]' "
            "and write the URL as postgresql+psycopg://…"
        )
    if database in ("mysql", "mariadb"):
        return StorageError(
            f"no driver for {scheme}; run pip install pymysql and write mysql+pymysql://…"
        )
    return StorageURLError(
        f"no driver for {scheme}; use sqlite:///FILE, postgresql+psycopg://… or grpc://HOST:PORT"
    )
