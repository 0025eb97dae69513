"""`sweep confirm`: a sweep's best and known configurations, trained again with other seeds.

The confirmation of NAME is a sweep of its own in the same store, NAME-confirm, with one study for
each study of NAME. Its trials are the runs: one for each configuration and seed, all of them
enqueued, so that workers, leases, resuming, `sweep status` and `sweep export` treat them as any
other. Nothing is suggested and nothing pruned: a run that is pruned has no final accuracy, and a
mean over those that are left would be of the lucky ones. `sweeps.confirmation` reads what comes
out.

The runs are listed nowhere but as trials. Whoever confirms compares what is wanted with what is
there, under the store's lock, and enqueues the rest: again after a kill it completes, with more
seeds it adds, and a second time it does nothing, but for the runs that failed, which get one more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from rich.console import Console

from storage.engine import close_storage, exclusive, open_storage
from storage.overview import OverviewReader
from storage.retries import patience, with_retries
from storage.trials import enqueue
from storage.urls import check_url
from sweeps.attributes import LABEL
from sweeps.config import Value
from sweeps.confirmation import SEED, Configuration, configuration_of, read_answer
from sweeps.edits import Edit, decisive_changes
from sweeps.errors import SpecError, SweepError, plural
from sweeps.launch import Place
from sweeps.machine import Need
from sweeps.preflight import load_data
from sweeps.progress import print_line
from sweeps.run import (
    done_code,
    leave_to_others,
    print_answer,
    print_edits,
    run_to_end,
)
from sweeps.space import Range
from sweeps.spec import CONFIRMATION, SweepSpec
from sweeps.status import StudyStatus, SweepStatus, TrialStatus, read_status
from sweeps.studies import (
    SPEC,
    StoredSweep,
    check_fingerprint,
    create_or_resume,
    place_of,
    stored_names,
    stored_sweep,
)

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

MAX_SEED = 10**9

MAX_RUNS = 2
"""Runs of a configuration and seed: one that failed may have had no fault of its own, twice has."""


@dataclass(frozen=True)
class _Wanted:
    """A run that is to be there: its parameters, and what it is called."""

    label: str
    params: Mapping[str, Value]


@dataclass(frozen=True)
class _Confirming:
    """A confirmation as it is to be, and what is missing of it.

    Attributes:
        of: the confirmed sweep.
        spec: of the confirmation.
        missing: for each study, the runs to enqueue.
        begun: whether the store has the confirmation.
        remarks: what went otherwise than one might expect.
    """

    of: StoredSweep
    spec: SweepSpec
    missing: Sequence[Sequence[_Wanted]]
    begun: bool
    remarks: Sequence[str]


def confirm_sweep(
    name: str,
    storage_url: str,
    *,
    top: int,
    seeds: int,
    data_dir: Path | None,
    workers: int | None,
    place: Place,
    again: str,
    out: Console,
    err: Console,
    print_json: Callable[[object], None] | None = None,
) -> int:
    """Train a sweep's best and known configurations with other seeds; say what came out.

    Args:
        name: the sweep.
        storage_url: where it is.
        top: how many of the best configurations of each study.
        seeds: runs of each configuration.
        data_dir: where the data set is, None for its usual place.
        workers: how many processes, None for as many as suit the place; with 0, others join.
        place: where they run.
        again: the command that goes on after an interruption.
        out: gets the answer.
        err: gets the progress.
        print_json: prints the answer for programs instead.

    Returns:
        The exit status: 0 done, 1 if workers failed, 130 after an interruption.

    Raises:
        SweepError: the store has no such sweep, no trial of it has completed, or something else
            is called as its confirmation is.
        SpecError: `top` is more than there is.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_url(storage_url)
    watcher = open_storage(storage_url, read_only=True)
    try:
        plan = with_retries(lambda: _plan(watcher, name, top, seeds))
        done = _already_done(watcher, plan)
    finally:
        close_storage(watcher, storage_url)
    for line in plan.remarks:
        print_line(err, line)
    if done is not None:
        _show(done, storage_url, again, out, print_json)
        return done_code(done, err)
    if workers != 0:
        place.prepare(storage_url, partial(print_line, err))
    checked = load_data(plan.spec, data_dir, err)
    fingerprints = checked.fingerprints
    for study, here in zip(plan.of.studies, fingerprints, strict=True):
        check_fingerprint(study.name, study.fingerprint, here)
    store = open_storage(storage_url)

    def create() -> list[Edit]:
        with exclusive(store, storage_url):
            return enqueue_runs(store, name, fingerprints, top=top, seeds=seeds)

    with patience(place_of(storage_url)):
        changed = with_retries(create)
    # A range that is wider than before follows from them, and is nobody's edit.
    kept = [edit for edit in changed if not edit.key.startswith("search.")]
    print_edits(kept, plan.spec.name, err)
    if workers == 0:
        if print_json is not None:
            print_json(read_answer(store, stored_sweep(store, plan.spec.name)).as_dict())
        said = out if print_json is None else err
        return leave_to_others(plan.spec.name, store, storage_url, data_dir, said, err)
    code, status = run_to_end(
        plan.spec, store, storage_url, data_dir=data_dir, workers=workers, place=place,
        need=Need(memory=checked.worker_bytes), err=err,
    )  # fmt: skip
    close_storage(store, storage_url)
    if status is not None:
        _show(status, storage_url, again, out, print_json)
        if status.done:
            code = done_code(status, err)
    return code


def enqueue_runs(
    store: BaseStorage, name: str, fingerprints: Sequence[str], *, top: int, seeds: int
) -> list[Edit]:
    """Create or complete the confirmation of a sweep, so that workers find its runs.

    The caller sees to it that one process does this at a time.

    Args:
        store: where the sweep is.
        name: the sweep.
        fingerprints: of the images of each cell, in their order.
        top: how many of the best configurations of each study.
        seeds: runs of each configuration.

    Returns:
        What differs from the confirmation that is there.

    Raises:
        SweepError, SpecError: as `confirm_sweep`.
    """
    plan = _plan(store, name, top, seeds)
    changed = create_or_resume(store, plan.spec, fingerprints)
    stored = stored_sweep(store, plan.spec.name)
    for study, missing in zip(stored.studies, plan.missing, strict=True):
        for run in missing:
            enqueue(store, study.study_id, run.params, user_attrs={LABEL: run.label})
    return changed


def _already_done(store: BaseStorage, plan: _Confirming) -> SweepStatus | None:
    """The state of a confirmation that has nothing left to run: it is told without images."""
    if not plan.begun or any(plan.missing):
        return None
    stored = stored_sweep(store, plan.spec.name)
    status = read_answer(store, stored)
    return status if status.done and stored.spec == plan.spec else None


def _show(
    status: SweepStatus,
    storage_url: str,
    again: str,
    out: Console,
    print_json: Callable[[object], None] | None,
) -> None:
    if print_json is None:
        print_answer(status, storage_url, None, again, out)
    elif status.confirmation is not None:
        print_json(status.confirmation.as_dict())


# --- what to run --------------------------------------------------------------------------------


def _plan(store: BaseStorage, name: str, top: int, seeds: int) -> _Confirming:
    sweep = stored_sweep(store, name)
    if sweep.spec.confirms:
        raise SweepError(
            f"{name} is the confirmation of {sweep.spec.confirms}; sweep confirm "
            f"{sweep.spec.confirms} --seeds N adds runs to it"
        )
    if SEED in sweep.spec.cells[0]:
        raise SweepError(
            f"{name} enumerates seed by [each]: each of its studies is of one seed, and there is "
            "nothing to confirm over others; enumerate something else"
        )
    status = read_status(store, sweep)
    if not any(study.count("complete") for study in status.studies):
        raise SweepError(
            f"no trial of {name} has completed, so there is no best one to confirm; sweep "
            f"start {name} goes on with it"
        )
    most = max(_complete_configurations(study) for study in status.studies)
    if top > most:
        raise SpecError(
            f"--top {top} is more than {name} has: {most} at most of its configurations have "
            "completed in a study"
        )
    fresh = _fresh_seeds(sweep.spec, seeds)
    remarks = _remarks(status, top)
    stored = _stored_confirmation(store, sweep)
    missing, configurations = [], []
    for position, study in enumerate(status.studies):
        wanted, left_out = _wanted(study, list(sweep.spec.search), top)
        remarks += left_out
        there = _runs(store, stored.studies[position].study_id) if stored else {}
        missing.append(
            [
                _Wanted(f"{label}, seed {seed}", {**dict(key), SEED: seed})
                for seed in fresh
                for key, label in wanted.items()
                if not there.get((key, seed))
            ]
        )
        configurations += [*wanted, *(key for key, _ in there)]
    spec = _confirmation_of(sweep.spec, configurations)
    if stored:
        _refuse_other(stored.spec, spec)
    return _Confirming(sweep, spec, missing, stored is not None, remarks)


def _remarks(status: SweepStatus, top: int) -> list[str]:
    name, remarks = status.name, []
    if not status.done:
        ended = sum(study.finished for study in status.studies)
        total = sum(study.budget for study in status.studies)
        remarks.append(
            f"{name} is not finished, {ended} of {total} trials have ended: what is best so far is "
            f"confirmed; when it has gone on, sweep confirm {name} adds what is better"
        )
    for study in status.studies:
        complete = _complete_configurations(study)
        if complete < top:
            had = plural(complete, "configuration has", "configurations have")
            remarks.append(f"{study.name}: {'no' if not complete else 'only'} {had} completed")
    return remarks


def _fresh_seeds(spec: SweepSpec, count: int) -> list[int]:
    """The first seeds that no trial of a sweep has trained with."""
    first = int(spec.train.get(SEED, 0))
    used = range(first, first + spec.budget.seeds)
    found: list[int] = []
    seed = 0
    while len(found) < count:
        if seed in used:
            seed = used.stop
            continue
        found.append(seed)
        seed += 1
    return found


def _complete_configurations(study: StudyStatus) -> int:
    return len({configuration_of(t.params) for t in study.trials if t.outcome == "complete"})


def _wanted(
    study: StudyStatus, searched: Sequence[str], top: int
) -> tuple[dict[Configuration, str], list[str]]:
    """The configurations to confirm, the best first, with their runs' names; and remarks."""
    wanted: dict[Configuration, str] = {}
    remarks = []
    complete = [t for t in study.trials if t.outcome == "complete"]
    for trial in sorted(complete, key=lambda t: (-(t.accuracy or 0.0), t.number)):
        key = configuration_of(trial.params)
        if len(wanted) < top:
            wanted.setdefault(key, _called(trial))
    for trial in (t for t in study.trials if t.label):
        if set(trial.params) != set(searched):
            # The sampler fills in what a [[try]] leaves out, when its trial begins.
            remarks.append(f"{study.name}: “{trial.label}” has not begun, so it is not confirmed")
        elif trial.outcome == "failed":
            remarks.append(
                f"{study.name}: “{trial.label}” failed, so it is not confirmed: {trial.reason}"
            )
        else:
            wanted.setdefault(configuration_of(trial.params), _called(trial))
    return wanted, remarks


def _called(trial: TrialStatus) -> str:
    return f"{trial.label} (#{trial.number})" if trial.label else f"#{trial.number}"


def _runs(store: BaseStorage, study_id: int) -> dict[tuple[Configuration, int], bool]:
    """The runs that are there, and of each whether that is all; one that failed runs again."""
    states: dict[tuple[Configuration, int], list[str]] = {}
    for trial in OverviewReader(store).read([study_id])[study_id]:
        params = trial.params
        if SEED in params:
            key = configuration_of(params), int(params[SEED])
            states.setdefault(key, []).append(trial.state)
    return {key: len(its) >= MAX_RUNS or set(its) != {"FAIL"} for key, its in states.items()}


# --- its spec -----------------------------------------------------------------------------------


def _confirmation_of(spec: SweepSpec, configurations: Sequence[Configuration]) -> SweepSpec:
    """The spec of the confirmation of a sweep.

    Args:
        spec: of the sweep.
        configurations: those that it has runs of; a range that was moved since then is widened,
            so that they are in it.
    """
    table = spec.as_dict()
    values: dict[str, list[Value]] = {name: [] for name in spec.search}
    for name, value in (pair for key in configurations for pair in key):
        values.setdefault(name, []).append(value)
    title = spec.title or spec.name
    return SweepSpec.from_dict(
        {
            **table,
            "name": spec.name + CONFIRMATION,
            "confirms": spec.name,
            "title": f"{title}, confirmed",
            "question": f"What do the configurations of {spec.name} reach with other seeds?",
            "train": {name: value for name, value in spec.train.items() if name != SEED},
            "search": {
                **{
                    name: _containing(space, values[name]).as_dict()
                    for name, space in spec.search.items()
                },
                SEED: {"low": 0, "high": MAX_SEED},
            },
            "try": [],
            # Never asked: every parameter of every run is given, and all of them run to their end.
            "sampler": {"type": "RandomSampler"},
            "pruner": {"type": "NopPruner"},
            "budget": {
                "trials": 1,
                "seeds": 1,
                "keep_checkpoints": "all" if spec.budget.keep_checkpoints == "all" else "none",
            },
        }
    )


def _containing(space: Range, values: Sequence[Value]) -> Range:
    numbers = [value for value in values if isinstance(value, int | float)]
    if space.choices or all(space.contains(value) for value in numbers):
        return space
    assert space.low is not None
    assert space.high is not None
    return Range(low=min(space.low, *numbers), high=max(space.high, *numbers), log=space.log)


def _stored_confirmation(store: BaseStorage, sweep: StoredSweep) -> StoredSweep | None:
    """What the store has under the confirmation's name; None if nothing, or not whole yet."""
    name = sweep.spec.name + CONFIRMATION
    elsewhere = (
        f"remove it (sweep delete {name}), or confirm a copy: sweep export "
        f"{sweep.spec.name} FILE, sweep import FILE --name NEW, sweep confirm NEW"
    )
    if name in stored_names(store):
        stored = stored_sweep(store, name)
        if stored.spec.confirms != sweep.spec.name:
            raise SweepError(
                f"the store has a sweep {name} that is no confirmation of {sweep.spec.name}; "
                + elsewhere
            )
        return stored
    names = {name + s.name.removeprefix(sweep.spec.name) for s in sweep.studies}
    for study in store.get_all_studies():
        its = study.user_attrs.get(SPEC)
        # One that has no spec yet is left to `create_or_resume`: its creation was cut short, or
        # it is nobody's sweep.
        other = its is not None and its.get("confirms") != sweep.spec.name
        if study.study_name in names and other:
            raise SweepError(
                f"the store has a study {study.study_name!r} that is not of the confirmation of "
                f"{sweep.spec.name}; {elsewhere}"
            )
    return None


def _refuse_other(stored: SweepSpec, wanted: SweepSpec) -> None:
    """Refuse a confirmation that was begun for other trainings than the sweep now has."""
    changed = decisive_changes(stored, wanted)
    if changed:
        shown = "; ".join(f"{key}: confirmed {a!r}, now {b!r}" for key, (a, b) in changed.items())
        raise SweepError(
            f"{wanted.confirms} has other settings than when {wanted.name} was begun ({shown}), so "
            f"what that holds does not confirm it; sweep delete {wanted.name}, and confirm anew"
        )
