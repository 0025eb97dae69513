"""`sweep delete`: all of a sweep and nothing else, never under a worker, whatever cuts it short."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from commands import Command, run
from helpers import begin, begin_at, make_spec, save_checkpoint, trials, url, wait_until
from optuna.storages import BaseStorage
from optuna.storages._rdb.models import BaseModel
from optuna.trial import TrialState, create_trial
from queues import STORES, move_to_other_host, new_study, store_url
from rich.console import Console
from sqlalchemy import select
from terminal import Terminal

from storage.checkpoints import CheckpointStore
from storage.deletion import delete_studies
from storage.engine import open_storage, sql_engine
from storage.errors import StorageError
from storage.leases import LEASE_ATTR, parse_lease
from storage.trials import TrialQueue
from sweeps import search
from sweeps.confirm import enqueue_runs
from sweeps.delete import delete_sweep
from sweeps.errors import SweepError
from sweeps.spec import SweepSpec
from sweeps.studies import stored_names, stored_sweep

CELLS: dict[str, Any] = {"train": {"norm": None}, "each": {"norm": ["group", "layer"]}}


@pytest.fixture(params=STORES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from store_url(request, tmp_path)


@pytest.fixture(autouse=True)
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointStore:
    """Where the checkpoints of any store are."""
    monkeypatch.setenv("SWEEP_CHECKPOINT_DIR", str(tmp_path / "kept"))
    return CheckpointStore(tmp_path / "kept")


def complete(store: BaseStorage, spec: SweepSpec, checkpoints: CheckpointStore) -> None:
    """A complete trial in each study, with its checkpoint."""
    for cell in spec.cells:
        study = optuna.load_study(storage=store, study_name=spec.study_name(cell))
        study.add_trial(
            create_trial(
                value=0.5,
                params={"peak_lr": 0.1},
                distributions=search.distributions(spec.search),
                user_attrs={"outcome": "complete"},
                intermediate_values={1: 0.4, 2: 0.5},
            )
        )
        save_checkpoint(checkpoints, f"{study.study_name}/0", {"epoch": 2})


def confirm(store: BaseStorage, name: str = "tiny") -> None:
    fingerprints = [study.fingerprint for study in stored_sweep(store, name).studies]
    enqueue_runs(store, name, fingerprints, top=1, seeds=2)


def delete(storage_url: str, name: str = "tiny", **options: Any) -> str:
    said = io.StringIO()
    assert delete_sweep(name, storage_url, yes=True, err=Console(file=said), **options) == 0
    return said.getvalue()


def rows(storage_url: str) -> dict[str, list[tuple[Any, ...]]]:
    """All that a database holds, by table."""
    with sql_engine(open_storage(storage_url)).connect() as connection:
        return {
            name: sorted(map(tuple, connection.execute(select(table))), key=str)
            for name, table in BaseModel.metadata.tables.items()
        }


def files(checkpoints: CheckpointStore) -> set[str]:
    return {path.name for path in checkpoints.root.iterdir()}


def test_a_sweep_goes_with_its_confirmation_and_nothing_else(
    place: str, tmp_path: Path, checkpoints: CheckpointStore
) -> None:
    database = url(tmp_path) if place.startswith("grpc") else place
    other = make_spec("tiny-2")
    complete(begin_at(place, other), other, checkpoints)
    before, kept = rows(database), files(checkpoints)
    spec = make_spec(**CELLS, **{"try": [{"label": "known", "peak_lr": 0.05}]})
    store = begin_at(place, spec)
    complete(store, spec, checkpoints)
    confirm(store)
    save_checkpoint(checkpoints, "tiny-confirm/norm=group/1", {"epoch": 1})
    (checkpoints.root / ".tiny%2Fnorm=group%2F1.pt.0123456789abcdef.tmp").touch()
    for study in (
        *stored_sweep(store, "tiny").studies,
        *stored_sweep(store, "tiny-confirm").studies,
    ):
        store.get_all_trials(study.study_id)  # which a server then has in its memory
    said = delete(place)
    assert said.startswith("deleted tiny and its confirmation tiny-confirm: 4 studies, 12 trials, ")
    assert rows(database) == before
    assert files(checkpoints) == kept
    # SQLite gives the numbers of what is gone to the next, also beside a server.
    begin_at(database, make_spec(**CELLS))
    again = open_storage(place)
    for study in stored_sweep(again, "tiny").studies:
        assert again.get_all_trials(study.study_id) == []
    assert "tiny and its" not in delete(place)
    assert stored_names(open_storage(place)) == ["tiny-2"]


@pytest.mark.parametrize("place", ["sqlite", "grpc"], indirect=True)
def test_nothing_is_deleted_under_a_worker_that_came_last(place: str) -> None:
    """It claimed a trial after everybody had looked."""
    idle, busy = new_study(place, "idle", queued=1), new_study(place, "busy", queued=2)
    ids = [idle._study_id, busy._study_id]
    queue = TrialQueue(busy._storage, worker_id="late")
    claim = queue.claim([(busy._study_id, 2)])
    assert claim is not None
    ((study_id, number, lease),) = delete_studies(idle._storage, ids)
    assert (study_id, number, parse_lease(lease)["worker"]) == (busy._study_id, 0, "late")
    assert len(idle.trials + busy.trials) == 3
    assert queue.finish(claim, TrialState.COMPLETE, 0.5)
    assert delete_studies(idle._storage, ids) == []
    assert open_storage(place).get_all_studies() == []
    assert delete_studies(idle._storage, ids) == []


def test_a_live_worker_is_named_and_a_dead_one_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path, make_spec(train={"epochs": 100_000}))
    with Command("worker", "tiny", "--threads", "1", cwd=tmp_path) as worker:
        wait_until(lambda: any((t.last_step or 0) >= 1 for t in trials(tmp_path)))
        name = trials(tmp_path)[0].system_attrs[LEASE_ATTR]["worker"]
        refused = run("delete", "tiny", "--yes", cwd=tmp_path)
        assert refused.returncode == 1
        assert refused.stderr == (
            f"sweep: tiny was not deleted: 1 trial of tiny is held by {name}; sweep stop tiny ends "
            "that\n"
        )
        assert trials(tmp_path)[0].state == TrialState.RUNNING
        worker.process.kill()
        worker.process.wait()
    assert list(tmp_path.glob("sweep.db.checkpoints/*.pt"))
    monkeypatch.delenv("SWEEP_CHECKPOINT_DIR")
    assert delete(url(tmp_path)).startswith("deleted tiny: 1 study, 1 trial, ")
    assert not list(tmp_path.glob("sweep.db.checkpoints/*"))


def test_a_worker_of_another_machine_is_one_that_renews_its_lease(tmp_path: Path) -> None:
    store = begin(tmp_path, make_spec())
    study = optuna.load_study(storage=store, study_name="tiny")
    queue = TrialQueue(store, worker_id="far")
    claim = queue.claim([(study._study_id, 3)])
    assert claim is not None
    move_to_other_host(study, claim)
    ended, pause = threading.Event(), 0.1

    def renew() -> None:
        while not ended.wait(pause):
            queue.renew(claim)

    working = threading.Thread(target=renew)
    working.start()
    try:
        with pytest.raises(SweepError, match="1 trial of tiny is held by far; sweep stop tiny"):
            delete(url(tmp_path))
    finally:
        ended.set()
        working.join()
    assert stored_names(store) == ["tiny"]
    said = delete(url(tmp_path), lease_seconds=0.5)
    assert "watching for up to 0.5 s" in said
    assert stored_names(store) == []


class Killed(BaseException):
    """A kill -9 at a chosen place."""


def test_a_delete_that_was_cut_short_is_ended_by_the_next(
    tmp_path: Path, checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(**CELLS)
    store = begin(tmp_path, spec)
    complete(store, spec, checkpoints)
    confirm(store)
    save_checkpoint(checkpoints, "tiny-confirm/norm=group/1", {"epoch": 1})

    def killed(*_: object) -> None:
        raise Killed

    for place in ("storage.study_tables.StudyTables.delete", f"{CheckpointStore.__module__}."
                  "CheckpointStore.delete_all"):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            with pytest.raises(Killed):
                delete(url(tmp_path))
        assert len(files(checkpoints)) == 3
        whole = place.endswith("StudyTables.delete")
        assert stored_names(store) == (["tiny", "tiny-confirm"] if whole else [])
    said = delete(url(tmp_path))
    assert said == "deleted tiny: 0.0 MB of checkpoints, which an earlier delete left\n"
    assert not files(checkpoints)
    with pytest.raises(SweepError, match="no sweep 'tiny'; it holds none"):
        delete(url(tmp_path))


def test_a_creation_that_was_cut_short_is_deleted_and_who_is_called_alike_is_not(
    tmp_path: Path, checkpoints: CheckpointStore
) -> None:
    store = begin(tmp_path, make_spec("tiny-confirm"))
    theirs = optuna.create_study(storage=store, study_name="tiny/norm=fixup")
    begin(tmp_path, make_spec(**CELLS))
    store.delete_study(store.get_study_id_from_name("tiny/norm=group"))
    save_checkpoint(checkpoints, "tiny-confirm/0", {"epoch": 1})
    assert stored_names(store) == ["tiny-confirm"]
    assert "deleted tiny: 1 study, 0 trials" in delete(url(tmp_path))
    left = {study.study_name for study in store.get_all_studies()}
    assert left == {"tiny-confirm", theirs.study_name}
    assert len(files(checkpoints)) == 1
    delete(url(tmp_path), "tiny-confirm")
    assert not files(checkpoints)


def test_of_a_long_name_too_every_checkpoint_goes(
    tmp_path: Path, checkpoints: CheckpointStore
) -> None:
    spec = make_spec("é" * 60)
    complete(begin(tmp_path, spec), spec, checkpoints)
    assert len(files(checkpoints)) == 1
    delete(url(tmp_path), spec.name)
    assert not files(checkpoints)


@pytest.mark.parametrize(("answer", "code"), [("n\n", 1), ("y\n", 0)])
def test_it_asks_on_a_terminal(tmp_path: Path, answer: str, code: int) -> None:
    store = begin(tmp_path, make_spec())
    question = "delete tiny: 1 study, 0 trials, 0.0 MB of checkpoints? [y/N]"
    with Terminal("delete", "tiny", cwd=tmp_path) as terminal:
        terminal.wait_for(lambda output: question in output)
        terminal.type(answer)
        assert terminal.end() == code
        assert ("tiny was not deleted" in terminal.output) == bool(code)
    assert stored_names(store) == (["tiny"] if code else [])


def test_a_mistake_deletes_nothing(tmp_path: Path) -> None:
    store = begin(tmp_path, make_spec())
    with pytest.raises(SweepError, match="no sweep 'tinny'; did you mean 'tiny'"):
        delete(url(tmp_path), "tinny")
    with pytest.raises(StorageError, match=r"none.db does not exist"):
        delete(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    asked = run("delete", "tiny", cwd=tmp_path)
    assert (asked.returncode, asked.stdout) == (2, "")
    assert asked.stderr == (
        "sweep: there is nobody to ask whether to delete tiny: 1 study, 0 trials, 0.0 MB of "
        "checkpoints; --yes deletes it\n"
    )
    assert stored_names(store) == ["tiny"]
