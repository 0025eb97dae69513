"""The report in a real browser, on screens and on paper, and its figures as pictures."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, NO_CHROMIUM, Browser, Page
from commands import environment, run
from test_report import HOSTILE, add, create, findings, known_spec, known_sweep, many_trials

from sweeps.figures import make_figures
from sweeps.page import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

WIDTHS = (1440, 400)

# The name, size and number of marks of each drawing.
DRAWINGS = """[...document.querySelectorAll(".plot")].map((place) => {
  const drawing = place.querySelector("svg.main-svg");
  const box = drawing ? drawing.getBoundingClientRect() : {width: 0, height: 0, right: 0};
  const marks = place.querySelectorAll(".scatterlayer path, .barlayer path, .contourlayer path");
  return [place.id, box.width, box.height, box.right, marks.length];
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def report(kind: str, folder: Path) -> tuple[Path, list[str]]:
    """A page, and the names of the drawings that it must have."""
    if kind == "one study":
        found = [findings(many_trials(folder, 40))]
    elif kind == "two sweeps":
        known_sweep(folder)
        other = known_spec("other", train={"norm": "fixup"})
        store = create(folder, other)
        for cell in (0, 1):
            params = {"peak_lr": 0.1, "warmup_epochs": 1.0}
            add(store, other, cell, "complete", [0.1, 0.2, 0.3, 0.7], params)
        found = [findings(store), findings(store, "other")]
    else:
        found = [findings(known_sweep(folder, label=HOSTILE if kind == "hostile" else "post"))]
    figures = make_figures(found)
    names = [f"{f.key}-{i}" for f in figures for i in range(len(f.panels))]
    return write_report(found, figures, folder / "report"), names


def assert_whole(page: Page, names: list[str], width: int) -> None:
    page.wait_for("document.documentElement.dataset.drawn")
    assert page.evaluate("document.documentElement.dataset.drawn") == str(len(names))
    drawings = page.evaluate(DRAWINGS)
    assert [name for name, *_ in drawings] == names
    for name, across, down, right, marks in drawings:
        assert across > 0.6 * min(width, 340), name
        assert down > 100, name
        assert right <= width, name
        assert marks > 0, name
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("kind", ["one study", "two studies", "hostile", "two sweeps"])
def test_every_figure_is_drawn_at_every_width(browser: Browser, tmp_path: Path, kind: str) -> None:
    path, names = report(kind, tmp_path)
    assert len(names) >= 4
    for width in WIDTHS:
        page = browser.page(path.as_uri(), width=width)
        assert_whole(page, names, width)
        assert page.complaints == []
        assert page.requests == [path.as_uri()]
        page.close()


def test_a_page_follows_its_window_and_survives_being_printed(
    browser: Browser, tmp_path: Path
) -> None:
    path, names = report("two studies", tmp_path)
    page = browser.page(path.as_uri(), width=1440)
    assert_whole(page, names, 1440)
    page.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    page.resize(400)
    # The drawings are made anew after the window has changed.
    page.wait_for(
        "[...document.querySelectorAll('svg.main-svg')].every((s) => s.clientWidth < 400)"
    )
    assert_whole(page, names, 400)
    assert page.complaints == []
    page.close()


def test_the_answer_is_read_on_a_phone_without_scrolling(browser: Browser, tmp_path: Path) -> None:
    path, _ = report("two studies", tmp_path)
    page = browser.page(path.as_uri(), width=400)
    cells = page.evaluate(
        "[...document.querySelectorAll('.settings td')].filter((c) => c.textContent)"
        ".map((c) => [c.textContent, c.getBoundingClientRect().right])"
    )
    assert any(text == "0.8200" for text, _ in cells)
    assert any(text == "peak_lr=0.2 warmup_epochs=1" for text, _ in cells)
    assert all(right <= 400 for _, right in cells)
    page.close()


# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("kaleido") is None, reason="kaleido is not installed")
def test_each_figure_is_a_picture_too(tmp_path: Path) -> None:
    known_sweep(tmp_path)
    done = run("report", "known", "--format", "png", "--format", "svg", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "known-report"
    names = [
        "best", "curves", "map-global_batch_size=128", "map-global_batch_size=512",
        "history-global_batch_size=128", "history-global_batch_size=512", "savings",
    ]  # fmt: skip
    expected = [f"known-report/{name}.{ending}" for ending in ("png", "svg") for name in names]
    assert done.stdout.splitlines() == ["known-report/index.html", *expected]
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
        assert "scatterlayer" in (folder / f"{name}.svg").read_text() or name == "savings"
    kept = {"figures.json", "index.html", "results.csv", "table.md"}
    pictures = {Path(path).name for path in expected}
    assert {path.name for path in folder.iterdir()} == kept | pictures


def without(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command where a package is not installed."""
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['sweep', *{list(arguments)!r}]\n"
        "from sweeps.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_pictures_without_kaleido_are_refused_in_a_line(tmp_path: Path) -> None:
    known_sweep(tmp_path)
    done = without("kaleido", "report", "known", "--format", "pdf", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "sweep: --format needs kaleido, which is not installed; run pip install kaleido, or leave "
        "--format out: the page needs neither"
    ]
    assert not (tmp_path / "known-report").exists()
    assert without("kaleido", "report", "known", cwd=tmp_path).returncode == 0
    drawn: list[Any] = json.loads((tmp_path / "known-report" / "figures.json").read_text())
    assert drawn[0]["key"] == "best"
