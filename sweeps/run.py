"""`sweep start` and `sweep worker`: data set, studies, worker processes, view, answer."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import torch
from filelock import FileLock
from rich.console import Console

from data.sources import Dataset
from storage.checkpoints import CheckpointStore, default_checkpoint_dir
from storage.engine import check_url, open_storage, sqlite_path
from storage.trials import TrialQueue
from sweeps import search
from sweeps.errors import SpecError, SweepError
from sweeps.launch import LocalWorkers, plan_slots
from sweeps.objective import Objective, dataset_identity, open_dataset, prepare_process
from sweeps.progress import open_view
from sweeps.report import answer_table, outcome_lines
from sweeps.spec import SweepSpec
from sweeps.status import SweepStatus, read_status
from sweeps.studies import create_or_resume, shown_url, stored_sweep
from sweeps.worker import Worker, WorkerOptions, new_worker_id

if TYPE_CHECKING:
    from collections.abc import Iterator

POLL_SECONDS = 0.5


def run_sweep(
    spec: SweepSpec,
    storage_url: str,
    *,
    data_dir: Path | None,
    workers: int | None,
    again: str,
    out: Console,
    err: Console,
) -> int:
    """Create or resume a sweep's studies and run workers on this machine until it is done.

    Args:
        spec: what to run.
        storage_url: where the studies are or go.
        data_dir: where the data set is, None for its usual place.
        workers: how many processes, None for as many as suit the machine.
        again: the command that goes on after an interruption.
        out: gets the answer.
        err: gets the progress.

    Returns:
        The exit status: 0 done, 1 if workers failed, 130 after an interruption.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search.check(spec)
    check_url(storage_url)
    fingerprints = _check_data(spec, data_dir, err)
    store = open_storage(storage_url)
    with _creation_lock(storage_url):
        sweep = create_or_resume(store, spec, fingerprints)
    watcher = open_storage(storage_url, read_only=True)
    status = read_status(watcher, sweep)
    slots = plan_slots(workers, spec.workers.threads)
    err.print(_opening(status, storage_url, len(slots)), highlight=False, soft_wrap=True)
    codes: list[int] = []
    interrupted = 0
    if not status.done:
        command = ["worker", spec.name, "--storage", storage_url]
        if data_dir is not None:
            command += ["--data-dir", str(data_dir)]
        with _signals() as signals, open_view(err) as view:
            with LocalWorkers(slots, command, view.say) as processes:
                codes = _supervise(
                    processes, signals, lambda: view.update(read_status(watcher, sweep)), view.say
                )
            interrupted = len(signals.received)
            view.update(read_status(watcher, sweep))
        # Workers that were ended by force have left their trials to the queue's keeper.
        TrialQueue(store, worker_id=new_worker_id("start")).requeue_abandoned(
            [study.study_id for study in sweep.studies]
        )
    status = read_status(watcher, sweep)
    _print_answer(status, storage_url, again, out)
    if status.done:
        return 0
    if interrupted:
        return 130
    err.print(
        f"sweep: workers ended with status {', '.join(map(str, codes))} before the budget was "
        "met; what they said stands above",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 1


def run_worker(
    name: str,
    storage_url: str,
    *,
    data_dir: Path | None,
    device: str | None,
    threads: int | None,
    lease_seconds: float,
    stop: threading.Event,
) -> None:
    """Pull trials of a stored sweep in this process until its budget is met or `stop` is set.

    Raises:
        SweepError: the sweep is not in the store, the device is not there, or its trials fail.
        StorageError: the store cannot be used.
        DataError: the data set is missing or broken.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen = _device(device)
    prepare_process(chosen, threads or torch.get_num_threads())
    store = open_storage(storage_url)
    stored_sweep(store, name)
    options = WorkerOptions(
        worker_id=new_worker_id(str(chosen)),
        device=chosen,
        lease_seconds=lease_seconds,
        data_dir=data_dir,
    )
    checkpoints = CheckpointStore(default_checkpoint_dir(storage_url))
    Worker(store, checkpoints, name, options, stop).run()


class _Signals:
    """SIGINT and SIGTERM as they arrived."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.woken = threading.Event()

    def __call__(self, number: int, _frame: object) -> None:
        self.received.append(number)
        self.woken.set()


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _supervise(
    processes: LocalWorkers,
    signals: _Signals,
    update: Callable[[], None],
    say: Callable[[str], None],
) -> list[int]:
    """Watch workers until all have ended; pass signals on. Returns their exit codes."""
    handled = 0
    while True:
        codes = processes.poll()
        update()
        if codes is not None:
            return codes
        signals.woken.wait(POLL_SECONDS)
        signals.woken.clear()
        if len(signals.received) > handled:
            handled = len(signals.received)
            if handled == 1:
                say(
                    "stopping: each running trial keeps its completed epochs; again to stop at once"
                )
                processes.stop()
            else:
                processes.kill()


def _check_data(spec: SweepSpec, data_dir: Path | None, err: Console) -> list[str]:
    """Load each cell's data set and try its split and model; return the fingerprints."""
    datasets: dict[Any, Dataset] = {}
    fingerprints = []
    for cell in spec.cells:
        config = spec.config(cell, spec.lowest_params())
        identity = dataset_identity(config)
        if identity not in datasets:
            datasets[identity] = open_dataset(
                config, data_dir, lambda line: err.print(line, highlight=False, soft_wrap=True)
            )
        try:
            Objective(datasets[identity], torch.device("cpu")).build(config, config.seed)
        except ValueError as error:
            raise SpecError(f"{spec.study_name(cell)}: {error}") from error
        fingerprints.append(datasets[identity].fingerprint)
    return fingerprints


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SweepError(
            f"device {name!r} cannot be used ({reason}); accepted: 'cpu', or 'cuda:0' and so on "
            "where PyTorch finds a GPU"
        ) from None
    return device


def _creation_lock(storage_url: str) -> Any:
    path = sqlite_path(storage_url)
    return FileLock(f"{path}.lock") if path is not None else nullcontext()


def _opening(status: SweepStatus, storage_url: str, workers: int) -> str:
    finished = sum(study.finished for study in status.studies)
    total = sum(study.budget for study in status.studies)
    going_on = f", {finished} of them done" if finished else ""
    return (
        f"{status.name}: {len(status.studies)} studies, {total} trials{going_on}; "
        f"{workers} worker{'s' if workers > 1 else ''}; store {shown_url(storage_url)}"
    )


def _print_answer(status: SweepStatus, storage_url: str, again: str, out: Console) -> None:
    out.print()
    out.print(answer_table(status))
    for line in outcome_lines(status):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    where = shlex.join(["--storage", storage_url])
    lines = {
        "look again": f"sweep status {status.name} {where}",
        "inspect": f"sweep dashboard {where}",
    }
    if not status.done:
        lines = {"go on": again, **lines}
    out.print()
    for label, command in lines.items():
        out.print(f"{label + ':':<12}{command}", highlight=False, markup=False, soft_wrap=True)
