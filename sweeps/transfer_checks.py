"""What must hold before a sweep is moved from one store to another, by way of a file.

:mod:`storage.archive_checks` holds a file's rows against Optuna's tables; here they are held
against what the commands count on: studies of one whole sweep, with attributes as workers write
them, and computed from the same spec and images as those in the store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from storage.archive_rows import StudyRows, TrialRows
from storage.leases import LEASE_ATTR
from storage.statements import FIXED
from storage.urls import is_grpc, sqlite_path
from sweeps.attributes import (
    CURVES,
    FAILURES,
    LABEL,
    OUTCOME,
    PROGRESS,
    PROVENANCE,
    REASON,
    SECONDS,
    WORST_DEVICE_ACCURACY,
)
from sweeps.carrying import CARRIED
from sweeps.edits import decisive_changes
from sweeps.errors import SpecError, SweepError
from sweeps.merging import MERGED_FROM, attribute, stored_spec
from sweeps.spec import SweepSpec
from sweeps.status import OUTCOMES
from sweeps.studies import ADDED, CELL, FINGERPRINT, POSITION, READY, SCORED, SPEC, SWEEP

_MAX_TRIALS = 2**31 - 1


def check_sweep(name: str, studies: list[StudyRows]) -> None:
    """Refuse studies that are not one whole sweep, as every other command counts on it.

    Sorts them in the order of the spec's cells.

    Raises:
        SweepError: saying what is wrong.
    """
    specs = [_check_study(name, study) for study in studies]
    if not specs or len(studies) != len(specs[0].cells):
        cells = len(specs[0].cells) if specs else 1
        raise SweepError(f"it has {len(studies)} of the {cells} studies of {name}")
    positions = sorted(attribute(study.user_attrs, POSITION) for study in studies)
    if positions != list(range(len(studies))):
        raise SweepError(f"two studies of {name} are the same")
    for spec in specs[1:]:
        if decisive_changes(specs[0], spec):
            raise SweepError(f"the studies of {name} have different specs")
    studies.sort(key=lambda study: int(study.user_attrs[POSITION]))


def _check_study(name: str, study: StudyRows) -> SweepSpec:
    attrs, where = study.user_attrs, f"study {study.name[:80]!r}"
    if attribute(attrs, SWEEP) != name:
        raise SweepError(f"{where} is not of the sweep {name!r}")
    table, cell, position = (attribute(attrs, key) for key in (SPEC, CELL, POSITION))
    fingerprint = attribute(attrs, FINGERPRINT)
    if not isinstance(table, dict) or not isinstance(fingerprint, str) or READY not in attrs:
        raise SweepError(f"{where} is not whole: it lacks its spec or its data set's fingerprint")
    try:
        spec = SweepSpec.from_dict(table)
        if spec.name != name:
            raise SweepError(f"the spec of {where} is of {spec.name[:80]!r}, not of {name!r}")
        if type(position) is not int or not 0 <= position < len(spec.cells):
            raise SweepError(f"{where} has no place in its spec")
        if dict(spec.cells[position]) != cell or spec.study_name(cell) != study.name:
            raise SweepError(f"{where} is not the study that its spec has at {position}")
        spec.lowest_config(cell)
    except SpecError as error:
        raise SweepError(f"the spec of {where} is refused: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SweepError(f"the spec of {where} cannot be read ({type(error).__name__})") from error
    if spec.budget.trials > _MAX_TRIALS:
        raise SweepError(f"{where} has a budget of more than {_MAX_TRIALS} trials")
    scored = attribute(attrs, SCORED)
    if scored is not None and (type(scored) is not int or scored < 1):
        raise SweepError(f"{where} has no number of images that score a trial")
    added = attribute(attrs, ADDED) or 0
    if type(added) is not int or not 0 <= added <= _MAX_TRIALS:
        raise SweepError(f"{where} has {str(added)[:80]!r} added trials")
    if study.directions != ("MAXIMIZE",):
        raise SweepError(f"{where} does not maximize one value")
    for trial in study.trials:
        _check_attrs(trial, where)
    return spec


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_TRIALS


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_curves(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(points, list) and all(map(_is_number, points)) for points in value.values()
    )


def _is_lease(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_count(value.get(key, 0)) for key in ("attempt", "deaths")
    )


def _is_progress(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_count(value.get(k)) for k in ("step", "deaths"))


# What workers and views take for granted of the attributes that they read.
_SYSTEM_ATTRS: dict[str, Callable[[Any], bool]] = {
    LEASE_ATTR: _is_lease,
    CURVES: _is_curves,
    PROVENANCE: lambda value: isinstance(value, dict),
    PROGRESS: _is_progress,
    FAILURES: _is_count,
    FIXED: lambda value: isinstance(value, dict),
    MERGED_FROM: lambda value: isinstance(value, list) and all(map(_is_count, value)),
}
_USER_ATTRS: dict[str, Callable[[Any], bool]] = {
    OUTCOME: lambda value: value in OUTCOMES,
    REASON: lambda value: isinstance(value, str),
    LABEL: lambda value: isinstance(value, str),
    CARRIED: lambda value: isinstance(value, str),
    SECONDS: _is_number,
    WORST_DEVICE_ACCURACY: _is_number,
}


def _check_attrs(trial: TrialRows, where: str) -> None:
    for attrs, accepted in ((trial.system_attrs, _SYSTEM_ATTRS), (trial.user_attrs, _USER_ATTRS)):
        for key, is_sound in accepted.items():
            if key in attrs and not is_sound(attribute(attrs, key)):
                raise SweepError(f"{where}: trial {trial.number} has an invalid attribute {key!r}")


def refuse_other_sweep(existing: Sequence[StudyRows], by_name: Mapping[str, StudyRows]) -> None:
    """Refuse to bring together what was not computed from the same spec and images.

    Args:
        existing: the store's studies.
        by_name: the file's.

    Raises:
        SweepError: saying what differs.
    """
    for ours in existing:
        # A difference in [each] may leave other studies, so the specs come first.
        theirs = by_name.get(ours.name) or next(iter(by_name.values()))
        changed = decisive_changes(stored_spec(ours), stored_spec(theirs))
        if changed:
            shown = "; ".join(f"{key}: store {a!r}, file {b!r}" for key, (a, b) in changed.items())
            raise SweepError(
                f"{stored_spec(ours).name} is in the store with other settings ({shown}); import "
                "under another --name"
            )
        if ours.user_attrs[FINGERPRINT] != theirs.user_attrs[FINGERPRINT]:
            raise SweepError(
                f"{ours.name} was begun on other images in the store (fingerprint "
                f"{attribute(ours.user_attrs, FINGERPRINT)[:12]}) than in the file "
                f"({attribute(theirs.user_attrs, FINGERPRINT)[:12]}); import under another --name"
            )


def refuse_proxy(storage_url: str) -> None:
    """Refuse a store that is reached through `sweep serve`.

    Raises:
        SweepError: it is one.
    """
    if is_grpc(storage_url):
        raise SweepError(
            f"a sweep moves from database to database, not through the proxy {storage_url}; run "
            "this where the database is reached, with its own --storage"
        )


def refuse_database(path: Path, storage_url: str) -> None:
    """Refuse a file of the store's own as the one to move a sweep in.

    Opening a SQLite database as a file would drop the locks that SQLite holds on it.

    Raises:
        SweepError: it is one.
    """
    database = sqlite_path(storage_url)
    if database is None:
        return
    own = [Path(f"{database}{end}").resolve() for end in ("", "-wal", "-shm", ".lock", ".host")]
    if path.resolve() in own:
        raise SweepError(f"{path} belongs to the store itself; name another file")
