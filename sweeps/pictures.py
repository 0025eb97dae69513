"""The figures of a report as files of their own: PNG for slides, SVG and PDF for papers.

kaleido draws them, in a Chrome or Chromium of this machine; it is an extra (`figures`).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps.errors import SweepError, first_line

if TYPE_CHECKING:
    from sweeps.figures import Figure

WIDTH = 840
"""Pixels at the size that the fonts are made for; a PNG has twice as many."""

_INSTALL = "run pip install kaleido, or leave --format out: the page needs neither"


def check_pictures() -> None:
    """Refuse to begin where pictures cannot be drawn.

    Raises:
        SweepError: kaleido is not installed, or finds no browser.
    """
    if find_spec("kaleido") is None:
        raise SweepError(f"--format needs kaleido, which is not installed; {_INSTALL}")
    from choreographer.browsers.chromium import Chromium

    if Chromium.find_browser(skip_local=False) is None:
        raise SweepError(
            "--format needs Chrome or Chromium, and kaleido finds none on this machine; install "
            "one (Debian: apt-get install chromium; anywhere: kaleido_get_chrome), or leave "
            "--format out"
        )


def write_pictures(figures: Sequence[Figure], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Draw every panel of every figure.

    Args:
        figures: of a report.
        folder: where they go; it is there.
        formats: "png", "svg" or "pdf".

    Returns:
        The files, named after figure and panel.

    Raises:
        SweepError: the browser fails, or the folder cannot be written.
    """
    import kaleido

    drawn = list(_titled(figures))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".figures-") as temporary:
        names = [f"{name}.{ending}" for ending in formats for name, _ in drawn]
        jobs = [
            {
                "fig": plot,
                "path": str(Path(temporary) / f"{name}.{ending}"),
                "opts": {
                    "format": ending, "width": WIDTH, "height": plot["layout"]["height"],
                    "scale": 2 if ending == "png" else 1,
                },
            }
            for ending in formats
            for name, plot in drawn
        ]  # fmt: skip
        try:
            # MathJax would come from the network, and no text here has formulas.
            kaleido.write_fig_from_object_sync(jobs, kopts={"mathjax": False})
        except Exception as error:
            # Whatever the browser says of itself, in classes of three libraries.
            raise SweepError(
                f"the browser could not draw the figures ({first_line(error)}); the page and its "
                "tables are written"
            ) from error
        for name in names:
            (Path(temporary) / name).replace(folder / name)
    return [folder / name for name in names]


def _titled(figures: Sequence[Figure]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each panel with a name for its file, and its title in the picture."""
    from sweeps.figures.parts import plain

    for figure in figures:
        for panel in figure.panels:
            plot = panel.plot.to_plotly_json()
            title = f"{figure.title}: {panel.title}" if panel.title else figure.title
            layout = plot["layout"]
            layout = {
                **layout,
                "title": {"text": plain(title), "font": {"size": 15}, "x": 0.02, "xanchor": "left"},
                "margin": {**layout["margin"], "t": 50},
                "height": layout["height"] + 20,
            }
            name = f"{figure.key}-{panel.title}" if panel.title else figure.key
            yield re.sub(r"[^\w.=,-]+", "-", name), {"data": plot["data"], "layout": layout}
