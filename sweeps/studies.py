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
    from optuna.study._frozen import FrozenStudy

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


def stored_names(store: BaseStorage) -> list[str]:
    """The names of the sweeps that a store holds, sorted; other studies are left out."""
    return sorted(name for name, parts in _parts(store).items() if _is_whole(parts))


def stored_sweep(store: BaseStorage, name: str) -> StoredSweep:
    """One sweep of a store.

    Raises:
        SweepError: if the store has no sweep of this name.
        SpecError: if this version of the program cannot read its spec.
    """
    parts = _parts(store)
    found = parts.get(name, {})
    if not _is_whole(found):
        names = [other for other, its in parts.items() if _is_whole(its)]
        raise SweepError(f"the store has no sweep {name!r}; {nearest(name, names)}")
    spec = SweepSpec.from_dict(found[0].user_attrs[SPEC])
    studies = [
        SweepStudy(
            study._study_id,
            study.study_name,
            study.user_attrs[CELL],
            study.user_attrs[SPEC]["budget"]["trials"],
            study.user_attrs[FINGERPRINT],
        )
        for _, study in sorted(found.items())
    ]
    return StoredSweep(spec, studies)


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
    store: BaseStorage, spec: SweepSpec, fingerprints: Sequence[str]
) -> StoredSweep:
    """Create the studies of a sweep, or go on with those that are there.

    A creation that was cut short is completed. Another number of trials, added `[[try]]`
    entries, the workers' share and new texts are taken over; anything that changes what a trial
    is, or what it is compared with, is refused. The caller sees to it that one process does
    this at a time.

    Args:
        store: where the studies are.
        spec: what is wanted.
        fingerprints: of the images of each cell, in their order.

    Raises:
        SpecError: if the stored spec differs in what may not change, or has no room for a new
            `[[try]]`.
        SweepError: if the sweep was begun on other images, or a study of its name is not its.
    """
    parts = _parts(store).get(spec.name, {})
    for position, study in sorted(parts.items()):
        _refuse_changes(SweepSpec.from_dict(study.user_attrs[SPEC]), spec)
        check_fingerprint(study.study_name, study.user_attrs[FINGERPRINT], fingerprints[position])
        if READY in study.user_attrs:
            _refuse_tries_without_room(store, spec, position, study._study_id)
    for position, fingerprint in enumerate(fingerprints):
        _create_study(store, spec, position, fingerprint)
    return stored_sweep(store, spec.name)


def shown_url(storage_url: str) -> str:
    """A storage URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(storage_url).render_as_string(hide_password=True)


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


def decisive_changes(stored: SweepSpec, wanted: SweepSpec) -> dict[str, tuple[Any, Any]]:
    """What differs between two specs of one sweep and decides what its trials are.

    Returns:
        Dotted key → (stored value, wanted value).
    """
    free = ("title", "question", "source", "budget.trials", "workers.threads", "try")
    changed = {
        key: values for key, values in differences(stored, wanted).items() if key not in free
    }
    if not changed:
        for cell in stored.cells:
            before = {t.label: t for t in stored.tries if t.applies_to(cell)}
            for attempt in wanted.tries:
                known = before.get(attempt.label)
                if known and attempt.applies_to(cell) and known.params != attempt.params:
                    changed[f"[[try]] {attempt.label}"] = (known.params, attempt.params)
    return changed


def _refuse_changes(stored: SweepSpec, wanted: SweepSpec) -> None:
    """Refuse a spec that changes what the stored trials are, naming each difference."""
    changed = decisive_changes(stored, wanted)
    if changed:
        shown = "; ".join(f"{key}: stored {a!r}, now {b!r}" for key, (a, b) in changed.items())
        raise SpecError(
            f"{wanted.name} is in the store with other settings ({shown}); these decide what a "
            "trial is, so repeat the options it was begun with, or begin anew under another "
            "--name"
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
    store: BaseStorage, spec: SweepSpec, position: int, study_id: int
) -> None:
    tries, begun = _missing_tries(store, spec, position, study_id)
    needed = begun + len(tries)
    if tries and needed > spec.budget.trials:
        raise SpecError(
            f"[[try]] {tries[0].label!r} is new, and {spec.study_name(spec.cells[position])} "
            f"has begun {begun} of its {spec.budget.trials} trials; raise the budget with --set "
            f"trials={needed}"
        )


def _create_study(store: BaseStorage, spec: SweepSpec, position: int, fingerprint: str) -> None:
    """Create, complete or renew one study; READY is written last, when nothing is missing."""
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
    attrs = study.user_attrs
    stored_attrs = {
        SWEEP: spec.name,
        CELL: dict(cell),
        POSITION: position,
        FINGERPRINT: fingerprint,
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
    if renewed:
        save_note(study, _note(spec, cell))
    if READY not in attrs:
        score = "validation" if _validation(spec, cell) == "holdout" else "test"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([f"{score} accuracy"])
        study.set_user_attr(READY, True)


def _validation(spec: SweepSpec, cell: Mapping[str, Value]) -> str:
    return spec.config(cell, spec.lowest_params()).validation


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
