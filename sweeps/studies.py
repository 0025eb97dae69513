"""A sweep in the store: one Optuna study for each cell, the spec kept with each of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sweeps.attributes import LABEL, in_parts
from sweeps.config import Value, written
from sweeps.edits import Edit, edits
from sweeps.errors import SpecError, SweepError, nearest
from sweeps.sections import Try
from sweeps.spec import SweepSpec

if TYPE_CHECKING:
    from pathlib import Path

    from optuna.storages import BaseStorage
    from optuna.study._frozen import FrozenStudy

SWEEP = "sweep"
SPEC = "sweep_spec"
CELL = "cell"
POSITION = "position"
FINGERPRINT = "data_fingerprint"
SCORED = "scored_images"
READY = "ready"
NOTE_VERSION = "dashboard:note_ver"
NOTE_TEXT = "dashboard:note_str:"

ADDED = "added_trials"
"""Trials of each study beyond the spec's budget; kept with the first study."""


@dataclass(frozen=True)
class SweepStudy:
    """One study of a sweep.

    Attributes:
        study_id: Optuna's own.
        name: as the dashboard shows it.
        cell: the enumerated settings of this study.
        budget: trials that it may run: the spec's and those that were added to it; of a
            confirmation, those that are enqueued.
        fingerprint: SHA-256 of the images and labels that its trials train on.
        scored_images: how many images score a trial; None where an earlier version made the study.
    """

    study_id: int
    name: str
    cell: Mapping[str, Value]
    budget: int
    fingerprint: str
    scored_images: int | None = None


@dataclass
class Addition:
    """Trials that are added to each study, once: a creation may have to be tried again.

    Attributes:
        trials: how many.
        total: what the first try made of the store's :data:`ADDED`; None before it.
    """

    trials: int = 0
    total: int | None = None


@dataclass(frozen=True)
class StoredSweep:
    """A sweep as the store has it.

    Attributes:
        spec: the resolved spec.
        studies: in the order of the spec's cells.
        stored_spec: the spec as it was read.
        marks: system attributes of the first study, as they stood when it was read.
    """

    spec: SweepSpec
    studies: list[SweepStudy]
    stored_spec: Mapping[str, Any] = field(compare=False)
    marks: Mapping[str, Any] = field(compare=False)


def store_to_read(storage_url: str) -> BaseStorage | None:
    """A store to look into; None where there is none yet.

    Raises:
        StorageError: it cannot be read.
    """
    from storage.engine import open_storage
    from storage.errors import EmptyStorageError
    from storage.urls import sqlite_path

    file = sqlite_path(storage_url)
    if file is not None and not _exists(file):
        return None
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return open_storage(storage_url, read_only=True)
    except EmptyStorageError:
        return None


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # no name can be so long
        return False


def stored_names(store: BaseStorage) -> list[str]:
    """The names of the sweeps that a store holds, sorted; other studies are left out."""
    return sorted(name for name, parts in _parts(store).items() if _is_whole(parts))


def stored_sweep(
    store: BaseStorage, name: str, *, before: StoredSweep | None = None
) -> StoredSweep:
    """One sweep of a store.

    Args:
        store: where it is.
        name: which one.
        before: what an earlier call returned; its spec is kept where it is still the stored one.

    Raises:
        SweepError: if the store has no sweep of this name.
        SpecError: if this version of the program cannot read its spec.
    """
    parts = _parts(store)
    found = parts.get(name, {})
    if not _is_whole(found):
        raise unknown_sweep(name, [other for other, its in parts.items() if _is_whole(its)])
    return _stored(store, found, before)


def stored_sweeps(store: BaseStorage) -> tuple[list[StoredSweep], dict[str, SpecError]]:
    """The sweeps of a store by name; and of those that this version cannot read, why."""
    read: list[StoredSweep] = []
    refused: dict[str, SpecError] = {}
    for name, found in sorted(_parts(store).items()):
        if _is_whole(found):
            try:
                read.append(_stored(store, found))
            except SpecError as error:
                refused[name] = error
    return read, refused


def _stored(
    store: BaseStorage, found: Mapping[int, FrozenStudy], before: StoredSweep | None = None
) -> StoredSweep:
    stored = found[0].user_attrs[SPEC]
    if before is not None and before.stored_spec == stored:
        spec = before.spec
    else:
        spec = SweepSpec.from_dict(stored)
    studies = [
        SweepStudy(
            study._study_id,
            study.study_name,
            study.user_attrs[CELL],
            # Whoever enqueues the runs of a confirmation says how many there are.
            store.get_n_trials(study._study_id)
            if spec.confirms
            else spec.budget.trials + found[0].user_attrs.get(ADDED, 0),
            study.user_attrs[FINGERPRINT],
            study.user_attrs.get(SCORED),
        )
        for _, study in sorted(found.items())
    ]
    return StoredSweep(spec, studies, stored, found[0].system_attrs)


def unknown_sweep(name: str, names: Sequence[str]) -> SweepError:
    """The error of a name that the store does not have, with those that it has."""
    hint = nearest(name, names) if names else "it holds none; sweep start begins one"
    return SweepError(f"the store has no sweep {name!r}; {hint}")


def _parts(store: BaseStorage) -> dict[str, dict[int, FrozenStudy]]:
    """The studies of each sweep by position, those of a creation that was cut short included."""
    parts: dict[str, dict[int, FrozenStudy]] = {}
    for study in store.get_all_studies():
        attrs = study.user_attrs
        if SPEC in attrs:
            parts.setdefault(attrs[SWEEP], {})[attrs[POSITION]] = study
    return parts


def _is_whole(parts: Mapping[int, FrozenStudy]) -> bool:
    ready = [study for study in parts.values() if READY in study.user_attrs]
    return bool(ready) and len(ready) == len(ready[0].user_attrs[SPEC]["each"])


def create_or_resume(
    store: BaseStorage,
    spec: SweepSpec,
    fingerprints: Sequence[str],
    *,
    scored: Sequence[int] = (),
    addition: Addition | None = None,
) -> list[Edit]:
    """Create the studies of a sweep, or go on with those that are there.

    A creation that was cut short is completed. What may change of a spec (see `sweeps.edits`) is
    taken over. The caller sees to it that one process does this at a time.

    Args:
        store: where the studies are.
        spec: what is wanted.
        fingerprints: of the images of each cell, in their order.
        scored: how many images score a trial of each cell; empty where nobody counted them.
        addition: by how many trials the budget of each study grows. A later start with the
            same `trials` keeps them; one with others replaces them. A call that is repeated
            after a lost answer, with the same object, adds nothing more.

    Returns:
        What differs from the stored spec, empty for a new sweep.

    Raises:
        SpecError: if the stored spec differs in what may not change, or has no room for a new
            `[[try]]`, or trials are to be added to a sweep that is not in the store.
        SweepError: if the sweep was begun on other images, or a study of its name is not its.
    """
    addition = Addition() if addition is None else addition
    add_trials = addition.trials
    parts = _parts(store).get(spec.name, {})
    if add_trials and not _is_whole(parts):
        raise SpecError(
            f"--add-trials {add_trials} extends a sweep that is in the store, and {spec.name} is "
            "not yet; set its budget with --set trials=N"
        )
    if add_trials and spec.confirms:
        raise SpecError(
            f"--add-trials {add_trials} has no meaning for {spec.name}; sweep confirm "
            f"{spec.confirms} adds to it, with --seeds and --top"
        )
    before = parts[0].user_attrs.get(ADDED, 0) if 0 in parts else 0
    changed: list[Edit] = []
    for study in parts.values():
        changed = edits(SweepSpec.from_dict(study.user_attrs[SPEC]), spec) or changed
    # A budget that is edited says how many there are, those added before included.
    edited = any(edit.key == "budget.trials" for edit in changed)
    if addition.total is None:
        addition.total = add_trials + (0 if edited else before)
    added = addition.total
    for position, study in sorted(parts.items()):
        check_fingerprint(study.study_name, study.user_attrs[FINGERPRINT], fingerprints[position])
        if READY in study.user_attrs:
            room = spec.budget.trials + added
            _refuse_tries_without_room(store, spec, position, study._study_id, room)
    for position, fingerprint in enumerate(fingerprints):
        _create_study(
            store, spec, position, fingerprint, scored=scored[position] if scored else None
        )
    if added != before:
        store.set_study_user_attr(parts[0]._study_id, ADDED, added)
    if add_trials:
        budget = spec.budget.trials + added
        changed.append(Edit("trials", budget - add_trials, budget, "of each study from now on"))
    return changed


def shown_url(storage_url: str) -> str:
    """A storage URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(storage_url).render_as_string(hide_password=True)


def place_of(storage_url: str) -> str:
    """What messages call a store."""
    return f"the store at {shown_url(storage_url)}"


def check_fingerprint(study_name: str, stored: str, here: str) -> None:
    """Refuse images that are not those which a study was begun on.

    Raises:
        SweepError: if they differ.
    """
    if here != stored:
        raise SweepError(
            f"the data set here is not the one {study_name} was begun on (fingerprint "
            f"{here[:12]}, the study's {stored[:12]}); point --data-dir at the same one, or "
            "begin anew under another --name"
        )


def _missing_tries(
    store: BaseStorage, spec: SweepSpec, position: int, study_id: int
) -> tuple[list[Try], int]:
    """The tries that a study lacks, by their labels, and the number of trials it has."""
    trials = store.get_all_trials(study_id, deepcopy=False)
    labels = {trial.user_attrs.get(LABEL) for trial in trials}
    cell = spec.cells[position]
    wanted = [t for t in spec.tries if t.applies_to(cell) and t.label not in labels]
    return wanted, len(trials)


def _refuse_tries_without_room(
    store: BaseStorage, spec: SweepSpec, position: int, study_id: int, room: int
) -> None:
    tries, begun = _missing_tries(store, spec, position, study_id)
    needed = begun + len(tries)
    if tries and needed > room:
        raise SpecError(
            f"[[try]] {tries[0].label!r} is new, and {spec.study_name(spec.cells[position])} "
            f"has begun {begun} of its {room} trials; raise the budget with --add-trials "
            f"{needed - room}"
        )


def _create_study(
    store: BaseStorage, spec: SweepSpec, position: int, fingerprint: str, *, scored: int | None
) -> None:
    """Create, complete or renew one study; READY is written last, when nothing is missing."""
    import optuna

    from storage.trials import enqueue

    cell = spec.cells[position]
    study = optuna.create_study(
        storage=store,
        study_name=spec.study_name(cell),
        direction="maximize",
        load_if_exists=True,
    )
    attrs = study.user_attrs
    stored_attrs = {
        SWEEP: spec.name,
        CELL: dict(cell),
        POSITION: position,
        FINGERPRINT: fingerprint,
        **({} if scored is None else {SCORED: scored}),
        "question": spec.question,
        "source": spec.source,
        SPEC: spec.as_dict(),  # last: with it the study counts as a part of the sweep
    }
    if SPEC not in attrs and ((attrs.keys() - stored_attrs) or study.trials):
        raise SweepError(
            f"the store has a study {study.study_name!r} that is not of this sweep; begin "
            "under another --name"
        )
    renewed = {key: value for key, value in stored_attrs.items() if attrs.get(key) != value}
    for key, value in renewed.items():
        study.set_user_attr(key, value)
    for attempt in _missing_tries(store, spec, position, study._study_id)[0]:
        enqueue(store, study._study_id, dict(attempt.params), user_attrs={LABEL: attempt.label})
    # Its versions tell whose spec is the later one where two stores are merged.
    if renewed.keys() - {SCORED}:
        _save_note(store, study._study_id, _note(spec, cell))
    if READY not in attrs:
        on_test = spec.confirms or _validation(spec, cell) == "test"
        score = "test" if on_test else "validation"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([f"{score} accuracy"])
        study.set_user_attr(READY, True)


def _save_note(store: BaseStorage, study_id: int, text: str) -> None:
    """Write a study's note as `optuna_dashboard.save_note` does.

    To import optuna-dashboard for it takes a second, as that brings scikit-learn.
    """
    attrs = store.get_study_system_attrs(study_id)
    store.set_study_system_attr(study_id, NOTE_VERSION, attrs.get(NOTE_VERSION, 0) + 1)
    for key, part in in_parts(NOTE_TEXT, text, attrs).items():
        store.set_study_system_attr(study_id, key, part)


def _validation(spec: SweepSpec, cell: Mapping[str, Value]) -> str:
    return spec.lowest_config(cell).validation


def _note(spec: SweepSpec, cell: Mapping[str, Value]) -> str:
    """What optuna-dashboard shows of a study: the question, where it comes from, the sweep."""
    here = ", ".join(f"{name} = {written(value)}" for name, value in cell.items())
    parts = [
        f"## {spec.title or spec.name}",
        spec.question,
        f"Source: {spec.source}" if spec.source else "",
        f"This study: {here}." if here else "",
        "A diverged trial stands as pruned, so that the sampler learns from it; its attribute "
        "`outcome` says `diverged`, and `reason` why.",
        f"`sweep start {spec.name}` goes on with it, `sweep report {spec.name}` answers in words "
        "and figures; with `--storage` and this store's address, unless it is `sweep.db` here.",
        f"```toml\n{spec.as_toml()}```",
    ]
    return "\n\n".join(part for part in parts if part)
