"""`sweep status --watch`: the view of a running sweep, from any terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from storage.engine import close_storage, open_storage
from storage.retries import patience, with_retries
from sweeps.confirmation import with_confirmation
from sweeps.progress import JsonView, View, open_view
from sweeps.status import StatusReader, SweepStatus
from sweeps.studies import place_of, stored_sweep

if TYPE_CHECKING:
    from rich.console import Console

WATCH_SECONDS = 1.0


def watch_sweep(name: str, storage_url: str, *, out: Console, as_json: bool) -> SweepStatus:
    """Show a sweep's state as it changes, until it is done.

    A live view on a terminal; elsewhere a line for each trial that ends; as JSON a line for each
    change, the first and the last state included.

    Returns:
        Its last state.

    Raises:
        SweepError: the sweep is not in the store.
        StorageError: the store cannot be read.
    """
    watcher = open_storage(storage_url, read_only=True)

    reader = StatusReader(watcher, name)

    def read() -> SweepStatus:
        status = with_retries(reader.read)
        if not as_json:  # the view has no place for a confirmation
            return status
        return with_retries(lambda: with_confirmation(watcher, stored_sweep(watcher, name), status))

    try:
        with patience(place_of(storage_url)), _view(out, as_json) as view:
            view.update(status := read())
            while not status.done:
                time.sleep(WATCH_SECONDS)
                view.update(status := read())
        return status
    finally:
        close_storage(watcher, storage_url)


def _view(out: Console, as_json: bool) -> View:
    if as_json:
        return JsonView(out)
    return open_view(out, "Ctrl-C ends the view; what runs goes on.")
