"""Accuracy against each other parameter, and which of them matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sweeps.config import written
from sweeps.figures.divergence import is_mapped
from sweeps.figures.parts import (
    MAX_STUDIES,
    Entry,
    Figure,
    Panel,
    bounds,
    left_out,
    log_ticks,
    make_caption,
    make_layout,
    make_pattern,
    make_plot,
    make_points,
    mark_key,
    plain,
    score_axis,
    thin,
    thinning,
)
from sweeps.progress import describe_params
from sweeps.status import TrialStatus

if TYPE_CHECKING:
    from sweeps.space import Range


def accuracy_by_parameter(entries: list[Entry]) -> Figure | None:
    """Accuracy against each parameter that the map does not have."""
    names = list(dict.fromkeys(name for e in entries for name in e.sweep.status.searched))
    shown = [e for e in entries if e.drawable]
    panels, said = [], []
    thinned = chosen = False
    most = 1
    floor, top = bounds(t for e in shown for t in e.drawable if t.outcome != "diverged")
    for name in names:
        group = [
            e
            for e in shown
            if name in e.sweep.status.searched
            and not (is_mapped(e) and name in ("peak_lr", "warmup_epochs"))
        ]
        if not group:
            continue
        space = group[0].sweep.spec.search[name]
        traces: list[dict[str, Any]] = []
        drawn = group[:MAX_STUDIES]
        most = max(most, len(drawn))
        choices = _choices(drawn, name) if space.choices else []
        chosen |= bool(choices) and len(drawn) > 1
        for place, entry in enumerate(drawn):
            trials = thin(entry, len(drawn))
            thinned |= len(trials) < len(entry.drawable)
            traces += _slice_points(entry, trials, name, choices, floor, (place, len(drawn)))
        layout = make_layout(
            x=_searched_axis(name, space, choices),
            y=score_axis(drawn, floor, top),
            height=360,
        )
        panels.append(Panel(name, make_plot(traces, layout)))
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
    seen = [t for e in shown for t in e.drawable]
    key = mark_key(
        seen,
        "Hollow: pruned, at their last accuracy.",
        "Crosses on the lower edge: diverged.",
    )
    others = "; the others differ too" if len(names) > 1 else ""
    caption = " ".join([f"Each trial by one parameter{others}. Filled: complete.", *key])
    if chosen:
        caption += " Studies stand side by side in each choice."
    return Figure(
        "settings",
        "Accuracy against parameters",
        make_caption([caption, *left_out(shown), *thinning(thinned, most)], said),
        panels,
    )


def _slice_points(
    entry: Entry,
    trials: list[TrialStatus],
    name: str,
    choices: list[str],
    floor: float,
    place: tuple[int, int],
) -> list[dict[str, Any]]:
    """One study's trials by one parameter; `place` is its own among the studies of the panel."""
    traces: list[dict[str, Any]] = []
    many = len(trials) * place[1] > 120
    for outcome in ("complete", "pruned", "diverged"):
        group = [t for t in trials if t.outcome == outcome and name in t.params]
        if not group:
            continue
        hollow = {"complete": entry.symbol, "pruned": f"{entry.symbol}-open", "diverged": "x-thin"}
        points = [
            (
                entry,
                t,
                _beside(t, choices.index(written(t.params[name])), place)
                if choices
                else t.params[name],
                floor if outcome == "diverged" else t.accuracy,
            )
            for t in group
        ]
        marker = {
            "color": entry.colour,
            "symbol": hollow[outcome],
            "size": 5 if many else 7,
            "line": {
                "color": entry.colour,
                "width": 0 if outcome == "complete" else 1 if many else 1.5,
            },
        }
        group_of = {"legendgroup": str(entry.index), "showlegend": not traces}
        traces.append(make_points(points, plain(entry.name), marker, **group_of))
    return traces


def _beside(trial: TrialStatus, choice: int, place: tuple[int, int]) -> float:
    """Where a trial stands around the tick of its choice, so that it covers few others."""
    mine, studies = place
    width = 0.76 / studies
    # Multiples of the golden ratio spread evenly, however many there are.
    spread = (trial.number * 0.618034) % 1 - 0.5
    return round(choice + (mine - (studies - 1) / 2 + 0.7 * spread) * width, 4)


def _choices(drawn: list[Entry], name: str) -> list[str]:
    """All choices of a parameter, as text: sweeps may differ in them, and specs be edited."""
    offered = [c for e in drawn for c in e.sweep.spec.search[name].choices or ()]
    taken = [t.params[name] for e in drawn for t in e.drawable if name in t.params]
    return list(dict.fromkeys(map(written, (*offered, *taken))))


def _searched_axis(name: str, space: Range, choices: list[str]) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": name}}
    if choices:
        ticks = {"tickvals": list(range(len(choices))), "ticktext": [plain(c) for c in choices]}
        return {**axis, **ticks, "range": [-0.6, len(choices) - 0.4], "showgrid": False}
    return {**axis, "type": "log", **log_ticks()} if space.log else axis


def parameter_importance(entries: list[Entry]) -> Figure | None:
    """How much each parameter matters, by study."""
    shown = [e for e in entries if e.study.importance]
    if not shown:
        return None
    names = list(dict.fromkeys(name for e in shown for name in e.study.importance))
    drawn = shown[:MAX_STUDIES]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": plain(entry.name),
            "y": [name for name in names if name in entry.study.importance],
            "x": [entry.study.importance[n] for n in names if n in entry.study.importance],
            "hovertemplate": "%{y}: %{x:.0%}<extra>" + plain(entry.name) + "</extra>",
            "marker": {
                "color": entry.colour,
                "pattern": make_pattern(("", "/", "x", ".")[entry.index % 4]),
            },
        }
        for entry in drawn
    ]
    layout = make_layout(
        x={"title": {"text": "share"}, "tickformat": ".0%", "rangemode": "tozero"},
        y={"autorange": "reversed", "type": "category"},
        height=120 + 26 * len(names) * max(1, len(drawn)),
    )
    layout["barmode"] = "group"
    parts = [
        "How much the values of a parameter in the better complete trials differ from those in "
        "all complete ones (PED-ANOVA); the shares of a study add to one. Trials that diverged "
        "or were pruned do not count, so a parameter that decides about divergence can look minor."
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
        "Which parameters matter",
        make_caption([*parts, *left_out(shown)], said),
        [Panel("", make_plot(traces, layout))],
    )
