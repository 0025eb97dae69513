"""Two states of one study, from the store and from a file: what one has that the other lacks.

Trials are matched by their result, wherever it stands by now, and then by their number and
settings. Nothing is dropped: where one number holds two trainings, the file's becomes an
additional trial. `docs/move.md` has the rules for people.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.archive_rows import StudyRows, TrialRows, renumbered
from storage.checkpoints import CheckpointStore, trial_key
from storage.leases import LEASE_ATTR
from storage.statements import FIXED
from sweeps.attributes import LABEL, OUTCOME
from sweeps.errors import plural
from sweeps.limits import SESSION, STOPS, is_span
from sweeps.spec import SweepSpec
from sweeps.studies import ADDED, SPEC

MERGED_FROM = "sweep:merged_from"
"""Trial system attribute: the numbers that the trial had in the stores that it comes from."""

_NOTE = "dashboard:note"
_PLOTS = "dashboard:plot_data:"
_NOTE_OF_TRIAL = "dashboard:{trial}:note"


@dataclass
class TrialChange:
    """Attributes to set on one of the store's trials, as JSON texts by key."""

    trial_id: int
    user: dict[str, str]
    system: dict[str, str]
    study: dict[str, str]


@dataclass
class StudyMerge:
    """What a file's study would change in the store's.

    Attributes:
        added: trials to create, with their number in the file; in their new numbers.
        replaced: (store's, file's): unfinished trials that the file has finished or brought
            further.
        attrs: attributes that the store's trials lack.
        study_user, study_system: attributes to set on the study.
        ahead: numbers of the store's that the file does not have, or not as far.
        behind: numbers of the file's that the store does not have, or not as far.
        conflicts: numbers whose trials are different ones.
        running: trials that a worker holds here, and that the file has further.
    """

    study_id: int
    store: StudyRows
    file: StudyRows
    added: list[tuple[int, TrialRows]] = field(default_factory=list)
    replaced: list[tuple[TrialRows, TrialRows]] = field(default_factory=list)
    attrs: list[TrialChange] = field(default_factory=list)
    study_user: dict[str, str] = field(default_factory=dict)
    study_system: dict[str, str] = field(default_factory=dict)
    ahead: list[int] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    conflicts: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    kept_spec: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether the store has all of it."""
        return not (
            self.added or self.replaced or self.attrs or self.study_user or self.study_system
        )

    def differences(self) -> list[str]:
        """One line for each kind of difference."""
        name = self.store.name
        kinds = {
            "only or further in the store": self.ahead,
            "only or further in the file": self.behind,
            "different trials of the same number": self.conflicts,
        }
        return [
            f"{name}: {kind}: {_numbers(numbers)} ({plural(len(numbers), 'trial')})"
            for kind, numbers in kinds.items()
            if numbers
        ]

    def remarks(self) -> list[str]:
        """What went otherwise than one might expect."""
        name, lines = self.store.name, []
        moved = [(origin, trial.number) for origin, trial in self.added if origin != trial.number]
        if moved:
            shown = ", ".join(f"#{origin} as #{number}" for origin, number in moved)
            lines.append(f"{name}: numbers that were taken; the file's trials are kept: {shown}")
        if self.running:
            lines.append(
                f"{name}: workers hold {_numbers(self.running)} here, which the file has further; "
                "they go on as they are"
            )
        if self.kept_spec:
            lines.append(f"{name}: texts and budgets differ; the store's are kept, the larger "
                         "budget holds")  # fmt: skip
        return lines


def plan_study(
    store: StudyRows,
    file: StudyRows,
    with_checkpoint: frozenset[tuple[str, int]],
    checkpoints: CheckpointStore,
) -> StudyMerge:
    """Compare a study in the store with the same study in a file.

    Args:
        store: as the store has it.
        file: as the file has it.
        with_checkpoint: study names and numbers of the trials whose checkpoints the file brings.
        checkpoints: those that are here.
    """
    assert store.study_id is not None
    plan = StudyMerge(store.study_id, store, file)

    def progress(trial: TrialRows, has_checkpoint: bool) -> int:
        # Without its checkpoint a trial starts over, whatever its curve says.
        return len(trial.intermediate) if has_checkpoint else 0

    pairs = _pairs(store, file)
    for theirs in file.trials:
        ours = pairs.get(theirs.number)
        if ours is None:
            if theirs.number < len(store.trials):
                if not _is_blank(theirs):
                    plan.conflicts.append(theirs.number)
                continue
            if not _is_blank(theirs):
                plan.behind.append(theirs.number)
            continue
        if ours.is_finished:
            if not theirs.is_finished:
                plan.ahead.append(ours.number)
            continue_with = theirs.is_finished
        elif theirs.is_finished:
            plan.behind.append(theirs.number)
            plan.replaced.append((ours, theirs))
            continue_with = False
        else:
            key = trial_key(store.name, ours.number)
            here = progress(ours, checkpoints.path(key).exists())
            there = progress(theirs, (file.name, theirs.number) in with_checkpoint)
            continue_with = here == there
            if here > there or (_is_blank(theirs) and not _is_blank(ours)):
                plan.ahead.append(ours.number)
            elif here < there or (_is_blank(ours) and not _is_blank(theirs)):
                if ours.state == "RUNNING":
                    plan.running.append(ours.number)
                else:
                    plan.behind.append(theirs.number)
                    plan.replaced.append((ours, theirs))
                    continue_with = False
        if continue_with:
            _add_attrs(plan, ours, theirs)
    matched = {trial.number for trial in pairs.values()}
    plan.ahead += [
        trial.number
        for trial in store.trials
        if trial.number not in matched
        and trial.number not in plan.conflicts
        and not _is_blank(trial)
    ]
    _number_added(plan, pairs)
    _plan_attrs(plan)
    return plan


def _number_added(plan: StudyMerge, pairs: Mapping[int, TrialRows]) -> None:
    """Number the trials to create: their own numbers where these are free, and no gaps."""
    missing = [trial for trial in plan.file.trials if trial.number not in pairs]
    number = len(plan.store.trials)
    natural = [trial for trial in missing if trial.number >= number]
    pool = [trial for trial in missing if trial.number < number and not _is_blank(trial)]
    while natural or pool:
        at_home = bool(natural) and (natural[0].number <= number or not pool)
        trial = (natural if at_home else pool).pop(0)
        attrs = {}
        if trial.number != number:
            attrs[MERGED_FROM] = json.dumps(sorted(_origins(trial)))
        plan.added.append((trial.number, renumbered(trial, number, attrs)))
        number += 1


def _pairs(store: StudyRows, file: StudyRows) -> dict[int, TrialRows]:
    """The store's trial that each of the file's trials is, by the file's number."""
    pairs: dict[int, TrialRows] = {}
    free = {trial.number: trial for trial in store.trials}

    def pair(theirs: TrialRows, ours: TrialRows) -> None:
        pairs[theirs.number] = free.pop(ours.number)

    # The very same result, whatever its number is by now.
    known: dict[object, list[TrialRows]] = {}
    for trial in store.trials:
        if trial.is_finished:
            known.setdefault(_identity(trial), []).append(trial)
    for theirs in file.trials:
        if theirs.is_finished:
            same = [t for t in known.get(_identity(theirs), ()) if t.number in free]
            if same:
                pair(theirs, min(same, key=lambda t: t.number != theirs.number))
    for theirs in file.trials:
        at = free.get(theirs.number)
        if theirs.number not in pairs and at is not None and _is_same(at, theirs):
            pair(theirs, at)
    # Trials that an earlier merge has given another number.
    for theirs in file.trials:
        if theirs.number in pairs or not theirs.params:
            continue
        for ours in list(free.values()):
            if MERGED_FROM in ours.system_attrs or MERGED_FROM in theirs.system_attrs:
                related = _origins(ours) & _origins(theirs)
                if related and ours.params and _is_same(ours, theirs):
                    pair(theirs, ours)
                    break
    return pairs


def _origins(trial: TrialRows) -> set[int]:
    return {trial.number, *(attribute(trial.system_attrs, MERGED_FROM) or ())}


def _identity(trial: TrialRows) -> object:
    """Equal for two records of one training: who ran it, when, and what came out."""
    lease = trial.system_attrs.get(LEASE_ATTR)
    return (lease, trial.started, trial.completed, _result(trial))


def _result(trial: TrialRows) -> object:
    return (
        trial.state,
        tuple(sorted((name, value) for name, (value, _) in trial.params.items())),
        trial.values,
        tuple(sorted(trial.intermediate.items())),
        trial.user_attrs.get(OUTCOME),
    )


def _is_blank(trial: TrialRows) -> bool:
    """Whether nothing was ever decided about a trial but its number."""
    return not (
        trial.is_finished
        or trial.params
        or trial.intermediate
        or FIXED in trial.system_attrs
        or LABEL in trial.user_attrs
    )


def _is_same(ours: TrialRows, theirs: TrialRows) -> bool:
    """Whether two trials of one number are the same training, as far as both have come."""
    if ours.is_finished and theirs.is_finished:
        return _result(ours) == _result(theirs)
    if _is_blank(ours):
        # A worker that is about to fill it in would do so differently.
        return theirs.is_finished or ours.state != "RUNNING" or _is_blank(theirs)
    if _is_blank(theirs):
        return True
    if ours.user_attrs.get(LABEL) != theirs.user_attrs.get(LABEL):
        return False
    here, there = _settings(ours), _settings(theirs)
    shared = here.keys() & there.keys()
    # A trial that was interrupted among its suggestions has some of them only.
    return shared in (here.keys(), there.keys()) and all(here[k] == there[k] for k in shared)


def _settings(trial: TrialRows) -> dict[str, Any]:
    return {**(attribute(trial.system_attrs, FIXED) or {}), **trial.external_params()}


def _add_attrs(plan: StudyMerge, ours: TrialRows, theirs: TrialRows) -> None:
    """Plan what the store's record of a trial lacks; where both have a value, it keeps its own."""
    assert ours.trial_id is not None

    def lacking(mine: Mapping[str, str], its: Mapping[str, str]) -> dict[str, str]:
        return {key: text for key, text in its.items() if key not in mine}

    change = TrialChange(
        ours.trial_id,
        lacking(ours.user_attrs, theirs.user_attrs),
        lacking(ours.system_attrs, {k: v for k, v in theirs.system_attrs.items()
                                    if k != MERGED_FROM}),
        _merged_notes(ours.study_attrs, theirs.study_attrs, _NOTE_OF_TRIAL),
    )  # fmt: skip
    if change.user or change.system or change.study:
        plan.attrs.append(change)


def _merged_notes(
    ours: Mapping[str, str], theirs: Mapping[str, str], prefix: str
) -> dict[str, str]:
    """What to set so that the later version of a note stands, and everything else of both."""
    changes = {
        key: text for key, text in theirs.items() if key not in ours and not key.startswith(prefix)
    }
    if _note_version(theirs, prefix) > _note_version(ours, prefix):
        # The dashboard, too, blanks the parts that a shorter text leaves over.
        changes |= {key: '""' for key in ours if key.startswith(f"{prefix}_str:")}
        changes |= {key: text for key, text in theirs.items() if key.startswith(prefix)}
    return changes


def _note_version(attrs: Mapping[str, str], prefix: str) -> int:
    version = attribute(attrs, f"{prefix}_ver")
    return version if isinstance(version, int) else 0


def _plan_attrs(plan: StudyMerge) -> None:
    ours, theirs = plan.store, plan.file
    plan.study_user = {k: t for k, t in theirs.user_attrs.items() if k not in ours.user_attrs}
    plan.study_system = _merged_notes(ours.system_attrs, theirs.system_attrs, _NOTE)
    if any(key.startswith(_PLOTS) for key in ours.system_attrs):
        # A figure is cut into parts: those of two do not fit together.
        plan.study_system = {k: t for k, t in plan.study_system.items() if not k.startswith(_PLOTS)}
    # The file's workers were asked to stop, not those that run here.
    plan.study_system.pop(STOPS, None)
    for key, text in theirs.system_attrs.items():
        if key.startswith(SESSION) and key in ours.system_attrs:
            spans = [attribute(attrs, key) for attrs in (ours.system_attrs, theirs.system_attrs)]
            if all(map(is_span, spans)) and spans[1] > spans[0]:
                plan.study_system[key] = text
    here, there = (attribute(study.user_attrs, SPEC) for study in (ours, theirs))
    # Whoever renews a spec writes the note anew, which counts its versions.
    versions = [_note_version(study.system_attrs, _NOTE) for study in (ours, theirs)]
    counts = [attribute(study.user_attrs, ADDED) or 0 for study in (ours, theirs)]
    added = max(counts)
    budgets = [stored_spec(study).budget.trials for study in (ours, theirs)]
    if budgets[0] != budgets[1] and versions[0] != versions[1]:
        added = counts[versions[1] > versions[0]]  # an edited budget has replaced them
    plan.study_user.pop(ADDED, None)
    if added != counts[0]:
        plan.study_user[ADDED] = json.dumps(added)
    if here == there:
        return
    if versions[1] > versions[0]:
        for key in (SPEC, "question", "source"):
            if key in theirs.user_attrs:
                plan.study_user[key] = theirs.user_attrs[key]
    elif versions[1] == versions[0]:
        plan.kept_spec = True
        if budgets[1] > budgets[0]:
            here.setdefault("budget", {})["trials"] = budgets[1]
            plan.study_user[SPEC] = json.dumps(here)


def summary(plans: Sequence[StudyMerge]) -> str:
    """What carrying out the plans of a sweep's studies changes, in words."""
    if all(plan.is_empty for plan in plans):
        newer = any(plan.ahead for plan in plans)
        return "nothing to do, the store has all of the file" + (" and more" if newer else "")
    added = sum(len(plan.added) for plan in plans)
    taken = sum(len(plan.replaced) for plan in plans)
    parts = [f"{plural(added, 'trial')} added", f"{taken} brought further"]
    if not added and not taken:
        parts = ["attributes brought up to date"]
    moved = sum(origin != trial.number for plan in plans for origin, trial in plan.added)
    if moved:
        parts.append(f"{moved} of them under another number")
    return ", ".join(parts)


def _numbers(numbers: Iterable[int]) -> str:
    """Trial numbers, runs of them as ranges."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"#{a}" if a == b else f"#{a} to #{b}" for a, b in runs)


def stored_spec(study: StudyRows) -> SweepSpec:
    """The spec that is kept with a study."""
    return SweepSpec.from_dict(attribute(study.user_attrs, SPEC))


def attribute(attrs: Mapping[str, str], key: str) -> Any:
    """An attribute's value; None if there is none."""
    return json.loads(attrs[key]) if key in attrs else None
