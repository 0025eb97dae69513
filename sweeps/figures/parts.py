"""What the figures of a report are made of: panels, axes, colours, captions."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sweeps.findings import Findings, StudyFindings
from sweeps.progress import describe_params
from sweeps.status import TrialStatus

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot")
GREY = "#767676"
DIVERGED = "#D55E00"

MAX_POINTS = 400
"""Trials drawn in one panel, by all studies in it."""

MAX_EPOCHS = 100
"""Points drawn of each curve."""

MAX_STUDIES = 12
"""Studies that have a panel of their own, or a curve, in one figure."""

BATCH = "global_batch_size"


@dataclass(frozen=True)
class Panel:
    """One plot of a figure.

    Attributes:
        title: plain text, or "".
        plot: what is drawn.
        study: the full name of the one study that it shows, or "".
    """

    title: str
    plot: PlotlyFigure
    study: str = ""


@dataclass(frozen=True)
class Figure:
    """Some plots that say one thing; title and caption are plain text."""

    key: str
    title: str
    caption: str
    panels: Sequence[Panel]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: each panel's `data` and `layout` are Plotly's."""
        return {
            "key": self.key,
            "title": self.title,
            "caption": self.caption,
            "panels": [
                {"title": panel.title, **panel.plot.to_plotly_json()} for panel in self.panels
            ],
        }


@dataclass(frozen=True)
class Entry:
    """A study among all that are reported: its sweep, its name here, how it is drawn."""

    sweep: Findings
    study: StudyFindings
    name: str
    index: int

    @property
    def colour(self) -> str:
        """Its colour in all figures."""
        return COLOURS[self.index % len(COLOURS)]

    @property
    def symbol(self) -> str:
        """Its marker in all figures."""
        return SYMBOLS[self.index % len(SYMBOLS)]

    @property
    def dash(self) -> str:
        """Its line in all figures."""
        return DASHES[self.index % len(DASHES)]

    @property
    def trials(self) -> Sequence[TrialStatus]:
        """All its trials."""
        return self.study.status.trials

    @property
    def drawable(self) -> list[TrialStatus]:
        """Trials that ended with something to show."""
        return [t for t in self.trials if t.outcome in ("complete", "pruned", "diverged")]


def make_plot(traces: list[dict[str, Any]], layout: dict[str, Any]) -> PlotlyFigure:
    """Plotly's figure of some traces."""
    import plotly.graph_objects as go

    return go.Figure(data=traces, layout=layout)


def make_layout(*, x: dict[str, Any], y: dict[str, Any], height: int) -> dict[str, Any]:
    """What all plots have in common: fonts, margins, lines and the legend's place.

    Args:
        x, y: what the axes have of their own.
        height: in pixels.
    """
    line = {
        "showline": True, "linecolor": "#555555", "gridcolor": "#e4e4e4", "zeroline": False,
        "ticks": "outside", "tickcolor": "#555555", "automargin": True,
    }  # fmt: skip
    x, y = (
        {**axis, "title": {"standoff": 12, **axis["title"]}} if "title" in axis else axis
        for axis in (x, y)
    )
    return {
        # Plotly's own template would add seven kilobytes to every plot, and fills in for an
        # empty one.
        "template": "none",
        "height": height,
        # The buttons stand above the plot, the legend below its axis.
        "margin": {"l": 50, "r": 15, "t": 30, "b": 45},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#222222"},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 0,
            "yref": "container",
            "tracegroupgap": 0,
            "font": {"size": 11},
            "yanchor": "bottom",
        },
        "hovermode": "closest",
        "xaxis": {**line, **x},
        "yaxis": {**line, **y},
    }


def make_pattern(shape: str) -> dict[str, Any]:
    """Hatching of a bar, which tells bars apart where colours do not."""
    return {"shape": shape, "solidity": 0.3, "fillmode": "overlay"}


def log_ticks() -> dict[str, Any]:
    """Ticks of a logarithmic axis at 1 and 3 of each power of ten."""
    # Plotly's own choice labels powers of ten alone, or every digit.
    ticks = [m * 10.0**e for e in range(-8, 8) for m in (1, 3)]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def make_points(
    points: Sequence[tuple[Entry, TrialStatus, Any, Any]],
    name: str,
    marker: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """Trials as markers, each with what the pointer shows of it.

    Args:
        points: study, trial, and where it stands on both axes.
        name: in the legend.
        marker: Plotly's.
        more: of Plotly's keys of a scatter trace.
    """
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x for _, _, x, _ in points],
        "y": [y for _, _, _, y in points],
        "text": [hover(trial, entry.name) for entry, trial, _, _ in points],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": marker,
        **more,
    }


def hover(trial: TrialStatus, study: str) -> str:
    """What the pointer shows of a trial, in Plotly's tags."""
    parts = [f"{study} #{trial.number}" + (f" “{trial.label}”" if trial.label else "")]
    accuracy = f" {trial.accuracy:.4f}" if trial.accuracy is not None else ""
    parts.append(trial.outcome + (f": {trial.reason}" if trial.reason else accuracy))
    parts.append(describe_params(trial.params))
    return "<br>".join(plain(part) for part in parts if part)


def labelled(entry: Entry) -> list[TrialStatus]:
    """The trials of the `[[try]]` tables."""
    return [t for t in entry.trials if t.label]


def thin(entry: Entry, studies: int = 1) -> list[TrialStatus]:
    """The best trial, the labelled ones, and as many others, evenly spaced, as can be told apart.

    Args:
        entry: the study.
        studies: how many share a panel.
    """
    trials, best, limit = entry.drawable, entry.study.status.best, _point_limit(studies)
    if len(trials) <= limit:
        return trials
    chosen = {round(i) for i in np.linspace(0, len(trials) - 1, limit)}
    return [t for i, t in enumerate(trials) if i in chosen or t.label or t is best]


def mark_key(trials: Iterable[TrialStatus], pruned: str, diverged: str) -> list[str]:
    """What the marks of some trials mean: a sentence for each outcome that is there."""
    outcomes = {trial.outcome for trial in trials}
    sentences = {"pruned": pruned, "diverged": diverged}
    return [said for outcome, said in sentences.items() if outcome in outcomes]


def thinning(thinned: bool, studies: int = 1) -> list[str]:
    """The sentence that says so where trials were left out by `thin`."""
    limit = _point_limit(studies)
    return [f"Thinned to about {limit} trials of each study, evenly."] if thinned else []


def _point_limit(studies: int) -> int:
    return max(MAX_POINTS // 8, MAX_POINTS // studies)


def make_caption(parts: Sequence[str], lines: Sequence[str]) -> str:
    """Sentences, then a line for each study."""
    return "\n".join([" ".join(parts), *lines])


def left_out(shown: list[Entry]) -> list[str]:
    """The sentence that says so where a figure has more studies than it draws."""
    rest = len(shown) - MAX_STUDIES
    return [f"The first {MAX_STUDIES} studies are drawn; {rest} are left out."] if rest > 0 else []


def bounds(trials: Iterable[TrialStatus], others: Iterable[float] = ()) -> tuple[float, float]:
    """The lower edge, on which diverged trials stand, and the upper end of an accuracy axis.

    Args:
        trials: which are drawn on it.
        others: further accuracies that it has room for.
    """
    values = [
        t.accuracy
        for t in trials
        if t.accuracy is not None and t.outcome not in ("diverged", "failed")
    ]
    values += others
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), 0.01)
    return low - pad, high + pad


def score_axis(entries: Sequence[Entry], floor: float, top: float) -> dict[str, Any]:
    """An axis of accuracies whose lower edge leaves room for marks on it.

    Args:
        entries: the studies that are drawn on it.
        floor, top: as `bounds` gives them.
    """
    bottom = floor - 0.03 * (top - floor)
    return {"title": {"text": score_title(entries)}, "range": [bottom, top]}


def score_title(entries: Sequence[Entry]) -> str:
    """What an axis of accuracies is called, by the images that scored the studies' trials."""
    names = {"holdout": "validation accuracy", "test": "test accuracy"}
    found = {names[entry.study.status.validation] for entry in entries}
    return found.pop() if len(found) == 1 else "accuracy"


def plain(text: str) -> str:
    """Text that Plotly shows as it is; it would leave an escaped quotation mark escaped."""
    return html.escape(text, quote=False)


def wrap(name: str) -> str:
    """A study's name on an axis: broken where settings meet, as narrow screens need."""
    return plain(name).replace(",", ",<br>").replace("/", "/<br>")
