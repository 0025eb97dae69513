"""The map of learning rate and warmup, with the cliff beyond which training diverges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sweeps.config import Value
from sweeps.figures.best import compare
from sweeps.figures.parts import (
    DIVERGED,
    MAX_STUDIES,
    Entry,
    Figure,
    Panel,
    left_out,
    log_ticks,
    make_caption,
    make_layout,
    make_plot,
    make_points,
    mark_key,
    score_title,
    thin,
    thinning,
)
from sweeps.status import TrialStatus

FEWEST = 5
"""Trials that diverged, and that did not, below which an edge between them is a guess."""


def is_mapped(entry: Entry) -> bool:
    """Whether a study searches both parameters of the map."""
    return {"peak_lr", "warmup_epochs"} <= set(entry.sweep.status.searched)


@dataclass(frozen=True)
class Cliff:
    """Where the training of one study diverges.

    Attributes:
        peak_lr: the columns of a grid, on a logarithmic scale between the trials.
        warmup_epochs: its rows.
        diverged: of the nearest trials to each point of the grid, the share that diverged;
            [rows, columns].
        nearest: how many those are.
        limit: the highest peak_lr of a trial that did not diverge, or, above that, the lowest of
            one that did.
    """

    peak_lr: np.ndarray
    warmup_epochs: np.ndarray
    diverged: np.ndarray
    nearest: int
    limit: float

    @property
    def edge(self) -> float | None:
        """The peak_lr from which on most trials diverge, the median over the warmups.

        None where that holds for fewer than half of the warmups.
        """
        edges = []
        for row in self.diverged:
            below = np.flatnonzero(row < 0.5)
            first = int(below[-1]) + 1 if len(below) else 0
            if first < len(row):
                edges.append(float(self.peak_lr[first]))
        if 2 * len(edges) < len(self.diverged):
            return None
        # Neighbours blur the edge: beyond this all trials diverged.
        return min(float(np.median(edges)), self.limit)


def divergence_map(entries: list[Entry]) -> Figure | None:
    """Trials by peak learning rate and warmup, a panel for each study."""
    shown = [e for e in entries if is_mapped(e) and e.drawable]
    if not shown:
        return None
    limits = _colour_limits([t for e in shown for t in e.drawable])
    drawn = shown[:MAX_STUDIES]
    x, y = _shared_axes(drawn)
    thinned = False
    panels = []
    cliffs = {entry.index: find_cliff(entry) for entry in drawn}
    for entry in drawn:
        trials = thin(entry)
        thinned |= len(trials) < len(entry.drawable)
        traces = [*_outline(cliffs[entry.index]), *_map_points(entry, trials, limits)]
        layout = make_layout(x=x, y=y, height=390)
        panels.append(Panel(entry.name, make_plot(traces, layout), entry.study.status.name))
    return Figure(
        "map",
        "Peak learning rate and warmup",
        _map_caption(shown, cliffs, thinned, clipped=limits[2]),
        panels,
    )


def _colour_limits(trials: Sequence[TrialStatus]) -> tuple[float, float, bool]:
    """The ends of the colour scale, and whether accuracies below its lower end are drawn alike.

    A few trials that hardly learned would leave one colour to all others.
    """
    scored = [t.accuracy for t in trials if t.outcome != "diverged" and t.accuracy is not None]
    if not scored:
        return 0.0, 1.0, False
    low, high = min(scored), max(scored)
    tenth = float(np.quantile(scored, 0.1))
    if len(scored) >= 20 and high - tenth < 0.7 * (high - low):
        return float(f"{tenth:.4f}"), high, True
    return low, high, False


def _shared_axes(entries: Sequence[Entry]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Axes over all that is searched, alike in all panels: so the cliff is seen to move."""
    lr, warmup = (
        [
            float(value)
            for entry in entries
            for value in (
                entry.sweep.spec.search[name].low,
                entry.sweep.spec.search[name].high,
                *(t.params.get(name) for t in entry.drawable),
            )
            if isinstance(value, int | float)
        ]
        for name in ("peak_lr", "warmup_epochs")
    )
    positive = [value for value in lr if value > 0] or [0.01, 1.0]
    ends = [math.log10(min(positive)), math.log10(max(positive))]
    pad = 0.04 * (ends[1] - ends[0]) + 0.02
    x = {
        "title": {"text": "peak_lr"},
        "type": "log",
        **log_ticks(),
        "range": [round(ends[0] - pad, 4), round(ends[1] + pad, 4)],
    }
    low, high = min(warmup, default=0.0), max(warmup, default=1.0)
    pad = 0.05 * (high - low) or 0.5
    y = {"title": {"text": "warmup_epochs"}, "range": [low - pad, high + pad]}
    return x, y


def _placed(
    entry: Entry, trials: Sequence[TrialStatus]
) -> list[tuple[Entry, TrialStatus, Value, Value]]:
    x, y = "peak_lr", "warmup_epochs"
    return [(entry, t, t.params[x], t.params[y]) for t in trials if t.params.keys() >= {x, y}]


def _map_points(
    entry: Entry, trials: list[TrialStatus], limits: tuple[float, float, bool]
) -> list[dict[str, Any]]:
    # Many points would cover each other.
    size = 9 if len(trials) <= 60 else 6
    scale = {
        "cmin": limits[0],
        "cmax": limits[1],
        "colorscale": "Cividis",
    }
    bar = {
        "title": {"text": score_title([entry]), "side": "right", "font": {"size": 10}},
        "thickness": 10,
        "outlinewidth": 0,
        "tickfont": {"size": 10},
    }
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
        traces.append(make_points(_placed(entry, group), outcome, marker))
    known = [t for t in trials if t.label]
    best = entry.study.status.best
    for name, group, symbol in (
        ("known", known, "square-open"),
        ("best", [best] if best else [], "star-open"),
    ):
        if group:
            ring = {"symbol": symbol, "size": 15, "color": "#000000", "line": {"width": 1.5}}
            traces.append(make_points(_placed(entry, group), name, ring))
    return traces


def find_cliff(entry: Entry) -> Cliff | None:
    """Where most of the nearest trials diverged; None where too few did, or too few did not."""
    trials = [
        t
        for t in entry.drawable
        if isinstance(t.params.get("peak_lr"), int | float)
        and isinstance(t.params.get("warmup_epochs"), int | float)
    ]
    diverged = np.array([t.outcome == "diverged" for t in trials])
    if min(diverged.sum(), (~diverged).sum()) < FEWEST:
        return None
    lr = np.log([float(t.params["peak_lr"]) for t in trials])
    warmup = np.array([float(t.params["warmup_epochs"]) for t in trials])
    cells = 32
    # More of them where there are many: an edge that follows every trial shows noise. Odd, so
    # that none is as many as the others.
    nearest = min(9, 3 + 2 * (len(trials) // 80))
    grids = [np.linspace(v.min(), v.max(), cells) for v in (lr, warmup)]
    spans = [max(float(np.ptp(v)), 1e-12) for v in (lr, warmup)]
    across = ((grids[0][:, None] - lr) / spans[0]) ** 2  # [cell, trial]
    up = ((grids[1][:, None] - warmup) / spans[1]) ** 2
    share = np.empty((cells, cells))
    for row in range(cells):
        found = np.argpartition(across + up[row], nearest - 1, axis=1)[:, :nearest]
        share[row] = diverged[found].mean(axis=1)
    if share.max() < 0.5 or share.min() > 0.5:
        return None
    limit = float(np.exp(max(lr[~diverged].max(), lr[diverged].min())))
    return Cliff(np.exp(grids[0]), grids[1], share, nearest, limit)


def _outline(cliff: Cliff | None) -> list[dict[str, Any]]:
    """The region beyond a cliff, shaded and with a line around it."""
    if cliff is None:
        return []
    return [
        {
            "type": "contour",
            "name": "cliff",
            "x": [float(f"{x:.5g}") for x in cliff.peak_lr],
            "y": [float(f"{y:.5g}") for y in cliff.warmup_epochs],
            "z": [[round(float(z), 3) for z in row] for row in cliff.diverged],
            # Plotly shades what does not satisfy a constraint.
            "contours": {"type": "constraint", "operation": "<", "value": 0.5},
            "fillcolor": "rgba(213, 94, 0, 0.13)",
            "line": {"color": "#000000", "width": 1.5, "dash": "dash"},
            "showlegend": True,
            "hoverinfo": "skip",
        }
    ]


def _map_caption(
    shown: list[Entry], cliffs: Mapping[int, Cliff | None], thinned: bool, *, clipped: bool
) -> str:
    drawn = shown[:MAX_STUDIES]
    scale = "the same scale and axes in all panels" if len(drawn) > 1 else ""
    if clipped:
        scale += ("; " if scale else "") + "the lowest tenth in one colour"
    seen = [t for e in drawn for t in e.drawable]
    parts = [
        f"Filled: complete, coloured by accuracy{f' ({scale})' if scale else ''}.",
        *mark_key(seen, "Hollow: pruned, by their last accuracy.", "Crosses: diverged."),
        *(["Squares: known beforehand."] if any(t.label for t in seen) else []),
        *(["Star: the best."] if any(e.study.status.best for e in drawn) else []),
    ]
    found = [cliff for cliff in cliffs.values() if cliff is not None]
    if found:
        counts = sorted({cliff.nearest for cliff in found})
        nearest = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        parts.append(
            "Shaded, with a dashed edge: the cliff, beyond which most of the "
            f"{nearest} nearest trials diverged."
        )
    said = _movement(drawn, cliffs)
    for entry in drawn:
        diverged = _values(entry, "peak_lr", "diverged")
        stable = _values(entry, "peak_lr", "complete", "pruned")
        cliff = cliffs[entry.index]
        edge = cliff.edge if cliff is not None else None
        text = ""
        if diverged and stable and max(stable) < min(diverged):
            text = f"none diverged up to peak_lr {max(stable):.3g}, all from {min(diverged):.3g} on"
        elif diverged:
            text = f"most diverge from peak_lr {edge:.2g} on; " if edge is not None else ""
            text += f"the lowest {'' if text else 'peak_lr '}that diverged is {min(diverged):.3g}"
            text += f", the highest that did not {max(stable):.3g}" if stable else ""
        elif stable:
            text = f"none diverged up to peak_lr {max(stable):.3g}"
        if text:
            said.append(f"{entry.name}: {text}.")
    return make_caption([*parts, *left_out(shown), *thinning(thinned)], said)


def _movement(drawn: list[Entry], cliffs: Mapping[int, Cliff | None]) -> list[str]:
    """How the cliff moves along the axis that tells the studies of a line apart."""
    comparison = compare(drawn)
    if comparison.axis is None:
        return []
    said = []
    for name, line in comparison.lines.items():
        edges = [
            (comparison.positions[entry.index], cliff.edge)
            for entry in line
            if (cliff := cliffs[entry.index]) is not None
        ]
        known = sorted((at, edge) for at, edge in edges if edge is not None)
        if len(known) < 2:
            continue
        (first, start), (last, end) = known[0], known[-1]
        if abs(math.log(end / start)) < math.log(1.25):
            verb = f"stays near peak_lr {start:.2g}"
        else:
            verb = f"moves {'down' if end < start else 'up'} from peak_lr {start:.2g} to {end:.2g}"
        prefix = "" if name == "best" else f"{name}: "
        said.append(
            f"{prefix}{'the' if prefix else 'The'} cliff {verb} between {comparison.axis} = "
            f"{first:g} and {last:g}."
        )
    return said


def _values(entry: Entry, name: str, *outcomes: str) -> list[float]:
    found: list[Value | None] = [t.params.get(name) for t in entry.trials if t.outcome in outcomes]
    return [float(value) for value in found if isinstance(value, int | float)]
