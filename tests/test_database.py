"""What is read of a store: as Optuna reads it, with no lock; and how much a trial reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import begin, begin_at, make_spec, make_worker, url
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialModel
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import create_engine, event, update
from test_storage import write_lock

from storage.engine import close_storage, open_storage, sql_engine
from storage.leases import LEASE_ATTR
from storage.overview import OverviewReader, TrialOverview
from storage.readers import READ_ONLY_OPTION, is_reading
from storage.serve import StoreServer
from storage.trial_table import TrialTable
from storage.trials import TrialQueue, enqueue
from sweeps.run import _already_done

SPACE: dict[str, Any] = {
    "lr": FloatDistribution(1e-3, 1.0, log=True),
    "groups": IntDistribution(2, 8, step=2),
    "norm": CategoricalDistribution(("group", "none", None, 1.5)),
}
PARAMS = {"lr": 0.125, "groups": 4, "norm": None}


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        new_place: Callable[[], str] = request.getfixturevalue("postgres")
        return new_place()
    return url(tmp_path)


def filled(store_url: str, many: int = 0) -> optuna.Study:
    """Trials of every state and with every kind of value, in the second of two studies."""
    store = open_storage(store_url)
    optuna.create_study(storage=store, study_name="other").add_trial(create_trial(value=1.0))
    study = optuna.create_study(storage=store, study_name="study", direction="maximize")
    study.set_user_attr("about", {"nested": [1, None, "ä"]})
    study.set_metric_names(["accuracy"])
    steps = {3: math.inf, 1: 0.1, 2: -math.inf}
    for value in (0.1 + 0.2, math.inf, -math.inf):
        study.add_trial(
            create_trial(
                value=value, params=PARAMS, distributions=SPACE, intermediate_values=steps,
                user_attrs={"b": 1, "a": None}, system_attrs={"z": [0.1]},
            )
        )  # fmt: skip
    study.add_trial(create_trial(state=TrialState.FAIL))
    study.add_trial(create_trial(state=TrialState.PRUNED, value=0.5, intermediate_values={7: 0.5}))
    enqueue(store, study._study_id, {"lr": 0.5}, user_attrs={"label": "known"})
    plain = create_trial(value=0.5, params={"lr": 0.5}, distributions={"lr": SPACE["lr"]})
    study.add_trials([plain] * many)
    TrialQueue(store, worker_id="w").claim([(study._study_id, 100 + many)])
    running = study.ask()
    running.report(0.25, 1)
    return study


@pytest.mark.parametrize("many", [0, 600])
def test_everything_reads_as_optuna_reads_it(store_url: str, many: int) -> None:
    if many and not store_url.startswith("sqlite"):
        pytest.skip("the same statements, and slow to fill")
    study = filled(store_url, many)
    ours: Any = open_storage(store_url)
    theirs = RDBStorage(store_url)
    study_id = study._study_id
    assert ours.get_all_trials(study_id) == theirs.get_all_trials(study_id)
    for trial in theirs.get_all_trials(study_id)[:8]:
        read = open_storage(store_url).get_trial(trial._trial_id)
        assert read == trial
        assert list(read.params) == list(trial.params)
    for one, other in zip(ours.get_all_studies(), theirs.get_all_studies(), strict=True):
        assert vars(one) == vars(other)
    for name in ("get_study_user_attrs", "get_study_system_attrs", "get_best_trial"):
        assert getattr(ours, name)(study_id) == getattr(theirs, name)(study_id), name
    assert ours.get_study_id_from_name("study") == study_id
    states = (TrialState.PRUNED, TrialState.RUNNING)
    assert [t.state for t in ours.get_all_trials(study_id, states=states)] == [
        t.state for t in theirs.get_all_trials(study_id, states=states)
    ]
    theirs.remove_session()
    theirs.engine.dispose()


def told(trials: Sequence[FrozenTrial]) -> list[TrialOverview]:
    """What an overview says of trials, from all that Optuna reads of them."""
    return [
        TrialOverview(
            number=trial.number,
            state=trial.state.name,
            value=trial.value,
            step=trial.last_step,
            last=None if trial.last_step is None else trial.intermediate_values[trial.last_step],
            params=trial.params or trial.system_attrs.get("fixed_params", {}),
            user_attrs={k: v for k, v in trial.user_attrs.items() if k in ("b", "label")},
            system_attrs={k: v for k, v in trial.system_attrs.items() if k == LEASE_ATTR}
            if trial.state == TrialState.RUNNING
            else {},
        )
        for trial in trials
    ]


@pytest.mark.parametrize("served", [False, True], ids=["direct", "served"])
def test_an_overview_is_what_optuna_reads_but_for_the_curves(store_url: str, served: bool) -> None:
    study = filled(store_url)
    ids = [study._study_id, 1, 99]
    slow = RDBStorage(store_url)
    with ExitStack() as stack:
        if served:
            server = StoreServer(store_url, "127.0.0.1", 0)
            server.start()
            stack.callback(server.stop, 0)
            fast = open_storage(f"grpc://127.0.0.1:{server.port}", read_only=True)
        else:
            fast = open_storage(store_url, read_only=True)
        reader = OverviewReader(fast, user_attrs=["b", "label"], running_attrs=[LEASE_ATTR])

        def same() -> None:
            read = reader.read(ids)
            assert read == {
                **{i: told(slow.get_all_trials(i)) for i in (study._study_id, 1)}, 99: [],
            }  # fmt: skip
            for trial, its in zip(study.trials, read[study._study_id], strict=True):
                assert list(its.params) == list(trial.params or its.params)
            assert fast.get_n_trials(study._study_id) == len(study.trials)

        same()
        running = study.ask(fixed_distributions=SPACE)
        running.report(0.5, 2)
        same()
        study.tell(running, 0.75)
        optuna.load_study(storage=study._storage, study_name="other").add_trial(
            create_trial(value=2.0)
        )
        same()
        with pytest.raises(KeyError):
            fast.get_n_trials(99)
        close_storage(fast, f"grpc://127.0.0.1:{server.port}" if served else store_url)
    slow.remove_session()
    slow.engine.dispose()


def test_trials_that_had_ended_are_read_again_where_one_came_between(tmp_path: Path) -> None:
    """A transaction that commits late has the lower ids."""
    store = open_storage(url(tmp_path))
    study = optuna.create_study(storage=store)
    study.add_trials([create_trial(value=value) for value in (0.1, 0.2, 0.3)])
    late, other = study.trials[1]._trial_id, optuna.create_study(storage=store)
    move = update(TrialModel.__table__).where(TrialModel.__table__.c.trial_id == late)
    with sql_engine(store).begin() as connection:
        connection.execute(move.values(study_id=other._study_id))
    reader = OverviewReader(store)
    assert [t.value for t in reader.read([study._study_id])[study._study_id]] == [0.1, 0.3]
    with sql_engine(store).begin() as connection:
        connection.execute(move.values(study_id=study._study_id))
    assert [t.value for t in reader.read([study._study_id])[study._study_id]] == [0.1, 0.2, 0.3]


def test_a_step_that_is_not_a_number_reads_as_one(tmp_path: Path) -> None:
    store = open_storage(url(tmp_path))
    study = optuna.create_study(storage=store)
    trial = study.ask()
    trial.report(math.nan, 1)
    assert math.isnan(store.get_trial(trial._trial_id).intermediate_values[1])
    (read,) = OverviewReader(store).read([study._study_id])[study._study_id]
    assert read.last is not None
    assert math.isnan(read.last)


def test_what_is_not_there_is_a_key_error(store_url: str) -> None:
    store = open_storage(store_url)
    study = optuna.create_study(storage=store, study_name="empty")
    assert store.get_all_trials(study._study_id) == []
    assert store.get_study_user_attrs(study._study_id) == {}
    for read in (
        lambda: store.get_study_id_from_name("none"),
        lambda: store.get_study_user_attrs(99),
        lambda: store.get_study_system_attrs(99),
        lambda: store.get_all_trials(99),
        lambda: store.get_trial(99),
        lambda: store.set_trial_param(99, "x", 0.5, FloatDistribution(0, 1)),
    ):
        with pytest.raises(KeyError):
            read()


def test_many_unfinished_trials_are_read_again(tmp_path: Path) -> None:
    """More of them than a list in a statement takes, among finished ones."""
    store = open_storage(url(tmp_path))
    study = optuna.create_study(storage=store)
    study.add_trials([create_trial(state=TrialState.WAITING)] * 600)
    study.add_trials([create_trial(value=0.5)] * 3)
    watcher = open_storage(url(tmp_path))
    assert len(watcher.get_all_trials(study._study_id)) == 603
    trial = study.ask()
    assert trial.number == 0
    trial.report(0.25, 4)
    read = watcher.get_all_trials(study._study_id)
    assert len(read) == 603
    assert read[0].state == TrialState.RUNNING
    assert read[0].intermediate_values == {4: 0.25}


def test_a_worker_reads_while_the_write_lock_is_held(tmp_path: Path) -> None:
    study = filled(url(tmp_path))
    store = open_storage(url(tmp_path), lock_seconds=0.1)
    with write_lock(tmp_path / "sweep.db"):
        trials = store.get_all_trials(study._study_id)
        assert store.get_trial(trials[-1]._trial_id).state == TrialState.RUNNING
        assert len(store.get_all_studies()) == 2
        assert store.get_study_name_from_id(study._study_id) == "study"
        assert store.get_study_directions(study._study_id)
        assert store.get_best_trial(study._study_id).number == 1
        assert store.get_trial_params(trials[0]._trial_id) == PARAMS
        optuna.load_study(storage=store, study_name="study")
        with pytest.raises(optuna.exceptions.StorageInternalError):
            store.set_study_user_attr(study._study_id, "a", 1)


def test_a_trial_takes_few_statements_and_transactions(tmp_path: Path) -> None:
    counts: list[Counter[str]] = []
    for budget in (3, 8):
        place = tmp_path / str(budget)
        place.mkdir()
        epochs = {"epochs": 2, "warmup_epochs": 0}
        begin(place, make_spec(budget={"trials": budget}, train=epochs))
        worker = make_worker(place)
        seen: Counter[str] = Counter()
        engine = sql_engine(worker._store)

        def count(*_: Any, seen: Counter[str] = seen) -> None:
            seen["statements"] += 1

        def commit(connection: Any, seen: Counter[str] = seen) -> None:
            options = connection.get_execution_options()
            seen["writes"] += not (is_reading() or options.get(READ_ONLY_OPTION))

        event.listen(engine, "before_cursor_execute", count)
        event.listen(engine, "commit", commit)
        worker.run()
        counts.append(seen)
    # Of the five trials more. A claim, the suggestion, two reports and the result; the rest is
    # for the worker's record of its time.
    assert counts[1]["writes"] - counts[0]["writes"] <= 5 * 5 + 1
    assert counts[1]["statements"] - counts[0]["statements"] <= 5 * 48 + 2


def test_a_connection_that_broke_during_a_pause_is_replaced(
    postgres: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store_url = postgres()
    study = filled(store_url)
    monkeypatch.setattr("storage.database_server._PAUSE_SECONDS", 0.0)
    store = open_storage(store_url)
    engine = sql_engine(store)
    with engine.connect() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    admin = create_engine(store_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as other:
        other.exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 5000)")
    admin.dispose()
    assert store.get_study_id_from_name("study") == study._study_id


def test_rows_are_renewed_in_databases_without_an_upsert_of_their_own(tmp_path: Path) -> None:
    study = optuna.create_study(storage=open_storage(url(tmp_path)))
    engine = create_engine(url(tmp_path))
    engine.dialect.name = "other"
    table = TrialTable(engine)
    trial_id = table.create(study._study_id, 0, {"token": "t"})
    assert trial_id is not None
    for value in (0.25, 0.5):
        assert table.report(trial_id, "t", 1, value, {"curves": [value]})
    assert table.finish(trial_id, "t", TrialState.COMPLETE, 0.75, {"a": 1}, {"curves": [1]})
    engine.dispose()
    (trial,) = study.trials
    assert trial.intermediate_values == {1: 0.5}
    assert trial.system_attrs["curves"] == [1]
    assert (trial.value, trial.user_attrs) == (0.75, {"a": 1})


def test_a_sweep_that_is_done_is_answered_before_its_images_are_loaded(store_url: str) -> None:
    spec = make_spec(search={}, budget={"trials": 1})
    assert _already_done(spec, store_url) is None
    store = begin_at(store_url, spec)
    assert _already_done(spec, store_url) is None
    study = optuna.load_study(storage=store, study_name="tiny")
    study.add_trial(create_trial(value=0.5, user_attrs={"outcome": "complete"}))
    status = _already_done(spec, store_url)
    assert status is not None
    assert status.done
