"""A sweep moves like a file: exported while it runs, imported elsewhere, merged, refused."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from commands import environment, run
from helpers import begin, make_spec, save_checkpoint, url, write_spec
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import get_note, save_note
from sqlalchemy import text
from test_cli import started, wait_for_epochs
from transfers import FINGERPRINT, bring, compute, create, export

from storage.archive_rows import StudyRows
from storage.checkpoints import CheckpointError, CheckpointStore, default_checkpoint_dir
from storage.engine import open_storage, sql_engine
from storage.leases import LEASE_ATTR
from storage.study_tables import StudyTables
from storage.trial_table import TrialTable
from storage.trials import TrialQueue
from sweeps.attributes import CURVES
from sweeps.cli import main
from sweeps.errors import SpecError, SweepError
from sweeps.limits import request_stop, stops
from sweeps.merging import MERGED_FROM
from sweeps.status import read_status
from sweeps.stopping import StopRequest
from sweeps.studies import Addition, create_or_resume, stored_sweep
from sweeps.transfer import export_sweep, import_sweep
from sweeps.worker import Worker, WorkerOptions


def trials(store_url: str, study: str = "tiny") -> list[FrozenTrial]:
    return optuna.load_study(storage=open_storage(store_url), study_name=study).trials


def rows(store_url: str) -> list[StudyRows]:
    """All rows of all studies, with their ids."""
    with sql_engine(open_storage(store_url)).connect() as connection:
        ids = connection.execute(text("SELECT study_id FROM studies ORDER BY study_id")).scalars()
        return [StudyTables().read(connection, study_id) for study_id in list(ids)]


def work(store_url: str, stop: StopRequest | None = None) -> None:
    """A worker of the sweep `tiny` in this process, with its checkpoints in their usual place."""
    torch.set_num_threads(1)
    options = WorkerOptions(worker_id="w", device=torch.device("cpu"), poll_seconds=0.05)
    checkpoints = CheckpointStore(default_checkpoint_dir(store_url))
    Worker(open_storage(store_url), checkpoints, "tiny", options, stop or StopRequest()).run()


def results(found: list[FrozenTrial]) -> list[Any]:
    names = ("train_loss", "val_loss", "val_accuracy", "lr")
    return [
        (t.number, t.state, t.params, t.value, t.intermediate_values,
         [t.system_attrs[CURVES][name] for name in names])
        for t in found
    ]  # fmt: skip


# --- real training ------------------------------------------------------------------------------


def test_a_sweep_that_two_workers_run_goes_on_elsewhere_as_if_it_had_never_moved(
    tmp_path: Path,
) -> None:
    changes: dict[str, Any] = {
        "train": {"epochs": 8}, "budget": {"trials": 3}, "workers": {"threads": 1},
    }  # fmt: skip
    here, there, whole = (tmp_path / place for place in ("here", "there", "whole"))
    for place in (here, there, whole):
        place.mkdir()
        write_spec(place / "tiny.toml", **changes)
    with started(here, "tiny.toml", "--workers", "2") as process:
        wait_for_epochs(here, epochs=1, busy=1)
        line = export_sweep("tiny", tmp_path / "tiny.sweep", url(here), overwrite=False)
        assert process.poll() is None, "the sweep ended before its export did"
        process.kill()
    assert line.startswith("tiny: 1 study, ")
    moved = run("import", "../tiny.sweep", cwd=there)
    assert moved.returncode == 0, moved.stderr
    assert "to go on" in moved.stdout
    interrupted = [t for t in trials(url(there)) if not t.state.is_finished()]
    assert any(t.last_step for t in interrupted)
    for trial in interrupted:
        assert trial.state == TrialState.WAITING
        assert trial.system_attrs[LEASE_ATTR]["released"]
        assert trial.system_attrs[LEASE_ATTR]["deaths"] == 0
    done = run("start", "tiny.toml", "--workers", "1", cwd=there)
    assert done.returncode == 0, done.stderr
    begin(whole, make_spec(**changes))
    work(url(whole))
    assert results(trials(url(there))) == results(trials(url(whole)))
    for trial in interrupted:
        assert trials(url(there))[trial.number].system_attrs[LEASE_ATTR]["attempt"] == 2


@pytest.mark.parametrize("checkpoint", ["as the curve", "ahead of the curve", "behind it", "gone"])
def test_the_checkpoint_and_the_curve_need_not_be_of_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: str
) -> None:
    """History-dependent suggestions and Hyperband's brackets go on as well."""
    spec = make_spec(
        sampler={"type": "TPESampler", "n_startup_trials": 1},
        pruner={"type": "HyperbandPruner", "reduction_factor": 2},
        budget={"trials": 4},
    )
    places = {name: url(tmp_path / name) for name in ("whole", "here", "there")}
    for name in places:
        (tmp_path / name).mkdir()
    for name in ("whole", "here"):
        begin(tmp_path / name, spec)
    work(places["whole"])
    reported: list[int] = []
    with monkeypatch.context() as patch:
        stop = StopRequest()
        store = open_storage(places["here"])
        report = TrialTable.report

        def stop_in_the_second_trial(self: TrialTable, trial_id: int, *arguments: Any) -> bool:
            written = report(self, trial_id, *arguments)
            reported.append(trial_id)
            if reported.count(trial_id) == 2 and len(set(reported)) == 2:
                stop.set()
            return written

        patch.setattr(TrialTable, "report", stop_in_the_second_trial)
        work(places["here"], stop)
    checkpoints = CheckpointStore(default_checkpoint_dir(places["here"]))
    cut = {"ahead of the curve": "> 1", "behind it": "< 0"}.get(checkpoint, "< 0")
    with sql_engine(store).begin() as connection:
        connection.execute(
            text(
                "DELETE FROM trial_intermediate_values WHERE step " + cut + " AND trial_id ="
                " (SELECT trial_id FROM trials WHERE number = 1)"
            )
        )
    if checkpoint == "gone":
        checkpoints.delete("tiny/1")
    elif checkpoint == "behind it":
        state = checkpoints.load("tiny/1")
        assert state is not None
        save_checkpoint(checkpoints, "tiny/1", {**state, "training": None})
    bring(export(places["here"], tmp_path / "tiny.sweep"), places["there"])
    work(places["there"])
    assert results(trials(places["there"])) == results(trials(places["whole"]))
    # At most the best trial's is kept, if it was trained there.
    assert CheckpointStore(default_checkpoint_dir(places["there"])).disk_usage()[0] <= 1


# --- synthetic sweeps ---------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """Two stores of one sweep, each with the same three finished trials of its six."""
    (tmp_path / "b").mkdir()
    ours, theirs = url(tmp_path), url(tmp_path / "b")
    create(ours)
    compute(ours, 3, low=0.02)
    bring(export(ours, tmp_path / "begin.sweep"), theirs)
    return ours, theirs


def contents(store_url: str) -> set[Any]:
    return {(t.state.name, *t.params.values(), t.value) for t in trials(store_url)}


def decorate(store_url: str) -> None:
    """All that Optuna's tables can hold of a study, beside what workers write."""
    store = open_storage(store_url)
    study = optuna.load_study(storage=store, study_name="tiny")
    study.set_user_attr("größe", {"nested": [1, None, "x"]})
    store.set_study_system_attr(study._study_id, "qmc:0", 7)
    trial = optuna.Trial(study, study.trials[1]._trial_id)
    save_note(study, "of the study")
    save_note(trial, "of trial 1\n" * 400)
    key = f"dashboard:artifacts:{trial._trial_id}:a1"
    store.set_study_system_attr(study._study_id, key, json.dumps({"artifact_id": "a1"}))
    asked = study.ask()
    for step, value in enumerate((float("nan"), float("inf"), float("-inf"), 0.1 + 0.2)):
        asked.report(value, step)
    study.tell(asked, state=TrialState.PRUNED)
    study.enqueue_trial({"peak_lr": 0.25}, user_attrs={"label": "queued"})


def test_every_row_survives_the_way_over_postgresql(
    tmp_path: Path,
    postgres: Callable[[], str],
) -> None:
    (tmp_path / "b").mkdir()
    ours, server, back = url(tmp_path), postgres(), url(tmp_path / "b")
    create(ours)
    compute(ours, 3, low=0.02)
    decorate(ours)
    for place in (server, back):
        # So that ids differ.
        other = optuna.create_study(storage=open_storage(place), study_name="another")
        other.enqueue_trial({"x": 1})
    first = export(ours, tmp_path / "first.sweep")
    bring(first, server)
    second = export(server, tmp_path / "second.sweep")
    assert second.read_bytes() == first.read_bytes()
    bring(second, back)
    assert export(back, tmp_path / "third.sweep").read_bytes() == first.read_bytes()
    assert compute(server, 2, low=0.25) == [4, 5]
    for place in (server, back):
        study = optuna.load_study(storage=open_storage(place), study_name="tiny")
        assert get_note(study) == "of the study"
        notes = [get_note(optuna.Trial(study, t._trial_id)) for t in study.trials[:3]]
        assert notes == ["", "of trial 1\n" * 400, ""]
    bring(export(server, tmp_path / "fourth.sweep"), back)
    assert contents(back) == contents(server)
    # Both go on; the server takes what the file has.
    compute(server, 1, low=0.1)
    compute(back, 1, low=0.2)
    compute(back, 1, low=0.25, finish=False)
    bring(export(back, tmp_path / "fifth.sweep"), server, merge=True)
    assert {content[1:] for content in contents(back)} < {c[1:] for c in contents(server)}
    assert [t.number for t in trials(server)] == list(range(9))


def test_what_is_here_already_is_not_imported_again(tmp_path: Path, two: tuple[str, str]) -> None:
    ours, theirs = two
    before = rows(theirs)
    assert "nothing to do" in bring(tmp_path / "begin.sweep", theirs)[0]
    assert rows(theirs) == before
    compute(ours, 1, low=0.1)
    before = rows(ours)
    result, _ = bring(tmp_path / "begin.sweep", ours)
    assert "nothing to do" in result
    assert "and more" in result
    assert rows(ours) == before


def test_a_newer_file_brings_an_older_store_up_to_date(
    tmp_path: Path, two: tuple[str, str]
) -> None:
    ours, theirs = two
    compute(theirs, 1, low=0.1, finish=False)
    bring(export(theirs, tmp_path / "one.sweep"), ours)
    assert [t.state.name for t in trials(ours)][3:] == ["WAITING"]
    checkpoints = CheckpointStore(default_checkpoint_dir(ours))
    assert checkpoints.load("tiny/3") == {"of": 0.1}
    store = open_storage(theirs)
    create(theirs, question="Asked anew?")
    study = optuna.load_study(storage=store, study_name="tiny")
    store.set_trial_intermediate_value(study.trials[3]._trial_id, 2, 0.07)
    store.set_trial_state_values(study.trials[3]._trial_id, TrialState.COMPLETE, [0.07])
    compute(theirs, 1, low=0.15)
    result, _ = bring(export(theirs, tmp_path / "two.sweep"), ours)
    assert "1 trial added, 1 brought further" in result
    assert [t.number for t in trials(ours)] == [0, 1, 2, 3, 4]
    assert contents(ours) == contents(theirs)
    assert checkpoints.load("tiny/3") is None
    assert stored_sweep(open_storage(ours), "tiny").spec.question == "Asked anew?"


def test_what_both_have_computed_is_kept_by_merge_alone(
    tmp_path: Path, two: tuple[str, str]
) -> None:
    ours, theirs = two
    compute(ours, 2, low=0.1)
    compute(theirs, 3, low=0.2)
    compute(theirs, 1, low=0.25, finish=False)
    file = export(theirs, tmp_path / "theirs.sweep")
    before = rows(ours)
    said: list[str] = []
    with pytest.raises(SweepError, match="--merge keeps what both have computed"):
        import_sweep(file, ours, merge=False, rename=None, say=said.append)
    assert rows(ours) == before
    assert said == [
        "tiny: only or further in the file: #5 to #6 (2 trials)",
        "tiny: different trials of the same number: #3 to #4 (2 trials)",
    ]
    result, said = bring(file, ours, merge=True)
    assert "4 trials added" in result
    merged = trials(ours)
    assert [t.number for t in merged] == list(range(9))
    assert [round(t.params["peak_lr"], 3) for t in merged] == [
        0.02, 0.021, 0.022, 0.1, 0.101, 0.202, 0.25, 0.2, 0.201,
    ]  # fmt: skip
    assert [t.system_attrs.get(MERGED_FROM) for t in merged[5:]] == [None, None, [3], [4]]
    assert "#3 as #7, #4 as #8" in said[0]
    assert CheckpointStore(default_checkpoint_dir(ours)).load("tiny/6") == {"of": 0.25}
    # The study has met its budget of 6 but for the interrupted trial, which lies beyond.
    store = open_storage(ours)
    sweep = stored_sweep(store, "tiny")
    assert read_status(store, sweep).done
    assert TrialQueue(store, worker_id="w").claim([(sweep.studies[0].study_id, 6)]) is None
    before = rows(ours)
    for merge in (True, False):
        assert "nothing to do" in bring(file, ours, merge=merge)[0]
    assert rows(ours) == before
    # And the other way round: the same trials, under the other store's numbers.
    bring(export(ours, tmp_path / "ours.sweep"), theirs, merge=True)
    assert len(trials(theirs)) == 9
    finished = {content for content in contents(ours) if content[0] == "COMPLETE"}
    assert finished == {content for content in contents(theirs) if content[0] == "COMPLETE"}


def test_equal_results_of_two_machines_are_one_trial(tmp_path: Path, two: tuple[str, str]) -> None:
    ours, theirs = two
    compute(ours, 1, low=0.1)
    compute(theirs, 1, low=0.1)
    mine, its = trials(ours)[3], trials(theirs)[3]
    assert mine.system_attrs[LEASE_ATTR]["token"] != its.system_attrs[LEASE_ATTR]["token"]
    result, _ = bring(export(theirs, tmp_path / "theirs.sweep"), ours)
    assert "nothing to do" in result
    assert len(trials(ours)) == 4


def test_a_trial_interrupted_here_is_finished_by_the_file(
    tmp_path: Path, two: tuple[str, str]
) -> None:
    ours, theirs = two
    compute(ours, 1, low=0.1, finish=False)
    compute(theirs, 1, low=0.1)
    result, _ = bring(export(theirs, tmp_path / "theirs.sweep"), ours)
    assert "0 trials added, 1 brought further" in result
    assert trials(ours)[3].value == 0.1
    # An interrupted trial with other settings at a number that is taken is kept to go on, too.
    compute(ours, 1, low=0.15)
    compute(theirs, 1, low=0.2, finish=False)
    bring(export(theirs, tmp_path / "theirs.sweep"), ours, merge=True)
    assert [(t.state.name, t.params["peak_lr"]) for t in trials(ours)[4:]] == [
        ("COMPLETE", 0.15), ("WAITING", 0.2),
    ]  # fmt: skip
    assert CheckpointStore(default_checkpoint_dir(ours)).load("tiny/5") == {"of": 0.2}


def test_a_trial_that_a_worker_holds_here_is_left_to_it(
    tmp_path: Path, two: tuple[str, str]
) -> None:
    ours, theirs = two
    compute(theirs, 1, low=0.1, finish=False)
    compute(ours, 1, low=0.1, finish=False)
    CheckpointStore(default_checkpoint_dir(ours)).delete("tiny/3")
    before = rows(ours)
    _, said = bring(export(theirs, tmp_path / "theirs.sweep"), ours)
    assert "workers hold #3 here" in said[0]
    assert rows(ours) == before


def test_another_sweep_of_the_same_name_is_refused(tmp_path: Path, two: tuple[str, str]) -> None:
    _, theirs = two
    file = export(theirs, tmp_path / "tiny.sweep")
    for number, (spec, fingerprint, reason) in enumerate(
        [
            (make_spec(train={"epochs": 9}), FINGERPRINT, "train.epochs: store 9, file 3"),
            (make_spec(budget={"trials": 6}), "0" * 64, "other images"),
        ]
    ):
        place = f"sqlite:///{tmp_path}/{number}.db"
        create_or_resume(open_storage(place), spec, [fingerprint])
        before = rows(place)
        with pytest.raises(SweepError, match=reason):
            bring(file, place, merge=True)
        assert rows(place) == before
    place = f"sqlite:///{tmp_path}/2.db"
    optuna.create_study(storage=open_storage(place), study_name="tiny")
    with pytest.raises(SweepError, match="not of this sweep"):
        bring(file, place)
    result, said = bring(file, place, rename="mine")
    assert "3 trials" in result
    assert "Hyperband" in said[0]
    assert {study.name for study in rows(place)} == {"tiny", "mine"}
    with pytest.raises(SpecError, match="cannot be called"):
        bring(file, place, rename="a/b")


def test_an_import_that_fails_at_its_last_step_leaves_no_row(
    tmp_path: Path, two: tuple[str, str]
) -> None:
    ours, theirs = two
    compute(ours, 1, low=0.1, finish=False)
    file = export(ours, tmp_path / "tiny.sweep")
    before = rows(theirs)
    folder = default_checkpoint_dir(theirs)
    folder.write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot save checkpoint .* has to be a folder"):
        bring(file, theirs)
    assert rows(theirs) == before
    folder.unlink()
    bring(file, theirs)
    assert [path.name for path in folder.iterdir()] == ["tiny%2F3.pt"]
    assert contents(theirs) != contents(ours)  # the interrupted trial waits


def test_each_study_of_a_sweep_is_brought_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    ours, theirs = url(tmp_path), url(tmp_path / "b")
    cells = {"train": {"norm": None}, "each": {"norm": ["group", "fixup"]}}
    create(ours, **cells)
    bring(export(ours, tmp_path / "empty.sweep"), theirs)
    compute(ours, 2, low=0.1, study=1)
    compute(theirs, 1, low=0.2, study=0)
    file = export(ours, tmp_path / "tiny.sweep")
    with pytest.raises(SweepError, match="--merge"):
        bring(file, theirs)
    result, said = bring(file, theirs, merge=True)
    assert "2 trials added" in result
    assert said == []
    found = {study.name: len(study.trials) for study in rows(theirs)}
    assert found == {"tiny/norm=group": 1, "tiny/norm=fixup": 2}
    bring(file, theirs, rename="mine")
    found = {study.name: len(study.trials) for study in rows(theirs)}
    assert found["mine/norm=fixup"] == 2


def test_a_file_asks_no_worker_to_stop(tmp_path: Path, two: tuple[str, str]) -> None:
    ours, theirs = two
    store = open_storage(theirs)
    request_stop(store, stored_sweep(store, "tiny"))
    compute(theirs, 1, low=0.1)
    bring(export(theirs, tmp_path / "tiny.sweep"), ours)
    assert len(trials(ours)) == 4
    store = open_storage(ours)
    assert stops(store, stored_sweep(store, "tiny")) == 0


@pytest.mark.parametrize("edited_here", [True, False])
def test_an_edited_budget_replaces_added_trials_on_both_sides(
    tmp_path: Path, two: tuple[str, str], edited_here: bool
) -> None:
    extended, edited = two[::-1] if edited_here else two
    for place in two:
        create_or_resume(open_storage(place), make_spec(budget={"trials": 6}), [FINGERPRINT],
                         addition=Addition(4))  # fmt: skip
    create_or_resume(open_storage(edited), make_spec(budget={"trials": 8}), [FINGERPRINT])
    bring(export(two[1], tmp_path / "tiny.sweep"), two[0])
    (study,) = stored_sweep(open_storage(two[0]), "tiny").studies
    assert study.budget == 8
    (study,) = stored_sweep(open_storage(extended), "tiny").studies
    assert study.budget == (10 if edited_here else 8)


# --- the command --------------------------------------------------------------------------------


def test_the_command_says_what_it_did_and_refuses_in_one_line(
    tmp_path: Path,
    two: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    def fails(status: int, *arguments: str) -> str:
        code, out, err = command(*arguments)
        assert (code, out) == (status, "")
        (line,) = err.splitlines()
        return line

    (tmp_path / "taken").write_text("mine")
    assert "--force" in fails(1, "export", "tiny", "taken")
    assert (tmp_path / "taken").read_text() == "mine"
    code, out, _ = command("export", "tiny", "taken", "--force")
    assert code == 0
    assert out.startswith("tiny: 1 study, 3 trials, 0 checkpoints, ")
    assert zipfile.is_zipfile(tmp_path / "taken")
    assert "no sweep 'tin'" in fails(1, "export", "tin", "x")
    assert "store itself" in fails(1, "export", "tiny", "sweep.db", "--force")
    assert "store itself" in fails(1, "import", "sweep.db")
    assert "proxy" in fails(1, "export", "tiny", "x", "--storage", "grpc://localhost:1")
    assert "proxy" in fails(1, "import", "taken", "--storage", "grpc://localhost:1")
    assert "does not exist" in fails(1, "import", "absent")
    assert "cannot write" in fails(1, "export", "tiny", "absent/x")
    assert "lists what there is" in fails(2, "export", "tiny")
    code, out, err = command("import", "taken", "--storage", "sqlite:///new.db", "--name", "mine")
    assert code == 0
    assert "imported 1 study, 3 trials, 0 checkpoints" in out
    assert "Hyperband" in err
    assert not list(tmp_path.glob(".*.tmp"))


def test_force_replaces_files_alone(tmp_path: Path, two: tuple[str, str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("file")
    for overwrite in (False, True):
        with pytest.raises(SweepError, match="pipe is a device or a pipe; name a file"):
            export_sweep("tiny", tmp_path / "pipe", two[0], overwrite=overwrite)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "file").write_text("old")
    export_sweep("tiny", tmp_path / "link", two[0], overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert zipfile.is_zipfile(tmp_path / "file")


def test_a_full_disk_leaves_no_file(tmp_path: Path, two: tuple[str, str]) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    (tmp_path / "out").mkdir()
    # An open connection keeps SQLite's shared-memory file, which is larger than the limit, there.
    with contextlib.closing(sqlite3.connect(tmp_path / "sweep.db")) as holder:
        holder.execute("SELECT COUNT(*) FROM studies").fetchone()
        done = subprocess.run(
            [sys.executable, "-P", "-m", "sweeps.cli", "export", "tiny", "out/x"],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
            preexec_fn=limit,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("sweep: cannot write out/x")
    assert not list((tmp_path / "out").iterdir())
