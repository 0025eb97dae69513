"""`sweep delete`: a sweep's studies and those of its confirmation, with all of their checkpoints.

The studies go in one transaction, and the checkpoints of this machine after it. Killed between the
two, a delete is ended by the next one: checkpoints of a sweep that the store does not have are what
it left.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from storage.checkpoints import CheckpointStore, default_checkpoint_dir, trial_key
from storage.deletion import delete_studies
from storage.engine import close_storage, exclusive, open_storage, own_url
from storage.leases import LEASE_ATTR, host_id, parse_lease
from storage.overview import OverviewReader
from storage.retries import patience, with_retries
from storage.trials import TrialQueue
from storage.urls import check_url
from sweeps.errors import SpecError, SweepError, plural
from sweeps.progress import can_ask, print_line, says_yes
from sweeps.spec import CONFIRMATION
from sweeps.studies import SPEC, SWEEP, place_of, stored_names, unknown_sweep

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study._frozen import FrozenStudy

LEASE_SECONDS = 60.0
"""How long a lease from another machine is watched before its worker counts as gone."""

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class _Doomed:
    """What is to be deleted.

    Attributes:
        name: of the sweep.
        studies: the sweep that each is of, by Optuna's id; none where an earlier delete was killed
            before it had removed the checkpoints.
        keys: of the checkpoints that their trials may have, one for each trial.
        prefixes: of the keys of all checkpoints that are to go.
        size: bytes that those hold.
    """

    name: str
    studies: Mapping[int, str]
    keys: Sequence[str]
    prefixes: Sequence[str]
    size: int

    def __str__(self) -> str:
        """Which sweeps, and how much there is of them."""
        names = " and its confirmation ".join(dict.fromkeys([self.name, *self.studies.values()]))
        checkpoints = f"{self.size / 1e6:.1f} MB of checkpoints"
        if not self.studies:
            return f"{names}: {checkpoints}, which an earlier delete left"
        studies = plural(len(self.studies), "study", "studies")
        return f"{names}: {studies}, {plural(len(self.keys), 'trial')}, {checkpoints}"


def delete_sweep(
    name: str,
    storage_url: str,
    *,
    yes: bool,
    err: Console,
    lease_seconds: float = LEASE_SECONDS,
) -> int:
    """Remove a sweep and its confirmation from a store, and their checkpoints from this machine.

    Args:
        name: the sweep.
        storage_url: where it is.
        yes: do not ask.
        err: gets the question, and a line of what happened.
        lease_seconds: as of the workers; only a lease from another machine takes so long to judge.

    Returns:
        The exit status: 0 done, 1 if the answer was no.

    Raises:
        SweepError: the store has no such sweep, or a worker holds one of its trials.
        SpecError: there is nobody to ask, and `yes` is false.
        StorageError: the store cannot be used.
        CheckpointError: a checkpoint cannot be removed. Deleting again removes the rest.
    """
    check_url(storage_url)
    watcher = open_storage(storage_url, read_only=True)
    checkpoints = CheckpointStore(default_checkpoint_dir(own_url(watcher, storage_url)))
    with patience(place_of(storage_url)):
        try:
            doomed = with_retries(lambda: _doomed(watcher, checkpoints, name))
        finally:
            close_storage(watcher, storage_url)
        if not yes and not can_ask(err):
            raise SpecError(f"there is nobody to ask whether to delete {doomed}; --yes deletes it")
        store = open_storage(storage_url)
        try:
            _refuse_held(store, doomed, lease_seconds, err)
            if not yes and not says_yes(err, f"delete {doomed}?"):
                print_line(err, f"sweep: {name} was not deleted")
                return 1
            with_retries(lambda: _delete(store, storage_url, doomed))
        finally:
            close_storage(store, storage_url)
    for prefix in doomed.prefixes:
        checkpoints.delete_all(prefix, doomed.keys)
    print_line(err, f"deleted {doomed}")
    return 0


def _doomed(store: BaseStorage, checkpoints: CheckpointStore, name: str) -> _Doomed:
    found, others = _studies(store, name)
    # Of a sweep of that name that confirms another, or none, the checkpoints stay as well.
    prefixes = [f"{name}/", *([] if others else [f"{name}{CONFIRMATION}/"])]
    held = [checkpoints.disk_usage(prefix) for prefix in prefixes]
    if not found and not any(count for count, _ in held):
        raise unknown_sweep(name, stored_names(store))
    return _Doomed(
        name=name,
        studies={study._study_id: study.user_attrs[SWEEP] for study in found},
        keys=[
            trial_key(study.study_name, number)
            for study in found
            for number in range(store.get_n_trials(study._study_id))
        ],
        prefixes=prefixes,
        size=sum(size for _, size in held),
    )


def _studies(store: BaseStorage, name: str) -> tuple[list[FrozenStudy], list[FrozenStudy]]:
    """The studies of a sweep and its confirmation, a creation that was cut short included.

    Beside them those of a sweep that is called as the confirmation would be, and is none.
    """
    found: list[FrozenStudy] = []
    called_so: list[FrozenStudy] = []
    for study in store.get_all_studies():
        sweep = study.user_attrs.get(SWEEP)
        if sweep == name and study.study_name.split("/")[0] == name:
            found.append(study)
        elif sweep == study.study_name.split("/")[0] == name + CONFIRMATION:
            called_so.append(study)
    runs = [
        study
        for study in called_so
        if found and study.user_attrs.get(SPEC, {}).get("confirms") == name
    ]
    return found + runs, [study for study in called_so if study not in runs]


def _refuse_held(store: BaseStorage, doomed: _Doomed, lease_seconds: float, err: Console) -> None:
    """Put back the trials of workers that are gone; refuse if one holds a trial.

    A process of this machine is there, or is seen to be gone. One of another machine shows that it
    is there when it renews its lease, and else is taken for gone when the lease has run out.
    """
    ids = list(doomed.studies)
    if not ids:
        return
    queue = TrialQueue(store, worker_id="delete", lease_seconds=lease_seconds)
    reader = OverviewReader(store, running_attrs=(LEASE_ATTR,))
    here, seen = host_id(), None
    while True:
        queue.requeue_abandoned(ids)
        running = [
            (study_id, trial.number, trial.system_attrs.get(LEASE_ATTR) or {})
            for study_id, trials in with_retries(lambda: reader.read(ids)).items()
            for trial in trials
            if trial.state == "RUNNING"
        ]
        if not running:
            return
        alive = [entry for entry in running if entry[2].get("host") == here]
        alive += [entry for entry in running if seen is not None and entry not in seen]
        if alive:
            raise _held(doomed, [(study_id, lease) for study_id, _, lease in alive])
        if seen is None:
            print_line(
                err,
                f"{doomed.name}: {_workers(lease for _, _, lease in running)} was at work on "
                f"another machine; watching for up to {lease_seconds:g} s whether it still is",
            )
            seen = running
        time.sleep(POLL_SECONDS)


def _delete(store: BaseStorage, storage_url: str, doomed: _Doomed) -> None:
    with exclusive(store, storage_url):
        # Again after a lost answer there is less than before, and that is well.
        now = {study._study_id for study in _studies(store, doomed.name)[0]}
        if now - doomed.studies.keys():
            raise SweepError(f"{doomed.name} has changed since it was looked at; delete it again")
        running = delete_studies(store, list(doomed.studies))
    if running:
        raise _held(doomed, [(study_id, parse_lease(text)) for study_id, _, text in running])


def _held(doomed: _Doomed, running: Sequence[tuple[int, Mapping[str, Any]]]) -> SweepError:
    """The refusal of what is held; pairs of study and lease."""
    told = []
    for sweep in dict.fromkeys(doomed.studies[study_id] for study_id, _ in running):
        leases = [lease for study_id, lease in running if doomed.studies[study_id] == sweep]
        trials = f"{plural(len(leases), 'trial')} of {sweep} {'is' if len(leases) == 1 else 'are'}"
        told.append(f"{trials} held by {_workers(leases)}; sweep stop {sweep} ends that")
    return SweepError(f"{doomed.name} was not deleted: {'; '.join(told)}")


def _workers(leases: Iterable[Mapping[str, Any]]) -> str:
    # A trial that runs without a lease is another Optuna program's.
    return ", ".join(sorted({lease.get("worker") or "another program" for lease in leases}))
