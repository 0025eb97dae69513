"""Opening a storage: creation by many processes at once, readers beside writers, messages."""

from __future__ import annotations

import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from commands import PROCESSES
from filelock import FileLock
from helpers import together
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from storage.engine import close_storage, open_storage, sql_engine
from storage.errors import StorageAwayError, StorageError
from storage.retries import is_transient, with_retries
from storage.trials import TrialQueue
from storage.urls import sqlite_path


def open_and_create(url: str, rounds: Any) -> list[int]:
    ids = []
    for number in range(3):
        rounds.wait(60)
        storage = open_storage(url.format(number))
        study = optuna.create_study(storage=storage, study_name="one", load_if_exists=True)
        ids.append(study._study_id)
    return ids


def open_and_die(url: str) -> None:
    open_storage(url)


@contextmanager
def write_lock(file: Path, kind: str = "EXCLUSIVE") -> Iterator[None]:
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute(f"BEGIN {kind}")
        yield
        connection.execute("ROLLBACK")


def test_eight_processes_open_one_fresh_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/" + "{}.db"
    ids = together(open_and_create, [(url, PROCESSES.Barrier(8))] * 8)
    assert ids == [[1, 1, 1]] * 8


def test_creation_waits_for_the_lock_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.sqlite.LOCK_TIMEOUT_SECONDS", 0.1)
    with FileLock(tmp_path / "a.db.lock"):
        assert "a.db.lock has been held by another process" in message(f"sqlite:///{tmp_path}/a.db")
        assert not (tmp_path / "a.db").exists()
    open_storage(f"sqlite:///{tmp_path}/a.db")
    with write_lock(tmp_path / "a.db"):
        assert "database is locked); another process" in message(f"sqlite:///{tmp_path}/a.db")


def test_killed_creation_leaves_a_usable_file(tmp_path: Path) -> None:
    for number in range(8):
        file = tmp_path / f"{number}.db"
        process = PROCESSES.Process(target=open_and_die, args=(f"sqlite:///{file}",))
        process.start()
        process.join(random.uniform(0.0, 0.4))
        process.kill()
        process.join(30)
        storage = open_storage(f"sqlite:///{file}")
        optuna.create_study(storage=storage, study_name="one")
        with pytest.raises(optuna.exceptions.DuplicatedStudyError):
            optuna.create_study(storage=storage, study_name="one")
        with closing(sqlite3.connect(file)) as connection:
            indexes = connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")
            assert ("ix_studies_study_name",) in indexes.fetchall()


def test_worker_connections_are_wal_writers_from_the_start(tmp_path: Path) -> None:
    file = tmp_path / "a.db"
    engine = sql_engine(open_storage(f"sqlite:///{file}"))
    with engine.begin() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 1
        with (
            closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as other,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            other.execute("BEGIN IMMEDIATE")


@pytest.mark.parametrize("kind", ["IMMEDIATE", "EXCLUSIVE"])
def test_reader_works_while_the_write_lock_is_held(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.db"
    study = optuna.create_study(storage=open_storage(f"sqlite:///{file}"), study_name="one")
    study.add_trial(optuna.trial.create_trial(value=0.5))
    began = time.monotonic()
    with write_lock(file, kind):
        reader = open_storage(f"sqlite:///{file}", read_only=True)
        (trial,) = optuna.load_study(study_name="one", storage=reader).trials
        assert trial.value == 0.5
    assert time.monotonic() - began < 20  # Far below the time-out of a lock.


def test_open_read_never_blocks_a_writer(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    study = optuna.create_study(storage=open_storage(url), study_name="one")
    with sql_engine(open_storage(url, read_only=True)).connect() as connection:
        count = text("SELECT count(*) FROM trials")
        assert connection.execute(count).scalar() == 0
        study.add_trial(optuna.trial.create_trial(value=0.5))
        assert connection.execute(count).scalar() == 0  # One snapshot for the whole read.
        connection.rollback()
        assert connection.execute(count).scalar() == 1


def test_read_only_storage_refuses_to_write(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    open_storage(url)
    with pytest.raises(optuna.exceptions.StorageInternalError) as error:
        optuna.create_study(storage=open_storage(url, read_only=True))
    assert not is_transient(error.value)


def test_read_only_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"a\.db does not exist; .* start a sweep there first"):
        open_storage(f"sqlite:///{tmp_path}/a.db", read_only=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.db").touch()
    with pytest.raises(StorageError, match="holds no sweep yet"):
        open_storage(f"sqlite:///{tmp_path}/b.db", read_only=True)
    assert (tmp_path / "b.db").stat().st_size == 0


def test_odd_file_names(tmp_path: Path) -> None:
    for name in ("with space.db", "{braces}.db", "per%cent.db", "häuser.db", "ha#sh.db"):
        url = f"sqlite:///{tmp_path}/{name}"
        optuna.create_study(storage=open_storage(url), study_name="one")
        file = sqlite_path(url)
        assert file is not None
        assert file.is_file()
        reader = open_storage(url, read_only=True)
        assert [study.study_name for study in reader.get_all_studies()] == ["one"]


def test_relative_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_storage("sqlite:///a.db")
    assert sqlite_path("sqlite:///a.db") == tmp_path / "a.db"
    assert (tmp_path / "a.db").is_file()


def test_sqlite_path() -> None:
    assert sqlite_path("sqlite:////data/a.db") == Path("/data/a.db")
    assert sqlite_path("sqlite+pysqlite:////data/a.db?timeout=5") == Path("/data/a.db")
    for url in ("sqlite://", "sqlite:///:memory:", "postgresql+psycopg://h/n", "a.db", ""):
        assert sqlite_path(url) is None


def test_import_is_cheap() -> None:
    code = (
        "import sys, storage.engine, storage.trials, storage.checkpoints;"
        "print([m for m in ('optuna', 'torch', 'sqlalchemy', 'filelock') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


# --- messages -----------------------------------------------------------------------------------


def message(url: str, *, read_only: bool = False) -> str:
    with pytest.raises(StorageError) as error:
        open_storage(url, read_only=read_only)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_plain_path_is_answered_with_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"sqlite:///{tmp_path}/sweep.db" in message("sweep.db")
    assert "sqlite:////data/sweep.db" in message("/data/sweep.db")
    assert "not a storage URL" in message("")


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=true"])
def test_in_memory_is_refused(url: str) -> None:
    assert "processes that could not share" in message(url)


@pytest.mark.parametrize("read_only", [False, True])
def test_unusable_files(tmp_path: Path, read_only: bool) -> None:
    (tmp_path / "text.db").write_text("This is not a database, and long enough to see that.")
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE notes (note)")
    with closing(sqlite3.connect(tmp_path / "clinic.db")) as connection:
        connection.execute("CREATE TABLE studies (patient)")
    open_storage(f"sqlite:///{tmp_path}/whole.db")
    (tmp_path / "half.db").write_bytes((tmp_path / "whole.db").read_bytes()[:5000])
    cases = {
        "text.db": "not a SQLite database",
        "half.db": "is damaged (database disk image is malformed); restore a copy",
        "clinic.db": "database of another program",
        "other.db": "database of another program",
        "no/a.db": f"folder {tmp_path}/no does not exist",
        "": "is a folder; name a database file in it",
        "x" * 300: "(File name too long); name another file",
    }
    for name, expected in cases.items():
        assert expected in message(f"sqlite:///{tmp_path}/{name}", read_only=read_only)
    for name, table in (("other.db", "notes"), ("clinic.db", "studies")):
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [(table,)]


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder nobody may write to")
def test_unwritable_folder() -> None:
    assert "cannot write in /sys/kernel" in message("sqlite:////sys/kernel/sweep.db")


def test_unwritable_file(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write to every file")
    url = f"sqlite:///{tmp_path}/a.db"
    open_storage(url)
    (tmp_path / "a.db").chmod(0o400)
    assert "choose a folder that you may write to" in message(url)


@pytest.mark.parametrize("read_only", [False, True])
def test_other_schema_version(tmp_path: Path, read_only: bool) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    open_storage(url)
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    advice = message(url, read_only=read_only)
    assert f"optuna storage upgrade --storage '{url}'" in advice
    assert "$STORAGE_URL" not in advice


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_whose_tables_are_damaged(tmp_path: Path, read_only: bool) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    close_storage(open_storage(url), url)
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'version_info'"
        ).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with (tmp_path / "a.db").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    assert "restore a copy of it" in message(url, read_only=read_only)


def test_servers() -> None:
    assert "pip install 'psycopg[binary]'" in message("postgresql+pg8000://me@host/name")
    assert "mysql+pymysql" in message("mysql+mysqldb://me@host/name")
    for mistyped in ("mysql2", "postgresql2", "mariadbs+pymysql"):
        assert f"no driver for {mistyped}; use sqlite" in message(f"{mistyped}://me@host/name")
    assert "no driver for nonsense" in message("nonsense://me@host/name")
    assert "write grpc://HOST:PORT" in message("grpc://host")
    try:
        import grpc  # noqa: F401
    except ImportError:
        assert "pip install grpcio" in message("grpc://host:13000")


def test_unreachable_server_is_named_without_its_password() -> None:
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not installed")
    answer = message("postgresql+psycopg://me:secret@127.0.0.1:1/name")
    assert "127.0.0.1" in answer
    assert "secret" not in answer
    with pytest.raises(StorageAwayError) as away:
        open_storage("postgresql+psycopg://me:secret@127.0.0.1:1/name")
    assert is_transient(away.value)


def test_storage_without_a_database_cannot_be_claimed_from() -> None:
    with pytest.raises(StorageError, match="cannot claim trials through InMemoryStorage"):
        TrialQueue(optuna.storages.InMemoryStorage(), worker_id="w")


# --- retries ------------------------------------------------------------------------------------


def test_with_retries_survives_a_lock_longer_than_the_time_out(tmp_path: Path) -> None:
    file = tmp_path / "a.db"
    open_storage(f"sqlite:///{file}")
    engine = create_engine(f"sqlite:///{file}", connect_args={"timeout": 0.01})
    failures = threading.Semaphore(0)
    results = []

    def write() -> str:
        try:
            with engine.begin() as connection:
                connection.execute(text("UPDATE version_info SET library_version = 'x'"))
        except OperationalError:
            failures.release()
            raise
        return "written"

    worker = threading.Thread(target=lambda: results.append(with_retries(write)))
    with write_lock(file):
        worker.start()
        for _ in range(3):
            assert failures.acquire(timeout=30)
        assert results == []
    worker.join(30)
    assert results == ["written"]


def test_with_retries_gives_up_in_time_and_passes_other_errors_on(tmp_path: Path) -> None:
    file = tmp_path / "a.db"
    open_storage(f"sqlite:///{file}")
    engine = create_engine(f"sqlite:///{file}", connect_args={"timeout": 0.01})
    calls = []

    def run(statement: str) -> None:
        calls.append(statement)
        with engine.begin() as connection:
            connection.execute(text(statement))

    with write_lock(file), pytest.raises(OperationalError, match="locked"):
        with_retries(lambda: run("DELETE FROM studies"), total_seconds=0.2)
    assert len(calls) > 1
    calls.clear()
    with pytest.raises(OperationalError, match="no such table"):
        with_retries(lambda: run("DELETE FROM missing"))
    with pytest.raises(KeyError):
        with_retries(lambda: {}["x"])
    assert len(calls) == 1


def test_opening_again_keeps_this_process_locks(tmp_path: Path) -> None:
    """A second open in one process must not let the others delete the write-ahead log.

    POSIX locks are dropped when any descriptor of the file is closed. If opening did that, the
    last other process to leave would take itself for the last of all and remove the log, and
    what this process reads would stand still from then on.
    """
    import optuna

    url = f"sqlite:///{tmp_path / 'sweep.db'}"
    study = optuna.create_study(storage=open_storage(url), study_name="s")
    watcher = open_storage(url, read_only=True)
    open_storage(url)
    for number in range(3):
        other = (
            "import optuna\n"
            "from storage.engine import open_storage\n"
            f"study = optuna.load_study(storage=open_storage({url!r}), study_name='s')\n"
            "study.tell(study.ask(), 1.0)\n"
        )
        subprocess.run([sys.executable, "-c", other], check=True, capture_output=True)
        assert (tmp_path / "sweep.db-wal").exists()
        assert len(watcher.get_all_trials(study._study_id)) == number + 1
        assert len(study.trials) == number + 1


def remove(file: Path) -> None:
    file.unlink()


def move(file: Path) -> None:
    file.rename(file.with_name("elsewhere.db"))


def replace(file: Path) -> None:
    file.with_name("empty").touch()
    file.with_name("empty").replace(file)


def empty(file: Path) -> None:
    os.truncate(file, 0)


@pytest.mark.parametrize("harm", [remove, move, replace, empty])
def test_nobody_goes_on_in_a_file_that_has_gone(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    file = tmp_path / "a.db"
    url = f"sqlite:///{file}"
    storage = open_storage(url)
    study_id = optuna.create_study(storage=storage)._study_id
    queue = TrialQueue(storage, worker_id="w")
    reader = open_storage(url, read_only=True)
    assert len(reader.get_all_studies()) == 1
    harm(file)
    said = f"{file} was moved, removed, replaced or emptied while it was in use; put it back"
    for operation in (lambda: queue.claim([(study_id, 1)]), reader.get_all_studies):
        with pytest.raises(StorageError, match=re.escape(said)):
            operation()
    close_storage(storage, url)
    assert file.exists() == (harm in (replace, empty))
    if harm is move:
        file.with_name("elsewhere.db").rename(file)
        assert queue.claim([(study_id, 1)]) is not None
        assert len(reader.get_all_trials(study_id)) == 1
