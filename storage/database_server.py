"""A database server, which many worker processes of several machines may use at once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InvalidatePoolError

from storage.database import CachedDatabase, open_database

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from sqlalchemy.engine import URL, Engine

_PAUSE_SECONDS = 2.0

# Seconds, but for the last, in milliseconds.
_LIBPQ_LIMITS = {
    "connect_timeout": 8,
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


def open_server(url: URL, *, read_only: bool) -> BaseStorage:
    """Open a server's database; create its tables if it has none, unless ``read_only``.

    Raises:
        StorageError: as :func:`storage.engine.open_storage`.
    """
    options: dict[str, Any] = {"pool_pre_ping": False}  # but see _ping_after_a_pause
    if url.drivername in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"):
        # Nobody waits for ever for a machine that is gone.
        args = {k: v for k, v in _LIBPQ_LIMITS.items() if k not in url.query}
        options["connect_args"] = args
    if read_only and url.get_backend_name() == "postgresql":
        options["execution_options"] = {"postgresql_readonly": True}
    text = url.render_as_string(hide_password=False)
    place = url.render_as_string(hide_password=True)
    storage = open_database(text, options, place=place, create=not read_only)
    _ping_after_a_pause(storage.engine)
    return CachedDatabase(storage)


def _ping_after_a_pause(engine: Engine) -> None:
    """Ask a connection that nobody used for a while whether it still is one.

    SQLAlchemy would ask before each transaction, which is one more trip to the server. One that
    breaks between two transactions in a row fails as within one (:mod:`storage.retries`).
    """

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
