"""What people are told of an error that ends a command."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from sweeps.exits import told_of


def test_a_database_on_a_full_disk_wants_space_and_no_copy(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'full.db'}")
    with engine.connect() as connection:
        connection.execute(text("CREATE TABLE t (x BLOB)"))
        connection.execute(text("PRAGMA max_page_count = 3"))
        with pytest.raises(OperationalError) as full:
            connection.execute(text("INSERT INTO t VALUES (zeroblob(100000))"))
    engine.dispose()
    told = told_of(full.value)
    assert told is not None
    message, code = told
    assert code == 1
    assert message is not None
    assert message.endswith("free some space there, then run this again")
