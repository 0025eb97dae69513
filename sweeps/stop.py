"""`sweep stop`: ask a sweep's workers, wherever they are, to end."""

from __future__ import annotations

import time

from rich.console import Console

from storage.engine import close_storage, open_storage
from storage.retries import with_retries
from sweeps.errors import plural
from sweeps.limits import request_stop
from sweeps.progress import print_line
from sweeps.status import TrialStatus, read_status
from sweeps.studies import stored_sweep

POLL_SECONDS = 0.5


def stop_sweep(name: str, storage_url: str, *, wait: float, err: Console) -> int:
    """Ask all workers of a sweep to end, and wait for them.

    Args:
        name: of the sweep.
        storage_url: where it is.
        wait: seconds to wait for running trials to go back to the queue.
        err: gets a line of what happened.

    Returns:
        The exit status: 0 if no trial is running any more, 1 if some still are.

    Raises:
        SweepError: the sweep is not in the store.
    """
    watcher = open_storage(storage_url, read_only=True)
    sweep = stored_sweep(watcher, name)

    def running() -> list[TrialStatus]:
        status = with_retries(lambda: read_status(watcher, sweep))
        return [t for study in status.studies for t in study.trials if t.outcome == "running"]

    asked = running()
    store = open_storage(storage_url)
    request_stop(store, sweep)
    deadline = time.monotonic() + wait
    while (left := running()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    close_storage(watcher, storage_url)
    close_storage(store, storage_url)
    if left:
        holders = ", ".join(sorted({trial.worker for trial in left}))
        line = (
            f"{name}: {plural(len(left), 'trial')} still running after {wait:g} s ({holders}); a "
            "worker that is gone loses its trial when its lease runs out"
        )
    else:
        done = plural(len(asked), "trial")
        line = f"{name}: stopped; {done} went back to the queue; sweep start {name} goes on"
        if not asked:
            line = f"{name}: no trial was running; workers that wait will end"
    print_line(err, line)
    return 1 if left else 0
