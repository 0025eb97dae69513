"""`sweep list`: how far each sweep of a store is, for people and for programs."""

import json
from pathlib import Path
from typing import Any

import optuna
from helpers import begin, make_spec, url
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial
from typer.testing import CliRunner

from storage.trials import TrialQueue
from sweeps import search, studies
from sweeps.cli import app
from sweeps.confirm import enqueue_runs
from sweeps.spec import SweepSpec
from sweeps.status import read_status
from sweeps.studies import stored_sweep


def complete(store: BaseStorage, spec: SweepSpec) -> None:
    """A complete trial of three epochs in each study."""
    for cell in spec.cells:
        optuna.load_study(storage=store, study_name=spec.study_name(cell)).add_trial(
            create_trial(
                value=0.5,
                params={"peak_lr": 0.1},
                distributions=search.distributions(spec.search),
                user_attrs={"outcome": "complete"},
                intermediate_values={1: 0.3, 2: 0.4, 3: 0.5},
            )
        )


def listed(tmp_path: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["list", "--storage", url(tmp_path), *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_list_says_how_far_each_sweep_is(tmp_path: Path) -> None:
    specs = {
        "going": make_spec("going", train={"norm": None}, each={"norm": ["group", "layer"]}),
        "met": make_spec("met", budget={"trials": 1}),
        "spent": make_spec("spent", budget={"trials": 9, "epochs_total": 3}),
        "old": make_spec("old"),
        "new": make_spec("new"),
    }
    for spec in specs.values():
        store = begin(tmp_path, spec)
    for name in ("going", "met", "spent"):
        complete(store, specs[name])
    enqueue_runs(store, "met", [stored_sweep(store, "met").studies[0].fingerprint], top=1, seeds=2)
    queue = TrialQueue(store, worker_id="w")
    claims = [queue.claim([(s.study_id, 3)]) for s in stored_sweep(store, "going").studies]
    (old,) = (s for s in store.get_all_studies() if s.study_name == "old")
    broken = {**old.user_attrs[studies.SPEC], "oldkey": 1}
    store.set_study_user_attr(old._study_id, studies.SPEC, broken)

    table = listed(tmp_path).partition("sweep.db\n")[2].splitlines()
    assert [line.split() for line in table[:-1]] == [
        ["sweep", "trials", "state", "confirmation"],
        ["going", "2", "of", "6", "2", "running"],
        ["met", "1", "of", "1", "done", "met-confirm"],
        ["met-confirm", "0", "of", "2", "not", "running", "of", "met"],
        ["new", "0", "of", "3", "not", "running"],
        ["old", "unreadable"],
        ["spent", "1", "of", "9", "done"],
    ]
    assert table[-1].startswith("old cannot be read here: old: there is no key 'oldkey'")

    done = CliRunner().invoke(app, ["status", "--json", "--storage", url(tmp_path)])
    assert done.exit_code == 0
    readable = sorted({*specs, "met-confirm"} - {"old"})
    assert [one["name"] for one in json.loads(done.stdout)] == [*readable, "old"]
    assert "old cannot be read here: old: there is no key 'oldkey'" in done.stderr

    for name, other in (("met", "met-confirm"), ("met-confirm", "met")):
        (unread,) = (s for s in store.get_all_studies() if s.study_name == name)
        spec = unread.user_attrs[studies.SPEC]
        store.set_study_user_attr(unread._study_id, studies.SPEC, {**spec, "oldkey": 1})
        done = CliRunner().invoke(app, ["status", "--json", "--storage", url(tmp_path)])
        assert done.exit_code == 0, done.output
        found = {one["name"]: one for one in json.loads(done.stdout)}
        assert "oldkey" in found[name]["error"]
        assert "error" not in found[other]
        store.set_study_user_attr(unread._study_id, studies.SPEC, spec)

    told = {one["name"]: one for one in json.loads(listed(tmp_path, "--json"))["stored"]}
    assert list(told) == sorted({*specs, "met-confirm"})
    assert "oldkey" in told.pop("old")["error"]
    assert told["met"] == {
        "name": "met", "question": "Does it run?", "finished": 1, "budget": 1, "running": 0,
        "done": True, "confirms": "", "confirmation": "met-confirm", "error": "",
    }  # fmt: skip
    for name, one in told.items():  # as `sweep status` has it
        status = read_status(store, stored_sweep(store, name))
        counts: dict[str, Any] = {
            "finished": sum(study.finished for study in status.studies),
            "budget": sum(study.budget for study in status.studies),
            "running": sum(study.count("running") for study in status.studies),
        }
        assert {key: one[key] for key in counts} == counts
        assert (one["done"], one["confirms"]) == (status.done, status.confirms)
    assert all(claim and queue.finish(claim, TrialState.COMPLETE, 0.6) for claim in claims)
    assert "4 of 6" in listed(tmp_path)
