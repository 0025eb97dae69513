"""`sweep report` on stores whose numbers are known, and its page in a real browser."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from commands import run
from helpers import SEARCH, make_spec, url
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial
from rich.console import Console
from sqlalchemy import text

from storage.engine import open_storage, sql_engine
from sweeps import search
from sweeps.attributes import CURVES, DEVICE_ACCURACIES
from sweeps.errors import SweepError
from sweeps.figures import Figure, make_figures
from sweeps.figures.parts import COLOURS, MAX_POINTS
from sweeps.findings import (
    Findings,
    comparison_sentences,
    headline,
    read_findings,
    study_sentences,
)
from sweeps.page import default_folder, page_html, results_csv, table_markdown, write_report
from sweeps.report import answer_table
from sweeps.spec import SweepSpec
from sweeps.studies import create_or_resume, stored_sweep

EPOCHS = 4
SPACE: dict[str, Any] = {
    "peak_lr": {"low": 0.01, "high": 1.0, "log": True},
    "warmup_epochs": {"low": 0.0, "high": 3.0},
}
HOSTILE = "</script><img src=x onerror=alert(1)> | [b]x[/b] `c`"


def known_spec(name: str = "known", **changes: Any) -> SweepSpec:
    changes = {
        "title": "A & B",
        "each": {"global_batch_size": [128, 512]},
        "search": SPACE,
        "budget": {"trials": 4},
        **changes,
        # Of 1,347 digits a fifth is held out: 269 validation images.
        "train": {"epochs": EPOCHS, "global_batch_size": None, **changes.get("train", {})},
    }
    return make_spec(name, **changes)


def create(tmp_path: Path, spec: SweepSpec, scored: int | None = 269) -> BaseStorage:
    store = open_storage(url(tmp_path))
    cells = len(spec.cells)
    counted = () if scored is None else (scored,) * cells
    create_or_resume(store, spec, ["0" * 64] * cells, scored=counted)
    return store


def add(
    store: BaseStorage,
    spec: SweepSpec,
    cell: int,
    outcome: str,
    curve: list[float],
    params: dict[str, Any],
    *,
    label: str = "",
    reason: str = "",
    devices: list[float | None] | None = None,
) -> None:
    """A trial as a worker leaves it."""
    study = optuna.load_study(storage=store, study_name=spec.study_name(spec.cells[cell]))
    state = {
        "complete": TrialState.COMPLETE,
        "failed": TrialState.FAIL,
        "running": TrialState.RUNNING,
    }.get(outcome, TrialState.PRUNED)
    attrs: dict[str, Any] = {"label": label} if label else {}
    if outcome != "running":
        attrs |= {"outcome": outcome, "seconds": 1.5}
    seeds = spec.budget.seeds
    value = sum(curve[EPOCHS - 1 :: EPOCHS]) / seeds if outcome == "complete" else None
    study.add_trial(
        create_trial(
            state=state,
            value=value if state != TrialState.PRUNED or not curve else curve[-1],
            params=params,
            distributions=search.distributions(spec.search),
            user_attrs=attrs | ({"reason": reason} if reason else {}),
            system_attrs={
                CURVES: {"val_accuracy": curve},
                **({DEVICE_ACCURACIES: devices} if devices else {}),
            },
            intermediate_values=dict(enumerate(curve, start=1)),
        )
    )


def known_sweep(tmp_path: Path, name: str = "known", label: str = "post") -> BaseStorage:
    """At batch 128 the known setting is nearly as good as the best; at 512 it diverges."""
    spec = known_spec(name)
    store = create(tmp_path, spec)
    settings = [{"peak_lr": lr, "warmup_epochs": w} for lr, w in ((0.1, 0.0), (0.2, 1.0))]
    add(store, spec, 0, "complete", [0.5, 0.7, 0.8, 0.81], settings[0], label=label)
    add(store, spec, 0, "complete", [0.4, 0.6, 0.8, 0.82], settings[1])
    add(store, spec, 0, "pruned", [0.1, 0.2], {"peak_lr": 0.01, "warmup_epochs": 3.0})
    add(store, spec, 0, "diverged", [], {"peak_lr": 1.0, "warmup_epochs": 0.0}, reason="boom")
    add(store, spec, 1, "diverged", [0.3], settings[0], label=label, reason="exploded")
    add(store, spec, 1, "complete", [0.2, 0.3, 0.5, 0.6], settings[1])
    add(store, spec, 1, "failed", [0.2], settings[0], reason="no memory")
    add(store, spec, 1, "running", [0.1, 0.3], {"peak_lr": 0.3, "warmup_epochs": 2.0})
    return store


def findings(store: BaseStorage, name: str = "known") -> Findings:
    return read_findings(store, stored_sweep(store, name))


def figures(*found: Findings) -> dict[str, Figure]:
    return {figure.key: figure for figure in make_figures(found)}


def page_of(*found: Findings) -> str:
    from datetime import UTC, datetime

    return page_html(found, make_figures(found), datetime(2026, 1, 2, 3, 4, tzinfo=UTC))


def without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.S)


def test_results_csv_has_every_trial(tmp_path: Path) -> None:
    text = results_csv([findings(known_sweep(tmp_path))])
    assert text == (
        "study,number,outcome,label,global_batch_size,peak_lr,warmup_epochs,accuracy,"
        "worst_device_accuracy,epochs,seconds,reason,carried_from\n"
        "known/global_batch_size=128,0,complete,post,128,0.1,0.0,0.81,,4,1.5,,\n"
        "known/global_batch_size=128,1,complete,,128,0.2,1.0,0.82,,4,1.5,,\n"
        "known/global_batch_size=128,2,pruned,,128,0.01,3.0,0.2,,2,1.5,,\n"
        "known/global_batch_size=128,3,diverged,,128,1.0,0.0,,,0,1.5,boom,\n"
        "known/global_batch_size=512,0,diverged,post,512,0.1,0.0,0.3,,1,1.5,exploded,\n"
        "known/global_batch_size=512,1,complete,,512,0.2,1.0,0.6,,4,1.5,,\n"
        "known/global_batch_size=512,2,failed,,512,0.1,0.0,0.2,,1,1.5,no memory,\n"
        "known/global_batch_size=512,3,running,,512,0.3,2.0,0.3,,2,,,\n"
    )


def test_results_csv_has_what_each_sweep_enumerates(tmp_path: Path) -> None:
    """One enumerates a setting that another searches; `epochs` is not what a trial completed."""
    lr, train = {"peak_lr": 0.1}, {"epochs": None}
    one = make_spec("one", each={"epochs": [1, 2], "nesterov": [True]}, train=train)
    two = make_spec("two", search={**SEARCH, "nesterov": {"choices": [True, False]}})
    for spec in (one, two):
        store = create(tmp_path, spec)
    add(store, one, 1, "pruned", [0.5], lr)
    add(store, two, 0, "pruned", [0.3, 0.3], {**lr, "nesterov": False})
    text = results_csv([findings(store, name) for name in ("one", "two")])
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0])[3:7] == ["label", "each.epochs", "nesterov", "peak_lr"]
    told = [(row["each.epochs"], row["nesterov"], row["epochs"]) for row in rows]
    assert told == [("2", "true", "1"), ("", "false", "2")]


def test_table_md_is_the_answer(tmp_path: Path) -> None:
    assert table_markdown([findings(known_sweep(tmp_path))]) == (
        "## A &amp; B (known)\n\n"
        "Does it run?\n\n"
        "Trained: dataset=digits model=resnet8 width_factor=0.25 norm=group num_devices=4 "
        "split=iid algorithm=sync-sgd epochs=4 schedule=constant\n\n"
        "| study | configuration | trial | outcome | accuracy | parameters |\n"
        "|---|---|---:|---|---:|---|\n"
        "| global_batch_size=128 | best | #1 | complete | 0.8200 | peak_lr=0.2 warmup_epochs=1 |\n"
        "| global_batch_size=128 | post | #0 | complete | 0.8100 | peak_lr=0.1 warmup_epochs=0 |\n"
        "| global_batch_size=512 | best | #1 | complete | 0.6000 | peak_lr=0.2 warmup_epochs=1 |\n"
        "| global_batch_size=512 | post | #0 | diverged | – | peak_lr=0.1 warmup_epochs=0 |\n\n"
        "Accuracies are on images held out of training, not on the test images.\n\n"
        "7 of 8 trials have ended: 3 complete, 1 pruned, 2 diverged, 1 failed. 1 running and 0 "
        "queued: what stands here may still change.\n"
    )


def test_the_answer_in_words(tmp_path: Path) -> None:
    found = findings(known_sweep(tmp_path))
    assert headline(found) == (
        "Best accuracy: 0.8200 (global_batch_size=128), 0.6000 (global_batch_size=512)."
    )
    first, second = (study_sentences(found, study) for study in found.studies)
    # sqrt(0.82 * 0.18 / 269) = 0.0234
    assert first == [
        "The best of 2 complete trials is #1 with accuracy 0.8200 ± 0.0234, at peak_lr=0.2 "
        "warmup_epochs=1.",
        "“post” (#0) reached 0.8100, 0.0100 less: within the standard error of 0.0234 that 269 "
        "validation images give, and from a single seed, so no evidence of a difference.",
    ]
    assert second == [
        "The only complete trial is #1 with accuracy 0.6000 ± 0.0299, at peak_lr=0.2 "
        "warmup_epochs=1.",
        "“post” (#0) diverged: exploded.",
    ]
    text = without_scripts(page_of(found))
    assert "7 of 8 trials have ended: 3 complete, 1 pruned, 2 diverged, 1 failed." in text
    assert "not on the test images" in text
    assert "how far another seed would move its accuracy was not measured" in text
    assert "Written 2026-01-02 03:04 UTC" in text


def test_captions_say_what_the_data_say(tmp_path: Path) -> None:
    drawn = figures(findings(known_sweep(tmp_path)))
    assert list(drawn) == ["best", "curves", "map", "history", "savings"]
    assert drawn["best"].caption == (
        "The best accuracy falls from 0.8200 at global_batch_size = 128 to 0.6000 at 512.\nBars "
        "are one standard error. Hollow: known beforehand. Crosses on the lower edge: "
        "known beforehand, and diverged."
    )
    assert "1 of the 2 trials that diverged; 1 did so before an epoch" in drawn["curves"].caption
    assert (
        "global_batch_size=128: none diverged up to peak_lr 0.2, all from 1 on."
        in drawn["map"].caption
    )
    # Ended: 4 + 4 + 2 + 0 and 1 + 4 + 1 epochs; spared: 2 pruned, 4 + 3 diverged.
    assert drawn["savings"].caption == (
        "The trials that ended spent 16 epochs; run to their ends they would have taken 25. "
        "Pruning spared 2 (8%), ending trials that diverged 7 (28%)."
    )
    (best,) = drawn["best"].as_dict()["panels"]
    assert best["layout"]["xaxis"]["type"] == "log"
    assert best["data"][0]["x"] == [128, 512]
    assert best["data"][0]["y"] == [0.82, 0.6]


def test_what_others_wrote_is_text(tmp_path: Path) -> None:
    found = findings(known_sweep(tmp_path, label=HOSTILE))
    page = page_of(found)
    assert "<img" not in page
    assert "&lt;img src=x" in without_scripts(page)
    assert page.count("</script>") == 3
    hovers = json.dumps(figures(found)["map"].as_dict())
    assert "<img" not in hovers
    assert "&lt;img" in hovers
    row = next(line for line in table_markdown([found]).splitlines() if "&lt;img" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 7
    labels = [row["label"] for row in csv.DictReader(io.StringIO(results_csv([found])))]
    assert labels[0] == HOSTILE
    # Nor is it Rich's markup on the terminal.
    shown = run("status", "known", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "[b]x[/b]" in shown.stdout


def test_a_sweep_of_which_nothing_has_ended(tmp_path: Path) -> None:
    store = create(tmp_path, known_spec())
    found = findings(store)
    assert headline(found) == "No trial has completed yet, so there is no best one."
    assert make_figures([found]) == []
    page = page_of(found)
    assert "0 of 8 trials have ended. 0 running and 8 queued" in page
    assert "There is nothing to draw yet." in page
    assert len(page) < 20_000
    assert results_csv([found]).count("\n") == 1


def test_a_sweep_of_which_everything_diverged(tmp_path: Path) -> None:
    spec = known_spec()
    store = create(tmp_path, spec)
    for cell in (0, 1):
        for lr in (0.1, 0.2, 0.5, 1.0):
            params = {"peak_lr": lr, "warmup_epochs": 0.0}
            add(store, spec, cell, "diverged", [0.1] if lr < 0.3 else [], params, reason="boom")
    found = findings(store)
    assert headline(found).startswith("No trial has completed yet")
    assert study_sentences(found, found.studies[0]) == ["No trial has completed."]
    assert list(figures(found)) == ["curves", "map", "history", "savings"]
    assert "0 of 8 trials" not in page_of(found)
    assert "8 of 8 trials have ended: 8 diverged." in page_of(found)


def test_a_sweep_that_searches_nothing(tmp_path: Path) -> None:
    spec = known_spec(
        each=[{"norm": "group", "split": "iid"}, {"norm": "fixup", "split": "iid"}],
        train={"norm": None, "split": None, "global_batch_size": 128},
        search={},
        budget={"trials": 1, "seeds": 2},
    )
    store = create(tmp_path, spec)
    add(store, spec, 0, "complete", [0.1, 0.3, 0.5, 0.7, 0.2, 0.4, 0.6, 0.9], {})
    add(store, spec, 1, "complete", [0.1, 0.3, 0.5, 0.5, 0.2, 0.4, 0.6, 0.5], {})
    found = findings(store)
    assert study_sentences(found, found.studies[0]) == [
        "The only complete trial is #0 with accuracy 0.8000 [0.0000, 1.0000] (seeds from 0.7000 to "
        "0.9000)."
    ]
    assert found.studies[0].curves[0] == pytest.approx([0.15, 0.35, 0.55, 0.8])
    assert "Each is the mean over 2 seeds." in page_of(found)
    drawn = figures(found)
    assert list(drawn) == ["best", "curves"]
    assert "Best: highest 0.8000 (norm=group,split=iid), lowest 0.5000" in drawn["best"].caption
    assert "Bars are the range over seeds." in drawn["best"].caption
    columns, *rows = csv.reader(io.StringIO(results_csv([found])))
    place = columns.index("seed_accuracies")
    assert [row[place] for row in rows] == ["0.7;0.9", "0.5;0.5"]
    assert "parameters" not in table_markdown([found])


def test_devices_stand_from_the_one_served_worst_on(tmp_path: Path) -> None:
    spec = known_spec(
        each={"split": ["iid", "classes"]},
        train={"split": None, "global_batch_size": 128},
        search={},
        budget={"trials": 1},
    )
    store = create(tmp_path, spec)
    add(store, spec, 0, "complete", [0.1, 0.2, 0.3, 0.9], {}, devices=[0.9, 0.89, 0.91, 0.9])
    add(store, spec, 1, "complete", [0.1, 0.2, 0.3, 0.5], {}, devices=[0.9, None, 0.05, 0.4])
    drawn = figures(findings(store))
    assert list(drawn) == ["best", "curves", "devices"]
    (panel,) = drawn["devices"].as_dict()["panels"]
    # Of IID devices all are alike.
    (trace,) = panel["data"]
    assert (trace["x"], trace["y"]) == ([0, 0.5, 1], [0.05, 0.4, 0.9])
    assert drawn["devices"].caption.endswith(
        "split=classes: from 0.0500 to 0.9000, median 0.4000; 1 of 3 devices have 0.1 or less."
    )


def test_one_study_needs_no_comparison(tmp_path: Path) -> None:
    spec = known_spec(each={}, train={"global_batch_size": 128}, search={"momentum": {
        "low": 0.0, "high": 0.9}})  # fmt: skip
    store = create(tmp_path, spec)
    add(store, spec, 0, "complete", [0.1, 0.2, 0.3, 0.4], {"momentum": 0.5})
    add(store, spec, 0, "complete", [0.1, 0.2, 0.3, 0.5], {"momentum": 0.9})
    found = findings(store)
    assert headline(found) == "Best accuracy: 0.5000, by trial #1."
    assert list(figures(found)) == ["curves", "settings", "history"]


def test_captions_of_a_level_line_and_of_a_single_divergence(tmp_path: Path) -> None:
    spec = known_spec()
    store = create(tmp_path, spec)
    setting = {"peak_lr": 0.1, "warmup_epochs": 0.0}
    for cell in (0, 1):
        add(store, spec, cell, "complete", [0.5, 0.7, 0.8, 0.8], setting)
    add(store, spec, 1, "diverged", [0.3], {**setting, "peak_lr": 1.0}, reason="exploded")
    drawn = figures(findings(store))
    assert drawn["best"].caption.startswith(
        "The best accuracy is 0.8000 at global_batch_size = 128 and at 512.\n"
    )
    assert drawn["curves"].caption.endswith("Thin, cut at a cross: the trial that diverged.")


def test_several_sweeps_share_their_figures(tmp_path: Path) -> None:
    known_sweep(tmp_path)
    other = known_spec("other", train={"norm": "fixup"})
    store = create(tmp_path, other)
    add(store, other, 0, "complete", [0.1, 0.2, 0.3, 0.7], {"peak_lr": 0.1, "warmup_epochs": 1.0})
    add(store, other, 1, "complete", [0.1, 0.2, 0.3, 0.9], {"peak_lr": 0.1, "warmup_epochs": 1.0})
    both = [findings(store), findings(store, "other")]
    drawn = figures(*both)
    (best,) = drawn["best"].as_dict()["panels"]
    lines = {t["name"]: (t["x"], t["y"]) for t in best["data"] if "lines" in t["mode"]}
    assert lines == {
        "known, norm=group": ([128, 512], [0.82, 0.6]),
        "other, norm=fixup": ([128, 512], [0.7, 0.9]),
    }
    assert "other, norm=fixup: best accuracy rises from 0.7000" in drawn["best"].caption
    assert [panel.title for panel in drawn["map"].panels] == [
        "known/global_batch_size=128", "known/global_batch_size=512",
        "other/global_batch_size=128", "other/global_batch_size=512",
    ]  # fmt: skip
    assert comparison_sentences(both) == [
        "global_batch_size = 128: known 0.8200 ± 0.0234, other 0.7000 ± 0.0279.",
        "global_batch_size = 512: other 0.9000 ± 0.0183, known 0.6000 ± 0.0299.",
    ]
    assert comparison_sentences(both[:1]) == []
    assert results_csv(both).count("\n") == 11
    assert table_markdown(both).count("## ") == 2
    done = run("report", "known", "other", "known", cwd=tmp_path)
    assert done.stdout == "known+other-report/index.html\n", done.stderr


def many_trials(tmp_path: Path, trials: int) -> BaseStorage:
    spec = known_spec(each={}, train={"global_batch_size": 128}, budget={"trials": trials})
    store = create(tmp_path, spec)
    for number in range(trials):
        lr, warmup = 0.01 * 1.01 ** (number * 37 % 400), number * 17 % 100 / 33.4
        params = {"peak_lr": lr, "warmup_epochs": warmup}
        if lr > 0.2:
            add(store, spec, 0, "diverged", [], params, reason="boom")
        else:
            add(store, spec, 0, "complete", [0.1, 0.2, 0.3, 0.5 + lr + 0.01 * warmup], params)
    return store


def test_many_trials_are_thinned_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = findings(many_trials(tmp_path, 40))
    assert "Thinned" not in figures(found)["map"].caption
    monkeypatch.setattr("sweeps.figures.parts.MAX_POINTS", 20)
    drawn = figures(found)
    for key in ("map", "history"):
        assert "Thinned to about 20 trials of each study" in drawn[key].caption
        (panel,) = drawn[key].as_dict()["panels"]
        named = ("complete", "pruned", "diverged")
        points = sum(len(t["x"]) for t in panel["data"] if t["name"] in named)
        assert 20 <= points <= 21
    assert MAX_POINTS > 100


def test_the_cliff_and_the_importance(tmp_path: Path) -> None:
    drawn = figures(findings(many_trials(tmp_path, 40)))
    (panel,) = drawn["map"].as_dict()["panels"]
    (outline,) = [t for t in panel["data"] if t["type"] == "contour"]
    lr = outline["x"]
    for row in outline["z"]:
        assert row[0] < 0.5 < row[-1]
    assert lr[0] == pytest.approx(0.01)
    (bars,) = drawn["importance"].as_dict()["panels"][0]["data"]
    assert set(bars["y"]) == {"peak_lr", "warmup_epochs"}
    assert sum(bars["x"]) == pytest.approx(1)
    assert "peak_lr matters most" in drawn["importance"].caption


def test_the_cliff_moves_with_the_batch_size(tmp_path: Path) -> None:
    spec = known_spec(budget={"trials": 60})
    store = create(tmp_path, spec)
    for cell, cliff in enumerate((0.4, 0.1)):
        for number in range(60):
            lr, warmup = 0.01 * 1.08 ** (number * 37 % 60), number * 17 % 60 / 20
            params = {"peak_lr": lr, "warmup_epochs": warmup}
            outcome = "diverged" if lr > cliff else "complete"
            curve = [] if lr > cliff else [0.1, 0.2, 0.3, 0.5 + 0.001 * number]
            add(store, spec, cell, outcome, curve, params)
    drawn = figures(findings(store))["map"]
    said = r"The cliff moves down from peak_lr 0\.[34]\d? to 0\.(09|1)\d* between "
    assert re.search(said + r"global_batch_size = 128 and 512\.", drawn.caption), drawn.caption
    # On one scale, so that it is seen to move.
    layouts = [panel["layout"] for panel in drawn.as_dict()["panels"]]
    assert layouts[0]["xaxis"]["range"] == layouts[1]["xaxis"]["range"]
    assert layouts[0]["yaxis"]["range"] == layouts[1]["yaxis"]["range"]


def test_a_trial_beyond_a_range_that_was_narrowed_counts_among_the_rest(tmp_path: Path) -> None:
    spec = known_spec(each={}, train={"global_batch_size": 128}, budget={"trials": 9})
    store = create(tmp_path, spec)
    for number in range(9):
        params = {"peak_lr": 0.05 + 0.1 * number, "warmup_epochs": 0.3 * number}
        add(store, spec, 0, "complete", [0.1, 0.1, 0.1, 0.1 + 0.05 * number], params)
    with sql_engine(store).begin() as connection:  # as a queued [[try]] keeps its value
        beyond = (
            "UPDATE trial_params SET param_value = 1.5 "
            "WHERE trial_id = 9 AND param_name = 'peak_lr'"
        )
        assert connection.execute(text(beyond)).rowcount == 1
    found = findings(open_storage(url(tmp_path)))
    assert found.studies[0].status.trials[8].params["peak_lr"] == 1.5
    assert set(found.studies[0].importance) == {"peak_lr", "warmup_epochs"}


def test_trials_that_scored_alike_have_no_importance(tmp_path: Path) -> None:
    spec = known_spec(each={}, train={"global_batch_size": 128}, budget={"trials": 9})
    store = create(tmp_path, spec)
    for number in range(9):
        params = {"peak_lr": 0.05 + 0.1 * number, "warmup_epochs": 0.3 * number}
        add(store, spec, 0, "complete", [0.1, 0.1, 0.1, 0.1], params)
    assert "importance" not in figures(findings(store))


def test_choices_stand_side_by_side(tmp_path: Path) -> None:
    """Also those that one sweep of a report offers and the other does not."""
    choices: dict[str, Any] = {"clip_grad_norm": {"choices": ["off", 1.0]}}
    one = known_spec("one", search=choices, each={}, train={"global_batch_size": 128})
    choices = {"clip_grad_norm": {"choices": [5.0, "off"]}}
    two = known_spec("two", search=choices, each={}, train={"global_batch_size": 512})
    for spec, taken in ((one, ["off", 1.0, "off"]), (two, [5.0, "off", 5.0])):
        store = create(tmp_path, spec)
        for value in taken:
            add(store, spec, 0, "complete", [0.1, 0.2, 0.3, 0.4], {"clip_grad_norm": value})
    drawn = figures(findings(store, "one"), findings(store, "two"))["settings"]
    (panel,) = drawn.as_dict()["panels"]
    assert panel["layout"]["xaxis"]["ticktext"] == ["off", "1.0", "5.0"]
    assert [[round(x) for x in trace["x"]] for trace in panel["data"]] == [[0, 1, 0], [2, 0, 2]]
    left, right = panel["data"]
    assert max(left["x"][0], left["x"][2]) < right["x"][1]
    assert "Studies stand side by side" in drawn.caption


def test_the_images_that_score_a_trial_are_those_of_the_study(tmp_path: Path) -> None:
    """What `sweep start` has counted holds, where the settings alone say nothing of it."""
    spec = known_spec(each={}, train={"dataset": "images", "image_size": 8})
    store = create(tmp_path, spec, scored=None)
    add(store, spec, 0, "complete", [0.1, 0.2, 0.3, 0.5], {"peak_lr": 0.1, "warmup_epochs": 1.0})
    (uncounted,) = findings(store).studies
    assert (uncounted.validation_images, uncounted.standard_error(0.5)) == (None, None)
    (study,) = store.get_all_studies()
    create_or_resume(store, spec, ["0" * 64], scored=[100])
    # No other spec came with the count, so its note is of no later version.
    assert store.get_study_system_attrs(study._study_id) == study.system_attrs
    found = findings(store)
    (sentence,) = study_sentences(found, found.studies[0])
    assert "accuracy 0.5000 ± 0.0500," in sentence  # sqrt(0.5 * 0.5 / 100)
    create_or_resume(store, spec, ["0" * 64])  # whoever has not counted takes nothing away
    assert findings(store).studies[0].validation_images == 100


@pytest.mark.parametrize(
    ("params", "label", "said"),
    [
        ({"peak_lr": 0.9, "warmup_epochs": 1.0}, "", "peak_lr stands at the end of its range, "
         "0.01 to 1 (log): what is better may lie beyond."),
        ({"peak_lr": 0.7, "warmup_epochs": 2.9}, "", "warmup_epochs stands at the end of its "
         "range, 0 to 3: what is better may lie beyond."),
        ({"peak_lr": 0.7, "warmup_epochs": 0.0}, "", None),  # none can be shorter
        ({"peak_lr": 0.9, "warmup_epochs": 1.0}, "usual", None),
    ],
)  # fmt: skip
def test_a_best_trial_at_the_end_of_a_range_is_said_to_be_there(
    tmp_path: Path, params: dict[str, float], label: str, said: str | None
) -> None:
    spec = known_spec(each={}, train={"global_batch_size": 128})
    store = create(tmp_path, spec)
    add(store, spec, 0, "complete", [0.1, 0.2, 0.3, 0.5], params, label=label)
    found = findings(store)
    _, *rest = study_sentences(found, found.studies[0])
    assert rest == ([said] if said else [])


def test_a_best_trial_beyond_a_range_that_was_narrowed_is_not_at_its_end(tmp_path: Path) -> None:
    wide = known_spec(each={}, train={"global_batch_size": 128})
    store = create(tmp_path, wide)
    params = {"peak_lr": 0.9, "warmup_epochs": 1.0}
    add(store, wide, 0, "complete", [0.1, 0.2, 0.3, 0.5], params)
    narrow = {**SPACE, "peak_lr": {"low": 0.01, "high": 0.5, "log": True}}
    create(tmp_path, known_spec(each={}, train={"global_batch_size": 128}, search=narrow))
    found = findings(store)
    assert found.spec.search["peak_lr"].high == 0.5
    assert len(study_sentences(found, found.studies[0])) == 1


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_what_a_best_trial_made_no_use_of_is_at_no_end(tmp_path: Path, optimizer: str) -> None:
    search = {
        "optimizer": {"choices": ["sgd", "muon"]},
        "muon_lr_factor": {"low": 0.2, "high": 5.0, "log": True},
    }
    spec = known_spec(each={}, train={"global_batch_size": 128}, search=search)
    store = create(tmp_path, spec)
    params = {"optimizer": optimizer, "muon_lr_factor": 4.9}
    add(store, spec, 0, "complete", [0.1, 0.2, 0.3, 0.5], params)
    found = findings(store)
    told = "muon_lr_factor stands at the end" in " ".join(study_sentences(found, found.studies[0]))
    assert told == (optimizer == "muon")


@pytest.mark.parametrize(("split", "said"), [("iid", False), ("quantity", True)])
def test_what_two_splits_use_is_at_its_end_with_either(
    tmp_path: Path, split: str, said: bool
) -> None:
    search = {
        "split": {"choices": ["iid", "dirichlet", "quantity"]},
        "alpha": {"low": 0.1, "high": 1.0},
    }
    spec = known_spec(each={}, train={"global_batch_size": 128, "split": None}, search=search)
    store = create(tmp_path, spec)
    add(store, spec, 0, "complete", [0.1, 0.2, 0.3, 0.5], {"split": split, "alpha": 0.99})
    found = findings(store)
    told = " ".join(study_sentences(found, found.studies[0]))
    assert ("alpha stands at the end" in told) == said


def test_colours_are_told_apart() -> None:
    assert len(set(COLOURS)) == len(COLOURS) == 7


def test_status_lists_every_trial(tmp_path: Path) -> None:
    known_sweep(tmp_path)
    shown = run("status", "known", "--trials", cwd=tmp_path).stdout.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown if "│" in line]
    assert rows[0] == [
        "global_batch_size=128", "#0", "complete", "0.8100", "4", "post",
        "peak_lr=0.1 warmup_epochs=0",
    ]  # fmt: skip
    assert [row[1:4] for row in rows[2:]] == [
        ["#2", "pruned", "(0.2000)"], ["#3", "diverged", "–"],
        ["#0", "diverged", "–"], ["#1", "complete", "0.6000"], ["#2", "failed", "–"],
        ["#3", "running", "(0.3000)"],
    ]  # fmt: skip
    told = json.loads(run("status", "known", "--trials", "--json", cwd=tmp_path).stdout)
    outcomes = [trial["outcome"] for trial in told["studies"][1]["trials"]]
    assert outcomes == ["diverged", "complete", "failed", "running"]
    plain = json.loads(run("status", "known", "--json", cwd=tmp_path).stdout)
    assert "trials" not in plain["studies"][0]


def test_the_command_writes_four_files_and_names_the_page(tmp_path: Path) -> None:
    store = known_sweep(tmp_path)
    done = run("report", "known", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "known-report/index.html\n"
    folder = tmp_path / "known-report"
    assert sorted(f.name for f in folder.iterdir()) == [
        "figures.json", "index.html", "results.csv", "table.md",
    ]  # fmt: skip
    assert {f.stat().st_mode & 0o044 for f in folder.iterdir()} == {
        (tmp_path / "sweep.db").stat().st_mode & 0o044
    }
    drawn = json.loads((folder / "figures.json").read_text())
    assert [figure["key"] for figure in drawn] == ["best", "curves", "map", "history", "savings"]
    assert drawn[0]["panels"][0]["data"]
    assert (folder / "index.html").stat().st_size < 3_000_000
    # Again, elsewhere and over what is there.
    (folder / "table.md").write_text("old")
    again = run("report", "known", "--out", "known-report", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (folder / "table.md").read_text().startswith("## A")
    del store


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "knwon"], "did you mean 'known'"),
        (["report", "known", "--out", "taken"], "cannot write the report to taken"),
        (["report", "known", "--storage", "sqlite:///none.db"], "none.db does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    create(tmp_path, known_spec())
    (tmp_path / "taken").write_text("a file")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert said in done.stderr
    assert done.stdout == ""


def test_an_interrupted_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = known_sweep(tmp_path)
    found = [findings(store)]
    page = write_report(found, make_figures(found), tmp_path / "out")
    before = {f.name: f.read_bytes() for f in page.parent.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SweepError, match="No space left"):
        write_report(found, make_figures(found), tmp_path / "out")
    assert {f.name: f.read_bytes() for f in page.parent.iterdir()} == before


def test_the_default_folder() -> None:
    assert default_folder(["a"]) == Path("a-report")
    assert default_folder(["a", "b"]) == Path("a+b-report")


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(findings(known_sweep(tmp_path)))
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
    assert "@import" not in page
    assert "url(" not in page


def test_axes_say_which_images_an_accuracy_is_measured_on(tmp_path: Path) -> None:
    held = findings(known_sweep(tmp_path))
    spec = known_spec("scored", train={"validation": "test", "validation_fraction": None})
    store = create(tmp_path, spec)
    for cell in (0, 1):
        params = {"peak_lr": 0.1, "warmup_epochs": 0.0}
        add(store, spec, cell, "complete", [0.2, 0.3, 0.5, 0.6], params)
    test = findings(store, "scored")

    def named(*sweeps: Findings) -> set[str]:
        texts = (json.dumps(figure.as_dict()) for figure in make_figures(list(sweeps)))
        return set(re.findall(r'"text": "([a-z ]*accuracy)"', " ".join(texts)))

    assert named(held) == {"validation accuracy"}
    assert named(test) == {"test accuracy"}
    assert "accuracy" in named(held, test)


def test_what_an_answer_is_too_wide_for_stands_below_it(tmp_path: Path) -> None:
    table = answer_table(findings(known_sweep(tmp_path)).status)

    def shown(width: int) -> list[str]:
        out = io.StringIO()
        Console(file=out, width=width).print(table)
        return [line.rstrip() for line in out.getvalue().splitlines()]

    wide, narrow = shown(160), shown(80)
    assert any("best" in line and "peak_lr=0.2 warmup_epochs=1" in line for line in wide)
    assert not any("peak_lr" in line for line in narrow if "│" in line)
    at = narrow.index("global_batch_size=128, best (#1):")
    assert narrow[at + 1] == "  peak_lr=0.2 warmup_epochs=1"
    assert max(map(len, narrow)) <= 80
