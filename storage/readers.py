"""Transactions that only read, and say so: they need not wait for those that write."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

READ_ONLY_OPTION = "sweep_read_only"
"""Connection execution option: this transaction reads, so it must not take the write lock."""

_reading = threading.local()


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
