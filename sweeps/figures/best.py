"""Best accuracy against what is enumerated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.config import written
from sweeps.confirmation import Estimate
from sweeps.figures.parts import (
    BATCH,
    COLOURS,
    DASHES,
    SYMBOLS,
    Entry,
    Figure,
    Panel,
    bounds,
    labelled,
    make_layout,
    make_plot,
    make_points,
    plain,
    score_axis,
    wrap,
)
from sweeps.findings import StudyFindings
from sweeps.status import TrialStatus


@dataclass(frozen=True)
class Layout:
    """What tells the studies of a report apart.

    Attributes:
        axis: the numeric setting along which a line of studies stands, or None.
        positions: of each study on that axis, or its name where there is none, by its index.
        lines: studies that differ in the axis alone; "best" is the only one's name.
    """

    axis: str | None
    positions: Mapping[int, Any]
    lines: Mapping[str, list[Entry]]


def compare(entries: list[Entry]) -> Layout:
    """Find the axis that studies are compared along, the batch size before any other."""
    axis = _axis(entries)
    if axis is None:
        return Layout(None, {e.index: wrap(e.name) for e in entries}, {"best": entries})
    lines: dict[str, list[Entry]] = {}
    for entry in entries:
        lines.setdefault(_line_name(entries, entry, axis), []).append(entry)
    return Layout(axis, {e.index: getattr(e.study.config, axis) for e in entries}, lines)


def best_by_axis(entries: list[Entry]) -> Figure | None:
    """The best accuracy of each study against the batch size, or what else they differ in."""
    with_best = [e for e in entries if e.study.status.best is not None]
    if len(entries) < 2 or not with_best:
        return None
    comparison = compare(entries)
    axis, positions, lines = comparison.axis, comparison.positions, comparison.lines
    scored = [t for e in entries for t in [e.study.status.best, *_known(e)] if t]
    floor, top = bounds(scored, [accuracy for e in entries for accuracy in _ends(e)])
    traces: list[dict[str, Any]] = []
    for number, (name, line) in enumerate(lines.items()):
        traces += _line(name, number, line, positions, floor, joined=axis is not None)
    scores = score_axis(entries, floor, top)
    if axis is not None:
        x, height = _axis_of(axis, [positions[e.index] for e in entries]), 420
        layout = make_layout(x=x, y=scores, height=height)
    else:
        # Names are read across, so they stand on the vertical axis.
        traces = [_turned(trace) for trace in traces]
        names = {"type": "category", "autorange": "reversed"}
        layout = make_layout(x=scores, y=names, height=140 + 34 * len(entries))
    return Figure(
        "best",
        f"Best accuracy against {axis}" if axis else "Best accuracy of each study",
        _best_caption(axis, lines, positions),
        [Panel("", make_plot(traces, layout))],
    )


def _axis(entries: list[Entry]) -> str | None:
    """The numeric setting that tells studies apart, the batch size before any other."""
    names = list(dict.fromkeys(name for e in entries for name in e.study.status.cell))
    for name in sorted([BATCH, *names], key=lambda name: name != BATCH):
        values = [getattr(e.study.config, name) for e in entries]
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        searched = any(name in e.sweep.status.searched for e in entries)
        if numeric and not searched and len(set(values)) > 1:
            return name
    return None


def _line_name(entries: list[Entry], entry: Entry, axis: str) -> str:
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
    line: list[Entry],
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
        make_points(
            [(e, trial, positions[e.index], accuracy) for e, trial, accuracy in found],
            plain(name),
            {"color": colour, "symbol": symbol, "size": 10},
            mode="lines+markers" if joined else "markers",
            line={"color": colour, "dash": DASHES[number % len(DASHES)]},
            error_y={
                "visible": any(low or high for low, high in errors),
                "array": [high for _, high in errors],
                "arrayminus": [low for low, _ in errors],
                "color": colour,
                "thickness": 1,
            },
        )
    ]
    if trace := _confirmed(name, line, positions, colour):
        traces.append(trace)
    known = [(e, t) for e in line for t in _known(e)]
    for outcome, mark in (("complete", f"{symbol}-open"), ("diverged", "x-thin-open")):
        tries = [(e, t) for e, t in known if t.outcome == outcome]
        if tries:
            label = "known beforehand" if outcome == "complete" else "known, diverged"
            points = [
                (e, t, positions[e.index], t.accuracy if outcome == "complete" else floor)
                for e, t in tries
            ]
            marker = {"color": colour, "symbol": mark, "size": 11, "line": {"width": 2}}
            called = label if name == "best" else f"{plain(name)}: {label}"
            traces.append(make_points(points, called, marker))
    return traces


def _known(entry: Entry) -> list[TrialStatus]:
    """The trials of the `[[try]]` tables that have a mark of their own."""
    best = entry.study.status.best
    return [t for t in labelled(entry) if t.outcome in ("complete", "diverged") and t != best]


def _confirmed(
    name: str, line: list[Entry], positions: Mapping[int, Any], colour: str
) -> dict[str, Any] | None:
    """The means over fresh seeds of the best configurations, with their intervals."""
    found = [(e, estimate) for e in line if (estimate := _estimate(e))]
    if not found:
        return None
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "confirmed" if name == "best" else f"{plain(name)}: confirmed",
        "x": [positions[e.index] for e, _ in found],
        "y": [estimate.mean for _, estimate in found],
        "text": [f"{plain(e.name)}, confirmed: {estimate.mean:.4f}" for e, estimate in found],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {
            "color": colour, "symbol": "diamond-tall-open", "size": 13, "line": {"width": 2}
        },
        "error_y": {
            "array": [estimate.ends[1] - estimate.mean for _, estimate in found],
            "arrayminus": [estimate.mean - estimate.ends[0] for _, estimate in found],
            "color": colour,
            "thickness": 2,
        },
    }  # fmt: skip


def _estimate(entry: Entry) -> Estimate | None:
    """What the confirmation found of a study's best configuration."""
    confirmation, best = entry.sweep.status.confirmation, entry.study.status.best
    found = confirmation.of_trial(entry.study.name, best.number) if confirmation and best else None
    return found.estimate if found else None


def _turned(trace: dict[str, Any]) -> dict[str, Any]:
    """A trace with its axes exchanged."""
    turned = {k: v for k, v in trace.items() if k not in ("x", "y", "error_y")}
    turned |= {"x": trace["y"], "y": trace["x"]}
    return turned | ({"error_x": trace["error_y"]} if "error_y" in trace else {})


def _error(study: StudyFindings, accuracy: float) -> tuple[float, float]:
    if values := study.best_seed_accuracies:
        low, high = min(values), max(values)
        return max(0.0, accuracy - low), max(0.0, high - accuracy)
    error = (
        study.standard_error(accuracy)
        if study.status.steps_per_trial == study.config.epochs
        else None
    )
    return (error, error) if error is not None else (0.0, 0.0)


def _ends(entry: Entry) -> list[float]:
    """The ends of the bars of a study's best accuracy, and of its confirmation."""
    best, confirmed = entry.study.status.best, _estimate(entry)
    if best is None or best.accuracy is None:
        return []
    low, high = _error(entry.study, best.accuracy)
    ends = [best.accuracy - low, best.accuracy + high]
    return [*ends, *confirmed.ends] if confirmed else ends


def _best_caption(
    axis: str | None, lines: Mapping[str, list[Entry]], positions: Mapping[int, Any]
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
            here, there = (f"{positions[entry.index]:g}" for entry in (first, last))
            values = [f"{value:.4f}" for value in (start, end)]
            if values[0] == values[1]:
                course = f"is {values[0]} at {axis} = {here} and at {there}"
            else:
                verb = "falls" if end < start else "rises"
                course = f"{verb} from {values[0]} at {axis} = {here} to {values[1]} at {there}"
            said.append(f"{prefix or 'The '}best accuracy {course}.")
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
        bars = (
            "the range over seeds" if every[0].study.best_seed_accuracies else "one standard error"
        )
        keys.append(f"Bars are {bars}.")
    if any(_estimate(e) for e in every):
        keys.append(
            "Diamonds: confirmed on the test images with other seeds, and the 95 % interval."
        )
    tries = [t.outcome for e in every for t in _known(e)]
    if "complete" in tries:
        keys.append("Hollow: known beforehand.")
    if "diverged" in tries:
        keys.append("Crosses on the lower edge: known beforehand, and diverged.")
    return "\n".join([*said, " ".join(keys)] if keys else said)


def _axis_of(axis: str, values: Sequence[Any]) -> dict[str, Any]:
    ticks = sorted(set(values))
    found: dict[str, Any] = {
        "title": {"text": f"{axis} (log)" if axis == BATCH else axis},
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }
    return {**found, "type": "log"} if axis == BATCH else found
