"""`sweep confirm`: fresh seeds, the test images once, the same runs whatever comes between."""

import csv
import dataclasses
import io
import json
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from commands import Command, run
from helpers import TRAIN, begin, begin_at, make_spec, make_worker, trials, url, wait_until
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from typer.testing import CliRunner

from storage.engine import close_storage, open_storage
from storage.leases import LEASE_ATTR
from storage.serve import StoreServer
from storage.trials import TrialQueue
from sweeps import assembly, search
from sweeps.assembly import Assembly, open_dataset
from sweeps.cli import app
from sweeps.config import TrialConfig
from sweeps.confirm import enqueue_runs
from sweeps.confirmation import Confirmation, read_answer
from sweeps.errors import SpecError, SweepError
from sweeps.figures import make_figures
from sweeps.findings import headline, notes, read_findings, study_sentences
from sweeps.objective import Objective, Progress
from sweeps.page import results_csv, table_markdown
from sweeps.report import answer_table
from sweeps.spec import SweepSpec
from sweeps.status import OUTCOMES
from sweeps.studies import StoredSweep, create_or_resume, stored_names, stored_sweep
from sweeps.transfer import export_sweep, import_sweep

KNOWN: dict[str, Any] = {"label": "known", "peak_lr": 0.05}


def confirm(store: BaseStorage, *, top: int = 1, seeds: int = 2) -> None:
    """What the command does before its workers."""
    fingerprint = open_dataset(TrialConfig.build(TRAIN), None).fingerprint
    cells = len(stored_sweep(store, "tiny").studies)
    enqueue_runs(store, "tiny", [fingerprint] * cells, top=top, seeds=seeds)


def add(
    store: BaseStorage, spec: SweepSpec, outcome: str, params: dict[str, Any], **more: Any
) -> None:
    """A trial as a worker leaves it; `value`, `curve`, `label` and `cell`."""
    study = optuna.load_study(
        storage=store, study_name=spec.study_name(spec.cells[more.get("cell", 0)])
    )
    state = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
    study.add_trial(
        create_trial(
            state=state.get(outcome, TrialState.PRUNED),
            value=more.get("value"),
            params=params,
            distributions=search.distributions(spec.search),
            user_attrs={"outcome": outcome} | {k: more[k] for k in ("label",) if k in more},
            intermediate_values=dict(enumerate(more.get("curve", []), start=1)),
        )
    )


def complete(store: BaseStorage, spec: SweepSpec, lr: float, value: float, **more: Any) -> None:
    add(store, spec, "complete", {"peak_lr": lr}, value=value, curve=[value], **more)


def finish(
    store: BaseStorage, results: dict[tuple[float, int], float | str], study: str = "tiny-confirm"
) -> None:
    """End the queued runs, by learning rate and seed, with a test accuracy or an outcome."""
    queue = TrialQueue(store, worker_id="hand")
    (study_id,) = [s._study_id for s in store.get_all_studies() if s.study_name == study]
    budget = store.get_n_trials(study_id)
    while (claim := queue.claim([(study_id, budget)])) is not None:
        trial = store.get_trial(claim.trial_id)
        its = trial.system_attrs["fixed_params"]
        space = search.distributions(stored_sweep(store, "tiny-confirm").spec.search)
        queue.set_params(
            claim, {name: (d.to_internal_repr(its[name]), d) for name, d in space.items()}
        )
        result = results[its["peak_lr"], its["seed"]]
        if isinstance(result, float):
            assert queue.report(claim, 1, result + 0.01, system_attrs={})
            state, value, outcome = TrialState.COMPLETE, result, "complete"
        elif result == "diverged":
            state, value, outcome = TrialState.PRUNED, 0.1, result
        else:
            state, value, outcome = TrialState.FAIL, None, result
        assert queue.finish(claim, state, value, user_attrs={"outcome": outcome})


def confirmation(store: BaseStorage) -> Confirmation:
    found = read_answer(store, stored_sweep(store, "tiny")).confirmation
    assert found is not None
    return found


def runs(tmp_path: Path, study: str = "tiny-confirm") -> list[tuple[float, int]]:
    found = [t.params or t.system_attrs["fixed_params"] for t in trials(tmp_path, study)]
    return [(params["peak_lr"], params["seed"]) for params in found]


def scored_anew(params: dict[str, Any], **changes: Any) -> tuple[float, float]:
    """Accuracy on the validation and on the test images of a training that nothing stopped."""
    torch.set_num_threads(1)
    config = TrialConfig.build({**TRAIN, **changes, **params})
    trained = Objective(Assembly(open_dataset(config, None), torch.device("cpu")))
    heard: list[Progress] = []
    value = trained.run(config, seeds=1, test=True, on_epoch=heard.append)
    return heard[-1].score, value


# --- the command --------------------------------------------------------------------------------


def test_from_a_sweep_to_its_confirmation(tmp_path: Path) -> None:
    spec = make_spec(
        train={"epochs": 2},
        budget={"trials": 2, "seeds": 2},
        workers={"threads": 1},
        **{"try": [KNOWN]},
    )
    store = begin(tmp_path, spec)
    make_worker(tmp_path).run()
    before = {t.params["peak_lr"]: t.value for t in trials(tmp_path)}
    done = run("confirm", "tiny", "--seeds", "2", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "] tiny-confirm #0  complete" in done.stderr
    assert "the seeds 2, 3, which tiny did not use" in " ".join(done.stdout.split())
    first = trials(tmp_path, "tiny-confirm")
    # The best may be the known setting.
    best = max(before, key=lambda lr: before[lr])
    assert {t.params["peak_lr"] for t in first} == {best, KNOWN["peak_lr"]}
    # A run's value is its accuracy on the test images, its curve that on the validation images.
    for trial in first:
        wanted = scored_anew(trial.params, epochs=2)
        assert (trial.intermediate_values[2], trial.value) == wanted
    # Again it adds nothing, and asks for no data set.
    again = run("confirm", "tiny", "--seeds", "2", "--json", "--data-dir", "nowhere", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert found["done"]
    assert found["seeds"] == [2, 3]
    (study,) = found["studies"]
    assert study["configurations"][0]["best"]
    assert study["configurations"][0]["found"] == before[best]
    assert sum(len(s["runs"]) for s in study["configurations"]) == len(first)
    assert records(trials(tmp_path, "tiny-confirm")) == records(first)
    # More seeds are exactly the missing runs.
    more = run("confirm", "tiny", "--seeds", "3", "--workers", "1", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    grown = trials(tmp_path, "tiny-confirm")
    assert records(grown[: len(first)]) == records(first)
    assert {t.params["seed"] for t in grown[len(first) :]} == {4}
    assert len(grown) == len(first) // 2 * 3
    values = [t.value or 0.0 for t in grown if t.params["peak_lr"] == best]
    rows = csv.DictReader(io.StringIO(results_csv([read_findings(store, stored(store))])))
    (row,) = [row for row in rows if float(row["peak_lr"]) == best]
    assert float(row["confirmed"]) == pytest.approx(sum(values) / 3)
    assert row["confirmed_runs"] == "3"
    # Whoever looks at it is told the same.
    watched = run("status", "tiny", "--watch", "--json", cwd=tmp_path)
    assert json.loads(watched.stdout)["confirmation"]["seeds"] == [2, 3, 4]
    assert f"{sum(values) / 3:.4f} [" in run("status", "tiny-confirm", cwd=tmp_path).stdout


@pytest.mark.parametrize("kind", ["postgresql", "grpc"])
def test_a_sweep_on_a_server_is_planned_and_confirmed(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with ExitStack() as stack:
        if kind == "grpc":
            server = StoreServer(url(tmp_path), "127.0.0.1", 0)
            server.start()
            stack.callback(server.stop, 0)
            place = f"grpc://127.0.0.1:{server.port}"
        else:
            new_place: Callable[[], str] = request.getfixturevalue("postgres")
            place = new_place()
        where = ["--storage", place]
        spec = make_spec(train={"epochs": 1}, budget={"trials": 1}, workers={"threads": 1})
        store = begin_at(place, spec)
        complete(store, spec, 0.05, 0.5)
        done = run(
            "confirm", "tiny", "--seeds", "2", "--workers", "1", "--json", *where, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        (configuration,) = found["studies"][0]["configurations"]
        assert (found["done"], found["seeds"], configuration["found"]) == (True, [1, 2], 0.5)
        for name, trials_in_all in (("tiny", 1), ("tiny-confirm", 2)):
            planned = run("plan", name, "--seconds", "0", "--json", *where, cwd=tmp_path)
            assert planned.returncode == 0, planned.stderr
            told = json.loads(planned.stdout)
            assert (told["total"]["trials"], told["remaining"]["trials"]) == (trials_in_all, 0)
        close_storage(store, place)


def stored(store: BaseStorage, name: str = "tiny") -> StoredSweep:
    return stored_sweep(store, name)


def records(found: list[FrozenTrial]) -> list[Any]:
    return [(t.number, t.params, t.value, t.intermediate_values, t.datetime_start) for t in found]


def test_interrupted_and_killed_it_goes_on_with_the_same_runs(tmp_path: Path) -> None:
    spec = make_spec(train={"epochs": 25}, workers={"threads": 1})
    store = begin(tmp_path, spec)
    for lr, value in ((0.03, 0.5), (0.1, 0.6), (0.2, 0.4)):
        complete(store, spec, lr, value)
    arguments = ("confirm", "tiny", "--seeds", "2", "--workers", "1")

    def further(epochs: int) -> bool:
        if "tiny-confirm" not in stored_names(store):
            return False
        found = trials(tmp_path, "tiny-confirm")
        return sum(t.last_step or 0 for t in found) >= epochs

    with Command(*arguments, cwd=tmp_path) as command:
        wait_until(lambda: further(2))
        command.process.send_signal(signal.SIGINT)
        assert command.end() == 130
        assert "go on:" in command.output
        assert "sweep confirm tiny --seeds 2" in command.output
    left = trials(tmp_path, "tiny-confirm")
    assert {t.state for t in left} == {TrialState.WAITING}
    kept = max(t.last_step or 0 for t in left)
    with Command(*arguments, cwd=tmp_path) as command:
        wait_until(lambda: further(kept + 2))
        for trial in trials(tmp_path, "tiny-confirm"):
            if trial.state == TrialState.RUNNING:
                os.kill(trial.system_attrs[LEASE_ATTR]["pid"], signal.SIGKILL)
        # It starts the worker anew.
        assert command.end() == 0, command.output
    finished = trials(tmp_path, "tiny-confirm")
    assert [t.state for t in finished] == [TrialState.COMPLETE] * 2
    assert runs(tmp_path) == [(0.1, 1), (0.1, 2)]
    assert finished[0].system_attrs[LEASE_ATTR]["attempt"] >= 2
    wanted = scored_anew({"peak_lr": 0.1, "seed": 1}, epochs=25)
    assert (finished[0].intermediate_values[25], finished[0].value) == wanted


def test_mistakes_say_what_to_do(tmp_path: Path) -> None:
    spec = make_spec()
    store = begin(tmp_path, spec)

    def refused(*arguments: str) -> BaseException:
        result = CliRunner().invoke(app, [*arguments, "--storage", url(tmp_path)])
        assert result.exception is not None
        assert not result.stdout
        return result.exception

    def usage(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments, "--storage", url(tmp_path)])
        assert result.exit_code == 2
        return result.output

    assert "no sweep 'tni'" in str(refused("confirm", "tni"))
    early = refused("confirm", "tiny")
    assert isinstance(early, SweepError)
    assert not isinstance(early, SpecError)
    assert "no trial of tiny has completed" in str(early)
    complete(store, spec, 0.1, 0.6)
    large = refused("confirm", "tiny", "--top", "2")
    assert isinstance(large, SpecError)
    assert "--top 2 is more than tiny has: 1 at most" in str(large)
    assert "--seeds" in usage("confirm", "tiny", "--seeds", "1")
    assert "mars" in usage("confirm", "tiny", "--on", "mars")
    confirm(store)
    assert "sweep report tiny" in str(refused("report", "tiny-confirm"))
    assert "sweep confirm tiny" in str(refused("start", "tiny-confirm", "--add-trials", "1"))


# --- the runs -----------------------------------------------------------------------------------


def test_a_run_scores_the_test_images_once_and_a_killed_one_leaves_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(train={"epochs": 2})
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.6)
    confirm(store, seeds=2)
    dataset = open_dataset(TrialConfig.build(TRAIN), None)
    scored: list[int] = []
    evaluate = assembly.evaluate

    def counted(model: Any, images: Any, labels: Any, **more: Any) -> tuple[float, float, int]:
        scored.append(len(labels))
        return evaluate(model, images, labels, **more)

    class Killed(BaseException):
        pass

    finish_trial = TrialQueue.finish

    def killed(*_: Any, **__: Any) -> bool:
        raise Killed

    monkeypatch.setattr(assembly, "evaluate", counted)
    monkeypatch.setattr(TrialQueue, "finish", killed)
    with pytest.raises(Killed):  # scored, and nothing of it written
        make_worker(tmp_path, "tiny-confirm", worker_id="dead").run()
    monkeypatch.setattr(TrialQueue, "finish", finish_trial)
    (trial, _) = trials(tmp_path, "tiny-confirm")
    assert trial.value is None
    validation, test = scored[0], len(dataset.test_labels)
    assert validation != test
    assert scored == [validation, validation, test]
    # This very process holds the dead worker's lease: what a look at the pid would find is said.
    queue = TrialQueue(store, worker_id="look")
    monkeypatch.setattr(queue, "_holder_gone", lambda lease: True)
    queue.requeue_abandoned([stored_sweep(store, "tiny-confirm").studies[0].study_id])
    make_worker(tmp_path, "tiny-confirm").run()
    # The first went on from its last epoch; the second is a whole run.
    assert scored[3:] == [test, validation, validation, test]
    finished = trials(tmp_path, "tiny-confirm")
    assert [t.state for t in finished] == [TrialState.COMPLETE] * 2
    assert [t.value for t in finished] == [
        scored_anew({"peak_lr": 0.1, "seed": seed}, epochs=2)[1] for seed in (1, 2)
    ]
    assert not list((tmp_path / "checkpoints").glob("*.pt"))


def test_a_run_that_diverges_counts_as_a_guess(tmp_path: Path) -> None:
    spec = make_spec(
        train={"norm": "fixup", "num_groups": None},
        search={"peak_lr": {"low": 0.01, "high": 1e4, "log": True}},
        **{"try": [{"label": "wild", "peak_lr": 1e4}]},
    )
    store = begin(tmp_path, spec)
    make_worker(tmp_path).run()
    confirm(store)
    make_worker(tmp_path, "tiny-confirm").run()
    wild = [t for t in trials(tmp_path, "tiny-confirm") if t.params["peak_lr"] == 1e4]
    assert [t.user_attrs["outcome"] for t in wild] == ["diverged"] * 2
    assert [t.value for t in wild] == [0.1, 0.1]
    (best, known) = confirmation(store).studies[0].configurations
    assert known.labels == ["wild"]
    assert known.estimate is not None
    assert (known.estimate.mean, known.estimate.low) == (0.1, None)
    assert best.best
    assert known.versus is not None
    assert known.versus.ahead.count == 2


# --- what is run --------------------------------------------------------------------------------


def test_settings_seeds_and_their_order(tmp_path: Path) -> None:
    """Top 2 of four, one of them found twice; the known one; all of a seed before the next."""
    spec = make_spec(
        train={"seed": 1}, budget={"trials": 6, "seeds": 2}, search={"peak_lr": {"choices": [
            0.1, 0.2, 0.3, 0.4]}}, **{"try": [{"label": "known", "peak_lr": 0.4}]},
    )  # fmt: skip
    store = begin(tmp_path, spec)
    for lr, value in ((0.1, 0.5), (0.2, 0.7), (0.2, 0.8), (0.3, 0.6)):
        complete(store, spec, lr, value)
    confirm(store, top=2, seeds=3)
    # Seeds 1 and 2 were the sweep's.
    assert runs(tmp_path) == [(lr, seed) for seed in (0, 3, 4) for lr in (0.2, 0.3, 0.4)]
    labels = [t.user_attrs["label"] for t in trials(tmp_path, "tiny-confirm")]
    assert labels[:3] == ["#3, seed 0", "#4, seed 0", "known (#0), seed 0"]
    confirm(store, top=2, seeds=3)
    confirm(store, top=1, seeds=2)
    assert len(runs(tmp_path)) == 9
    # The sweep goes on and finds a better one: it is added, and nothing is taken away.
    complete(store, spec, 0.1, 0.9)
    confirm(store, seeds=2)
    assert runs(tmp_path)[9:] == [(0.1, 0), (0.1, 3)]
    settings = confirmation(store).studies[0].configurations
    assert [(s.name, s.trial, len(s.runs)) for s in settings] == [
        ("best", 5, 2), ("known", 0, 3), ("rank 2", 3, 3), ("rank 3", 4, 3),
    ]  # fmt: skip


def test_the_best_that_is_a_known_setting_runs_once(tmp_path: Path) -> None:
    spec = make_spec(**{"try": [KNOWN, {"label": "same", "peak_lr": 0.05}]})
    store = begin(tmp_path, spec)
    for label in ("known", "same"):
        complete(store, spec, 0.05, 0.8, label=label)
    complete(store, spec, 0.1, 0.7)
    confirm(store)
    assert runs(tmp_path) == [(0.05, 1), (0.05, 2)]
    (only,) = confirmation(store).studies[0].configurations
    assert only.best
    assert set(only.labels) == {"known", "same"}
    assert only.versus is None


def test_a_range_that_was_moved_still_holds_the_runs(tmp_path: Path) -> None:
    spec = make_spec(train={"epochs": 1})
    store = begin(tmp_path, spec)
    complete(store, spec, 0.29, 0.8)
    fingerprint = stored_sweep(store, "tiny").studies[0].fingerprint
    moved = make_spec(
        train={"epochs": 1}, search={"peak_lr": {"low": 0.05, "high": 0.2, "log": True}}
    )
    create_or_resume(store, moved, [fingerprint])
    confirm(store)
    make_worker(tmp_path, "tiny-confirm").run()
    assert runs(tmp_path) == [(0.29, 1), (0.29, 2)]
    assert [t.user_attrs["outcome"] for t in trials(tmp_path, "tiny-confirm")] == ["complete"] * 2


def test_what_a_kill_leaves_of_a_creation_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(train={"norm": None}, each={"norm": ["group", "layer"]})
    store = begin(tmp_path, spec)
    for cell in (0, 1):
        complete(store, spec, 0.1, 0.6, cell=cell)
    real: Callable[..., int] = optuna.storages._CachedStorage.create_new_trial
    left = [3]

    class Killed(BaseException):
        pass

    def counting(*args: Any, **more: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*args, **more)

    monkeypatch.setattr(optuna.storages._CachedStorage, "create_new_trial", counting)
    with pytest.raises(Killed):
        confirm(store)
    monkeypatch.undo()
    confirm(store)
    for norm in ("group", "layer"):
        assert runs(tmp_path, f"tiny-confirm/norm={norm}") == [(0.1, 1), (0.1, 2)]


def test_a_creation_that_was_cut_short_in_its_first_study_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.6)
    real: Callable[..., None] = optuna.storages._CachedStorage.set_study_user_attr

    class Killed(BaseException):
        pass

    def before_spec(*args: Any, **more: Any) -> None:
        if "sweep_spec" in (*args, *more.values()):
            raise Killed
        real(*args, **more)

    monkeypatch.setattr(optuna.storages._CachedStorage, "set_study_user_attr", before_spec)
    with pytest.raises(Killed):
        confirm(store)
    monkeypatch.undo()
    assert "tiny-confirm" in [study.study_name for study in store.get_all_studies()]
    confirm(store)
    assert runs(tmp_path) == [(0.1, 1), (0.1, 2)]


def test_a_study_of_somebody_elses_under_its_name_is_refused(tmp_path: Path) -> None:
    spec = make_spec()
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.6)
    theirs = optuna.create_study(storage=store, study_name="tiny-confirm", direction="maximize")
    theirs.set_user_attr("mine", True)
    with pytest.raises(SweepError, match=r"a study 'tiny-confirm' that is not of this sweep"):
        confirm(store)


def test_what_cannot_be_confirmed_is_refused(tmp_path: Path) -> None:
    spec = make_spec(train={"norm": None}, each={"norm": ["group", "layer"]})
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.6)
    with pytest.raises(SpecError, match="--top 2 is more"):
        confirm(store, top=2)
    # Of a study with nothing to confirm only the others are.
    confirm(store)
    assert runs(tmp_path, "tiny-confirm/norm=group")
    assert not runs(tmp_path, "tiny-confirm/norm=layer")
    with pytest.raises(SweepError, match="is the confirmation of tiny"):
        enqueue_runs(store, "tiny-confirm", [], top=1, seeds=2)
    # Begun anew with other trainings under the same name.
    for study in list(store.get_all_studies()):
        if study.study_name.startswith("tiny/"):
            store.delete_study(study._study_id)
    other = make_spec(train={"norm": None, "epochs": 5}, each={"norm": ["group", "layer"]})
    begin(tmp_path, other)
    complete(store, other, 0.1, 0.6)
    with pytest.raises(
        SweepError, match=r"train.epochs: confirmed 3, now 5.*sweep delete tiny-confirm"
    ):
        confirm(store)


def test_a_name_that_something_else_has_is_left_alone(tmp_path: Path) -> None:
    spec = make_spec()
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.6)
    begin(tmp_path, make_spec("tiny-confirm"))
    with pytest.raises(SweepError, match=r"no confirmation of tiny.*--name NEW"):
        confirm(store)
    assert read_answer(store, stored_sweep(store, "tiny")).confirmation is None
    cells = make_spec("many", each={"seed": [0, 1]})
    begin(tmp_path, cells)
    complete(store, cells, 0.1, 0.6)
    with pytest.raises(SweepError, match="enumerates seed"):
        enqueue_runs(store, "many", [], top=1, seeds=2)
    # Nor is a confirmation what a file can ask for.
    with pytest.raises(SpecError, match="run sweep confirm tiny"):
        make_spec("tiny-confirm", confirms="tiny")


# --- what is told -------------------------------------------------------------------------------


def known_confirmation(tmp_path: Path) -> tuple[BaseStorage, SweepSpec]:
    """The best at 0.8, 0.82 and 0.84; “known” behind it by 0.1, 0.11 and 0.12; “wild” diverges."""
    spec = make_spec(train={"epochs": 1}, budget={"trials": 4})
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.9)
    complete(store, spec, 0.05, 0.7, label="known")
    add(store, spec, "diverged", {"peak_lr": 0.3}, label="wild")
    complete(store, spec, 0.01, 0.2)
    confirm(store, seeds=3)
    results: dict[tuple[float, int], float | str] = {
        (0.1, 1): 0.8, (0.1, 2): 0.82, (0.1, 3): 0.84,
        (0.05, 1): 0.7, (0.05, 2): 0.71, (0.05, 3): 0.72,
        (0.3, 1): "diverged", (0.3, 2): 0.6, (0.3, 3): "failed",
    }  # fmt: skip
    finish(store, results)
    return store, spec


def test_the_numbers_of_a_confirmation(tmp_path: Path) -> None:
    from scipy import stats

    store, _ = known_confirmation(tmp_path)
    found = confirmation(store)
    assert found.done
    best, known, wild = found.studies[0].configurations
    assert (best.name, known.name, wild.name) == (
        "best",
        "known",
        "wild",
    )
    assert best.estimate is not None
    assert best.estimate.mean == pytest.approx(0.82)
    reach = stats.t.ppf(0.975, 2) * 0.02 / 3**0.5
    assert best.estimate.low == pytest.approx(0.82 - reach)
    assert best.estimate.high == pytest.approx(0.82 + reach)
    # 0.83 is what the same runs have on the validation images.
    assert (best.luck, best.drop) == pytest.approx((0.07, 0.08))
    assert known.versus is not None
    assert known.versus.ahead.mean == pytest.approx(0.11)
    wanted = stats.ttest_rel([0.8, 0.82, 0.84], [0.7, 0.71, 0.72]).pvalue
    assert known.versus.p_value == pytest.approx(wanted)
    # One diverged and counts as a guess, one failed and is left out, in the mean and the pairs.
    assert wild.estimate is not None
    assert (wild.estimate.mean, wild.estimate.count) == pytest.approx((0.35, 2))
    assert (wild.found, wild.luck, wild.drop) == (None, None, None)
    assert wild.versus is not None
    assert wild.versus.ahead.mean == pytest.approx((0.7 + 0.22) / 2)
    assert wild.versus.ahead.count == 2
    assert found.comparisons == 2
    assert known.versus.corrected == pytest.approx(2 * wanted)
    assert (
        json.loads(json.dumps(found.as_dict()))["studies"][0]["configurations"][2]["diverged"] == 1
    )


def test_confirmed_is_told_as_confirmed_and_unconfirmed_as_unconfirmed(tmp_path: Path) -> None:
    spec = make_spec(train={"epochs": 1}, budget={"trials": 2})
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.9)
    complete(store, spec, 0.2, 0.7)
    before = read_findings(store, stored_sweep(store, "tiny"))
    assert any("sweep confirm tiny tells how much" in note for note in notes(before))
    assert "Confirmed" not in headline(before)
    assert "confirmed" not in table_markdown([before])
    confirm(store, seeds=2)
    begun = read_findings(store, stored_sweep(store, "tiny"))
    assert "no run of a best configuration with another seed has ended" in headline(begun)
    assert "2 of 2 to come" in table_markdown([begun])
    finish(store, {(0.1, 1): 0.8, (0.1, 2): 0.82})
    after = read_findings(store, stored_sweep(store, "tiny"))
    assert headline(after) == (
        "Best accuracy: 0.9000, by trial #0. Confirmed, on the test images with fresh seeds: "
        "0.8100 [0.6829, 0.9371]."
    )
    (said,) = [s for s in study_sentences(after, after.studies[0]) if s.startswith("Confirmed")]
    assert "0.8100 on the test images, the mean over 2 runs" in said
    assert "0.0900 less than the sweep found" in said
    assert "| 0.8100 \\[0.6829, 0.9371\\] |" in table_markdown([after])
    rows = results_csv([after]).splitlines()
    assert rows[1].endswith(",2")
    assert rows[2].endswith(",,,,")
    # The sweep goes on: what is best now is unconfirmed, and says so.
    add(store, spec, "complete", {"peak_lr": 0.15}, value=0.95, curve=[0.95])
    fingerprint = stored_sweep(store, "tiny").studies[0].fingerprint
    create_or_resume(store, make_spec(train={"epochs": 1}, budget={"trials": 3}), [fingerprint])
    later = read_findings(store, stored_sweep(store, "tiny"))
    assert "| best | #2 | complete | 0.9500 | unconfirmed |" in table_markdown([later])
    assert any(s.startswith("Unconfirmed") for s in study_sentences(later, later.studies[0]))


def test_a_confirmation_that_is_not_done_says_so(tmp_path: Path) -> None:
    spec = make_spec(train={"epochs": 1}, budget={"trials": 2})
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.9)
    complete(store, spec, 0.05, 0.7, label="known")
    confirm(store, seeds=2)
    finish(store, {(0.1, 1): 0.8, (0.05, 1): 0.7, (0.1, 2): 0.81, (0.05, 2): 0.71})
    confirm(store, seeds=3)
    found = read_findings(store, stored_sweep(store, "tiny"))
    assert "Confirmed so far (2 of 3 runs), on the test images" in headline(found)
    sentences = study_sentences(found, found.studies[0])
    assert sum("Confirmed so far (2 of 3 runs): 0." in s for s in sentences) == 2
    known = confirmation(store).studies[0].configurations[1]
    assert known.versus is not None


def test_one_pair_is_no_comparison(tmp_path: Path) -> None:
    spec = make_spec(train={"epochs": 1}, budget={"trials": 2})
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.9)
    complete(store, spec, 0.05, 0.7, label="known")
    confirm(store, seeds=2)
    finish(store, {(0.1, 1): 0.8, (0.05, 1): 0.7, (0.1, 2): 0.81, (0.05, 2): "failed"})
    known = confirmation(store).studies[0].configurations[1]
    assert known.versus is None


def test_a_sweep_on_the_test_images_says_that_they_took_part(tmp_path: Path) -> None:
    spec = make_spec(train={"epochs": 1, "validation": "test", "validation_fraction": None})
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.9)
    confirm(store)
    make_worker(tmp_path, "tiny-confirm").run()
    (best,) = confirmation(store).studies[0].configurations
    assert all(r.accuracy == r.validation_accuracy for r in best.runs)
    found = read_findings(store, stored_sweep(store, "tiny"))
    assert any("taken part in the choice" in note for note in notes(found))


def test_the_confirmed_best_has_a_mark_with_its_interval(tmp_path: Path) -> None:
    store, _ = known_confirmation(tmp_path)
    found = read_findings(store, stored_sweep(store, "tiny"))
    two = dataclasses.replace(found, studies=[*found.studies, *found.studies])
    (drawn,) = (figure for figure in make_figures([two]) if figure.key == "best")
    best = confirmation(store).studies[0].configurations[0].estimate
    assert best is not None
    (mark,) = (t for t in drawn.as_dict()["panels"][0]["data"] if t["name"] == "confirmed")
    assert mark["x"] == pytest.approx([best.mean] * 2)  # names are read across
    ends = (mark["error_x"]["arrayminus"][0], mark["error_x"]["array"][0])
    assert ends == pytest.approx((best.mean - best.ends[0], best.ends[1] - best.mean))
    assert "Diamonds: confirmed on the test images" in drawn.caption


def test_a_run_that_failed_is_tried_once_more(tmp_path: Path) -> None:
    spec = make_spec(train={"epochs": 1})
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.9)
    confirm(store, seeds=3)
    finish(store, {(0.1, 1): 0.8, (0.1, 2): "failed", (0.1, 3): "failed"})
    found = read_findings(store, stored_sweep(store, "tiny"))
    assert any("2 runs failed and are left out" in note for note in notes(found))
    confirm(store, seeds=3)
    assert runs(tmp_path) == [(0.1, 1), (0.1, 2), (0.1, 3), (0.1, 2), (0.1, 3)]
    assert confirmation(store).count("queued") == 2
    finish(store, {(0.1, 2): 0.82, (0.1, 3): "failed"})
    confirm(store, seeds=3)
    assert len(runs(tmp_path)) == 5
    found = read_findings(store, stored_sweep(store, "tiny"))
    assert any("1 run failed and is left out" in note for note in notes(found))
    (best,) = confirmation(store).studies[0].configurations
    assert [run.outcome for run in best.runs] == ["complete", "complete", "failed"]
    assert best.estimate is not None
    assert best.estimate.count == 2


def test_a_run_that_found_no_memory_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(train={"epochs": 1})
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.9)
    confirm(store, seeds=2)
    train = Objective.run

    def full_at_seed_two(self: Objective, config: TrialConfig, **more: Any) -> float:
        if config.seed == 2:
            raise MemoryError
        return train(self, config, **more)

    with monkeypatch.context() as full:
        full.setattr(Objective, "run", full_at_seed_two)
        make_worker(tmp_path, "tiny-confirm").run()
    assert confirmation(store).count("failed") == 1
    confirm(store, seeds=2)
    assert runs(tmp_path) == [(0.1, 1), (0.1, 2), (0.1, 2)]
    make_worker(tmp_path, "tiny-confirm").run()
    (best,) = confirmation(store).studies[0].configurations
    assert [run.outcome for run in best.runs] == ["complete", "complete"]


def test_a_confirmation_picks_no_best_run(tmp_path: Path) -> None:
    store, _ = known_confirmation(tmp_path)
    status = read_answer(store, stored_sweep(store, "tiny-confirm"))
    assert status.studies[0].best is None
    assert status.confirmation is not None
    columns = [column.header for column in answer_table(status).columns]
    assert columns[:4] == ["study", "configuration", "runs", "found"]
    assert {t.outcome for t in status.studies[0].trials} <= set(OUTCOMES)


def test_a_confirmation_moves_as_a_sweep_of_its_own(tmp_path: Path) -> None:
    store, _ = known_confirmation(tmp_path)
    told = confirmation(store).as_dict()
    there = f"sqlite:///{tmp_path / 'there.db'}"

    def bring(name: str, rename: str | None = None) -> None:
        file = tmp_path / f"{name}.sweep"
        export_sweep(name, file, url(tmp_path), overwrite=True)
        import_sweep(file, there, merge=False, rename=rename, say=lambda line: None)

    bring("tiny")
    bring("tiny-confirm")
    assert confirmation(open_storage(there)).as_dict() == told
    # Under another name it is the confirmation of the sweep of that name.
    with pytest.raises(SpecError, match="NAME-confirm"):
        bring("tiny-confirm", "copy")
    bring("tiny-confirm", "copy-confirm")
    moved = stored_sweep(open_storage(there), "copy-confirm")
    assert moved.spec.confirms == "copy"
    # Without its sweep, its settings have the names that they were run under.
    alone = read_answer(open_storage(there), moved).confirmation
    assert alone is not None
    assert {s.name for s in alone.studies[0].configurations} == {
        "#0",
        "known (#1)",
        "wild (#2)",
    }


def test_two_machines_add_to_one_confirmation(tmp_path: Path) -> None:
    """One has gone on to more seeds, the other to more settings; merged, all of it counts."""
    spec = make_spec(train={"epochs": 1})
    store = begin(tmp_path, spec)
    complete(store, spec, 0.1, 0.9)
    complete(store, spec, 0.2, 0.8)
    confirm(store)
    there = f"sqlite:///{tmp_path / 'there.db'}"

    def move(name: str, to: str, at: str) -> None:
        file = tmp_path / f"{name}.sweep"
        export_sweep(name, file, at, overwrite=True)
        import_sweep(file, to, merge=True, rename=None, say=lambda line: None)

    for name in ("tiny", "tiny-confirm"):
        move(name, there, url(tmp_path))
    other = open_storage(there)
    confirm(other, seeds=3)
    finish(other, {(0.1, seed): 0.8 + seed / 100 for seed in (1, 2, 3)})
    confirm(store, top=2)
    finish(store, {(lr, s): 0.7 + s / 100 for lr in (0.1, 0.2) for s in (1, 2)})
    move("tiny-confirm", url(tmp_path), there)
    found = confirmation(open_storage(url(tmp_path)))
    counts = [(s.name, [r.seed for r in s.runs]) for s in found.studies[0].configurations]
    assert counts == [("best", [1, 2, 3]), ("rank 2", [1, 2])]
    assert found.done
    # Where both have computed a run, one counts.
    best = found.studies[0].best
    assert best is not None
    assert best.estimate is not None
    assert best.estimate.count == 3
    before = len(runs(tmp_path))
    confirm(open_storage(url(tmp_path)), top=2, seeds=2)
    assert len(runs(tmp_path)) == before


def test_where_nothing_is_searched_each_study_has_its_one_setting(tmp_path: Path) -> None:
    spec = make_spec(
        search={}, budget={"trials": 1, "seeds": 3}, train={"norm": None, "epochs": 1},
        each={"norm": ["group", "fixup"]},
    )  # fmt: skip
    store = begin(tmp_path, spec)
    make_worker(tmp_path).run()
    confirm(store)
    make_worker(tmp_path, "tiny-confirm").run()
    for study in confirmation(store).studies:
        (only,) = study.configurations
        assert (only.name, only.trial, dict(only.params)) == ("best", 0, {})
        assert [run.seed for run in only.runs] == [3, 4]
        assert only.estimate is not None
        assert only.estimate.count == 2
    assert "confirmed" in table_markdown([read_findings(store, stored(store))])
