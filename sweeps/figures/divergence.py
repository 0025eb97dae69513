"""The map of learning rate and warmup, with the cliff beyond which training diverges."""

from __future__ import annotations

from typing import Any

import numpy as np

from sweeps.config import Value
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
    thin,
    thinning,
)
from sweeps.status import TrialStatus


def is_mapped(entry: Entry) -> bool:
    """Whether a study searches both settings of the map."""
    return {"peak_lr", "warmup_epochs"} <= set(entry.sweep.status.searched)


def divergence_map(entries: list[Entry]) -> Figure | None:
    """Trials by peak learning rate and warmup, a panel for each study."""
    shown = [e for e in entries if is_mapped(e) and e.drawable]
    if not shown:
        return None
    scored = [t.accuracy for e in shown for t in e.drawable if t.outcome != "diverged"]
    colours = [a for a in scored if a is not None] or [0.0, 1.0]
    limits = (min(colours), max(colours))
    thinned = False
    panels = []
    for entry in shown[:MAX_STUDIES]:
        trials = thin(entry)
        thinned |= len(trials) < len(entry.drawable)
        traces = [*_outline(entry), *_map_points(entry, trials, limits)]
        layout = make_layout(
            x={"title": {"text": "peak_lr"}, "type": "log", **log_ticks()},
            y={"title": {"text": "warmup_epochs"}},
            height=390,
        )
        panels.append(Panel(entry.name, make_plot(traces, layout)))
    return Figure(
        "map",
        "Peak learning rate and warmup",
        _map_caption(shown, thinned),
        panels,
    )


def _map_points(
    entry: Entry, trials: list[TrialStatus], limits: tuple[float, float]
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
        traces.append(make_points(entry, group, outcome, marker, "peak_lr", "warmup_epochs"))
    known = [t for t in trials if t.label]
    best = entry.study.status.best
    for name, group, symbol in (
        ("known", known, "square-open"),
        ("best", [best] if best else [], "star-open"),
    ):
        if group:
            ring = {"symbol": symbol, "size": 15, "color": "#000000", "line": {"width": 1.5}}
            traces.append(make_points(entry, group, name, ring, "peak_lr", "warmup_epochs"))
    return traces


def _outline(entry: Entry) -> list[dict[str, Any]]:
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


def _map_caption(shown: list[Entry], thinned: bool) -> str:
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
    return make_caption([*parts, *left_out(shown), *thinning(thinned)], said)


def _values(entry: Entry, name: str, *outcomes: str) -> list[float]:
    found: list[Value | None] = [t.params.get(name) for t in entry.trials if t.outcome in outcomes]
    return [float(value) for value in found if isinstance(value, int | float)]
