"""Validation curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sweeps.figures.parts import (
    MAX_EPOCHS,
    MAX_STUDIES,
    Entry,
    Figure,
    Panel,
    left_out,
    make_layout,
    make_plot,
    plain,
    score_title,
)


def validation_curves(entries: list[Entry]) -> Figure | None:
    """Validation accuracy by epoch: the best trial of each study, and some that diverged."""
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
                    "name": plain(f"{entry.name} #{number}")
                    + ("" if best else " diverged"),
                    "showlegend": best,
                    "x": epochs,
                    "y": [curve[epoch - 1] for epoch in epochs],
                    "text": plain(f"{entry.name} #{number} {trial.label}".strip()),
                    "hovertemplate": "%{text}<br>epoch %{x}: %{y:.4f}<extra></extra>",
                    "line": {
                        "color": entry.colour,
                        "dash": entry.dash if best else "solid",
                        "width": 2 if best else 1,
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
    layout = make_layout(
        x={"title": {"text": "epoch"}, "rangemode": "tozero"},
        y={"title": {"text": score_title(shown[:MAX_STUDIES])}},
        height=440,
    )
    return Figure(
        "curves",
        "Validation curves",
        _curves_caption(shown, cut, thinned),
        [Panel("", make_plot(traces, layout))],
    )


def _curves_caption(shown: list[Entry], cut: int, thinned: bool) -> str:
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
        of_those = "" if cut == diverged else f"{cut} of "
        shares = f"{of_those}the {diverged} trials" if diverged > 1 else "the trial"
        parts.append(
            (f"Thin, cut at a cross: {shares} that diverged" if cut else f"{diverged} diverged")
            + (f"; {unseen} did so before an epoch had ended" if unseen else "")
            + "."
        )
    if any(e.sweep.status.seeds > 1 for e in drawn):
        parts.append("Curves are means over the seeds; a diverged one is of its last seed.")
    if thinned:
        parts.append(f"Curves are thinned to about {MAX_EPOCHS} epochs.")
    return " ".join([*parts, *left_out(shown)])


def _argmax(curve: Sequence[float]) -> int:
    return max(range(len(curve)), key=curve.__getitem__) + 1
