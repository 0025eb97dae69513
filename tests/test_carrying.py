"""Settings carried between the studies of a sweep: real studies, real workers."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers import begin, make_spec, make_worker, together, trials, url
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from storage.engine import open_storage
from storage.trials import TrialQueue
from sweeps import carrying
from sweeps.attributes import LABEL
from sweeps.edits import edits
from sweeps.errors import SpecError
from sweeps.findings import read_findings, trial_rows
from sweeps.spec import SweepSpec
from sweeps.status import read_status
from sweeps.studies import stored_sweep

TRAIN = {"epochs": 1, "global_batch_size": None, "num_train_images": 200}


def sweep(**changes: Any) -> SweepSpec:
    table: dict[str, Any] = {
        "train": TRAIN,
        "each": {"global_batch_size": [64, 128]},
        "sampler": {"type": "RandomSampler"},
        "budget": {"trials": 10, "carry": 2},
    }
    return make_spec(**{**table, **changes})


def done(number: int, peak_lr: float, value: float | None, **attrs: str) -> FrozenTrial:
    """A complete trial, or, without a value, one that runs."""
    trial = create_trial(
        state=TrialState.RUNNING if value is None else TrialState.COMPLETE,
        value=value,
        params={"peak_lr": peak_lr},
        distributions={"peak_lr": FloatDistribution(0.001, 10.0)},
        user_attrs=attrs,
    )
    trial.number = number
    return trial


def offered(studies: list[list[FrozenTrial]], **changes: Any) -> list[tuple[str, float]]:
    """What the last of some studies may be given."""
    changes = {"each": {"global_batch_size": [64, 128, 256]}, **changes}
    found = carrying.candidates(sweep(**changes), studies)
    return [(each.source, float(each.params["peak_lr"])) for each in found]


def test_the_best_of_each_study_come_first_and_the_nearest_study_of_them() -> None:
    studies = [
        [done(0, 0.01, 0.5), done(1, 0.02, 0.9)],
        [done(0, 0.03, 0.7), done(1, 0.05, 0.6), done(2, 0.06, None)],
        [],
    ]
    # The learning rate grows with the batch.
    assert offered(studies) == [
        ("global_batch_size=128 #0", 0.06),
        ("global_batch_size=64 #1", 0.08),
        ("global_batch_size=128 #1", 0.1),
        ("global_batch_size=64 #0", 0.04),
    ]
    # What a study has tried, or tries now, is not for it.
    studies[2] = [done(0, 0.06, 0.4), done(1, 0.08, None)]
    assert [source for source, _ in offered(studies)] == [
        "global_batch_size=128 #1",
        "global_batch_size=64 #0",
    ]
    assert offered(studies[:1]) == []


def test_what_was_carried_on_is_known_by_where_it_was_found_first() -> None:
    source = "global_batch_size=64 #1"
    studies = [[], [done(4, 0.02, 0.9, carried_from=source)], []]
    assert offered(studies) == [(source, 0.04)]
    # Another worker has the mark already, and is about to write the settings.
    studies[2] = [create_trial(state=TrialState.RUNNING, user_attrs={"carried_from": source})]
    assert offered(studies) == []


def test_a_rate_ends_where_its_range_does_and_other_settings_are_left_out() -> None:
    studies = [[done(0, 0.2, 0.9)], []]
    assert offered(studies) == [("global_batch_size=64 #0", 0.3)]
    choices = {"peak_lr": {"choices": [0.1, 0.2]}}
    assert offered(studies, search=choices) == [("global_batch_size=64 #0", 0.2)]
    assert offered([[done(0, 0.15, 0.9)], []], search=choices) == []
    momentum = {"momentum": {"low": 0.1, "high": 0.9}}
    assert offered(studies, search=momentum) == []


def test_studies_that_differ_in_one_axis_are_nearer_than_those_that_differ_in_two() -> None:
    each = [
        {"norm": "group", "global_batch_size": 256},
        {"norm": "group", "global_batch_size": 128},
        {"norm": "instance", "global_batch_size": 128},
        {"norm": "instance", "global_batch_size": 64},
        {"norm": "group", "global_batch_size": 64},
    ]
    studies = [*([done(0, 0.02 + i / 100, 0.5)] for i in range(4)), []]
    train = {**TRAIN, "norm": None}
    assert [source for source, _ in offered(studies, each=each, train=train)] == [
        "norm=instance,global_batch_size=64 #0",
        "norm=group,global_batch_size=128 #0",
        "norm=group,global_batch_size=256 #0",
        "norm=instance,global_batch_size=128 #0",
    ]


def run(folder: Path, **changes: Any) -> list[list[FrozenTrial]]:
    folder.mkdir(exist_ok=True)
    spec = sweep(**changes)
    begin(folder, spec)
    make_worker(folder).run()
    return [trials(folder, name) for name in map(spec.study_name, spec.cells)]


def test_the_first_trials_of_a_study_try_what_did_best_before_within_the_budget(
    tmp_path: Path,
) -> None:
    first, second = run(tmp_path / "a")
    assert [len(first), len(second)] == [10, 10], "the budget is exact"
    begun = sorted([*first, *second], key=lambda t: t.datetime_start or datetime.max)
    eight = carrying.HEAD_START
    assert begun[:eight] == first[:eight]
    assert [t.number for t in begun[eight : eight + 4]] == [eight, 0, eight + 1, 1]
    marks = [trial.user_attrs.get(carrying.CARRIED) for trial in [*first, *second]]
    assert [mark is not None for mark in marks] == [False] * 10 + [True] * 2 + [False] * 8
    best = max(first[: eight + 1], key=lambda t: (t.value, -t.number))
    assert marks[10] == f"global_batch_size=64 #{best.number}"
    assert second[0].params["peak_lr"] == min(0.3, 2 * best.params["peak_lr"])
    assert second[0].params != second[1].params
    again = run(tmp_path / "b")
    assert [t.params for t in again[1]] == [t.params for t in second], "one worker is determined"
    store = open_storage(url(tmp_path / "a"))
    status = read_status(store, stored_sweep(store, "tiny"))
    assert [study.finished for study in status.studies] == [10, 10]
    assert [trial.carried_from for trial in status.studies[1].trials[:3]] == [*marks[10:12], ""]
    columns, rows = trial_rows([read_findings(store, stored_sweep(store, "tiny"))])
    assert columns[-1] == "carried_from"
    assert [row["carried_from"] for row in rows[10:13]] == [*marks[10:12], ""]


def test_known_settings_come_first(tmp_path: Path) -> None:
    known = [{"label": str(i), "peak_lr": 0.05 + i / 100} for i in range(2)]
    first, second = run(tmp_path, budget={"trials": 4, "carry": 1}, **{"try": known})
    assert not any(carrying.CARRIED in trial.user_attrs for trial in first)
    assert [trial.user_attrs.get(LABEL) for trial in second] == ["0", "1", None, None]
    assert [carrying.CARRIED in trial.user_attrs for trial in second] == [False] * 2 + [True, False]


def test_a_trial_whose_worker_went_before_it_began_keeps_what_it_was_given(tmp_path: Path) -> None:
    store = begin(tmp_path, sweep(budget={"trials": 1, "carry": 1}))
    queue = TrialQueue(store, worker_id="gone")
    name = sweep().study_name(sweep().cells[1])
    claim = queue.claim([(store.get_study_id_from_name(name), 1)])
    assert claim is not None
    assert queue.fix_params(claim, {"peak_lr": 0.123}, mark=(carrying.CARRIED, "x #0"))
    assert queue.release(claim)
    make_worker(tmp_path).run()
    (trial,) = trials(tmp_path, name)
    assert trial.params == {"peak_lr": 0.123}
    assert trial.state == TrialState.COMPLETE


def test_workers_side_by_side_carry_nothing_twice(tmp_path: Path) -> None:
    begin(tmp_path, sweep(budget={"trials": 6, "carry": 4}))
    together(work, [(tmp_path, f"w{number}") for number in range(2)])
    for name in map(sweep().study_name, sweep().cells):
        found = trials(tmp_path, name)
        assert [trial.state for trial in found] == [TrialState.COMPLETE] * 6
        assert len({trial.params["peak_lr"] for trial in found}) == 6
        marks = [t.user_attrs[carrying.CARRIED] for t in found if carrying.CARRIED in t.user_attrs]
        assert len(set(marks)) == len(marks)


def work(folder: Path, worker_id: str) -> None:
    make_worker(folder, worker_id=worker_id).run()


def test_carried_settings_may_be_pruned(tmp_path: Path) -> None:
    known = [{"label": "known", "when": {"global_batch_size": 64}, "peak_lr": 0.1}]
    pruner = {"type": "ThresholdPruner", "lower": 0.999}
    train = {**TRAIN, "epochs": 2}
    budget = {"trials": 2, "carry": 1}
    first, second = run(tmp_path, train=train, pruner=pruner, budget=budget, **{"try": known})
    assert [trial.state for trial in first] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert second[0].params == {"peak_lr": 0.2}
    assert second[0].state == TrialState.PRUNED


def test_carrying_may_be_changed_on_resume() -> None:
    (edit,) = edits(sweep(), sweep(budget={"trials": 10, "carry": 1}))
    assert str(edit) == "budget.carry: 2 → 1 (for trials that begin from now on)"


@pytest.mark.parametrize("value", [-1, 1.5, True, "often"])
def test_a_mistake_is_explained(value: object) -> None:
    with pytest.raises(SpecError, match=r"\[budget\] carry = .* not a whole number from 0"):
        sweep(budget={"carry": value})
