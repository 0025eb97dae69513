"""What a network is worth to each device."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from sweeps.figures.parts import (
    MAX_STUDIES,
    Entry,
    Figure,
    Panel,
    left_out,
    make_caption,
    make_layout,
    make_plot,
    plain,
    score_title,
)

FORGOTTEN = 0.1
"""Accuracy up to which a caption counts a device as forgotten."""


def device_accuracies(entries: list[Entry]) -> Figure | None:
    """The accuracy of each study's best trial on the classes of each device, the worst first.

    Nothing where all devices are of one kind: what lies between them is then a matter of the
    validation images.
    """
    shown = [e for e in entries if len(e.study.device_accuracies) > 1 and e.study.devices_differ]
    if not shown:
        return None
    traces: list[dict[str, Any]] = []
    for entry in shown[:MAX_STUDIES]:
        found = entry.study.device_accuracies
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(entry.name),
                # From the worst device to the best, whatever their number.
                "x": [index / (len(found) - 1) for index in range(len(found))],
                "y": list(found),
                "text": [f"{n} of {len(found)}, from the worst" for n in range(1, len(found) + 1)],
                "hovertemplate": plain(entry.name) + "<br>%{text}: %{y:.4f}<extra></extra>",
                "line": {"color": entry.colour, "dash": entry.dash, "width": 1.5},
                "marker": {
                    "color": entry.colour,
                    "symbol": entry.symbol,
                    "size": 8,
                    "maxdisplayed": 40,
                },
            }
        )
    axis = {
        "title": {"text": "devices, from the one served worst to the one served best"},
        "tickvals": [0, 0.25, 0.5, 0.75, 1],
        "ticktext": ["worst", "a quarter", "median", "three quarters", "best"],
        "range": [-0.03, 1.03],
    }
    layout = make_layout(
        x=axis,
        y={"title": {"text": score_title(shown[:MAX_STUDIES])}, "range": [-0.03, 1.03]},
        height=420,
    )
    return Figure(
        "devices",
        "Accuracy on each device's classes",
        _caption(shown),
        [Panel("", make_plot(traces, layout))],
    )


def _caption(shown: list[Entry]) -> str:
    parts = [
        "The best trial of each study: validation accuracy on the classes of each device, each "
        "class with its share in the device's images."
    ]
    lines = [_said(e.name, e.study.device_accuracies) for e in shown[:MAX_STUDIES]]
    return make_caption([*parts, *left_out(shown)], lines)


def _said(name: str, found: Sequence[float]) -> str:
    said = f"{name}: from {found[0]:.4f} to {found[-1]:.4f}, median {statistics.median(found):.4f}"
    forgotten = sum(accuracy <= FORGOTTEN for accuracy in found)
    if forgotten:
        said += f"; {forgotten} of {len(found)} devices have {FORGOTTEN:g} or less"
    return said + "."
