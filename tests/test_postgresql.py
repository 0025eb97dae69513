"""What a database server is asked beside a file: opened at once, away for a while, restarted."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from commands import Command
from helpers import begin_at, make_spec, stop_postgres, together, wait_until
from optuna.trial import TrialState
from queues import new_study
from sqlalchemy import create_engine, event, make_url, text

from storage.engine import open_storage, sql_engine
from storage.errors import StorageError
from storage.leases import LEASE_ATTR
from storage.retries import is_transient, with_retries


def count_studies(url: str) -> int:
    return len(open_storage(url).get_all_studies())


def test_eight_processes_open_one_fresh_postgresql_database(postgres: Callable[[], str]) -> None:
    for url in [postgres() for _ in range(2)]:
        assert together(count_studies, [(url,)] * 8) == [0] * 8


def test_postgresql_read_only(postgres: Callable[[], str]) -> None:
    url = postgres()
    with pytest.raises(StorageError, match="holds no sweep yet"):
        open_storage(url, read_only=True)
    study = new_study(url, queued=1)
    reader = open_storage(url, read_only=True)
    assert len(reader.get_all_trials(study._study_id)) == 1
    with pytest.raises(optuna.exceptions.StorageInternalError):
        optuna.create_study(storage=reader, study_name="two")


def test_a_connection_that_breaks_within_a_read_is_a_passing_failure(
    postgres: Callable[[], str],
) -> None:
    """Optuna reads a second time in the broken session, which is no failure of the connection."""
    url = postgres()
    study = new_study(url, queued=1)
    engine = sql_engine(study._storage)
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    broken: list[int] = []

    def break_once(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "FROM trial_user_attributes" in statement and not broken:
            broken.append(connection.connection.dbapi_connection.info.backend_pid)
            with admin.connect() as other:
                other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": broken[0]})

    event.listen(engine, "before_cursor_execute", break_once)
    read = with_retries(lambda: study._storage.get_all_trials(study._study_id))
    assert broken
    assert [trial.number for trial in read] == [0]
    admin.dispose()


def test_worker_outlives_a_restart_of_its_database(
    postgres: Callable[[], str], postgres_server: Any, tmp_path: Path
) -> None:
    url = postgres()
    store = begin_at(url, make_spec(train={"epochs": 40}, budget={"trials": 2}))
    study_id = store.get_study_id_from_name("tiny")
    with Command("worker", "tiny", "--storage", url, "--threads", "1", cwd=tmp_path) as worker:
        wait_until(lambda: any((t.last_step or 0) >= 2 for t in store.get_all_trials(study_id)))
        stop_postgres(postgres_server, signal.SIGINT)
        with Command("worker", "tiny", "--storage", url, "--threads", "1", cwd=tmp_path) as late:
            try:
                for waiting in (worker, late):
                    waiting.line("does not answer")
            finally:
                postgres_server.ensure_postgres_running()
            for waiting in (worker, late):
                waiting.line("answers again")
                assert waiting.end() == 0, waiting.output
                assert waiting.output.count("does not answer") == 1
        done = open_storage(url).get_all_trials(study_id)
    assert [trial.state for trial in done] == [TrialState.COMPLETE] * 2
    for trial in done:
        assert sorted(trial.intermediate_values) == list(range(1, 41))
        assert trial.system_attrs[LEASE_ATTR]["attempt"] == 1


def test_a_database_that_is_not_there_is_not_waited_for(postgres: Callable[[], str]) -> None:
    missing = make_url(postgres()).set(database="nobody_made_it")
    with pytest.raises(StorageError, match="nobody_made_it") as refusal:
        open_storage(missing.render_as_string(hide_password=False))
    assert not is_transient(refusal.value)
