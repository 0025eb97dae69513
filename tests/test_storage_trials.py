"""Claims, results and budgets: a trial is handed out once, with real worker processes."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
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
from sqlalchemy.exc import OperationalError

from storage.engine import open_storage, sql_engine
from storage.leases import LEASE_ATTR
from storage.trial_table import TrialTable
from storage.trials import LeaseLostError, TrialQueue, enqueue

SPACE = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from store_url(request, tmp_path)


@pytest.fixture
def remote(url: str) -> Iterator[Callable[[str], Remote]]:
    yield from remotes(url)


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
