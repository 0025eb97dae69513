"""Leases: whose worker is gone, what becomes of its trial, with real processes and signals."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from commands import PROCESSES
from helpers import together
from optuna.trial import TrialState
from queues import (
    STORES,
    Clock,
    Remote,
    lease,
    move_to_other_host,
    new_study,
    pull_with,
    remotes,
    store_url,
    trials,
)
from sqlalchemy import event

from storage.engine import open_storage, sql_engine
from storage.leases import LEASE_ATTR
from storage.trials import Claim, LeaseLostError, TrialQueue

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from store_url(request, tmp_path)


@pytest.fixture
def remote(url: str) -> Iterator[Callable[[str], Remote]]:
    yield from remotes(url)


def test_release_puts_the_same_trial_back(url: str, remote: Callable[[str], Remote]) -> None:
    study = new_study(url)
    worker = remote("first")
    claim = worker("claim", [(study._study_id, 1)])
    worker("report", claim, [0.1, 0.2])
    before = trials(url)[0]
    assert worker("release", claim)
    assert not worker("owns", claim)
    assert worker("release", claim), "a repeated call is harmless"
    (waiting,) = trials(url)
    assert waiting.state == TrialState.WAITING
    again = remote("second")("claim", [(study._study_id, 1)])
    assert not worker("release", claim)
    assert (again.number, again.attempt, again.deaths) == (0, 2, 0)
    (after,) = trials(url)
    assert after.state == TrialState.RUNNING
    assert (after.params, after.intermediate_values) == (before.params, {0: 0.1, 1: 0.2})


def test_killed_holder_is_followed_at_once(url: str, remote: Callable[[str], Remote]) -> None:
    study = new_study(url)
    studies = [(study._study_id, 1)]
    worker, observer = remote("first"), remote("second")
    claim = worker("claim", studies)
    worker("report", claim, [0.1, 0.2])
    before = trials(url)[0]
    assert observer("claim", studies) is None
    worker.kill()
    again = observer("claim", studies)  # lease_seconds is 60: no waiting is involved.
    assert (again.trial_id, again.number) == (claim.trial_id, 0)
    assert (again.attempt, again.deaths) == (2, 1)
    (after,) = trials(url)
    assert (after.params, after.intermediate_values) == (before.params, {0: 0.1, 1: 0.2})
    assert observer("finish", again, TrialState.COMPLETE, 0.5)
    assert [trial.state for trial in trials(url)] == [TrialState.COMPLETE]


def test_unreaped_process_counts_as_gone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/sweep.db"
    study = new_study(url)
    studies = [(study._study_id, 1)]
    observer = TrialQueue(study._storage, worker_id="observer")
    code = (
        "import os, signal; from storage.engine import open_storage;"
        "from storage.trials import TrialQueue;"
        f"TrialQueue(open_storage({url!r}), worker_id='child').claim({studies});"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    # A direct child that nobody waits for stays in the process table as a zombie.
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert lease(url)["pid"] == child.pid
        claim = observer.claim(studies)
        assert claim is not None
        assert (claim.attempt, claim.deaths) == (2, 1)


def test_reused_process_id_counts_as_gone(url: str) -> None:
    study = new_study(url)
    studies = [(study._study_id, 1)]
    holder, observer = (TrialQueue(study._storage, worker_id=name) for name in "ho")
    claim = holder.claim(studies)
    assert claim is not None
    assert observer.claim(studies) is None
    stored = lease(url)
    study._storage.set_trial_system_attr(
        claim.trial_id, LEASE_ATTR, stored | {"process_start": stored["process_start"] - 1}
    )
    again = observer.claim(studies)
    assert again is not None
    assert again.attempt == 2


def claim_all(url: str, name: str, studies: list[tuple[int, int]], everybody: Any) -> list[Claim]:
    queue = TrialQueue(open_storage(url), worker_id=name)
    everybody.wait(60)
    claims = []
    while (claim := queue.claim(studies)) is not None:
        claims.append(claim)
    everybody.wait(60)  # Nobody may die before all have looked.
    return claims


def test_eight_observers_of_five_dead_trials(url: str, remote: Callable[[str], Remote]) -> None:
    study = new_study(url)
    studies = [(study._study_id, 5)]
    holders = [remote(f"h{number}") for number in range(5)]
    for holder in holders:
        assert holder("claim", studies) is not None
    for holder in holders:
        holder.kill()
    for attempt in (2, 3):
        everybody = PROCESSES.Barrier(8)
        calls = [(url, f"w{number}", studies, everybody) for number in range(8)]
        claims = [claim for result in together(claim_all, calls) for claim in result]
        assert sorted(claim.number for claim in claims) == [0, 1, 2, 3, 4]
        assert {(claim.attempt, claim.deaths) for claim in claims} == {(attempt, attempt - 1)}
        # All eight have ended by now: the next round finds five dead trials again.


# The clocks disagree by years, and one of them is negative: only differences count.
@pytest.mark.parametrize("start", [0.0, -1e9, 1e9])
def test_lease_of_another_host_is_observed(url: str, start: float) -> None:
    study = new_study(url)
    studies = [(study._study_id, 1)]
    clock = Clock(start)
    holder = TrialQueue(study._storage, worker_id="holder", clock=Clock(5e5))
    observer = TrialQueue(study._storage, worker_id="observer", lease_seconds=60, clock=clock)
    claim = holder.claim(studies)
    assert claim is not None
    move_to_other_host(study, claim)
    assert observer.claim(studies) is None
    clock.now += 59
    assert observer.claim(studies) is None
    holder.renew(claim)
    clock.now += 2
    assert observer.claim(studies) is None  # The renewed lease is seen for the first time.
    clock.now += 59
    assert observer.claim(studies) is None
    assert holder.owns(claim)
    clock.now += 1
    again = observer.claim(studies)
    assert again is not None
    assert (again.number, again.attempt, again.deaths) == (0, 2, 1)
    assert not holder.owns(claim)
    with pytest.raises(LeaseLostError, match="no longer held by holder"):
        holder.renew(claim)
    assert not holder.release(claim)
    assert not holder.finish(claim, TrialState.COMPLETE, 1.0)
    assert observer.finish(again, TrialState.COMPLETE, 0.5)
    assert [trial.value for trial in trials(url)] == [0.5]


def test_observer_that_looks_rarely_is_not_fooled(url: str) -> None:
    study = new_study(url)
    studies = [(study._study_id, 1)]
    clock = Clock()
    holder = TrialQueue(study._storage, worker_id="holder")
    observer = TrialQueue(study._storage, worker_id="observer", clock=clock)
    claim = holder.claim(studies)
    assert claim is not None
    move_to_other_host(study, claim)
    for _ in range(3):
        assert observer.claim(studies) is None
        holder.renew(claim)
        clock.now += 1e6
    assert holder.owns(claim)


def test_slow_observer_cannot_put_back_a_reclaimed_trial(url: str) -> None:
    study = new_study(url)
    studies = [(study._study_id, 1)]
    clock = Clock()
    holder, fast, slow = (
        TrialQueue(study._storage, worker_id=name, clock=clock) for name in ("h", "fast", "slow")
    )
    claim = holder.claim(studies)
    assert claim is not None
    move_to_other_host(study, claim)
    # The queue reads and acts in one go; the delay between the two is made here by hand.
    seen = slow._table.running([study._study_id])[0].lease_text
    assert fast.claim(studies) is None
    clock.now = 60
    again = fast.claim(studies)
    assert again is not None
    # What the slow one saw before it was delayed is out of date in every later state.
    assert not slow._table.requeue(claim.trial_id, seen, died=True)
    assert not slow._table.requeue(claim.trial_id, None, died=True)
    assert fast.owns(again)
    assert fast.release(again)
    assert not slow._table.requeue(claim.trial_id, seen, died=True)
    assert lease(url)["deaths"] == 1


def test_trial_of_a_foreign_program_is_observed_by_its_start(url: str) -> None:
    study = new_study(url)
    studies = [(study._study_id, 1)]
    foreign = study.ask()
    clock = Clock()
    queue = TrialQueue(study._storage, worker_id="w", clock=clock)
    assert queue.claim(studies) is None
    clock.now = 59
    assert queue.claim(studies) is None
    clock.now = 60
    claim = queue.claim(studies)
    assert claim is not None
    assert (claim.number, claim.attempt, claim.deaths) == (foreign.number, 2, 1)


def test_foreign_claim_of_a_released_trial_is_observed(url: str) -> None:
    study = new_study(url)
    studies = [(study._study_id, 1)]
    clock = Clock()
    queue = TrialQueue(study._storage, worker_id="w", clock=clock)
    claim = queue.claim(studies)
    assert claim is not None
    assert queue.release(claim)
    assert study.ask().number == 0
    assert queue.claim(studies) is None
    clock.now = 60
    again = queue.claim(studies)
    assert again is not None
    assert (again.attempt, again.deaths) == (3, 1)


def test_stopped_worker_comes_back_to_a_lost_lease(
    url: str, remote: Callable[[str], Remote]
) -> None:
    study = new_study(url)
    studies = [(study._study_id, 1)]
    clock = Clock()
    observer = TrialQueue(study._storage, worker_id="observer", clock=clock)
    worker = remote("frozen")
    claim = worker("claim", studies)
    worker("renew", claim)
    worker.signal(signal.SIGSTOP)
    assert observer.claim(studies) is None  # Its process is there: only time can tell.
    clock.now = 60
    again = observer.claim(studies)
    assert again is not None
    assert again.attempt == 2
    worker.tell("finish", claim, TrialState.COMPLETE, 1.0)
    worker.signal(signal.SIGCONT)
    assert worker.answer() is False
    assert worker("owns", claim) is False
    assert worker("release", claim) is False
    with pytest.raises(LeaseLostError):
        worker("renew", claim)
    assert observer.finish(again, TrialState.COMPLETE, 0.5)
    assert [(trial.number, trial.value) for trial in trials(url)] == [(0, 0.5)]


def test_workers_killed_at_random_lose_and_repeat_nothing(
    url: str, remote: Callable[[str], Remote]
) -> None:
    study = new_study(url)
    studies = [(study._study_id, 12)]
    for round_ in range(6):
        # Told to claim and killed at whatever point it has reached by then.
        worker = remote(f"w{round_}")
        worker("pending", studies)
        for _ in range(2):
            worker.tell("claim", studies)
        worker.process.join(0.01 * round_)
        worker.kill()
    done = pull_with(url, 4, studies)
    assert done == [(study._study_id, number) for number in range(12)]
    assert [trial.state for trial in trials(url)] == [TrialState.COMPLETE] * 12


def test_renewals_from_a_thread_do_not_disturb_the_finish(url: str) -> None:
    study = new_study(url)
    queue = TrialQueue(study._storage, worker_id="w")
    claim = queue.claim([(study._study_id, 1)])
    assert claim is not None
    stop, beats = threading.Event(), threading.Semaphore(0)

    def renew() -> None:
        while not stop.is_set():
            try:
                queue.renew(claim)
            except LeaseLostError:
                return
            beats.release()

    thread = threading.Thread(target=renew)
    thread.start()
    for _ in range(5):
        assert beats.acquire(timeout=30)
    assert queue.finish(claim, TrialState.COMPLETE, 0.5)
    stop.set()
    thread.join(30)
    assert trials(url)[0].value == 0.5


def test_queue_survives_a_lock_longer_than_the_time_out(tmp_path: Path) -> None:
    file = tmp_path / "sweep.db"
    study = new_study(f"sqlite:///{file}")
    queue = TrialQueue(study._storage, worker_id="w")
    claim = queue.claim([(study._study_id, 1)])
    assert claim is not None
    engine = sql_engine(study._storage)
    engine.dispose()
    tries = threading.Semaphore(0)

    def impatient(connection: sqlite3.Connection, record: object) -> None:
        connection.execute("PRAGMA busy_timeout = 10")

    event.listen(engine, "connect", impatient)
    event.listen(engine, "checkout", lambda *_: tries.release())
    results = []
    thread = threading.Thread(
        target=lambda: results.append(queue.finish(claim, TrialState.COMPLETE, 0.5))
    )
    with closing(sqlite3.connect(file, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        thread.start()
        for _ in range(5):
            assert tries.acquire(timeout=30)
        assert results == []
        holder.execute("ROLLBACK")
    thread.join(30)
    assert results == [True]


def test_lease_holds_no_time(url: str) -> None:
    study = new_study(url)
    claim = TrialQueue(study._storage, worker_id="w").claim([(study._study_id, 1)])
    assert claim is not None
    stored = lease(url)
    keys = "worker host pid process_start token beat attempt deaths"
    assert sorted(stored) == sorted(keys.split())
    assert (stored["worker"], stored["pid"], stored["beat"]) == ("w", os.getpid(), 0)
    assert json.loads(json.dumps(stored)) == stored


def test_unreadable_lease_is_observed_like_none(url: str) -> None:
    study = new_study(url)
    studies = [(study._study_id, 1)]
    clock = Clock()
    holder = TrialQueue(study._storage, worker_id="holder")
    claim = holder.claim(studies)
    assert claim is not None
    study._storage.set_trial_system_attr(claim.trial_id, LEASE_ATTR, "broken")
    assert not holder.owns(claim)
    observer = TrialQueue(study._storage, worker_id="w", clock=clock)
    assert observer.claim(studies) is None
    clock.now = 60
    again = observer.claim(studies)
    assert again is not None


def test_bad_lease_seconds(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/sweep.db")
    with pytest.raises(ValueError, match="lease_seconds must be positive, got 0"):
        TrialQueue(storage, worker_id="w", lease_seconds=0)
