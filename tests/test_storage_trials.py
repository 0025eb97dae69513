"""Claims, leases and budgets, with real worker processes and real signals."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import PROCESSES, Command, begin_at, make_spec, stop_postgres, together, wait_until
from optuna.trial import TrialState
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.exc import OperationalError

from storage.engine import StorageError, open_storage, sql_engine
from storage.leases import LEASE_ATTR
from storage.retries import is_transient, with_retries
from storage.trial_table import TrialTable
from storage.trials import Claim, LeaseLostError, TrialQueue, enqueue

ROOT = Path(__file__).parent.parent
SPACE = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}


# --- fixtures and processes ---------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgresql", "grpc"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "postgresql":
        new_place: Callable[[], str] = request.getfixturevalue("postgres")
        yield new_place()
        return
    file = f"sqlite:///{tmp_path}/sweep.db"
    if request.param == "sqlite":
        yield file
        return
    pytest.importorskip("grpc", reason="gRPC is not installed")
    from storage.serve import StoreServer

    server = StoreServer(file, "127.0.0.1", 0)
    server.start()
    yield f"grpc://127.0.0.1:{server.port}"
    server.stop(grace=0)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, start: float = 0.0) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now


def new_study(url: str, name: str = "study", queued: int = 0) -> optuna.Study:
    study = optuna.create_study(storage=open_storage(url), study_name=name, direction="maximize")
    for number in range(queued):
        assert enqueue(study._storage, study._study_id, {"x": number / 1000}) == number
    return study


def trials(url: str, name: str = "study") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=open_storage(url)).trials


def lease(url: str, number: int = 0) -> dict[str, Any]:
    value = trials(url)[number].system_attrs[LEASE_ATTR]
    assert isinstance(value, dict)
    return value


def pull(url: str, worker_id: str, studies: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Work like a worker whose trials take no time, until nothing is left."""
    queue = TrialQueue(open_storage(url), worker_id=worker_id)
    done = []
    while True:
        claim = queue.claim(studies)
        if claim is not None:
            done.append((claim.study_id, claim.number))
            assert queue.finish(claim, TrialState.COMPLETE, float(claim.number))
        elif queue.pending(studies) == 0:
            return done
        else:
            time.sleep(0.02)


def pull_with(url: str, workers: int, studies: list[tuple[int, int]]) -> list[tuple[int, int]]:
    calls = [(url, f"w{number}", studies) for number in range(workers)]
    return sorted(item for done in together(pull, calls) for item in done)


def _remote(url: str, worker_id: str, pipe: Any) -> None:
    storage = open_storage(url)
    queue = TrialQueue(storage, worker_id=worker_id)
    while True:
        name, arguments = pipe.recv()
        try:
            if name == "report":
                claim, values = arguments
                study = optuna.load_study(study_name="study", storage=storage)
                trial = optuna.Trial(study, claim.trial_id)
                trial.suggest_float("x", 0.0, 1.0)
                for step, value in enumerate(values):
                    trial.report(value, step)
                pipe.send((True, None))
            else:
                pipe.send((True, getattr(queue, name)(*arguments)))
        except BaseException as error:
            pipe.send((False, error))


class Remote:
    """A worker process that does what it is told."""

    def __init__(self, url: str, worker_id: str) -> None:
        self._pipe, there = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=_remote, args=(url, worker_id, there), daemon=True)
        self.process.start()
        there.close()

    def tell(self, name: str, *arguments: Any) -> None:
        self._pipe.send((name, arguments))

    def answer(self) -> Any:
        assert self._pipe.poll(60), "the worker hangs"
        good, value = self._pipe.recv()
        if not good:
            raise value
        return value

    def __call__(self, name: str, *arguments: Any) -> Any:
        self.tell(name, *arguments)
        return self.answer()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(30)
        assert not self.process.is_alive()


@pytest.fixture
def remote(url: str) -> Iterator[Callable[[str], Remote]]:
    started: list[Remote] = []

    def start(worker_id: str) -> Remote:
        started.append(Remote(url, worker_id))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()


# --- claims and budgets -------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite", "grpc"], indirect=True)
def test_eight_processes_take_200_queued_trials_once_each(url: str) -> None:
    study = new_study(url, queued=200)
    done = pull_with(url, 8, [(study._study_id, 200)])
    assert done == [(study._study_id, number) for number in range(200)]
    finished = trials(url)
    assert [trial.number for trial in finished] == list(range(200))
    assert [trial.value for trial in finished] == list(range(200))
    assert {trial.system_attrs[LEASE_ATTR]["attempt"] for trial in finished} == {1}
    assert len({trial.system_attrs[LEASE_ATTR]["worker"] for trial in finished}) > 1


def test_budget_is_exact(url: str) -> None:
    study_id = new_study(url)._study_id
    assert pull_with(url, 8, [(study_id, 10)]) == [(study_id, number) for number in range(10)]
    assert pull_with(url, 8, [(study_id, 10)]) == []
    assert pull_with(url, 8, [(study_id, 13)]) == [(study_id, n) for n in (10, 11, 12)]
    assert [trial.state for trial in trials(url)] == [TrialState.COMPLETE] * 13


def test_two_studies_have_their_own_budgets(url: str) -> None:
    one, two = (new_study(url, name)._study_id for name in ("one", "two"))
    assert len(pull_with(url, 6, [(one, 7), (two, 4)])) == 11
    assert [len(trials(url, name)) for name in ("one", "two")] == [7, 4]


def test_order_queued_first_and_side_by_side(url: str) -> None:
    one, two = new_study(url, "one", queued=2), new_study(url, "two")
    queue = TrialQueue(one._storage, worker_id="w")
    studies = [(two._study_id, 3), (one._study_id, 2)]
    order = []
    while (claim := queue.claim(studies)) is not None:
        order.append(("one" if claim.study_id == one._study_id else "two", claim.number))
    assert order == [("two", 0), ("one", 0), ("two", 1), ("one", 1), ("two", 2)]
    fixed = [trial.system_attrs["fixed_params"] for trial in trials(url, "one")]
    assert fixed == [{"x": 0.0}, {"x": 0.001}]


def test_queued_trial_beyond_the_budget_waits_for_a_larger_one(url: str) -> None:
    study = new_study(url, queued=3)
    assert len(pull_with(url, 2, [(study._study_id, 2)])) == 2
    assert trials(url)[2].state == TrialState.WAITING
    assert pull_with(url, 2, [(study._study_id, 3)]) == [(study._study_id, 2)]


def test_pending_counts_what_others_hold_and_what_is_left(url: str) -> None:
    study = new_study(url)
    studies = [(study._study_id, 3)]
    mine, other = (TrialQueue(study._storage, worker_id=name) for name in ("mine", "other"))
    assert mine.pending(studies) == 3
    first, second = mine.claim(studies), other.claim(studies)
    assert first is not None
    assert second is not None
    assert (mine.pending(studies), other.pending(studies)) == (2, 2)
    third = mine.claim(studies)
    assert third is not None
    assert mine.claim(studies) is None
    assert mine.pending(studies) == 1
    assert other.finish(second, TrialState.FAIL)
    assert (mine.pending(studies), other.pending(studies)) == (0, 2)
    assert mine.release(first)
    assert (mine.pending(studies), other.pending(studies)) == (1, 2)
    assert mine.pending([]) == 0
    assert mine.claim([]) is None


def test_claimed_trial_can_be_used_as_an_optuna_trial(url: str) -> None:
    study = new_study(url)
    # RandomSampler reads no trials: Optuna's cache must know the claimed one all the same.
    sampler = optuna.samplers.RandomSampler(seed=0)
    storage = open_storage(url)
    study = optuna.load_study(study_name="study", storage=storage, sampler=sampler)
    queue = TrialQueue(storage, worker_id="w")
    claim = queue.claim([(study._study_id, 1)])
    assert claim is not None
    trial = optuna.Trial(study, claim.trial_id)
    x = trial.suggest_float("x", 0.0, 1.0)
    trial.report(0.25, 0)
    assert queue.finish(claim, TrialState.COMPLETE, 0.5)
    (stored,) = trials(url)
    assert (stored.params, stored.intermediate_values) == ({"x": x}, {0: 0.25})
    assert (stored.state, stored.value) == (TrialState.COMPLETE, 0.5)
    assert stored.datetime_start is not None
    assert stored.datetime_complete is not None
    age = time.time() - stored.datetime_complete.timestamp()
    assert -5 < stored.duration.total_seconds() < 60  # type: ignore[union-attr]
    assert -5 < age < 60  # Optuna's time zone convention is kept.
    assert study.best_value == 0.5


def test_foreign_optuna_process_and_queue_share_numbers(url: str) -> None:
    study = new_study(url)
    queue = TrialQueue(study._storage, worker_id="w")
    numbers = []
    for _ in range(3):
        numbers.append(study.ask().number)
        claim = queue.claim([(study._study_id, 6)])
        assert claim is not None
        numbers.append(claim.number)
    assert numbers == list(range(6))
    assert queue.claim([(study._study_id, 6)]) is None


# --- results ------------------------------------------------------------------------------------


def test_finish_states_and_values(url: str) -> None:
    study = new_study(url)
    queue = TrialQueue(study._storage, worker_id="w")
    wanted = [
        (TrialState.COMPLETE, 0.5),
        (TrialState.PRUNED, 0.25),
        (TrialState.PRUNED, None),
        (TrialState.FAIL, None),
    ]
    for state, value in wanted:
        claim = queue.claim([(study._study_id, 4)])
        assert claim is not None
        assert queue.finish(claim, state, value)
        assert queue.finish(claim, state, value), "a repeated call is harmless"
        assert not queue.finish(claim, TrialState.COMPLETE, 1.0)
    assert [(trial.state, trial.value) for trial in trials(url)] == wanted
    assert lease(url)["finished"] == "COMPLETE"


def test_finish_refuses_what_optuna_should_not_store(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/sweep.db"
    study = new_study(url)
    queue = TrialQueue(study._storage, worker_id="w")
    claim = queue.claim([(study._study_id, 1)])
    assert claim is not None
    for value in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match="must be finite"):
            queue.finish(claim, TrialState.COMPLETE, value)
    with pytest.raises(ValueError, match="needs a value"):
        queue.finish(claim, TrialState.COMPLETE)
    with pytest.raises(ValueError, match="has no value"):
        queue.finish(claim, TrialState.FAIL, 0.5)
    with pytest.raises(ValueError, match="not as WAITING"):
        queue.finish(claim, TrialState.WAITING)
    assert queue.owns(claim)


def test_trial_finished_by_hand_is_lost(url: str) -> None:
    study = new_study(url)
    queue = TrialQueue(study._storage, worker_id="w")
    claim = queue.claim([(study._study_id, 1)])
    assert claim is not None
    study.tell(claim.number, 9.0)
    assert not queue.owns(claim)
    with pytest.raises(LeaseLostError):
        queue.renew(claim)
    assert not queue.release(claim)
    assert not queue.finish(claim, TrialState.COMPLETE, 0.5)
    assert trials(url)[0].value == 9.0


# --- parameters ---------------------------------------------------------------------------------


def test_parameters_are_written_once_and_by_the_holder_alone(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = new_study(url)
    lost = lose_answers(monkeypatch, "set_params")
    queue, clock = TrialQueue(study._storage, worker_id="w"), Clock()
    claim = queue.claim([(study._study_id, 1)])
    assert claim is not None
    colours = optuna.distributions.CategoricalDistribution(("red", "blue"))
    queue.set_params(claim, {"x": (0.25, SPACE["x"]), "colour": (1.0, colours)})
    assert lost
    (stored,) = trials(url)
    assert stored.params == {"x": 0.25, "colour": "blue"}
    assert stored.distributions == {"x": SPACE["x"], "colour": colours}
    queue.set_params(claim, {"x": (0.5, SPACE["x"]), "y": (0.5, SPACE["x"])})
    assert trials(url)[0].params == {"x": 0.25, "colour": "blue", "y": 0.5}
    other = TrialQueue(study._storage, worker_id="other", clock=clock)
    move_to_other_host(study, claim)
    assert other.claim([(study._study_id, 1)]) is None
    clock.now = 61
    taken = other.claim([(study._study_id, 1)])
    assert taken is not None
    with pytest.raises(LeaseLostError):
        queue.set_params(claim, {"z": (0.5, SPACE["x"])})
    assert "z" not in trials(url)[0].params
    assert other.finish(taken, TrialState.COMPLETE, 0.5)
    with pytest.raises(LeaseLostError):
        other.set_params(taken, {"z": (0.5, SPACE["x"])})


def test_settings_are_fixed_for_one_trial_of_a_study(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, beside = new_study(url), new_study(url, "beside")
    lost = lose_answers(monkeypatch, "fix_params")
    queue = TrialQueue(study._storage, worker_id="w")
    claims = [queue.claim([(study._study_id, 2)]) for _ in range(2)]
    there = queue.claim([(beside._study_id, 1)])
    assert claims[0] is not None
    assert claims[1] is not None
    assert there is not None
    mark = ("carried_from", "other #3")
    assert queue.fix_params(claims[0], {"x": 0.25}, mark=mark)
    assert lost
    assert not queue.fix_params(claims[1], {"x": 0.5}, mark=mark)
    assert not queue.fix_params(claims[1], {"x": 0.25}, mark=("carried_from", "third #1"))
    assert queue.fix_params(there, {"x": 0.25}, mark=mark)
    first, second = trials(url)
    assert first.system_attrs["fixed_params"] == {"x": 0.25}
    assert first.user_attrs == {"carried_from": "other #3"}
    assert "fixed_params" not in second.system_attrs
    assert second.user_attrs == {}
    assert queue.release(claims[1])
    with pytest.raises(LeaseLostError):
        queue.fix_params(claims[1], {"x": 0.5}, mark=("carried_from", "other #4"))
    assert trials(url)[1].user_attrs == {}


def fix(url: str, worker_id: str, study_id: int) -> list[str]:
    """Claim a trial and try the same marks as the others do; return those that it got."""
    queue = TrialQueue(open_storage(url), worker_id=worker_id)
    got = []
    for mark in range(3):
        claim = queue.claim([(study_id, 12)])
        assert claim is not None
        if queue.fix_params(claim, {"x": mark / 10}, mark=("carried_from", str(mark))):
            got.append(str(mark))
        assert queue.finish(claim, TrialState.COMPLETE, 0.5)
    return got


def test_of_workers_that_want_one_mark_at_once_one_gets_it(url: str) -> None:
    study_id = new_study(url)._study_id
    got = together(fix, [(url, f"w{number}", study_id) for number in range(4)])
    assert sorted(mark for each in got for mark in each) == ["0", "1", "2"]
    marks = [trial.user_attrs.get("carried_from") for trial in trials(url)]
    assert len(marks) == 12
    assert sorted(filter(None, marks)) == ["0", "1", "2"]


# --- answers that are lost ----------------------------------------------------------------------


def lose_answers(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Let each first call of an operation go through, and its answer be lost."""
    original = getattr(TrialTable, name)
    lost: list[str] = []

    def operation(self: TrialTable, *arguments: Any, **options: Any) -> Any:
        answer = original(self, *arguments, **options)
        if not lost:
            lost.append(name)
            raise OperationalError("COMMIT", None, ConnectionResetError("connection reset"))
        return answer

    monkeypatch.setattr(TrialTable, name, operation)
    return lost


@pytest.mark.parametrize(("name", "queued"), [("create", 0), ("take", 2)])
def test_claim_whose_answer_was_lost_is_kept(
    url: str, monkeypatch: pytest.MonkeyPatch, name: str, queued: int
) -> None:
    study = new_study(url, queued=queued)
    queue = TrialQueue(study._storage, worker_id="w")
    lost = lose_answers(monkeypatch, name)
    claims = [queue.claim([(study._study_id, 2)]) for _ in range(3)]
    assert lost
    assert [claim and (claim.number, claim.attempt) for claim in claims] == [(0, 1), (1, 1), None]
    for claim in claims[:2]:
        assert claim is not None
        assert queue.finish(claim, TrialState.COMPLETE, 0.5)
    assert [trial.state for trial in trials(url)] == [TrialState.COMPLETE] * 2


@pytest.mark.parametrize("name", ["finish", "requeue"])
def test_end_whose_answer_was_lost_is_known(
    url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    study = new_study(url)
    queue = TrialQueue(study._storage, worker_id="w")
    claim = queue.claim([(study._study_id, 1)])
    assert claim is not None
    lost = lose_answers(monkeypatch, name)
    if name == "finish":
        assert queue.finish(claim, TrialState.COMPLETE, 0.5)
        assert trials(url)[0].value == 0.5
    else:
        assert queue.release(claim)
        assert trials(url)[0].state == TrialState.WAITING
        assert lease(url)["deaths"] == 0
    assert lost


def test_outage_does_not_age_the_leases_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can renew while the store is away; whoever comes back first must not take all."""
    monkeypatch.setattr("storage.retries.ANNOUNCE_SECONDS", 0.0)
    study = new_study(f"sqlite:///{tmp_path}/sweep.db")
    studies = [(study._study_id, 1)]
    holder = TrialQueue(study._storage, worker_id="holder")
    clock = Clock()
    observer = TrialQueue(study._storage, worker_id="observer", clock=clock)
    claim = holder.claim(studies)
    assert claim is not None
    move_to_other_host(study, claim)
    assert observer.claim(studies) is None
    with monkeypatch.context() as patch:
        lost = lose_answers(patch, "unfinished")
        clock.now = 300
        assert observer.pending(studies) == 1
        assert lost
    assert observer.claim(studies) is None
    clock.now = 359
    assert observer.claim(studies) is None
    assert holder.owns(claim)
    clock.now = 360
    assert observer.claim(studies) is not None


# --- leases -------------------------------------------------------------------------------------


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


def move_to_other_host(study: optuna.Study, claim: Claim) -> None:
    stored = study._storage.get_trial_system_attrs(claim.trial_id)[LEASE_ATTR]
    study._storage.set_trial_system_attr(claim.trial_id, LEASE_ATTR, stored | {"host": "elsewhere"})


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


# --- PostgreSQL alone ---------------------------------------------------------------------------


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


# --- small things -------------------------------------------------------------------------------


def test_enqueue_keeps_attributes_and_returns_the_number(url: str) -> None:
    study = new_study(url)
    attributes = {"reason": "baseline", "source": ["paper", 2]}
    study.ask()
    assert enqueue(study._storage, study._study_id, {"x": 0.5}, user_attrs=attributes) == 1
    stored = trials(url)[1]
    assert stored.state == TrialState.WAITING
    assert stored.user_attrs == attributes
    assert stored.system_attrs["fixed_params"] == {"x": 0.5}


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


def test_large_study_is_not_read_row_by_row(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/sweep.db"
    study = new_study(url)
    study.add_trials(
        [optuna.trial.create_trial(value=0.5, params={"x": 0.5}, distributions=SPACE)] * 300
    )
    queue = TrialQueue(study._storage, worker_id="w")
    study.get_trials(deepcopy=False)
    statements: Counter[str] = Counter()
    event.listen(
        sql_engine(study._storage),
        "before_cursor_execute",
        lambda connection, cursor, statement, *rest: statements.update([statement.split()[0]]),
    )
    claim = queue.claim([(study._study_id, 301)])
    assert claim is not None
    assert statements["SELECT"] < 20
