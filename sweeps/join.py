"""`sweep worker`: one process that joins a sweep and pulls its trials."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import optuna
import torch
from rich.console import Console

from storage.checkpoints import CheckpointStore, default_checkpoint_dir
from storage.engine import close_storage, open_storage, own_url
from storage.retries import StopRequestedError, is_transient, patience, reason, with_retries
from storage.urls import check_url, is_grpc, sqlite_path
from sweeps.errors import SweepError, plural
from sweeps.preflight import device_named
from sweeps.process import prepare_process
from sweeps.progress import describe, print_line
from sweeps.provenance import new_worker_id
from sweeps.status import TrialStatus
from sweeps.stopping import StopRequest
from sweeps.studies import place_of, stored_sweep
from sweeps.worker import Worker, WorkerOptions

LOCK_SECONDS = 2.0
"""How long one operation of a worker waits on a SQLite file that others hold, before it is tried
again: no signal is handled during the wait."""


def run_worker(
    name: str,
    storage_url: str,
    *,
    data_dir: Path | None,
    device: str | None,
    threads: int | None,
    lease_seconds: float,
    stop: StopRequest,
    gpu_memory: int | None = None,
    err: Console | None = None,
) -> None:
    """Pull trials of a stored sweep in this process until its budget is met or `stop` is set.

    Args:
        name, storage_url, data_dir, device, threads, lease_seconds, stop: as of the command.
        gpu_memory: bytes of the device that it may allocate; None sets no limit.
        err: gets a line when it has joined, for each trial that it ends, and at its own end; None
            where whoever launched it shows the sweep.

    Raises:
        SweepError: the sweep is not in the store, the device is not there, or its trials fail.
        StorageError: the store cannot be used. One whose server is away is waited for.
        DataError: the data set is missing or broken.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen = device_named(device)
    check_url(storage_url)
    file = sqlite_path(storage_url)
    if file is not None and not file.exists():
        open_storage(storage_url, read_only=True)  # says so; to write would create it
    prepare_process(chosen, threads or torch.get_num_threads(), gpu_memory)
    options = WorkerOptions(
        worker_id=new_worker_id(str(chosen)),
        device=chosen,
        lease_seconds=lease_seconds,
        data_dir=data_dir,
        gpu_memory=gpu_memory,
    )
    with patience(place_of(storage_url), stop.is_set):
        try:
            store = with_retries(lambda: open_storage(storage_url, lock_seconds=LOCK_SECONDS))
        except StopRequestedError:
            return
        checkpoints = CheckpointStore(default_checkpoint_dir(own_url(store, storage_url)))
        ended: list[int] = []

        def on_end(study: str, trial: TrialStatus) -> None:
            ended.append(trial.number)
            if err is not None:
                print_line(err, f"{study} {describe(trial)}")

        try:
            if err is not None:
                with suppress(StopRequestedError):  # which the worker says, with what it means
                    with_retries(lambda: stored_sweep(store, name))  # or there is none to join
                width = plural(torch.get_num_threads(), "thread")
                print_line(err, f"{name}: {options.worker_id} has joined, on {chosen}, {width}")
            listener = None if err is None else on_end
            worker = Worker(store, checkpoints, name, options, stop, listener)
            worker.run()
            if err is not None:
                why = "nothing is left to run"
                if worker.spent:
                    why = f"the budget {worker.spent} is spent"
                if stop.is_set():
                    why = "told to stop"
                print_line(err, f"{name}: {why}; {plural(len(ended), 'trial')} ended here")
        except Exception as error:
            if not is_transient(error):
                raise
            raise SweepError(
                f"{place_of(storage_url)} does not answer ({reason(error)}); when it does, start "
                "this worker again"
            ) from error
        finally:
            if is_grpc(storage_url):
                close_storage(store, storage_url)
