"""Sweeps in the store: created whole, whatever comes between; edited only where that is sound."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import begin, make_spec, trials, url
from optuna_dashboard import get_note

from storage.engine import open_storage
from sweeps import studies
from sweeps.errors import SpecError, SweepError
from sweeps.status import read_status
from sweeps.studies import create_or_resume, stored_names, stored_sweep

CELLS = {"train": {"norm": None}, "each": {"norm": ["group", "layer", "fixup"]}}
KNOWN = {"label": "known", "peak_lr": 0.05}


class Killed(BaseException):
    """A kill -9 at a chosen write."""


@pytest.mark.parametrize("writes", range(1, 40, 5))
def test_a_creation_that_was_cut_short_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Cut after any number of writes to any of the studies, then begun again."""
    spec = make_spec(**CELLS, **{"try": [KNOWN, {"label": "other", "peak_lr": 0.1}]})
    left = [writes]
    with monkeypatch.context() as patch:

        def counted(write: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*args: Any, **kw: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return write(*args, **kw)

            return counting

        for name in ("set_study_user_attr", "set_study_system_attr", "create_new_trial"):
            method = counted(getattr(optuna.storages._CachedStorage, name))
            patch.setattr(optuna.storages._CachedStorage, name, method)
        try:
            begin(tmp_path, spec)
        except Killed:
            assert stored_names(open_storage(url(tmp_path))) == []
    begin(tmp_path, spec)
    store = open_storage(url(tmp_path))
    assert stored_names(store) == ["tiny"]
    sweep = stored_sweep(store, "tiny")
    assert sweep.spec == spec
    assert [study.name for study in sweep.studies] == [spec.study_name(cell) for cell in spec.cells]
    for study in sweep.studies:
        labels = [t.user_attrs["label"] for t in trials(tmp_path, study.name)]
        assert labels == ["known", "other"]


def edited(tmp_path: Path, **changes: Any) -> list[list[str]]:
    """Begin again with another spec; the labels of each study's trials."""
    spec = make_spec(**{**CELLS, **changes})
    begin(tmp_path, spec)
    return [
        [t.user_attrs.get("label", "") for t in trials(tmp_path, spec.study_name(cell))]
        for cell in spec.cells
    ]


def test_added_tries_are_enqueued_once_in_the_studies_that_lack_them(tmp_path: Path) -> None:
    only_group = {**KNOWN, "when": {"norm": "group"}}
    assert edited(tmp_path, **{"try": [only_group]}) == [["known"], [], []]
    wider = {**KNOWN, "when": {"norm": ["layer", "group"]}}
    assert edited(tmp_path, **{"try": [wider]}) == [["known"], ["known"], []]
    reordered = {**KNOWN, "when": {"norm": ["group", "layer"]}}
    assert edited(tmp_path, **{"try": [reordered]}) == [["known"], ["known"], []]
    both = [reordered, {"label": "new", "peak_lr": 0.2}]
    assert edited(tmp_path, **{"try": both}) == [["known", "new"], ["known", "new"], ["new"]]


def test_a_try_that_the_budget_has_no_room_for_is_refused(tmp_path: Path) -> None:
    store = begin(tmp_path, make_spec(budget={"trials": 1}, **{"try": [KNOWN]}))
    two = [KNOWN, {"label": "new", "peak_lr": 0.2}]
    with pytest.raises(SpecError, match=r"trials"):
        begin(tmp_path, make_spec(budget={"trials": 1}, **{"try": two}))
    fewer = [{"label": "new", "peak_lr": 0.2}]
    with pytest.raises(SpecError, match="--add-trials 1"):
        begin(tmp_path, make_spec(budget={"trials": 1}, **{"try": fewer}))
    begin(tmp_path, make_spec(budget={"trials": 2}, **{"try": two}))
    (study,) = read_status(store, stored_sweep(store, "tiny")).studies
    assert (study.budget, study.count("queued")) == (2, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"norm": None, "epochs": 4}}, "train.epochs: stored 3, now 4"),
        ({"train": {"norm": None, "seed": 5}}, "train.seed: stored left out, now 5"),
        ({"search": {"peak_lr": {"low": 0.02, "high": 0.3}}}, "search.peak_lr"),
        ({"each": {"norm": ["group"]}}, "each"),
        ({"budget": {"trials": 3, "seeds": 2}}, "budget.seeds"),
        ({"try": [{**KNOWN, "peak_lr": 0.06}]}, "[[try]] known"),
    ],
)
def test_what_changes_the_meaning_of_trials_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    begin(tmp_path, make_spec(**{**CELLS, "try": [KNOWN]}))
    with pytest.raises(SpecError) as caught:
        begin(tmp_path, make_spec(**{**CELLS, "try": [KNOWN], **change}))
    assert said in str(caught.value)
    assert "--name" in str(caught.value)


def test_new_texts_reach_the_store(tmp_path: Path) -> None:
    begin(tmp_path, make_spec())
    store = begin(tmp_path, make_spec(question="Does it still run?"))
    (study,) = store.get_all_studies()
    assert study.user_attrs["question"] == "Does it still run?"
    assert "Does it still run?" in str(study.system_attrs)
    assert stored_sweep(store, "tiny").spec.question == "Does it still run?"


def test_optuna_dashboard_reads_a_studys_note_however_its_length_changes(tmp_path: Path) -> None:
    for question in ("Short?", "Long? " * 1000, "Short again?"):
        store = begin(tmp_path, make_spec(question=question))
        note = get_note(optuna.load_study(storage=store, study_name="tiny"))
        assert question.strip() in note
        assert note.endswith("```")
        assert "Long" not in note or question.startswith("Long")


def test_a_study_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    store = open_storage(url(tmp_path))
    theirs = optuna.create_study(storage=store, study_name="tiny", direction="minimize")
    theirs.set_user_attr("owner", "somebody")
    with pytest.raises(SweepError, match="not of this sweep"):
        begin(tmp_path, make_spec())
    assert theirs.user_attrs == {"owner": "somebody"}
    assert stored_names(store) == []


def test_other_images_are_refused(tmp_path: Path) -> None:
    store = begin(tmp_path, make_spec())
    with pytest.raises(SweepError, match="--data-dir"):
        create_or_resume(store, make_spec(), ["0" * 64])


def test_a_sweep_that_cannot_be_read_spoils_no_other(tmp_path: Path) -> None:
    store = begin(tmp_path, make_spec())
    begin(tmp_path, make_spec("old"))
    (old,) = (s for s in store.get_all_studies() if s.study_name == "old")
    broken = {**old.user_attrs[studies.SPEC], "oldkey": 1}
    store.set_study_user_attr(old._study_id, studies.SPEC, broken)
    assert stored_names(store) == ["old", "tiny"]
    assert stored_sweep(store, "tiny").spec == make_spec()
    with pytest.raises(SpecError, match="oldkey"):
        stored_sweep(store, "old")
