"""The figures of a report: Plotly objects, each with a caption that says what to read from it.

Colours are Okabe and Ito's, told apart by colour-blind readers (https://jfly.uni-koeln.de/color/),
without their yellow, which is lost on white paper; markers and dashes tell the same in grey.
All text that comes from the store is escaped, since Plotly reads tags in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sweeps.figures.best import best_by_axis
from sweeps.figures.course import epochs_saved, optimization_history
from sweeps.figures.curves import validation_curves
from sweeps.figures.devices import device_accuracies
from sweeps.figures.divergence import divergence_map
from sweeps.figures.parameters import accuracy_by_parameter, parameter_importance
from sweeps.figures.parts import Entry, Figure, Panel
from sweeps.findings import Findings

__all__ = ["Figure", "Panel", "make_figures"]


def make_figures(sweeps: Sequence[Findings]) -> list[Figure]:
    """Every figure that has something to show, in the order in which a report has them."""
    entries = _entries(sweeps)
    makers: tuple[Callable[[list[Entry]], Figure | None], ...] = (
        best_by_axis,
        validation_curves,
        device_accuracies,
        divergence_map,
        accuracy_by_parameter,
        optimization_history,
        parameter_importance,
        epochs_saved,
    )
    return [figure for figure in (make(entries) for make in makers) if figure is not None]


def _entries(sweeps: Sequence[Findings]) -> list[Entry]:
    found: list[Entry] = []
    for sweep in sweeps:
        for study in sweep.studies:
            name = study.name if len(sweeps) == 1 else study.status.name
            found.append(Entry(sweep, study, name, len(found)))
    return found
