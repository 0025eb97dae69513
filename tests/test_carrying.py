"""Settings carried between the studies of a sweep: real studies, real workers."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import begin, make_spec, make_worker, trials, url
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from storage.engine import open_storage
from storage.trials import TrialQueue
from sweeps import carrying
from sweeps.edits import edits
from sweeps.errors import SpecError
from sweeps.spec import SweepSpec
from sweeps.status import read_status
from sweeps.studies import LABEL, stored_sweep

BATCHES = [64, 128, 256]
NAMES = [f"tiny/global_batch_size={batch}" for batch in BATCHES]


def sweep(**changes: Any) -> SweepSpec:
    table: dict[str, Any] = {
        "train": {"epochs": 1, "global_batch_size": None},
        "each": {"global_batch_size": BATCHES},
        "sampler": {"type": "RandomSampler"},
        "budget": {"trials": 6, "carry_every": 3},
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


def offered(here: int, studies: list[list[FrozenTrial]], **changes: Any) -> list[tuple[str, float]]:
    found = carrying.candidates(sweep(**changes), here, studies)
    return [(each.source, float(each.params["peak_lr"])) for each in found]


def test_the_best_of_each_study_come_first_and_the_nearest_study_of_them() -> None:
    studies = [
        [done(0, 0.01, 0.5), done(1, 0.02, 0.9)],
        [done(0, 0.03, 0.7), done(1, 0.04, 0.6), done(2, 0.05, None)],
        [],
    ]
    assert offered(2, studies) == [
        ("global_batch_size=128 #0", 0.03),
        ("global_batch_size=64 #1", 0.02),
        ("global_batch_size=128 #1", 0.04),
        ("global_batch_size=64 #0", 0.01),
    ]
    # What a study has tried, or tries now, is not for it.
    studies[2] = [done(0, 0.03, 0.4), done(1, 0.02, None)]
    assert [source for source, _ in offered(2, studies)] == [
        "global_batch_size=128 #1",
        "global_batch_size=64 #0",
    ]


def test_what_was_carried_on_is_known_by_where_it_was_found_first() -> None:
    source = "global_batch_size=64 #1"
    studies = [[], [done(4, 0.02, 0.9, carried_from=source)], []]
    assert offered(2, studies) == [(source, 0.02)]
    # Another worker has the mark already, and is about to write the settings.
    studies[2] = [create_trial(state=TrialState.RUNNING, user_attrs={"carried_from": source})]
    assert offered(2, studies) == []


def test_settings_outside_a_study_are_not_carried_to_it() -> None:
    studies = [[done(0, 0.9, 0.9), done(1, 0.02, 0.8)], []]
    cells = {"each": {"global_batch_size": BATCHES[:2]}}
    assert offered(1, studies, **cells) == [("global_batch_size=64 #1", 0.02)]


def test_studies_that_differ_in_one_axis_are_nearer_than_those_that_differ_in_two() -> None:
    each = [
        {"norm": "group", "global_batch_size": 64},
        {"norm": "instance", "global_batch_size": 64},
        {"norm": "group", "global_batch_size": 256},
        {"norm": "group", "global_batch_size": 128},
    ]
    studies = [[], *([done(0, 0.02 + i / 100, 0.5)] for i in range(3))]
    train = {"epochs": 1, "norm": None, "global_batch_size": None}
    assert [source for source, _ in offered(0, studies, each=each, train=train)] == [
        "norm=instance,global_batch_size=64 #0",
        "norm=group,global_batch_size=128 #0",
        "norm=group,global_batch_size=256 #0",
    ]


def run(folder: Path, **changes: Any) -> list[list[FrozenTrial]]:
    folder.mkdir(exist_ok=True)
    begin(folder, sweep(**changes))
    make_worker(folder).run()
    return [trials(folder, name) for name in NAMES]


def test_every_third_trial_tries_what_did_best_elsewhere_within_the_budget(tmp_path: Path) -> None:
    studies = run(tmp_path / "a")
    for here, study in enumerate(studies):
        assert [trial.number for trial in study] == list(range(6)), "the budget is exact"
        marks = [trial.user_attrs.get(carrying.CARRIED) for trial in study]
        assert [mark is not None for mark in marks] == [False, False, True] * 2
        rates = [trial.params["peak_lr"] for trial in study]
        assert len(set(rates)) == 6, "nothing is tried twice"
        for trial in study:
            if carrying.CARRIED in trial.user_attrs:
                cell, _, number = trial.user_attrs[carrying.CARRIED].rpartition(" #")
                source = studies[NAMES.index(f"tiny/{cell}")]
                assert trial.params == source[int(number)].params
                assert NAMES[here] != f"tiny/{cell}"
    # The first that is due: both neighbours of 128 have two trials, and 64 is the nearer in order.
    first = max(studies[0][:2], key=lambda t: t.value or 0.0)
    assert studies[1][2].params["peak_lr"] in (
        first.params["peak_lr"],
        studies[0][2].params["peak_lr"],
    )
    again = run(tmp_path / "b")
    assert [[t.params for t in study] for study in again] == [
        [t.params for t in study] for study in studies
    ], "one worker comes to the same"
    status = read_status(open_storage(url(tmp_path / "a")), stored_sweep_of(tmp_path / "a"))
    assert [study.finished for study in status.studies] == [6, 6, 6]
    assert [bool(trial.carried_from) for trial in status.studies[0].trials] == [
        False, False, True, False, False, True,
    ]  # fmt: skip


def stored_sweep_of(folder: Path) -> Any:
    return stored_sweep(open_storage(url(folder)), "tiny")


def test_nothing_is_carried_unless_asked_for(tmp_path: Path) -> None:
    studies = run(tmp_path, budget={"trials": 3})
    assert not any(carrying.CARRIED in t.user_attrs for study in studies for t in study)


def test_known_settings_run_where_something_is_due(tmp_path: Path) -> None:
    known = [{"label": str(i), "peak_lr": 0.05 + i / 100} for i in range(3)]
    studies = run(tmp_path, budget={"trials": 4, "carry_every": 3}, **{"try": known})
    for study in studies:
        assert [trial.user_attrs.get(LABEL) for trial in study[:3]] == ["0", "1", "2"]
        assert not any(carrying.CARRIED in trial.user_attrs for trial in study)


def test_a_trial_whose_worker_went_before_it_began_keeps_what_it_was_given(tmp_path: Path) -> None:
    store = begin(tmp_path, sweep(budget={"trials": 1, "carry_every": 1}))
    queue = TrialQueue(store, worker_id="gone")
    study_id = store.get_study_id_from_name(NAMES[2])
    claim = queue.claim([(study_id, 1)])
    assert claim is not None
    assert queue.fix_params(claim, {"peak_lr": 0.123}, mark=(carrying.CARRIED, "x #0"))
    assert queue.release(claim)
    make_worker(tmp_path).run()
    (trial,) = trials(tmp_path, NAMES[2])
    assert trial.params == {"peak_lr": 0.123}
    assert trial.state == TrialState.COMPLETE


def test_carried_settings_may_be_pruned(tmp_path: Path) -> None:
    pruner = {"type": "ThresholdPruner", "lower": 0.999}
    store = begin(tmp_path, sweep(train={"epochs": 2, "global_batch_size": None}, pruner=pruner))
    study = optuna.load_study(storage=store, study_name=NAMES[0])
    for rate in (0.1, 0.2):
        study.enqueue_trial({"peak_lr": rate}, user_attrs={LABEL: f"{rate}"})
    make_worker(tmp_path).run()
    carried = [t for t in trials(tmp_path, NAMES[1]) if carrying.CARRIED in t.user_attrs]
    assert [trial.state for trial in carried] == [TrialState.PRUNED] * 2


def test_carrying_may_be_changed_on_resume() -> None:
    (edit,) = edits(sweep(), sweep(budget={"trials": 6, "carry_every": 2}))
    assert str(edit) == "budget.carry_every: 3 → 2 (for trials that begin from now on)"


@pytest.mark.parametrize("value", [-1, 1.5, True, "often"])
def test_a_mistake_is_explained(value: object) -> None:
    with pytest.raises(SpecError, match=r"\[budget\] carry_every = .* not a whole number from 0"):
        sweep(budget={"carry_every": value})
