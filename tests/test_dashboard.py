"""optuna-dashboard on a sweep: what it shows, what it refuses, and that no worker minds it."""

import json
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from browser import CHROMIUM, NO_CHROMIUM, Browser
from commands import Command, environment, run
from helpers import trials, url, wait_until, write_spec
from test_report import add, findings, known_spec, known_sweep, many_trials

from storage.engine import open_storage
from storage.leases import LEASE_ATTR
from sweeps import dashboard
from sweeps.attributes import LABEL
from sweeps.dashboard import keep_figures, make_dashboard
from sweeps.errors import SweepError
from sweeps.figures import make_figures
from sweeps.studies import create_or_resume

SHOWN = ["sweep-best", "sweep-curves", "sweep-map", "sweep-savings"]
TITLES = [
    "Best accuracy against global_batch_size",
    "Validation curves",
    "Peak learning rate and warmup",
    "What pruning saved",
]


@contextmanager
def served(storage_url: str, *, writable: bool = False) -> Iterator[str]:
    """The dashboard's address."""
    with make_dashboard(storage_url, "127.0.0.1", 0, writable=writable) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(30)


def get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=60) as answer:
        return json.load(answer)


def study_details(address: str) -> list[dict[str, Any]]:
    found = get(f"{address}/api/studies")["study_summaries"]
    return [get(f"{address}/api/studies/{study['study_id']}") for study in found]


def plots(study: dict[str, Any]) -> dict[str, Any]:
    return {p["id"]: json.loads(p["graph_object"]) for p in study["plotly_graph_objects"]}


def keep(tmp_path: Path, name: str = "known") -> None:
    found = findings(open_storage(url(tmp_path)), name)
    keep_figures(url(tmp_path), found, make_figures([found]))


def test_a_study_carries_its_note_its_figures_and_readable_trials(tmp_path: Path) -> None:
    known_sweep(tmp_path)
    done = run("report", "known", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    with served(url(tmp_path)) as address:
        small, large = study_details(address)
    assert small["name"] == "known/global_batch_size=128"
    note = small["note"]["body"]
    for said in (
        "Does it run?",
        "`sweep start known`",
        "[search.peak_lr]",
        "global_batch_size = 128",
    ):
        assert said in note
    for study, size in ((small, 128), (large, 512)):
        drawn = plots(study)
        assert sorted(drawn) == SHOWN
        assert drawn["sweep-best"]["data"][0]["y"] == [0.82, 0.6]
        said = drawn["sweep-map"]["layout"]["title"]["subtitle"]["text"]
        assert f"global_batch_size={size}: " in said
        assert f"global_batch_size={640 - size}:" not in said
        assert drawn["sweep-map"]["layout"]["title"]["text"] == "Peak learning rate and warmup"
    attributes = {a["key"]: a["value"] for a in large["trials"][0]["user_attrs"]}
    assert attributes[LABEL] == "post"
    assert (attributes["outcome"], attributes["reason"]) == ("diverged", "exploded")


def test_figures_that_are_saved_again_replace_the_old(tmp_path: Path) -> None:
    store = many_trials(tmp_path, 40)
    keep(tmp_path)
    with served(url(tmp_path)) as address:
        (before,) = study_details(address)
    study_id = store.get_study_id_from_name("known")
    large = store.get_study_system_attrs(study_id)
    # Shorter than before: what is left of the longer must not show.
    found = findings(store)
    figures = [figure for figure in make_figures([found]) if figure.key == "map"]
    (panel,) = figures[0].panels
    panel.plot.data = panel.plot.data[-1:]
    keep_figures(url(tmp_path), found, figures)
    with served(url(tmp_path)) as address:
        (after,) = study_details(address)
    assert sorted(plots(after)) == sorted(plots(before))
    assert len(plots(before)["sweep-map"]["data"]) > 1
    assert len(plots(after)["sweep-map"]["data"]) == 1
    assert store.get_study_system_attrs(study_id).keys() == large.keys()


def test_figures_in_the_store_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = many_trials(tmp_path, 40)
    monkeypatch.setattr(dashboard, "KEPT_POINTS", 7)
    keep(tmp_path)
    with served(url(tmp_path)) as address:
        (study,) = study_details(address)
    traces = {trace["name"]: trace for trace in plots(study)["sweep-map"]["data"]}
    for name in ("complete", "diverged"):
        assert len(traces[name]["x"]) == len(traces[name]["text"]) == 7
    assert len(traces["complete"]["marker"]["color"]) == 7
    assert len(traces["best"]["x"]) == 1
    # Too large by any measure: the old one stays, and no error.
    before = store.get_study_system_attrs(store.get_study_id_from_name("known"))
    monkeypatch.setattr(dashboard, "KEPT_BYTES", 10)
    keep(tmp_path)
    assert store.get_study_system_attrs(store.get_study_id_from_name("known")) == before


def test_a_locked_store_keeps_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known_sweep(tmp_path)
    monkeypatch.setattr(dashboard, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr("storage.sqlite.LOCK_TIMEOUT_SECONDS", 0.2)
    holder = sqlite3.connect(tmp_path / "sweep.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    found = findings(open_storage(url(tmp_path), read_only=True))
    with pytest.raises(SweepError, match=r"stay as they are .*locked"):
        keep_figures(url(tmp_path), found, make_figures([found]))
    holder.execute("ROLLBACK")
    holder.close()
    with served(url(tmp_path)) as address:
        assert [plots(study) for study in study_details(address)] == [{}, {}]


@pytest.mark.parametrize("kind", ["postgresql", "grpc"])
def test_figures_in_stores_of_every_kind(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "grpc":
        pytest.importorskip("grpc", reason="gRPC is not installed")
        from storage.serve import StoreServer

        server = StoreServer(url(tmp_path), "127.0.0.1", 0)
        server.start()
        request.addfinalizer(lambda: server.stop(grace=0))
        place = f"grpc://127.0.0.1:{server.port}"
    else:
        new_place: Callable[[], str] = request.getfixturevalue("postgres")
        place = new_place()
    spec = known_spec()
    store = open_storage(place)
    create_or_resume(store, spec, ["0" * 64] * len(spec.cells))
    for cell in (0, 1):
        for lr in (0.1, 0.2):
            params = {"peak_lr": lr, "warmup_epochs": 1.0}
            add(store, spec, cell, "complete", [0.1, 0.2, 0.3, lr], params)
    found = findings(store)
    for _ in range(2):
        keep_figures(place, found, make_figures([found]))
    with served(place) as address:
        for study in study_details(address):
            assert sorted(plots(study)) == SHOWN[:3]
            assert "Does it run?" in study["note"]["body"]


def change(address: str, method: str, path: str) -> tuple[int, Any]:
    question = urllib.request.Request(
        f"{address}{path}", b"{}", {"Content-Type": "application/json"}, method=method
    )
    try:
        with urllib.request.urlopen(question, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_only_a_writable_dashboard_changes_studies(tmp_path: Path) -> None:
    store = known_sweep(tmp_path)
    study_id = store.get_study_id_from_name("known/global_batch_size=512")
    with served(url(tmp_path)) as address:
        for method, path in (("DELETE", f"/api/studies/{study_id}"), ("POST", "/api/studies")):
            status, said = change(address, method, path)
            assert status == 403
            assert "read-only; start it with --writable" in said["reason"]
        assert len(study_details(address)) == 2
    with served(url(tmp_path), writable=True) as address:
        assert len(study_details(address)) == 2
        assert change(address, "DELETE", f"/api/studies/{study_id}")[0] == 204
        assert [s["name"] for s in study_details(address)] == ["known/global_batch_size=128"]


@pytest.mark.parametrize("writable", [False, True])
def test_reading_waits_for_no_worker_that_writes(tmp_path: Path, writable: bool) -> None:
    known_sweep(tmp_path)
    with served(url(tmp_path), writable=writable) as address:
        writer = sqlite3.connect(tmp_path / "sweep.db", isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        assert len(study_details(address)) == 2
        writer.execute("ROLLBACK")
        writer.close()


def test_a_store_that_has_gone_is_told_once_and_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known_sweep(tmp_path)
    with served(url(tmp_path)) as address:
        (tmp_path / "sweep.db").rename(tmp_path / "moved.db")
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError, match="500"):
                get(f"{address}/api/studies")
        (tmp_path / "moved.db").rename(tmp_path / "sweep.db")
        assert len(study_details(address)) == 2
    (line,) = [r.message for r in caplog.records if r.name.startswith("optuna_dashboard")]
    assert line.startswith(f"sweep: {tmp_path / 'sweep.db'} was moved, removed, replaced or empt")
    assert "\n" not in line


def test_a_sweep_beside_a_busy_dashboard_loses_nothing_and_leaves_its_figures(
    tmp_path: Path,
) -> None:
    write_spec(tmp_path / "tiny.toml", budget={"trials": 3}, train={"epochs": 2})
    with Command("start", "tiny.toml", "--workers", "2", cwd=tmp_path) as sweep:
        sweep.line("tiny: 1 study, 3 trials")
        ended = threading.Event()
        with served(url(tmp_path)) as address:
            failed: list[BaseException] = []

            def look() -> None:
                try:
                    while not ended.wait(0.05):
                        study_details(address)
                except BaseException as error:
                    failed.append(error)

            visitors = [threading.Thread(target=look) for _ in range(2)]
            for visitor in visitors:
                visitor.start()
            code = sweep.end()
            ended.set()
            for visitor in visitors:
                visitor.join(60)
            (study,) = study_details(address)
    assert code == 0, sweep.output
    assert failed == []
    assert "does not answer" not in sweep.output
    found = trials(tmp_path)
    assert [t.state for t in found] == [optuna.trial.TrialState.COMPLETE] * 3
    assert {t.system_attrs[LEASE_ATTR]["attempt"] for t in found} == {1}
    assert "sweep-curves" in plots(study)


def test_plain_optuna_dashboard_shows_a_sweep(tmp_path: Path) -> None:
    known_sweep(tmp_path)
    keep(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from optuna_dashboard._cli import main; sys.exit(main())"
    arguments = ["optuna-dashboard", url(tmp_path), "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.argv = {arguments!r}\n{code}"],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.poll() is None
            try:
                return bool(get(f"{address}/api/meta"))
            except urllib.error.URLError:
                return False

        wait_until(answers)
        assert [sorted(plots(study)) for study in study_details(address)] == [SHOWN, SHOWN]
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize("width", [1440, 400])
def test_the_figures_are_drawn_in_a_browser(tmp_path: Path, width: int) -> None:
    store = known_sweep(tmp_path)
    keep(tmp_path)
    study_id = store.get_study_id_from_name("known/global_batch_size=128")
    with served(url(tmp_path)) as address, Browser() as browser:
        page = browser.page(f"{address}/dashboard/studies/{study_id}", width=width)
        for title in TITLES:
            page.wait_for(
                "[...document.querySelectorAll('.js-plotly-plot')].some((place) => "
                f"place.querySelector('.gtitle')?.textContent === {title!r} && "
                "place.querySelector('.scatterlayer path, .barlayer path'))"
            )
        assert page.complaints == []
        assert all(request.startswith(f"{address}/") for request in page.requests)
        # What optuna-dashboard draws of its own accord stands beside them.
        assert page.evaluate("document.querySelectorAll('.js-plotly-plot').length") > len(SHOWN)


def test_a_merge_leaves_no_figure_of_two_halves(tmp_path: Path) -> None:
    known_sweep(tmp_path)
    keep(tmp_path)
    there = tmp_path / "there"
    there.mkdir()
    assert run("export", "known", "there/known.sweep", cwd=tmp_path).returncode == 0
    assert run("import", "known.sweep", cwd=there).returncode == 0
    # Here the figures grow by a trial and its long reason.
    spec = known_spec()
    params = {"peak_lr": 0.5, "warmup_epochs": 1.0}
    add(open_storage(url(tmp_path)), spec, 0, "diverged", [], params, reason="boom " * 900)
    keep(tmp_path)
    assert run("export", "known", "there/more.sweep", cwd=tmp_path).returncode == 0
    merged = run("import", "more.sweep", "--merge", cwd=there)
    assert merged.returncode == 0, merged.stderr
    with served(url(there)) as address:
        for study in study_details(address):
            assert sorted(plots(study)) == SHOWN
