"""`sweep export` and `sweep import`: a sweep as one file, and what two stores have computed as one.

The export is one read transaction, while workers run. A checkpoint that is copied after the
snapshot may be ahead of the curve in it; a resumed trial reports the epochs that are missing. One
that is behind the curve, as a worker reports an epoch while its checkpoint is still being written,
has the rest trained again (:meth:`storage.trials.TrialQueue.forget_steps`). Both end in the same
curve.

An import is one write transaction. Where the store has the sweep already, trials are compared
one by one; see `docs/move.md` for the rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage import archive
from storage.archive_rows import ArchiveError, StudyRows, TrialRows
from storage.checkpoints import CheckpointError, CheckpointStore, default_checkpoint_dir, trial_key
from storage.engine import close_storage, exclusive, open_storage, sql_engine
from storage.leases import LEASE_ATTR, count, parse_lease, released
from storage.placement import CheckpointPlacement
from storage.readers import READ_ONLY_OPTION
from storage.retries import with_retries
from storage.study_tables import StudyTables
from storage.trials import TrialQueue
from storage.urls import check_url
from sweeps.errors import SweepError, plural
from sweeps.merging import StudyMerge, attribute, plan_study, summary
from sweeps.spec import SweepSpec, confirmed_by
from sweeps.studies import CELL, SPEC, SWEEP, shown_url, stored_sweep
from sweeps.transfer_checks import check_sweep, refuse_database, refuse_other_sweep, refuse_proxy

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from sqlalchemy.engine import Connection, Engine

_SNAPSHOTS = 3


# --- export -------------------------------------------------------------------------------------


def export_sweep(name: str, path: Path, storage_url: str, *, overwrite: bool) -> str:
    """Write a sweep, with what its unfinished trials need to go on, to one file.

    Args:
        name: the sweep.
        path: the file, which appears when it is whole.
        storage_url: where the sweep is; workers may be running.
        overwrite: whether the file may replace another.

    Returns:
        A line that says what was written.

    Raises:
        SweepError: the store has no such sweep, or is only reached through a proxy.
        StorageError: the store cannot be read, or the file not written.
    """
    refuse_proxy(storage_url)
    refuse_database(path, storage_url)
    if path.is_dir():
        raise SweepError(f"{path} is a folder; name a file in it, such as {path / name}.sweep")
    if path.exists() and not path.is_file():
        # A rename would put the file in the place of a device or a pipe that others use.
        raise SweepError(f"{path} is a device or a pipe; name a file")
    if not overwrite and path.exists():
        raise archive.exists_already(path)
    store = open_storage(storage_url, read_only=True)
    try:
        stored_sweep(store, name)
        checkpoints = CheckpointStore(default_checkpoint_dir(storage_url))
        for attempt in range(1, _SNAPSHOTS + 1):
            line = _export_once(
                name, path, sql_engine(store), checkpoints, overwrite, last=attempt == _SNAPSHOTS
            )
            if line is not None:
                return line
        raise AssertionError("unreachable")
    finally:
        close_storage(store, storage_url)


class _Outdated(Exception):
    """A trial of the snapshot has finished meanwhile, and its checkpoint is gone."""


def _export_once(
    name: str,
    path: Path,
    engine: Engine,
    checkpoints: CheckpointStore,
    overwrite: bool,
    *,
    last: bool,
) -> str | None:
    """Write the file from one snapshot; None if a later snapshot would hold more."""
    before = {file.name for file in checkpoints.root.glob("*.pt")}
    studies, versions = with_retries(lambda: _snapshot(engine, name))
    check_sweep(name, studies)
    count, waiting = 0, 0
    try:
        with archive.writing(path, overwrite=overwrite) as writer:
            for study in studies:
                for trial in study.trials:
                    if trial.is_finished or _attempts(trial) == 0:
                        continue
                    waiting += 1
                    key = trial_key(study.name, trial.number)
                    content = checkpoints.read(key)
                    if content is not None:
                        writer.add_checkpoint(study.name, trial.number, content)
                        count += 1
                    elif checkpoints.path(key).name in before and not last:
                        raise _Outdated
            for study in studies:
                writer.add_study(study)
            writer.add_manifest(name, versions)
    except _Outdated:
        return None
    trials = sum(len(study.trials) for study in studies)
    missing = f" ({waiting} trials are under way)" if count < waiting else ""
    return (
        f"{name}: {plural(len(studies), 'study', 'studies')}, {plural(trials, 'trial')}, "
        f"{plural(count, 'checkpoint')}{missing}, {path.stat().st_size:,} bytes in {path}"
    )


def _snapshot(engine: Engine, name: str) -> tuple[list[StudyRows], dict[str, Any]]:
    """All rows of a sweep at one moment."""
    options: dict[str, Any] = {READ_ONLY_OPTION: True}
    if engine.dialect.name != "sqlite":  # which gives a transaction one snapshot by itself
        options["isolation_level"] = "REPEATABLE READ"
    tables = StudyTables()
    with engine.connect().execution_options(**options) as connection, connection.begin():
        versions: dict[str, Any] = {p: metadata.version(p) for p in ("sweep", "optuna", "torch")}
        versions["storage_schema"] = tables.schema_version(connection)
        ids = tables.ids(connection, attr=(SWEEP, json.dumps(name)))
        return [tables.read(connection, study_id) for study_id in ids], versions


# --- import -------------------------------------------------------------------------------------


def import_sweep(
    path: Path,
    storage_url: str,
    *,
    merge: bool,
    rename: str | None,
    say: Callable[[str], None],
) -> str:
    """Bring the sweep of a file into a store, or what the file has more than the store.

    Args:
        path: what `export_sweep` wrote.
        storage_url: where the sweep goes.
        merge: whether to take what the file has more, although the store has gone on as well.
        rename: import it under this name.
        say: hears of what is worth knowing beside the result.

    Returns:
        A line that says what was done.

    Raises:
        SweepError: the store has another sweep or study of this name, or both have gone on and
            `merge` is false.
        SpecError: `rename` is no name of a sweep.
        StorageError: the file is damaged, or the store cannot be used. Nothing was changed.
        CheckpointError: a checkpoint cannot be written. Nothing was changed.
    """
    refuse_proxy(storage_url)
    refuse_database(path, storage_url)
    check_url(storage_url)
    with archive.reading(path) as opened:
        incoming = _read_incoming(opened)
        _say_versions(opened.versions, say)
        if rename is not None and rename != incoming.name:
            incoming = _renamed(incoming, rename)
            say(
                f"suggestions and Hyperband's brackets depend on a sweep's name: from here on "
                f"they are those of {rename}, not those that {opened.sweep} would have had"
            )
        store = open_storage(storage_url)
        try:
            with exclusive(store, storage_url):
                checkpoints = CheckpointStore(default_checkpoint_dir(storage_url))
                return _Import(store, storage_url, checkpoints, incoming, merge, say).run()
        finally:
            close_storage(store, storage_url)


@dataclass(frozen=True)
class _Incoming:
    """A file's sweep, checked; `checkpoint` reads one by study and number, or gives None."""

    name: str
    studies: list[StudyRows]
    with_checkpoint: frozenset[tuple[str, int]]
    checkpoint: Callable[[str, int], bytes]


def _read_incoming(opened: archive.Archive) -> _Incoming:
    studies = opened.studies()
    try:
        check_sweep(opened.sweep, studies)
    except SweepError as error:
        raise ArchiveError(str(error)) from error
    unfinished = {(s.name, t.number) for s in studies for t in s.trials if not t.is_finished}
    entries = {(entry.study, entry.number): entry for entry in opened.checkpoints}
    if len(entries) < len(opened.checkpoints):
        raise ArchiveError("it has two checkpoints of one trial")
    for of, entry in entries.items():
        if of not in unfinished:
            raise ArchiveError(f"{entry.member} is of no unfinished trial of the file")
        opened.check_checkpoint(entry)
    return _Incoming(
        opened.sweep,
        studies,
        frozenset(entries),
        lambda study, number: opened.checkpoint(entries[study, number]),
    )


def _renamed(incoming: _Incoming, name: str) -> _Incoming:
    studies, before = [], {}
    for study in incoming.studies:
        table = {**json.loads(study.user_attrs[SPEC]), "name": name}
        if table.get("confirms"):
            table["confirms"] = confirmed_by(name)
        renamed = SweepSpec.from_dict(table).study_name(json.loads(study.user_attrs[CELL]))
        before[renamed] = study.name
        attrs = {**study.user_attrs, SWEEP: json.dumps(name), SPEC: json.dumps(table)}
        studies.append(replace(study, name=renamed, user_attrs=attrs))
    after = {old: new for new, old in before.items()}
    return _Incoming(
        name,
        studies,
        frozenset((after[study], number) for study, number in incoming.with_checkpoint),
        lambda study, number: incoming.checkpoint(before[study], number),
    )


def _say_versions(versions: Mapping[str, Any], say: Callable[[str], None]) -> None:
    for package in ("optuna", "torch"):
        here, there = metadata.version(package), versions.get(package)
        if there != here:
            say(
                f"the file was written with {package} {str(there)[:40]!r}, here is {here!r}: "
                "what is computed from here on may differ in its last digits"
            )


class _Import:
    """One import; its transaction may be run again after a lock or a lost connection."""

    def __init__(
        self,
        store: BaseStorage,
        storage_url: str,
        checkpoints: CheckpointStore,
        incoming: _Incoming,
        merge: bool,
        say: Callable[[str], None],
    ) -> None:
        self._store = store
        self._url = storage_url
        self._checkpoints = checkpoints
        self._incoming = incoming
        self._merge = merge
        self._say = say
        self._tables = StudyTables()

    def run(self) -> str:
        plans = with_retries(self._look)
        if plans is not None and any(plan.running for plan in plans):
            # Trials of workers that were killed are RUNNING until somebody looks after them.
            queue = TrialQueue(self._store, worker_id="import")
            queue.requeue_abandoned([plan.study_id for plan in plans])
        lines, result = with_retries(self._write)
        for line in lines:
            self._say(line)
        return result

    def _look(self) -> list[StudyMerge] | None:
        """What would be done; refuses what must not be done."""
        engine = sql_engine(self._store)
        with engine.connect().execution_options(**{READ_ONLY_OPTION: True}) as connection:
            return self._plans(connection)

    def _plans(self, connection: Connection) -> list[StudyMerge] | None:
        """One plan for each study; None if the store does not have the sweep."""
        incoming = self._incoming
        ids = self._tables.ids(
            connection,
            attr=(SWEEP, json.dumps(incoming.name)),
            names=[study.name for study in incoming.studies],
        )
        if not ids:
            return None
        existing = [self._tables.read(connection, study_id) for study_id in ids]
        for study in existing:
            if attribute(study.user_attrs, SWEEP) != incoming.name:
                raise SweepError(
                    f"the store has a study {study.name!r} that is not of this sweep; import "
                    "under another --name"
                )
        try:
            check_sweep(incoming.name, existing)
        except SweepError as error:
            raise SweepError(
                f"{incoming.name} in the store is not whole ({error}); sweep start "
                f"{incoming.name} completes it, or import under another --name"
            ) from error
        by_name = {study.name: study for study in incoming.studies}
        refuse_other_sweep(existing, by_name)
        plans = [
            plan_study(
                study, by_name[study.name], self._incoming.with_checkpoint, self._checkpoints
            )
            for study in existing
        ]
        ahead, behind = any(p.ahead for p in plans), any(p.behind for p in plans)
        conflicts = any(plan.conflicts for plan in plans)
        if not self._merge and (conflicts or (ahead and behind)):
            for plan in plans:
                for line in plan.differences():
                    self._say(line)
            raise SweepError(
                f"{incoming.name} has gone on in the store and in the file; --merge keeps what "
                "both have computed"
            )
        return plans

    def _write(self) -> tuple[list[str], str]:
        name, place = self._incoming.name, shown_url(self._url)
        with CheckpointPlacement(self._checkpoints) as placement:
            finished: list[str] = []
            with sql_engine(self._store).begin() as connection:
                ids = self._tables.ids(connection, attr=(SWEEP, json.dumps(name)))
                self._tables.lock(connection, ids)
                plans = self._plans(connection)
                if plans is None:
                    lines, result = [], self._create(connection, placement)
                else:
                    for plan in plans:
                        finished += self._carry_out(connection, plan, placement)
                    lines = [line for plan in plans for line in plan.remarks()]
                    result = summary(plans)
                placement.place()
            placement.keep()
            for key in finished:
                # Of no use any more, and harmless where it stays.
                with suppress(CheckpointError):
                    self._checkpoints.delete(key)
        return lines, f"{name} in {place}: {result}"

    def _create(self, connection: Connection, placement: CheckpointPlacement) -> str:
        going_on = 0
        for study in self._incoming.studies:
            waiting = replace(study, trials=[_released(trial) for trial in study.trials])
            self._tables.insert_study(connection, waiting)
            going_on += sum(
                not trial.is_finished and _attempts(trial) > 0 for trial in study.trials
            )
        for study_name, number in sorted(self._incoming.with_checkpoint):
            content = self._incoming.checkpoint(study_name, number)
            placement.stage(trial_key(study_name, number), content)
        studies = self._incoming.studies
        trials = sum(len(study.trials) for study in studies)
        text = (
            f"imported {plural(len(studies), 'study', 'studies')}, {plural(trials, 'trial')}, "
            f"{plural(len(self._incoming.with_checkpoint), 'checkpoint')}"
        )
        if going_on:
            text += f"; {plural(going_on, 'interrupted trial')} to go on"
        return text

    def _carry_out(
        self, connection: Connection, plan: StudyMerge, placement: CheckpointPlacement
    ) -> list[str]:
        """Write what a plan says; return the checkpoints that are then of finished trials."""
        tables, name, finished = self._tables, plan.file.name, []
        tables.set_study_attrs(
            connection, plan.study_id, user=plan.study_user, system=plan.study_system
        )
        added = [_released(trial) for _, trial in plan.added]
        if added:
            tables.insert_trials(connection, plan.study_id, added)
        places = {origin: trial.number for origin, trial in plan.added}
        for ours, theirs in plan.replaced:
            assert ours.trial_id is not None
            kept = {**ours.user_attrs, **theirs.user_attrs}
            trial = _released(replace(theirs, user_attrs=kept))
            tables.replace_trial(connection, plan.study_id, ours.trial_id, trial)
            places[theirs.number] = ours.number
            if theirs.is_finished:
                finished.append(trial_key(name, ours.number))
        for change in plan.attrs:
            tables.set_trial_attrs(
                connection, plan.study_id, change.trial_id,
                user=change.user, system=change.system, study=change.study,
            )  # fmt: skip
        for number, at in places.items():
            if (name, number) in self._incoming.with_checkpoint:
                placement.stage(trial_key(name, at), self._incoming.checkpoint(name, number))
        return finished


# --- small things -------------------------------------------------------------------------------


def _attempts(trial: TrialRows) -> int:
    text = trial.system_attrs.get(LEASE_ATTR)
    lease = released(text, died=False) if trial.state == "RUNNING" else parse_lease(text)
    return count(lease, "attempt")


def _released(trial: TrialRows) -> TrialRows:
    """A running trial as its worker would have left it, had it been asked to stop.

    As :meth:`storage.trials.TrialQueue.release` writes it: no death is counted.
    """
    if trial.state != "RUNNING":
        return trial
    lease = released(trial.system_attrs.get(LEASE_ATTR), died=False)
    attrs = {**trial.system_attrs, LEASE_ATTR: json.dumps(lease)}
    return replace(trial, state="WAITING", started=None, heartbeat=None, system_attrs=attrs)
