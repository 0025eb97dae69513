"""optuna-dashboard on a sweep's store, and the figures of a report in it."""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from sweeps.attributes import in_parts
from sweeps.errors import SweepError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from sweeps.figures import Figure
    from sweeps.findings import Findings

READING = ("GET", "HEAD", "OPTIONS")

KEPT = ("best", "curves", "map", "importance", "savings")
"""Figures that a study carries; the dashboard has its own of the others."""

KEPT_POINTS = 60
"""Markers of each kind in a figure that a study carries."""

KEPT_BYTES = 60_000
"""Size of one such figure: what is larger stays out of the store, which workers read too."""

PLOTS = "dashboard:plot_data:"
"""optuna-dashboard's prefix of the attributes that hold figures."""

KEPT_HEIGHT = 470
"""Pixels that optuna-dashboard leaves to a figure; it cuts off the rest."""

LOCK_SECONDS = 5.0
"""How long the figures wait for workers that write to a SQLite file."""

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def read_only(application: Application) -> Application:
    """Refuse every request that could change a study, with status 403.

    optuna-dashboard has no accounts: whoever reaches it can delete studies and tell results.
    """

    def filtered(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in READING:
            return application(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "application/json")])
        # The dashboard's own pages show a reason that comes in this form.
        said = "this dashboard is read-only; start it with --writable to change studies"
        return [json.dumps({"reason": said}).encode() + b"\n"]

    return filtered


def make_dashboard(url: str, host: str, port: int, *, writable: bool) -> WSGIServer:
    """Bind optuna-dashboard to an address; the caller serves and closes.

    What it reads, it reads without a lock, so that no worker waits for a visitor; only what a
    visitor changes is a transaction that writes.

    Args:
        url: the store's.
        host: address to listen on.
        port: 0 takes a free one.
        writable: whether visitors may change and delete studies.

    Raises:
        StorageError: if the store cannot be opened.
        OSError: if the address cannot be had.
    """
    from optuna_dashboard import wsgi

    from storage.engine import open_storage

    # The one that writes is opened first, as it creates a store that is not there yet.
    writing: Application | None = wsgi(open_storage(url)) if writable else None
    reading: Application = wsgi(open_storage(url, read_only=True))

    def both(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        application = reading if environ["REQUEST_METHOD"] in READING else writing
        assert application is not None
        return application(environ, start_response)

    # Where optuna-dashboard logs what a request raised, with its stack.
    logging.getLogger("optuna_dashboard._bottle_util").addFilter(_StoreFailures())

    class QuietHandler(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            return

    application = both if writable else read_only(reading)
    return make_server(host, port, application, server_class=_Server, handler_class=QuietHandler)


class _StoreFailures(logging.Filter):
    """Says of a store that fails why it does, in one line, and not at every request again."""

    _said = ""

    def filter(self, record: logging.LogRecord) -> bool:
        from storage.errors import StorageError
        from storage.retries import is_transient, reason

        error = sys.exc_info()[1]
        if isinstance(error, StorageError) or (error is not None and is_transient(error)):
            said = f"sweep: {reason(error)}"
            if said == self._said:
                return False
            self._said = record.msg = said
            record.args = ()
        return True


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection: browsers keep idle ones open."""

    daemon_threads = True
    allow_reuse_address = True


# --- figures in the store -----------------------------------------------------------------------


def keep_figures(url: str, sweep: Findings, figures: Sequence[Figure]) -> None:
    """Save the figures of one sweep with its studies, where optuna-dashboard shows them.

    A figure replaces what was saved of it before. Those of a study are one transaction, and at
    most `KEPT_BYTES` each.

    Args:
        url: of the store that has the sweep.
        sweep: what the figures show.
        figures: of this sweep alone.

    Raises:
        SweepError: if the store cannot be written, or stays locked for `LOCK_SECONDS`.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    from storage.attributes import set_study_system_attrs
    from storage.engine import close_storage, open_storage
    from storage.errors import StorageError
    from storage.retries import is_transient, reason

    try:
        store = open_storage(url, lock_seconds=LOCK_SECONDS)
        try:
            ids = {study.study_name: study._study_id for study in store.get_all_studies()}
            for study in sweep.studies:
                study_id = ids[study.status.name]
                before = store.get_study_system_attrs(study_id)
                plots = study_plots(figures, study.status.name)
                set_study_system_attrs(store, url, study_id, _attributes(before, plots))
        finally:
            close_storage(store, url)
    except Exception as error:
        known = (StorageError, SQLAlchemyError, StorageInternalError)
        if not (isinstance(error, known) or is_transient(error)):
            raise
        said = f"the figures in optuna-dashboard stay as they are ({reason(error)})"
        raise SweepError(said) from None


def study_plots(figures: Sequence[Figure], study: str) -> dict[str, PlotlyFigure]:
    """The figures that a study carries, by the id under which optuna-dashboard keeps them.

    Args:
        figures: of one sweep.
        study: the study's full name.
    """
    from sweeps.figures.parts import make_plot

    found = {}
    for figure in figures:
        panels = [panel for panel in figure.panels if panel.study in ("", study)]
        if figure.key in KEPT and panels:
            drawn = panels[0].plot.to_plotly_json()
            plot = make_plot(drawn["data"], drawn["layout"])
            for trace in plot.data:
                _thin_markers(trace)
            caption = [
                line
                for place, line in enumerate(figure.caption.splitlines())
                # After the first a line for each study, and the others carry theirs.
                if not (place and panels[0].study) or line.startswith(panels[0].title)
            ]
            _head(plot, figure.title, caption)
            if len(plot.to_json()) <= KEPT_BYTES:
                found[f"sweep-{figure.key}"] = plot
    return found


def _thin_markers(trace: Any) -> None:
    """Leave `KEPT_POINTS` markers, evenly spaced."""
    if trace.type != "scatter" or trace.mode != "markers" or len(trace.x) <= KEPT_POINTS:
        return
    chosen = [round(i * (len(trace.x) - 1) / (KEPT_POINTS - 1)) for i in range(KEPT_POINTS)]
    for holder, name in ((trace, "x"), (trace, "y"), (trace, "text"), (trace.marker, "color")):
        values = holder[name]
        if isinstance(values, list | tuple):
            holder[name] = [values[i] for i in chosen]


def _head(plot: PlotlyFigure, title: str, caption: Sequence[str]) -> None:
    """Put title and caption into a plot, and make it as large as the dashboard's place for it."""
    from sweeps.figures.parts import plain

    lines = [part for line in caption for part in textwrap.wrap(line, 105)]
    plot.layout.title = {
        "text": plain(title),
        "subtitle": {"text": "<br>".join(map(plain, lines)), "font": {"size": 10}},
        "x": 0, "xref": "container", "yref": "container", "y": 1, "yanchor": "top",
        # Below the dashboard's buttons.
        "pad": {"t": 34, "l": 20}, "font": {"size": 15},
    }  # fmt: skip
    plot.layout.margin.t = 70 + 13 * len(lines)
    plot.layout.height = KEPT_HEIGHT


def _attributes(before: Mapping[str, Any], plots: Mapping[str, PlotlyFigure]) -> dict[str, str]:
    """The system attributes in which optuna-dashboard keeps some figures.

    Those that its `save_plotly_graph_object` would write one by one, and whose import brings
    scikit-learn.
    """
    found: dict[str, str] = {}
    for key, plot in plots.items():
        found |= in_parts(f"{PLOTS}{key}:", plot.to_json(), before)
    return {key: text for key, text in found.items() if before.get(key) != text}
