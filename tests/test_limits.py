"""Budgets of time and epochs, requests to stop, and what a finished trial leaves on disk."""

import json
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from commands import Command, command, environment, run
from helpers import begin, make_spec, make_worker, trials, url, wait_until, write_spec
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from test_cli import wait_for_epochs

from storage.checkpoints import CheckpointStore
from storage.engine import open_storage
from sweeps import limits
from sweeps.errors import SpecError
from sweeps.limits import SESSION, request_stop, union
from sweeps.status import read_status
from sweeps.studies import Addition, create_or_resume, stored_sweep


def curves(tmp_path: Path) -> list[dict[int, float]]:
    return [t.intermediate_values for t in trials(tmp_path)]


def test_an_epoch_budget_ends_the_sweep_and_raised_it_goes_on_as_if_never_ended(
    tmp_path: Path,
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    begin(whole, make_spec())
    make_worker(whole).run()

    store = begin(parts, make_spec(budget={"trials": 3, "epochs_total": 5}))
    make_worker(parts).run()
    assert [len(curve) for curve in curves(parts)] == [3, 2]
    status = read_status(store, stored_sweep(store, "tiny"))
    assert (status.done, status.spent) == (True, "epochs_total = 5")
    make_worker(parts).run()  # starting again adds nothing
    assert [len(curve) for curve in curves(parts)] == [3, 2]

    begin(parts, make_spec(budget={"trials": 3, "epochs_total": 100}))
    make_worker(parts).run()
    assert curves(parts) == curves(whole)
    assert [t.params for t in trials(parts)] == [t.params for t in trials(whole)]


def test_a_wall_clock_budget_counts_the_time_of_all_workers_once(tmp_path: Path) -> None:
    store = begin(tmp_path, make_spec(budget={"trials": 3, "hours": 2.0}))
    sweep = stored_sweep(store, "tiny")
    spans = {"a": [0.0, 3600.0], "b": [1800.0, 5400.0], "c": [90000.0, 91800.0]}
    for worker, span in spans.items():
        store.set_study_system_attr(sweep.studies[0].study_id, SESSION + worker, span)
    assert limits.seconds_spent(store, sweep) == 7200.0
    make_worker(tmp_path).run()
    assert trials(tmp_path) == []
    store = begin(tmp_path, make_spec(budget={"trials": 3, "hours": 3.0}))
    make_worker(tmp_path).run()
    assert len(trials(tmp_path)) == 3
    assert 7200 < limits.seconds_spent(store, sweep) < 3 * 3600


def test_a_wall_clock_budget_that_ends_the_workers_is_spent_for_everybody(tmp_path: Path) -> None:
    spec = write_spec(tmp_path / "tiny.toml", budget={"trials": 3, "hours": 1e-6})
    done = run("start", str(spec), "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the budget hours = 1e-06 is spent, with 3 trials not finished" in done.stdout
    assert "before the budget was met" not in done.stderr
    joined = run("worker", "tiny", cwd=tmp_path)
    assert joined.returncode == 0
    last = joined.stderr.splitlines()[-1]
    assert last == "tiny: the budget hours = 1e-06 is spent; 0 trials ended here"
    assert "confirm:" not in done.stdout  # there is no best trial


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=8))
def test_union_is_the_number_of_covered_places(pairs: list[tuple[int, int]]) -> None:
    spans = [(min(pair), max(pair)) for pair in pairs]
    covered = {place for begin, end in spans for place in range(begin, end)}
    assert union(spans) == len(covered)


def test_a_request_to_stop_ends_workers_everywhere_and_a_later_start_ignores_it(
    tmp_path: Path,
) -> None:
    spec = write_spec(tmp_path / "tiny.toml", train={"epochs": 100000})
    # Where `make_worker` looks for what they leave.
    env = {**environment(), "SWEEP_CHECKPOINT_DIR": str(tmp_path / "checkpoints")}
    start = subprocess.Popen(
        command("start", str(spec), "--workers", "1"),
        cwd=tmp_path, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    joined: subprocess.Popen[str] | None = None
    try:
        wait_for_epochs(tmp_path, 1, busy=1)
        joined = subprocess.Popen(
            command("worker", "tiny", "--threads", "1"),
            cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for_epochs(tmp_path, 1, busy=2)
        stopped = run("stop", "tiny", cwd=tmp_path)
        assert (stopped.returncode, stopped.stdout) == (0, "")
        assert "2 trials went back to the queue" in stopped.stderr
        assert start.wait(30) == 130
        assert joined.wait(30) == 0
    finally:
        for process in (start, joined):
            if process is not None:
                process.kill()
                process.communicate()
    assert {t.state for t in trials(tmp_path)} == {TrialState.WAITING}
    before = [len(curve) for curve in curves(tmp_path)]
    again = make_worker(tmp_path, worker_id="later")
    timer = threading.Thread(target=lambda: stop_when_grown(tmp_path, before), daemon=True)
    timer.start()
    again.run()
    assert [len(c) for c in curves(tmp_path)] > before


def test_a_request_to_stop_reaches_workers_that_are_still_starting(tmp_path: Path) -> None:
    spec = write_spec(tmp_path / "tiny.toml", train={"epochs": 100000})
    with Command("start", str(spec), "--workers", "1", cwd=tmp_path) as start:
        start.line("1 worker; store")
        store = open_storage(url(tmp_path))
        request_stop(store, stored_sweep(store, "tiny"))
        assert start.end() == 130
    assert not [t for t in trials(tmp_path) if t.state == TrialState.RUNNING]


def stop_when_grown(tmp_path: Path, before: list[int]) -> None:
    wait_until(lambda: [len(c) for c in curves(tmp_path)] > before)
    store = open_storage(url(tmp_path))
    request_stop(store, stored_sweep(store, "tiny"))


def test_stopping_what_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    begin(tmp_path, make_spec())
    refused = run("stop", "tinny", cwd=tmp_path)
    assert refused.returncode == 1
    assert "tiny" in refused.stderr
    nothing = run("stop", "tiny", cwd=tmp_path)
    assert nothing.returncode == 0
    assert "no trial was running" in nothing.stderr


@pytest.mark.parametrize(("keep", "left"), [("best", 1), ("all", 3), ("none", 0)])
def test_finished_trials_keep_the_checkpoints_that_the_rule_names(
    tmp_path: Path, keep: str, left: int
) -> None:
    store = begin(tmp_path, make_spec(budget={"trials": 3, "keep_checkpoints": keep}))
    worker = make_worker(tmp_path)
    worker.run()
    checkpoints = CheckpointStore(tmp_path / "checkpoints")
    assert checkpoints.disk_usage("tiny/")[0] == left
    best = read_status(store, stored_sweep(store, "tiny")).studies[0].best
    assert best is not None
    if keep == "best":
        kept = checkpoints.load(f"tiny/{best.number}")
        assert kept is not None
        assert json.loads(kept["config"])["peak_lr"] == best.params["peak_lr"]
        assert json.loads(kept["training"]["history"])[-1]["val_accuracy"] == best.accuracy


def test_added_trials_stay_and_an_edited_budget_replaces_them(tmp_path: Path) -> None:
    spec = write_spec(tmp_path / "tiny.toml", budget={"trials": 1}, train={"epochs": 1})
    refused = run("start", str(spec), "--add-trials", "2", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--set trials=N" in refused.stderr

    def begun(*arguments: str) -> tuple[int, str]:
        done = run("start", str(spec), *arguments, "--workers", "1", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return len(trials(tmp_path)), done.stderr

    assert begun()[0] == 1
    count, said = begun("--add-trials", "2")
    assert count == 3
    assert "trials: 1 → 3" in said
    assert begun()[0] == 3
    count, said = begun("--set", "trials=4")
    assert count == 4
    assert re.search(r"budget\.trials: 1 → 4", said)
    assert begun()[0] == 4


def test_trials_are_added_once_however_often_the_store_has_to_be_asked(tmp_path: Path) -> None:
    store = begin(tmp_path, make_spec())
    fingerprints = [stored_sweep(store, "tiny").studies[0].fingerprint]
    addition = Addition(2)
    for _ in range(2):
        edits = create_or_resume(store, make_spec(), fingerprints, addition=addition)
        assert [(edit.before, edit.after) for edit in edits] == [(3, 5)]
    assert stored_sweep(store, "tiny").studies[0].budget == 5
    spec, addition = make_spec(budget={"trials": 4}), Addition(1)
    for _ in range(2):
        create_or_resume(store, spec, fingerprints, addition=addition)
    assert stored_sweep(store, "tiny").studies[0].budget == 5


def test_a_changed_range_is_searched_from_now_on(tmp_path: Path) -> None:
    begin(tmp_path, make_spec(train={"epochs": 1}))
    make_worker(tmp_path).run()
    wider = {"peak_lr": {"low": 0.4, "high": 0.5, "log": True}}
    begin(tmp_path, make_spec(train={"epochs": 1}, search=wider, budget={"trials": 5}))
    make_worker(tmp_path).run()
    rates = [t.params["peak_lr"] for t in trials(tmp_path)]
    assert [rate >= 0.4 for rate in rates] == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
    "limit", [{"hours": 0}, {"hours": True}, {"epochs_total": 1.5}, {"keep_checkpoints": "last"}]
)
def test_limits_that_mean_nothing_are_refused(limit: dict[str, Any]) -> None:
    (name,) = limit
    with pytest.raises(SpecError, match=name):
        make_spec(budget=limit)


def test_sigterm_in_a_long_update_ends_the_worker_and_puts_its_trial_back(tmp_path: Path) -> None:
    """An update here takes minutes: ResNet-18 in full width with a batch of thousands."""
    begin(tmp_path, make_spec(train={
        "dataset": "digits", "model": "resnet18", "width_factor": 4.0, "num_groups": 2,
        "global_batch_size": 4096,
    }))  # fmt: skip
    worker = subprocess.Popen(
        command("worker", "tiny", "--threads", "1"), cwd=tmp_path, env=environment()
    )
    try:
        wait_until(lambda: bool([t for t in trials(tmp_path) if t.params]))
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 130
    finally:
        worker.kill()
        worker.wait()
    (trial,) = trials(tmp_path)
    assert trial.state == TrialState.WAITING


def test_a_stored_sweep_is_changed_by_its_name_alone(tmp_path: Path) -> None:
    begin(tmp_path, make_spec(each={"norm": ["group", "layer"]}, train={"norm": None}))

    def shown(*arguments: str) -> dict[str, Any]:
        done = run("show", "tiny", *arguments, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    before = shown()
    changed = shown("--set", "hours=2", "--set", "search.peak_lr.high=0.5")
    assert changed["budget"] == {**before["budget"], "hours": 2.0}
    assert changed["search"]["peak_lr"]["high"] == 0.5
    assert {k: changed[k] for k in ("name", "train", "each")} == {
        k: before[k] for k in ("name", "train", "each")
    }
    assert shown("--name", "other") == {**before, "name": "other"}
    wrong = run("show", "tiny", "--set", "norm=fixup", cwd=tmp_path)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "norm is enumerated by [each]" in wrong.stderr
