"""A sweep in the store: one Optuna study for each cell, the spec kept with each of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.config import Value
from sweeps.errors import SpecError, SweepError, nearest
from sweeps.spec import SweepSpec, Try, differences

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

SWEEP = "sweep"
SPEC = "sweep_spec"
CELL = "cell"
POSITION = "position"
FINGERPRINT = "data_fingerprint"
READY = "ready"
LABEL = "label"


@dataclass(frozen=True)
class SweepStudy:
    """One study of a sweep.

    Attributes:
        study_id: Optuna's own.
        name: as the dashboard shows it.
        cell: the enumerated settings of this study.
        budget: trials that it may run.
        fingerprint: SHA-256 of the images and labels that its trials train on.
    """

    study_id: int
    name: str
    cell: Mapping[str, Value]
    budget: int
    fingerprint: str


@dataclass(frozen=True)
class StoredSweep:
    """A sweep as the store has it.

    Attributes:
        spec: the resolved spec.
        studies: in the order of the spec's cells.
    """

    spec: SweepSpec
    studies: list[SweepStudy]


def stored_sweeps(store: BaseStorage) -> dict[str, StoredSweep]:
    """Every sweep that a store holds, by name; studies of other origin are left out."""
    found: dict[str, list[tuple[int, Mapping[str, Any], SweepStudy]]] = {}
    for study in store.get_all_studies():
        attrs = study.user_attrs
        if attrs.get(READY):
            entry = SweepStudy(
                study._study_id,
                study.study_name,
                attrs[CELL],
                attrs[SPEC]["budget"]["trials"],
                attrs[FINGERPRINT],
            )
            found.setdefault(attrs[SWEEP], []).append((attrs[POSITION], attrs, entry))
    sweeps = {}
    for name, entries in sorted(found.items()):
        entries.sort(key=lambda entry: entry[0])
        sweeps[name] = StoredSweep(
            SweepSpec.from_dict(entries[0][1][SPEC]),
            [study for _, _, study in entries],
        )
    return sweeps


def stored_sweep(store: BaseStorage, name: str) -> StoredSweep:
    """One sweep of a store.

    Raises:
        SweepError: if the store has no sweep of this name.
    """
    sweeps = stored_sweeps(store)
    if name not in sweeps:
        raise SweepError(f"the store has no sweep {name!r}; {nearest(name, sweeps)}")
    return sweeps[name]


def create_or_resume(
    store: BaseStorage, spec: SweepSpec, fingerprints: Sequence[str]
) -> StoredSweep:
    """Create the studies of a sweep, or go on with those that are there.

    A creation that was cut short is completed. A larger or smaller number of trials, added
    `[[try]]` entries, the workers' share and new texts are taken over; anything that changes
    what a trial is, or what it is compared with, is refused. The caller sees to it that one
    process does this at a time.

    Args:
        store: where the studies are.
        spec: what is wanted.
        fingerprints: of the images of each cell, in their order.

    Raises:
        SpecError: if the stored spec differs in what may not change.
        SweepError: if the sweep was begun on other images.
    """
    stored = stored_sweeps(store).get(spec.name)
    new_tries: list[Try] = []
    if stored is not None:
        spec, new_tries = _merge(stored.spec, spec)
        for study, fingerprint in zip(stored.studies, fingerprints, strict=True):
            check_fingerprint(study, fingerprint)
    for position, fingerprint in enumerate(fingerprints):
        _create_study(store, spec, position, fingerprint, new_tries)
    return stored_sweep(store, spec.name)


def shown_url(storage_url: str) -> str:
    """A storage URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(storage_url).render_as_string(hide_password=True)


def check_fingerprint(study: SweepStudy, fingerprint: str) -> None:
    """Refuse images that are not those which a study was begun on.

    Raises:
        SweepError: if they differ.
    """
    if fingerprint != study.fingerprint:
        raise SweepError(
            f"the data set here is not the one {study.name} was begun on (fingerprint "
            f"{fingerprint[:12]}, the study's {study.fingerprint[:12]}); point --data-dir at the "
            "same one, or begin anew under another --name"
        )


def _merge(stored: SweepSpec, wanted: SweepSpec) -> tuple[SweepSpec, list[Try]]:
    """The spec to go on with, and the tries that it adds; refuse what may not change."""
    free = ("title", "question", "source", "budget.trials", "workers.threads", "try")
    changed = {
        key: values for key, values in differences(stored, wanted).items() if key not in free
    }
    places = {(t.label, cell): t for t in stored.tries for cell in _cells_of(stored, t)}
    for attempt in wanted.tries:
        for cell in _cells_of(wanted, attempt):
            before = places.get((attempt.label, cell))
            if before is not None and before.params != attempt.params:
                changed[f"[[try]] {attempt.label}"] = (before.params, attempt.params)
    if changed:
        shown = "; ".join(f"{key}: stored {a!r}, now {b!r}" for key, (a, b) in changed.items())
        raise SpecError(
            f"{wanted.name} is in the store with other settings ({shown}); these decide what a "
            "trial is, so repeat the options it was begun with, or begin anew under another "
            "--name"
        )
    return wanted, [t for t in wanted.tries if t not in stored.tries]


def _note(spec: SweepSpec, cell: Mapping[str, Value]) -> str:
    """What optuna-dashboard shows of a study: the question, where it comes from, the sweep."""
    here = ", ".join(f"{name} = {value}" for name, value in cell.items())
    parts = [
        f"## {spec.title or spec.name}",
        spec.question,
        f"Source: {spec.source}" if spec.source else "",
        f"This study: {here}." if here else "",
        "A diverged trial stands as pruned, so that the sampler learns from it; its attribute "
        "`outcome` says `diverged`, and `reason` why.",
        f"```toml\n{spec.as_toml()}```",
    ]
    return "\n\n".join(part for part in parts if part)


def _cells_of(spec: SweepSpec, attempt: Try) -> list[int]:
    return [index for index, cell in enumerate(spec.cells) if attempt.applies_to(cell)]


def _create_study(
    store: BaseStorage,
    spec: SweepSpec,
    position: int,
    fingerprint: str,
    new_tries: list[Try],
) -> None:
    import optuna
    from optuna_dashboard import save_note

    from storage.trials import enqueue

    cell = spec.cells[position]
    study = optuna.create_study(
        storage=store,
        study_name=spec.study_name(cell),
        direction="maximize",
        load_if_exists=True,
    )
    study_id = study._study_id
    attrs = study.user_attrs
    if READY in attrs:
        tries = [t for t in new_tries if t.applies_to(cell)]
    else:
        if attrs.get(SWEEP, spec.name) != spec.name or (not attrs and study.trials):
            raise SweepError(
                f"the store has a study {study.study_name!r} that is not of this sweep; begin "
                "under another --name"
            )
        # A creation that was cut short has enqueued some of them, in this order.
        tries = [t for t in spec.tries if t.applies_to(cell)][len(study.trials) :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["validation accuracy"])
        for key, value in {
            SWEEP: spec.name,
            "question": spec.question,
            "source": spec.source,
            CELL: dict(cell),
            POSITION: position,
            FINGERPRINT: fingerprint,
        }.items():
            study.set_user_attr(key, value)
        save_note(study, _note(spec, cell))
    for attempt in tries:
        enqueue(store, study_id, dict(attempt.params), user_attrs={LABEL: attempt.label})
    spec_dict = spec.as_dict()
    if attrs.get(SPEC) != spec_dict:
        study.set_user_attr(SPEC, spec_dict)
    if READY not in attrs:
        study.set_user_attr(READY, True)
