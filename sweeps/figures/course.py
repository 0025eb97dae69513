"""The course of a search: its trials in their order, and the epochs that they took."""

from __future__ import annotations

from typing import Any

from sweeps.figures.parts import (
    COLOURS,
    DIVERGED,
    GREY,
    MAX_STUDIES,
    Entry,
    Figure,
    Panel,
    bounds,
    left_out,
    make_caption,
    make_layout,
    make_pattern,
    make_plot,
    make_points,
    mark_key,
    score_axis,
    thin,
    thinning,
    wrap,
)
from sweeps.findings import ended_early


def optimization_history(entries: list[Entry]) -> Figure | None:
    """Trials in the order of their suggestion, a panel for each study."""
    shown = [e for e in entries if e.sweep.status.searched and len(e.drawable) > 1]
    if not shown:
        return None
    floor, top = bounds(t for e in shown for t in e.drawable if t.outcome != "diverged")
    panels, said = [], []
    thinned = False
    for entry in shown[:MAX_STUDIES]:
        trials = thin(entry)
        thinned |= len(trials) < len(entry.drawable)
        traces = []
        for outcome, symbol in (
            ("complete", "circle"), ("pruned", "circle-open"), ("diverged", "x-thin")
        ):  # fmt: skip
            group = [t for t in trials if t.outcome == outcome]
            if group:
                colour = {"complete": COLOURS[0], "pruned": GREY, "diverged": DIVERGED}[outcome]
                marker = {
                    "color": colour,
                    "symbol": symbol,
                    "size": 7 if len(trials) <= 60 else 5,
                    "line": {"width": 0 if outcome == "complete" else 1.5, "color": colour},
                }
                points = [
                    (entry, t, t.number, floor if outcome == "diverged" else t.accuracy)
                    for t in group
                ]
                traces.append(make_points(points, outcome, marker))
        traces += _best_so_far(entry)
        layout = make_layout(
            x={"title": {"text": "trial"}},
            y=score_axis([entry], floor, top),
            height=340,
        )
        panels.append(Panel(entry.name, make_plot(traces, layout), entry.study.status.name))
        best = entry.study.status.best
        if best is not None:
            later = sum(
                t.number > best.number and t.outcome in ("complete", "pruned", "diverged", "failed")
                for t in entry.trials
            )
            said.append(f"{entry.name}: the best is trial #{best.number}; {later} ended after it.")
    key = mark_key(
        [t for e in shown for t in e.drawable],
        "Grey, hollow: pruned, at their last accuracy.",
        "Crosses on the lower edge: diverged.",
    )
    caption = " ".join(
        [
            "Trials in the order of their suggestion. The line is the best complete trial so far: "
            "where it still rises at the end, more trials may pay.",
            *key,
        ]
    )
    return Figure(
        "history",
        "Optimization history",
        make_caption([caption, *left_out(shown), *thinning(thinned)], said),
        panels,
    )


def _best_so_far(entry: Entry) -> list[dict[str, Any]]:
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


def epochs_saved(entries: list[Entry]) -> Figure | None:
    """Epochs that the trials took, and that pruning and ending divergence spared."""
    found = [(e, ended_early(e.study)) for e in entries]
    found = [(e, epochs) for e, epochs in found if sum(epochs.values())]
    total = {
        key: sum(epochs[key] for _, epochs in found) for key in ("spent", "pruned", "diverged")
    }
    saved = total["pruned"] + total["diverged"]
    if not saved:
        return None
    names = [wrap(e.name) for e, _ in found]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label,
            "y": names,
            "x": [epochs[key] for _, epochs in found],
            "hovertemplate": "%{y}<br>%{x:,} epochs " + label + "<extra></extra>",
            "marker": {"color": colour, "pattern": make_pattern(shape)},
        }
        for key, label, colour, shape in (
            ("spent", "spent", COLOURS[0], ""),
            ("pruned", "spared by pruning", COLOURS[5], "/"),
            ("diverged", "spared by ending divergence", COLOURS[4], "x"),
        )
    ]
    layout = make_layout(
        x={"title": {"text": "epochs"}, "rangemode": "tozero"},
        y={"autorange": "reversed", "type": "category"},
        height=140 + 40 * len(found),
    )
    layout["barmode"] = "stack"
    layout["legend"]["traceorder"] = "normal"
    full = total["spent"] + saved
    caption = (
        f"The trials that ended spent {total['spent']:,} epochs; run to their ends they would "
        f"have taken {full:,}. Pruning spared {total['pruned']:,} ({total['pruned'] / full:.0%}), "
        f"ending trials that diverged {total['diverged']:,} ({total['diverged'] / full:.0%})."
    )
    return Figure("savings", "What pruning saved", caption, [Panel("", make_plot(traces, layout))])
