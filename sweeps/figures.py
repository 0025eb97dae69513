"""The figures of a report: Plotly objects, each with a caption that says what to read from it.

Colours are Okabe and Ito's, told apart by colour-blind readers (https://jfly.uni-koeln.de/color/),
without their yellow, which is lost on white paper; markers and dashes tell the same in grey.
All text that comes from the store is escaped, since Plotly reads tags in it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sweeps.config import Value, written
from sweeps.findings import Findings, StudyFindings, ended_early
from sweeps.progress import describe_params
from sweeps.status import TrialStatus

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from sweeps.spec import Range

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot")
GREY = "#767676"
DIVERGED = "#D55E00"

MAX_POINTS = 400
"""Trials drawn of each study in one panel."""

MAX_EPOCHS = 100
"""Points drawn of each curve."""

MAX_STUDIES = 12
"""Studies that have a panel of their own, or a curve, in one figure."""

BATCH = "global_batch_size"


@dataclass(frozen=True)
class Panel:
    """One plot of a figure; its title is plain text."""

    title: str
    plot: PlotlyFigure


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
class _Entry:
    """A study among all that are reported: its sweep, its name here, how it is drawn."""

    sweep: Findings
    study: StudyFindings
    name: str
    index: int

    @property
    def colour(self) -> str:
        return COLOURS[self.index % len(COLOURS)]

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.index % len(SYMBOLS)]

    @property
    def dash(self) -> str:
        return DASHES[self.index % len(DASHES)]

    @property
    def trials(self) -> Sequence[TrialStatus]:
        return self.study.status.trials

    @property
    def drawable(self) -> list[TrialStatus]:
        """Trials that ended with something to show."""
        return [t for t in self.trials if t.outcome in ("complete", "pruned", "diverged")]


def make_figures(sweeps: Sequence[Findings]) -> list[Figure]:
    """Every figure that has something to show, in the order in which a report has them."""
    entries = _entries(sweeps)
    makers: tuple[Callable[[list[_Entry]], Figure | None], ...] = (
        _best_by_axis, _curves, _map, _slices, _history, _importance, _savings,
    )  # fmt: skip
    return [figure for figure in (make(entries) for make in makers) if figure is not None]


def _entries(sweeps: Sequence[Findings]) -> list[_Entry]:
    found: list[_Entry] = []
    for sweep in sweeps:
        for study in sweep.studies:
            name = study.name if len(sweeps) == 1 else study.status.name
            found.append(_Entry(sweep, study, name, len(found)))
    return found


# --- best accuracy against what is enumerated ---------------------------------------------------


def _best_by_axis(entries: list[_Entry]) -> Figure | None:
    with_best = [e for e in entries if e.study.status.best is not None]
    if len(entries) < 2 or not with_best:
        return None
    axis = _axis(entries)
    if axis is None:
        positions: dict[int, Any] = {e.index: _wrap(e.name) for e in entries}
        lines = {"best": entries}
    else:
        positions = {e.index: getattr(e.study.config, axis) for e in entries}
        lines = {}
        for entry in entries:
            lines.setdefault(_line_name(entries, entry, axis), []).append(entry)
    floor, top = _bounds(t for e in entries for t in [e.study.status.best, *_tries(e)] if t)
    traces: list[dict[str, Any]] = []
    for number, (name, line) in enumerate(lines.items()):
        traces += _line(name, number, line, positions, floor, joined=axis is not None)
    scores = _score_axis(floor, top)
    if axis is not None:
        x, height = _axis_of(axis, [positions[e.index] for e in entries]), 420
        layout = _layout(x=x, y=scores, height=height)
    else:
        # Names are read across, so they stand on the vertical axis.
        traces = [_turned(trace) for trace in traces]
        names = {"type": "category", "autorange": "reversed"}
        layout = _layout(x=scores, y=names, height=140 + 34 * len(entries))
    return Figure(
        "best",
        f"Best accuracy against {axis}" if axis else "Best accuracy of each study",
        _best_caption(axis, lines, positions),
        [Panel("", _plot(traces, layout))],
    )


def _axis(entries: list[_Entry]) -> str | None:
    """The numeric setting that tells studies apart, the batch size before any other."""
    names = list(dict.fromkeys(name for e in entries for name in e.study.status.cell))
    for name in sorted([BATCH, *names], key=lambda name: name != BATCH):
        values = [getattr(e.study.config, name) for e in entries]
        if any(name in e.study.status.cell for e in entries) or name == BATCH:
            numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
            searched = any(name in e.sweep.status.searched for e in entries)
            if numeric and not searched and len(set(values)) > 1:
                return name
    return None


def _line_name(entries: list[_Entry], entry: _Entry, axis: str) -> str:
    """What a line has in common: its sweep, where there are several, and the other settings."""
    cell = entry.study.status.cell
    parts = [f"{name}={written(value)}" for name, value in cell.items() if name != axis]
    sweeps = {e.sweep.status.name for e in entries}
    if len(sweeps) > 1:
        norms = {e.study.config.norm for e in entries}
        if len(norms) > 1 and "norm" not in cell:
            parts.insert(0, f"norm={entry.study.config.norm}")
        parts.insert(0, entry.sweep.status.name)
    return ", ".join(parts) or "best"


def _line(
    name: str,
    number: int,
    line: list[_Entry],
    positions: Mapping[int, Any],
    floor: float,
    *,
    joined: bool,
) -> list[dict[str, Any]]:
    colour, symbol = COLOURS[number % len(COLOURS)], SYMBOLS[number % len(SYMBOLS)]
    line = sorted(line, key=lambda e: positions[e.index]) if joined else line
    best = [(e, e.study.status.best) for e in line]
    found = [(e, t, t.accuracy) for e, t in best if t is not None and t.accuracy is not None]
    errors = [_error(e.study, accuracy) for e, _, accuracy in found]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers" if joined else "markers",
            "name": _plain(name),
            "x": [positions[e.index] for e, _, _ in found],
            "y": [accuracy for _, _, accuracy in found],
            "text": [_hover(trial, e.name) for e, trial, _ in found],
            "hovertemplate": "%{text}<extra></extra>",
            "line": {"color": colour, "dash": DASHES[number % len(DASHES)]},
            "marker": {"color": colour, "symbol": symbol, "size": 10},
            "error_y": {
                "visible": any(low or high for low, high in errors),
                "array": [high for _, high in errors],
                "arrayminus": [low for low, _ in errors],
                "color": colour,
                "thickness": 1,
            },
        }
    ]
    known = [(e, t) for e in line for t in _tries(e) if t.outcome in ("complete", "diverged")]
    for outcome, mark in (("complete", f"{symbol}-open"), ("diverged", "x-thin-open")):
        tries = [(e, t) for e, t in known if t.outcome == outcome]
        if tries:
            label = "known settings" if outcome == "complete" else "known, diverged"
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": label if name == "best" else f"{_plain(name)}: {label}",
                    "x": [positions[e.index] for e, _ in tries],
                    "y": [t.accuracy if outcome == "complete" else floor for _, t in tries],
                    "text": [_hover(t, e.name) for e, t in tries],
                    "hovertemplate": "%{text}<extra></extra>",
                    "marker": {
                        "color": colour, "symbol": mark, "size": 11, "line": {"width": 2}
                    },
                }
            )  # fmt: skip
    return traces


def _turned(trace: dict[str, Any]) -> dict[str, Any]:
    """A trace with its axes exchanged."""
    turned = {k: v for k, v in trace.items() if k not in ("x", "y", "error_y")}
    turned |= {"x": trace["y"], "y": trace["x"]}
    return turned | ({"error_x": trace["error_y"]} if "error_y" in trace else {})


def _error(study: StudyFindings, accuracy: float) -> tuple[float, float]:
    if study.seed_accuracies:
        low, high = min(study.seed_accuracies), max(study.seed_accuracies)
        return max(0.0, accuracy - low), max(0.0, high - accuracy)
    error = (
        study.standard_error(accuracy)
        if study.status.steps_per_trial == study.config.epochs
        else None
    )
    return (error, error) if error is not None else (0.0, 0.0)


def _best_caption(
    axis: str | None, lines: Mapping[str, list[_Entry]], positions: Mapping[int, Any]
) -> str:
    said = []
    for name, line in lines.items():
        best = [(e, e.study.status.best) for e in line]
        found = [(e, t.accuracy) for e, t in best if t is not None and t.accuracy is not None]
        if not found:
            said.append(f"{name}: no trial has completed.")
            continue
        prefix = "" if name == "best" else f"{name}: "
        if axis is not None and len(found) > 1:
            found.sort(key=lambda entry: positions[entry[0].index])
            (first, start), (last, end) = found[0], found[-1]
            verb = "falls" if end < start else "rises" if end > start else "stays"
            said.append(
                f"{prefix or 'The '}best accuracy {verb} from {start:.4f} at {axis} = "
                f"{positions[first.index]:g} to {end:.4f} at {positions[last.index]:g}."
            )
        else:
            high = max(found, key=lambda entry: entry[1])
            low = min(found, key=lambda entry: entry[1])
            said.append(
                f"{prefix or 'Best: '}highest {high[1]:.4f} ({high[0].name})"
                + (f", lowest {low[1]:.4f} ({low[0].name})." if len(found) > 1 else ".")
            )
    keys = []
    every = [e for line in lines.values() for e in line]
    if any(_error(e.study, 0.5) != (0.0, 0.0) for e in every):
        bars = "the range over seeds" if every[0].study.seed_accuracies else "one standard error"
        keys.append(f"Bars are {bars}.")
    tries = [t.outcome for e in every for t in _tries(e)]
    if "complete" in tries:
        keys.append("Hollow: settings known beforehand.")
    if "diverged" in tries:
        keys.append("Crosses on the lower edge: known settings that diverged.")
    return "\n".join([*said, " ".join(keys)] if keys else said)


# --- curves -------------------------------------------------------------------------------------


def _curves(entries: list[_Entry]) -> Figure | None:
    shown = [e for e in entries if any(e.study.curves.values())]
    if not shown:
        return None
    traces: list[dict[str, Any]] = []
    cut = 0
    thinned = False
    for entry in shown[:MAX_STUDIES]:
        by_number = {t.number: t for t in entry.trials}
        for number, curve in entry.study.curves.items():
            trial = by_number[number]
            if not curve:
                continue
            every = max(1, math.ceil(len(curve) / MAX_EPOCHS))
            thinned |= every > 1
            epochs = sorted({*range(1, len(curve) + 1, every), len(curve)})
            best = trial.outcome != "diverged"
            cut += not best
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": _plain(f"{entry.name} #{number}")
                    + ("" if best else " diverged"),
                    "showlegend": best,
                    "x": epochs,
                    "y": [curve[epoch - 1] for epoch in epochs],
                    "text": _plain(f"{entry.name} #{number} {trial.label}".strip()),
                    "hovertemplate": "%{text}<br>epoch %{x}: %{y:.4f}<extra></extra>",
                    "line": {
                        "color": entry.colour,
                        "dash": entry.dash if best else "dot",
                        "width": 2 if best else 1.2,
                    },
                    "marker": {
                        "color": entry.colour,
                        "symbol": entry.symbol,
                        "size": 7,
                        "maxdisplayed": 8,
                    }
                    if best
                    else {
                        "color": entry.colour,
                        # The end alone is marked.
                        "size": [*[0] * (len(epochs) - 1), 11],
                        "symbol": "x-thin",
                        "line": {"width": 2.5, "color": entry.colour},
                    },
                }
            )  # fmt: skip
    layout = _layout(
        x={"title": {"text": "epoch"}, "rangemode": "tozero"},
        y={"title": {"text": "validation accuracy"}},
        height=440,
    )
    return Figure(
        "curves",
        "Validation curves",
        _curves_caption(shown, cut, thinned),
        [Panel("", _plot(traces, layout))],
    )


def _curves_caption(shown: list[_Entry], cut: int, thinned: bool) -> str:
    drawn = shown[:MAX_STUDIES]
    parts = []
    if any(e.study.status.best for e in drawn):
        parts.append("The best trial of each study, by epoch.")
    late = []
    for entry in drawn:
        best = entry.study.status.best
        curve = entry.study.curves.get(best.number) if best else None
        if curve and max(curve) > curve[-1] + 0.02:
            late.append(f"{entry.name} ({max(curve):.4f} at epoch {_argmax(curve)})")
    if late:
        parts.append(
            "A trial counts with its last epoch; higher before it were " + ", ".join(late) + "."
        )
    diverged = sum(e.study.status.count("diverged") for e in drawn)
    if diverged:
        unseen = sum(t.outcome == "diverged" and t.step == 0 for e in drawn for t in e.trials)
        parts.append(
            f"Dotted, cut at a cross: {cut} of the {diverged} trials that diverged"
            + (f"; {unseen} did so before an epoch had ended" if unseen else "")
            + "."
        )
    if any(e.sweep.status.seeds > 1 for e in drawn):
        parts.append("Curves are means over the seeds; a diverged one is of its last seed.")
    if thinned:
        parts.append(f"Curves are thinned to about {MAX_EPOCHS} epochs.")
    return " ".join([*parts, *_left_out(shown)])


def _argmax(curve: Sequence[float]) -> int:
    return max(range(len(curve)), key=curve.__getitem__) + 1


# --- the map of learning rate and warmup --------------------------------------------------------


def _is_mapped(entry: _Entry) -> bool:
    return {"peak_lr", "warmup_epochs"} <= set(entry.sweep.status.searched)


def _map(entries: list[_Entry]) -> Figure | None:
    shown = [e for e in entries if _is_mapped(e) and e.drawable]
    if not shown:
        return None
    scored = [t.accuracy for e in shown for t in e.drawable if t.outcome != "diverged"]
    colours = [a for a in scored if a is not None] or [0.0, 1.0]
    limits = (min(colours), max(colours))
    thinned = False
    panels = []
    for entry in shown[:MAX_STUDIES]:
        trials = _thin(entry)
        thinned |= len(trials) < len(entry.drawable)
        traces = [*_outline(entry), *_map_points(entry, trials, limits)]
        layout = _layout(
            x={"title": {"text": "peak_lr"}, "type": "log", **_log_ticks()},
            y={"title": {"text": "warmup_epochs"}},
            height=390,
        )
        panels.append(Panel(entry.name, _plot(traces, layout)))
    return Figure(
        "map",
        "Peak learning rate and warmup",
        _map_caption(shown, thinned),
        panels,
    )


def _map_points(
    entry: _Entry, trials: list[TrialStatus], limits: tuple[float, float]
) -> list[dict[str, Any]]:
    # Many points would cover each other.
    size = 9 if len(trials) <= 60 else 6
    scale = {
        "cmin": limits[0],
        "cmax": limits[1],
        "colorscale": "Cividis",
    }
    bar = {"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 10}}
    traces = []
    for outcome, marker in (
        ("pruned", {"symbol": "circle-open", "size": size, "line": {"width": 1.5}, **scale}),
        (
            "complete",
            {"symbol": "circle", "size": size, **scale, "colorbar": bar, "showscale": True},
        ),
        (
            "diverged",
            {"symbol": "x-thin", "size": size - 1, "line": {"width": 1.6, "color": DIVERGED}},
        ),
    ):
        group = [t for t in trials if t.outcome == outcome]
        if not group:
            continue
        if outcome != "diverged":
            marker["color"] = [t.accuracy for t in group]
        traces.append(_points(entry, group, outcome, marker, "peak_lr", "warmup_epochs"))
    known = [t for t in trials if t.label]
    best = entry.study.status.best
    for name, group, symbol in (
        ("known", known, "square-open"),
        ("best", [best] if best else [], "star-open"),
    ):
        if group:
            ring = {"symbol": symbol, "size": 15, "color": "#000000", "line": {"width": 1.5}}
            traces.append(_points(entry, group, name, ring, "peak_lr", "warmup_epochs"))
    return traces


def _outline(entry: _Entry) -> list[dict[str, Any]]:
    """A line around the settings whose three nearest trials mostly diverged."""
    trials = [
        t
        for t in entry.drawable
        if isinstance(t.params.get("peak_lr"), int | float)
        and isinstance(t.params.get("warmup_epochs"), int | float)
    ]
    diverged = np.array([t.outcome == "diverged" for t in trials])
    if diverged.sum() < 3 or (~diverged).sum() < 3:
        return []
    lr = np.log([float(t.params["peak_lr"]) for t in trials])
    warmup = np.array([float(t.params["warmup_epochs"]) for t in trials])
    cells = 32
    grids = [np.linspace(v.min(), v.max(), cells) for v in (lr, warmup)]
    spans = [max(float(np.ptp(v)), 1e-12) for v in (lr, warmup)]
    across = ((grids[0][:, None] - lr) / spans[0]) ** 2  # [cell, trial]
    up = ((grids[1][:, None] - warmup) / spans[1]) ** 2
    share = np.empty((cells, cells))
    for row in range(cells):
        nearest = np.argpartition(across + up[row], 2, axis=1)[:, :3]
        share[row] = diverged[nearest].mean(axis=1)
    if share.max() < 0.5 or share.min() > 0.5:
        return []
    return [
        {
            "type": "contour",
            "name": "cliff",
            "x": [float(f"{x:.5g}") for x in np.exp(grids[0])],
            "y": [float(f"{y:.5g}") for y in grids[1]],
            "z": [[round(float(z), 3) for z in row] for row in share],
            "autocontour": False,
            "contours": {"start": 0.5, "end": 0.5, "size": 1, "coloring": "none"},
            "line": {"color": "#000000", "width": 1.5, "dash": "dash"},
            "showscale": False,
            "showlegend": True,
            "hoverinfo": "skip",
        }
    ]


def _map_caption(shown: list[_Entry], thinned: bool) -> str:
    drawn = shown[:MAX_STUDIES]
    parts = [
        "Filled: complete, coloured by accuracy (the scale is the same in all panels). Hollow: "
        "pruned, by their last accuracy. Crosses: diverged. Squares: settings known beforehand. "
        "Star: the best."
        if len(drawn) > 1
        else "Filled: complete, coloured by accuracy. Hollow: pruned, by their last accuracy. "
        "Crosses: diverged. Squares: settings known beforehand. Star: the best."
    ]
    if any(_outline(e) for e in drawn):
        parts.append("Dashed: the cliff, beyond which the three nearest trials mostly diverged.")
    said = []
    for entry in drawn:
        diverged = _values(entry, "peak_lr", "diverged")
        stable = _values(entry, "peak_lr", "complete", "pruned")
        if diverged:
            text = f"{entry.name}: the lowest peak_lr that diverged is {min(diverged):.3g}"
            if stable:
                text += f", the highest that did not {max(stable):.3g}"
        elif stable:
            text = f"{entry.name}: none diverged up to peak_lr {max(stable):.3g}"
        else:
            continue
        said.append(text + ".")
    return _caption([*parts, *_left_out(shown), *_thinning(thinned)], said)


# --- accuracy against each other searched setting -----------------------------------------------


def _slices(entries: list[_Entry]) -> Figure | None:
    names = list(dict.fromkeys(name for e in entries for name in e.sweep.status.searched))
    shown = [e for e in entries if e.drawable]
    panels, said = [], []
    thinned = False
    floor, top = _bounds(t for e in shown for t in e.drawable if t.outcome != "diverged")
    for name in names:
        group = [
            e
            for e in shown
            if name in e.sweep.status.searched
            and not (_is_mapped(e) and name in ("peak_lr", "warmup_epochs"))
        ]
        if not group:
            continue
        space = group[0].sweep.spec.search[name]
        traces: list[dict[str, Any]] = []
        for entry in group[:MAX_STUDIES]:
            trials = _thin(entry)
            thinned |= len(trials) < len(entry.drawable)
            traces += _slice_points(entry, trials, name, space, floor)
        layout = _layout(
            x=_searched_axis(name, space),
            y=_score_axis(floor, top),
            height=360,
        )
        panels.append(Panel(name, _plot(traces, layout)))
        at = [
            (e.name, e.study.status.best.params[name])
            for e in group[:MAX_STUDIES]
            if e.study.status.best is not None and name in e.study.status.best.params
        ]
        if at:
            values = ", ".join(
                f"{describe_params({name: value}).partition('=')[2]} ({study})"
                if len(group) > 1
                else describe_params({name: value}).partition("=")[2]
                for study, value in at
            )
            said.append(f"{name} of the best: {values}.")
    if not panels:
        return None
    caption = (
        "Each trial by one searched setting; the others differ too. Filled: complete. Hollow: "
        "pruned, at their last accuracy. Crosses on the lower edge: diverged."
    )
    return Figure(
        "settings",
        "Accuracy against searched settings",
        _caption([caption, *_left_out(shown), *_thinning(thinned)], said),
        panels,
    )


def _slice_points(
    entry: _Entry, trials: list[TrialStatus], name: str, space: Range, floor: float
) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = []
    for outcome in ("complete", "pruned", "diverged"):
        group = [t for t in trials if t.outcome == outcome and name in t.params]
        if not group:
            continue
        hollow = {"complete": entry.symbol, "pruned": f"{entry.symbol}-open", "diverged": "x-thin"}
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _plain(entry.name),
                "legendgroup": str(entry.index),
                "showlegend": not traces,
                "x": [
                    _plain(written(t.params[name])) if space.choices else t.params[name]
                    for t in group
                ],
                "y": [floor if outcome == "diverged" else t.accuracy for t in group],
                "text": [_hover(t, entry.name) for t in group],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {
                    "color": entry.colour,
                    "symbol": hollow[outcome],
                    "size": 7 if len(trials) <= 60 else 5,
                    "line": {
                        "color": entry.colour,
                        "width": 0 if outcome == "complete" else 1.5,
                    },
                },
            }
        )
    return traces


def _searched_axis(name: str, space: Range) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": name}}
    if space.choices:
        texts = [_plain(written(choice)) for choice in space.choices]
        return {**axis, "type": "category", "categoryorder": "array", "categoryarray": texts}
    return {**axis, "type": "log", **_log_ticks()} if space.log else axis


# --- history ------------------------------------------------------------------------------------


def _history(entries: list[_Entry]) -> Figure | None:
    shown = [e for e in entries if e.sweep.status.searched and len(e.drawable) > 1]
    if not shown:
        return None
    floor, top = _bounds(t for e in shown for t in e.drawable if t.outcome != "diverged")
    panels, said = [], []
    thinned = False
    for entry in shown[:MAX_STUDIES]:
        trials = _thin(entry)
        thinned |= len(trials) < len(entry.drawable)
        traces = []
        for outcome, symbol in (
            ("complete", "circle"), ("pruned", "circle-open"), ("diverged", "x-thin")
        ):  # fmt: skip
            group = [t for t in trials if t.outcome == outcome]
            if group:
                colour = {"complete": COLOURS[0], "pruned": GREY, "diverged": DIVERGED}[outcome]
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "markers",
                        "name": outcome,
                        "x": [t.number for t in group],
                        "y": [floor if outcome == "diverged" else t.accuracy for t in group],
                        "text": [_hover(t, entry.name) for t in group],
                        "hovertemplate": "%{text}<extra></extra>",
                        "marker": {
                            "color": colour,
                            "symbol": symbol,
                            "size": 7 if len(trials) <= 60 else 5,
                            "line": {
                                "width": 0 if outcome == "complete" else 1.5,
                                "color": colour,
                            },
                        },
                    }
                )
        traces += _best_so_far(entry)
        layout = _layout(
            x={"title": {"text": "trial"}},
            y=_score_axis(floor, top),
            height=340,
        )
        panels.append(Panel(entry.name, _plot(traces, layout)))
        best = entry.study.status.best
        if best is not None:
            later = sum(
                t.number > best.number and t.outcome in ("complete", "pruned", "diverged", "failed")
                for t in entry.trials
            )
            said.append(f"{entry.name}: the best is trial #{best.number}; {later} ended after it.")
    caption = (
        "Trials in the order of their suggestion. The line is the best complete trial so far: "
        "where it still rises at the end, more trials may pay. Grey, hollow: pruned, at their "
        "last accuracy. Crosses on the lower edge: diverged."
    )
    return Figure(
        "history",
        "Optimization history",
        _caption([caption, *_left_out(shown), *_thinning(thinned)], said),
        panels,
    )


def _best_so_far(entry: _Entry) -> list[dict[str, Any]]:
    x: list[int] = []
    y: list[float] = []
    for trial in entry.drawable:
        if trial.outcome != "complete" or trial.accuracy is None:
            continue
        if not y or trial.accuracy > y[-1]:
            x.append(trial.number)
            y.append(trial.accuracy)
    if not x:
        return []
    last = entry.drawable[-1].number
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": [*x, last],
            "y": [*y, y[-1]],
            "line": {"color": "#000000", "width": 1.5, "shape": "hv"},
            "hoverinfo": "skip",
        }
    ]


# --- importance, savings ------------------------------------------------------------------------


def _importance(entries: list[_Entry]) -> Figure | None:
    shown = [e for e in entries if e.study.importance]
    if not shown:
        return None
    names = list(dict.fromkeys(name for e in shown for name in e.study.importance))
    drawn = shown[:MAX_STUDIES]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": _plain(entry.name),
            "y": [name for name in names if name in entry.study.importance],
            "x": [entry.study.importance[n] for n in names if n in entry.study.importance],
            "hovertemplate": "%{y}: %{x:.0%}<extra>" + _plain(entry.name) + "</extra>",
            "marker": {
                "color": entry.colour,
                "pattern": {"shape": ("", "/", "x", ".")[entry.index % 4], "solidity": 0.25},
            },
        }
        for entry in drawn
    ]
    layout = _layout(
        x={"title": {"text": "share"}, "tickformat": ".0%", "rangemode": "tozero"},
        y={"autorange": "reversed", "type": "category"},
        height=120 + 26 * len(names) * max(1, len(drawn)),
    )
    layout["barmode"] = "group"
    parts = [
        "How much the values of a setting in the better complete trials differ from those in "
        "all complete ones (PED-ANOVA); the shares of a study add to one. Trials that diverged "
        "or were pruned do not count, so a setting that decides about divergence can look minor."
    ]
    said = []
    for entry in drawn:
        top = max(entry.study.importance, key=entry.study.importance.__getitem__)
        said.append(f"{entry.name}: {top} matters most ({entry.study.importance[top]:.0%}).")
    few = [e.name for e in entries if not e.study.importance]
    if few:
        parts.append("Too few complete trials to tell: " + ", ".join(few) + ".")
    return Figure(
        "importance",
        "Which settings matter",
        _caption([*parts, *_left_out(shown)], said),
        [Panel("", _plot(traces, layout))],
    )


def _savings(entries: list[_Entry]) -> Figure | None:
    found = [(e, ended_early(e.study)) for e in entries]
    found = [(e, epochs) for e, epochs in found if sum(epochs.values())]
    total = {
        key: sum(epochs[key] for _, epochs in found) for key in ("spent", "pruned", "diverged")
    }
    saved = total["pruned"] + total["diverged"]
    if not saved:
        return None
    names = [_wrap(e.name) for e, _ in found]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label,
            "y": names,
            "x": [epochs[key] for _, epochs in found],
            "hovertemplate": "%{y}<br>%{x:,} epochs " + label + "<extra></extra>",
            "marker": {"color": colour, "pattern": {"shape": shape, "solidity": 0.3}},
        }
        for key, label, colour, shape in (
            ("spent", "spent", COLOURS[0], ""),
            ("pruned", "spared by pruning", COLOURS[5], "/"),
            ("diverged", "spared by ending divergence", COLOURS[4], "x"),
        )
    ]
    layout = _layout(
        x={"title": {"text": "epochs"}, "rangemode": "tozero"},
        y={"autorange": "reversed", "type": "category"},
        height=140 + 40 * len(found),
    )
    layout["barmode"] = "stack"
    full = total["spent"] + saved
    caption = (
        f"The trials that ended spent {total['spent']:,} epochs; run to their ends they would "
        f"have taken {full:,}. Pruning spared {total['pruned']:,} ({total['pruned'] / full:.0%}), "
        f"ending trials that diverged {total['diverged']:,} ({total['diverged'] / full:.0%})."
    )
    return Figure("savings", "What pruning saved", caption, [Panel("", _plot(traces, layout))])


# --- shared -------------------------------------------------------------------------------------


def _plot(traces: list[dict[str, Any]], layout: dict[str, Any]) -> PlotlyFigure:
    import plotly.graph_objects as go

    return go.Figure(data=traces, layout=layout)


def _layout(*, x: dict[str, Any], y: dict[str, Any], height: int) -> dict[str, Any]:
    line = {
        "showline": True, "linecolor": "#555555", "gridcolor": "#e4e4e4", "zeroline": False,
        "ticks": "outside", "tickcolor": "#555555", "automargin": True,
    }  # fmt: skip
    return {
        # Plotly's own template would add seven kilobytes to every plot.
        "template": {"layout": {}},
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


def _log_ticks() -> dict[str, Any]:
    # Plotly's own choice labels powers of ten alone, or every digit.
    ticks = [m * 10.0**e for e in range(-8, 8) for m in (1, 3)]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _axis_of(axis: str | None, values: Sequence[Any]) -> dict[str, Any]:
    if axis is None:
        return {"type": "category"}
    ticks = sorted(set(values))
    found: dict[str, Any] = {
        "title": {"text": f"{axis} (log)" if axis == BATCH else axis},
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }
    return {**found, "type": "log"} if axis == BATCH else found


def _points(
    entry: _Entry,
    group: Sequence[TrialStatus],
    name: str,
    marker: dict[str, Any],
    x: str,
    y: str,
) -> dict[str, Any]:
    group = [t for t in group if x in t.params and y in t.params]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [t.params[x] for t in group],
        "y": [t.params[y] for t in group],
        "text": [_hover(t, entry.name) for t in group],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": marker,
    }


def _hover(trial: TrialStatus, study: str) -> str:
    parts = [f"{study} #{trial.number}" + (f" “{trial.label}”" if trial.label else "")]
    accuracy = f" {trial.accuracy:.4f}" if trial.accuracy is not None else ""
    parts.append(trial.outcome + (f": {trial.reason}" if trial.reason else accuracy))
    parts.append(describe_params(trial.params))
    return "<br>".join(_plain(part) for part in parts if part)


def _tries(entry: _Entry) -> list[TrialStatus]:
    return [t for t in entry.trials if t.label]


def _thin(entry: _Entry) -> list[TrialStatus]:
    """At most `MAX_POINTS` trials: the best and the labelled ones, the rest evenly spaced."""
    trials, best = entry.drawable, entry.study.status.best
    if len(trials) <= MAX_POINTS:
        return trials
    chosen = {round(i) for i in np.linspace(0, len(trials) - 1, MAX_POINTS)}
    return [t for i, t in enumerate(trials) if i in chosen or t.label or t is best]


def _thinning(thinned: bool) -> list[str]:
    return [f"Thinned to about {MAX_POINTS} trials of each study, evenly."] if thinned else []


def _caption(parts: Sequence[str], lines: Sequence[str]) -> str:
    """Sentences, then a line for each study."""
    return "\n".join([" ".join(parts), *lines])


def _left_out(shown: list[_Entry]) -> list[str]:
    rest = len(shown) - MAX_STUDIES
    return [f"The first {MAX_STUDIES} studies are drawn; {rest} are left out."] if rest > 0 else []


def _values(entry: _Entry, name: str, *outcomes: str) -> list[float]:
    found: list[Value | None] = [t.params.get(name) for t in entry.trials if t.outcome in outcomes]
    return [float(value) for value in found if isinstance(value, int | float)]


def _bounds(trials: Iterable[TrialStatus]) -> tuple[float, float]:
    """The lower edge, on which diverged trials stand, and the upper end of an accuracy axis."""
    values = [
        t.accuracy
        for t in trials
        if t.accuracy is not None and t.outcome not in ("diverged", "failed")
    ]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), 0.01)
    return low - pad, high + pad


def _score_axis(floor: float, top: float) -> dict[str, Any]:
    bottom = floor - 0.03 * (top - floor)
    return {"title": {"text": "validation accuracy"}, "range": [bottom, top]}


def _plain(text: str) -> str:
    """Text that Plotly shows as it is; it would leave an escaped quotation mark escaped."""
    return html.escape(text, quote=False)


def _wrap(name: str) -> str:
    """A study's name on an axis: broken where settings meet, as narrow screens need."""
    return _plain(name).replace(",", ",<br>").replace("/", "/<br>")
