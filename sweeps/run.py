"""`sweep start`: data set, studies, worker processes, view, answer."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from rich.console import Console

from storage.engine import close_storage, exclusive, open_storage
from storage.errors import ElsewhereError, EmptyStorageError, StorageError
from storage.retries import StopRequestedError, is_transient, patience, reason, with_retries
from storage.trials import TrialQueue
from storage.urls import check_url, sqlite_path
from sweeps import search
from sweeps.confirmation import SEED, read_answer
from sweeps.edits import Edit
from sweeps.errors import SweepError, plural
from sweeps.launch import Place, ThisMachine, worker_command
from sweeps.machine import Need, Slot
from sweeps.planning.plan import Plan
from sweeps.planning.speeds import keep_speeds
from sweeps.planning.words import plan_line
from sweeps.preflight import agreed, estimate, load_data
from sweeps.progress import open_view, print_line
from sweeps.provenance import new_worker_id
from sweeps.report import answer_table, disk_line, outcome_lines
from sweeps.spec import SweepSpec
from sweeps.status import StatusReader, SweepStatus, read_status
from sweeps.studies import (
    Addition,
    create_or_resume,
    place_of,
    shown_url,
    stored_names,
    stored_sweep,
)
from sweeps.supervision import Signals, received_signals, supervise

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def run_sweep(
    spec: SweepSpec,
    storage_url: str,
    *,
    data_dir: Path | None,
    workers: int | None,
    place: Place,
    add_trials: int = 0,
    again: str,
    yes: bool = True,
    out: Console,
    err: Console,
) -> int:
    """Create or resume a sweep's studies and run workers until it is done.

    Args:
        spec: what to run.
        storage_url: where the studies are or go.
        data_dir: where the data set is, None for its usual place.
        workers: how many processes, None for as many as suit the place; with 0, others join.
        place: where they run.
        add_trials: by how many the budget of each stored study grows.
        again: the command that goes on after an interruption.
        yes: do not ask before a run that is estimated to take longer than a day. Nobody is asked
            where there is no terminal.
        out: gets the answer.
        err: gets the progress.

    Returns:
        The exit status: 0 done, 1 if workers failed or the answer was no, 130 after an
        interruption.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search.check(spec)
    check_url(storage_url)
    if not add_trials and (done := _already_done(spec, storage_url)) is not None:
        print_answer(done, storage_url, data_dir, again, out)
        return done_code(done, err)
    if workers != 0:
        place.prepare(storage_url, partial(print_line, err))
    checked = load_data(spec, data_dir, err)
    found = None
    if isinstance(place, ThisMachine) and workers != 0:
        found = estimate(
            spec, storage_url, data_dir, workers, checked, add_trials, place.machine(), err
        )
    if found is not None and not yes and not agreed(found, err):
        err.print(f"sweep: {spec.name} was not started", highlight=False, markup=False)
        return 1
    store = open_storage(storage_url)

    addition = Addition(add_trials)

    def create() -> list[Edit]:
        with exclusive(store, storage_url):
            return create_or_resume(
                store,
                spec,
                checked.fingerprints,
                scored=[size.val_images for size in checked.sizes],
                addition=addition,
            )

    with patience(place_of(storage_url)):
        changed = with_retries(create)
    print_edits(changed, spec.name, err)
    if workers == 0:
        return leave_to_others(spec.name, store, storage_url, data_dir, out, err)
    code, status = run_to_end(
        spec, store, storage_url, data_dir=data_dir, workers=workers, place=place, found=found,
        need=found.need if found is not None else Need(memory=checked.worker_bytes), err=err,
    )  # fmt: skip
    close_storage(store, storage_url)
    if status is not None:
        print_answer(status, storage_url, data_dir, again, out)
        # Those of a confirmation stand in its sweep's report.
        if status.done:
            code = done_code(status, err)
        if status.done and not status.confirms:
            _keep_figures(spec.name, storage_url, err)
    return code


def run_to_end(
    spec: SweepSpec,
    store: BaseStorage,
    storage_url: str,
    *,
    data_dir: Path | None,
    workers: int | None,
    place: Place,
    need: Need,
    found: Plan | None = None,
    err: Console,
) -> tuple[int, SweepStatus | None]:
    """Run workers until a sweep that is in the store is done.

    Args:
        spec: of the sweep.
        store: where it is, to write to.
        storage_url: what the store was opened with.
        data_dir: where the data set is, None for its usual place.
        workers: how many processes, None for as many as suit the place.
        place: where they run.
        need: what a worker takes.
        found: what it is estimated to take; the speed of its trials is then kept for later ones.
        err: gets the progress.

    Returns:
        The exit status, as of `run_sweep`, and the sweep's state then; None if the wait for the
        store was interrupted. It is 0 where the sweep is done: what that is worth, `done_code`
        says, after the answer.
    """
    began = datetime.now()
    watcher = open_storage(storage_url, read_only=True)

    reader = StatusReader(watcher, spec.name)

    def read() -> SweepStatus:
        return with_retries(reader.read)

    status = read()
    requests_before = status.stop_requests
    left = sum(study.budget - study.finished for study in status.studies)
    slots = place.plan(workers, spec.workers.threads, left, need)
    print_line(err, _opening(status, storage_url, len(slots)))
    if found is not None and not status.done:
        print_line(err, plan_line(found))
    code = 0
    if not status.done:
        try:
            code = _run_workers(
                spec.name, store, storage_url, data_dir, place, slots, read, err, requests_before
            )
        except StopRequestedError as stopping:
            print_line(err, f"sweep: {stopping}; what runs goes on at the next start")
            return 130, None
    if found is not None:
        images = {study.name: study.dataset_images for study in found.studies}
        with_retries(
            lambda: keep_speeds(watcher, stored_sweep(watcher, spec.name), images, slots, began)
        )
    status = with_retries(lambda: read_answer(watcher, stored_sweep(watcher, spec.name)))
    close_storage(watcher, storage_url)
    if status.done:
        return 0, status
    return 130 if status.stop_requests != requests_before else code, status


def leave_to_others(
    name: str,
    store: BaseStorage,
    storage_url: str,
    data_dir: Path | None,
    out: Console,
    err: Console,
) -> int:
    """Say how workers join a sweep that has been created, and run none.

    Returns:
        The exit status.
    """
    status = with_retries(lambda: read_status(store, stored_sweep(store, name)))
    close_storage(store, storage_url)
    print_line(err, _opening(status, storage_url, 0))
    file = sqlite_path(storage_url)
    # They are typed elsewhere: a path is to be the same in any folder.
    url = shown_url(storage_url) if file is None else f"sqlite:///{file}"
    where = shlex.join(["--storage", url])
    images = "" if data_dir is None else f" {shlex.join(['--data-dir', str(data_dir.absolute())])}"
    print_line(out, f"join:       sweep worker {name} {where}{images}")
    print_line(out, f"follow:     sweep status {name} --watch {where}")
    if file is not None:
        print_line(out, f"let others: sweep serve {where}")
    return 0


def _keep_figures(name: str, storage_url: str, err: Console) -> None:
    """Save the figures of a sweep that has ended where optuna-dashboard shows them."""
    from sweeps.dashboard import keep_figures
    from sweeps.figures import make_figures
    from sweeps.findings import read_findings

    try:
        store = open_storage(storage_url, read_only=True)
        try:
            findings = read_findings(store, stored_sweep(store, name))
        finally:
            close_storage(store, storage_url)
        keep_figures(storage_url, findings, make_figures([findings]))
    except Exception as error:
        # The answer stands above, and `sweep report` saves them too.
        if not (isinstance(error, SweepError | StorageError) or is_transient(error)):
            raise
        print_line(err, f"sweep: {reason(error)}")


def done_code(status: SweepStatus, err: Console) -> int:
    """The exit status of a sweep that has met its budget: 1 if a study has failed trials only."""
    hopeless = [s.name for s in status.studies if s.finished and s.count("failed") == s.finished]
    if hopeless:
        print_line(
            err, f"sweep: every trial failed in {', '.join(hopeless)}; the reasons stand above"
        )
    return 1 if hopeless else 0


def _already_done(spec: SweepSpec, storage_url: str) -> SweepStatus | None:
    """The state of a sweep that has nothing left to run: it is answered without its images."""
    file = sqlite_path(storage_url)
    if file is not None and not file.exists():
        return None
    try:
        store = open_storage(storage_url, read_only=True)
    except EmptyStorageError:
        return None
    except StorageError as error:
        if file is None or isinstance(error, ElsewhereError):
            raise  # before the data set is loaded
        return None  # a fault that opening it to write explains better
    try:
        if spec.name not in stored_names(store):
            return None
        sweep = stored_sweep(store, spec.name)
        status = read_answer(store, sweep)
        return status if sweep.spec == spec and status.done else None
    finally:
        close_storage(store, storage_url)


def _run_workers(
    name: str,
    store: BaseStorage,
    storage_url: str,
    data_dir: Path | None,
    place: Place,
    slots: list[Slot],
    read: Callable[[], SweepStatus],
    err: Console,
    requests_before: int,
) -> int:
    """Run worker processes until they end; show what they do.

    Returns:
        The exit status if the budget is not met then: 130 after an interruption, else 1.
    """
    command = worker_command(name, data_dir)
    # Not as an argument, which every user of the machine could read: it may hold a password.
    variables = {"SWEEP_STORAGE": storage_url}
    with received_signals() as signals, _patience(storage_url, signals):
        try:
            hint = "Ctrl-C stops and keeps everything; start again to go on."
            with open_view(err, hint) as view:

                def update() -> bool:
                    # Nobody waits for the view: the workers say that the store is away.
                    with suppress(StopRequestedError):
                        status = read()
                        view.update(status)
                        return status.stop_requests != requests_before
                    return False

                with place.launch(slots, command, variables, view.say) as processes:
                    codes = supervise(processes, signals, update, view.say)
                update()
        finally:
            # Workers that were ended by force have left their trials RUNNING.
            with_retries(lambda: _requeue(store, name))
    if signals.received:
        return 130
    status = read()
    if not status.done and status.stop_requests == requests_before:
        print_line(
            err,
            f"sweep: workers ended with status {', '.join(map(str, codes))} before the budget "
            "was met; what they said stands above",
        )
    return 1


def _patience(storage_url: str, signals: Signals) -> AbstractContextManager[None]:
    """Wait for the store until a signal comes, quietly: every worker says when it is away."""
    return patience(place_of(storage_url), lambda: bool(signals.received), quiet=True)


def _requeue(store: BaseStorage, name: str) -> None:
    study_ids = [study.study_id for study in stored_sweep(store, name).studies]
    TrialQueue(store, worker_id=new_worker_id("start")).requeue_abandoned(study_ids)


def print_edits(changed: list[Edit], name: str, err: Console) -> None:
    """Say what differs from the settings that a sweep was begun with."""
    if changed:
        lines = [f"{name} was begun with other settings; from now on:", *map(str, changed)]
        print_line(err, "\n  ".join(lines))


def _opening(status: SweepStatus, storage_url: str, workers: int) -> str:
    finished = sum(study.finished for study in status.studies)
    total = sum(study.budget for study in status.studies)
    going_on = f", {finished} of them done" if finished else ""
    on_test = any(study.validation == "test" for study in status.studies)
    scored = "; scored on the test images" if on_test or status.confirms else ""
    return (
        f"{status.name}: {plural(len(status.studies), 'study', 'studies')}, "
        f"{plural(total, 'trial')}{going_on}; {plural(workers, 'worker')}; "
        f"store {shown_url(storage_url)}{scored}"
    )


def print_answer(
    status: SweepStatus, storage_url: str, data_dir: Path | None, again: str, out: Console
) -> None:
    """Print what a sweep has come to, and the commands that tell more."""
    out.print()
    out.print(answer_table(status))
    for line in (*outcome_lines(status), disk_line(status.name, storage_url)):
        print_line(out, line)
    where = shlex.join(["--storage", shown_url(storage_url)])
    lines = {
        "look again": f"sweep status {status.name} {where}",
        "report": f"sweep report {status.confirms or status.name} {where}",
        "inspect": f"sweep dashboard {where}",
    }
    images = "" if data_dir is None else f" {shlex.join(['--data-dir', str(data_dir)])}"
    found = any(study.best for study in status.studies)
    # Where the accuracy that picked the best is no measure of it, and nobody has taken one.
    if found and status.done and status.confirmation is None and SEED not in status.studies[0].cell:
        lines["confirm"] = f"sweep confirm {status.name} {where}{images}"
    if found:
        lines["take along"] = f"sweep best {status.name} {where}{images}"
    if not status.done:
        lines = {"go on": again.replace(storage_url, shown_url(storage_url)), **lines}
    out.print()
    for label, command in lines.items():
        print_line(out, f"{label + ':':<12}{command}")
