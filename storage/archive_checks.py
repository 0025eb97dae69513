"""The rows of a study as a file gives them: nothing is taken for granted.

What is read here goes into a database whose readers count on what Optuna itself would have written
there. So every value is held against what Optuna's tables hold, and whatever is not is refused in a
line that names it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from storage.archive_rows import (
    NON_FINITE,
    OF_A_TRIAL,
    ArchiveError,
    Number,
    StudyRows,
    TrialRows,
    distribution,
    shown,
)

_OF_ANY_TRIAL = re.compile(r"dashboard:\{trial\}:(note_ver|note_str:\d+)|"
                           r"dashboard:artifacts:\{trial\}:.+")  # fmt: skip

# Columns of Optuna's tables: VARCHAR(512) and 32-bit integers.
_MAX_NAME = 512
_MAX_INTEGER = 2**31 - 1

_MAX_FLOAT = math.nextafter(math.inf, 0)

_TIME = "2026-01-31T12:00:00.5"

_SURROGATE = re.compile("[\ud800-\udfff]")

_TRIAL_KEYS = (
    "number", "state", "started", "completed", "heartbeat", "params", "values", "steps",
    "intermediate_values", "user_attrs", "system_attrs", "study_attrs",
)  # fmt: skip


def parse_study(value: Any) -> StudyRows:
    """Check what `StudyRows.as_json` gave and somebody may have changed since.

    Raises:
        ArchiveError: something in it is not what Optuna's tables hold.
    """
    where = "the study"
    table = _table(value, where, ("name", "directions", "user_attrs", "system_attrs", "trials"))
    name = _text(table["name"], f"{where}'s name", _MAX_NAME)
    where = f"study {name!r}"
    directions = tuple(
        _one_of(direction, f"{where}: direction", ("MINIMIZE", "MAXIMIZE"))
        for direction in _list(table["directions"], f"{where}: directions")
    )
    if not directions:
        raise ArchiveError(f"{where} has no direction")
    system = _attrs(table["system_attrs"], f"{where}: system_attrs")
    for key in system:
        if OF_A_TRIAL.fullmatch(key):
            raise ArchiveError(f"{where}: attribute {key!r} is of a trial of another database")
    trials = [
        _trial(trial, f"{where}: trial {number}", number, len(directions))
        for number, trial in enumerate(_list(table["trials"], f"{where}: trials"))
    ]
    _check_distributions(trials, where)
    return StudyRows(
        name, directions, _attrs(table["user_attrs"], f"{where}: user_attrs"), system, trials
    )


def _trial(value: Any, where: str, number: int, objectives: int) -> TrialRows:
    table = _table(value, where, _TRIAL_KEYS)
    if _integer(table["number"], f"{where}: number") != number:
        raise ArchiveError(
            f"{where} is numbered {table['number']}; numbers run from 0 without gaps"
        )
    state = _one_of(
        table["state"], f"{where}: state", ("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING")
    )
    values = tuple(
        _number(v, f"{where}: value", nan=False) for v in _list(table["values"], f"{where}: values")
    )
    accepted = {"COMPLETE": (objectives,), "PRUNED": (0, objectives)}.get(state, (0,))
    if len(values) not in accepted:
        raise ArchiveError(f"{where} is {state} with {len(values)} values")
    steps = _list(table["steps"], f"{where}: steps")
    curve = _list(table["intermediate_values"], f"{where}: intermediate_values")
    if len(steps) != len(curve):
        raise ArchiveError(f"{where} has {len(steps)} steps and {len(curve)} intermediate values")
    intermediate = {
        _integer(step, f"{where}: step"): _number(v, f"{where}: intermediate value")
        for step, v in zip(steps, curve, strict=True)
    }
    if len(intermediate) < len(steps):
        raise ArchiveError(f"{where} has a step twice")
    study_attrs = _attrs(table["study_attrs"], f"{where}: study_attrs")
    for key in study_attrs:
        if not _OF_ANY_TRIAL.fullmatch(key):
            raise ArchiveError(f"{where}: study attribute {key!r} is not one of a trial")
    return TrialRows(
        number=number,
        state=state,
        started=_time(table["started"], f"{where}: started"),
        completed=_time(table["completed"], f"{where}: completed"),
        heartbeat=_time(table["heartbeat"], f"{where}: heartbeat"),
        params=_params(table["params"], f"{where}: params"),
        values=values,
        intermediate=intermediate,
        user_attrs=_attrs(table["user_attrs"], f"{where}: user_attrs"),
        system_attrs=_attrs(table["system_attrs"], f"{where}: system_attrs"),
        study_attrs=study_attrs,
    )


def _params(value: Any, where: str) -> dict[str, tuple[float, str]]:
    params: dict[str, tuple[float, str]] = {}
    for name, pair in _table(value, where).items():
        _text(name, f"{where}: name", _MAX_NAME)
        if not isinstance(pair, list) or len(pair) != 2:
            raise ArchiveError(f"{where}: {name!r} is not a value and a distribution")
        internal = _number(pair[0], f"{where}: {name!r}")
        text = _text(pair[1], f"{where}: distribution of {name!r}")
        if isinstance(internal, str):
            raise ArchiveError(f"{where}: {name!r} is {internal}")
        if not distribution(text)._contains(internal):
            raise ArchiveError(f"{where}: {name!r} = {internal!r} is not in {shown(text)}")
        params[name] = (internal, text)
    return params


def _check_distributions(trials: Iterable[TrialRows], where: str) -> None:
    """Optuna's samplers count on one kind of distribution for each parameter of a study."""
    from optuna.distributions import check_distribution_compatibility

    first: dict[str, str] = {}
    checked: set[tuple[str, str]] = set()
    for trial in trials:
        for name, (_, text) in trial.params.items():
            if (name, text) in checked:
                continue
            checked.add((name, text))
            try:
                check_distribution_compatibility(
                    distribution(first.setdefault(name, text)), distribution(text)
                )
            except ValueError as error:
                raise ArchiveError(
                    f"{where}: trial {trial.number} has another kind of {name!r} than those before"
                ) from error


def _attrs(value: Any, where: str) -> dict[str, str]:
    attrs: dict[str, str] = {}
    for key, text in _table(value, where).items():
        _text(key, f"{where}: key", _MAX_NAME)
        attrs[key] = _text(text, f"{where}: {shown(key)}")
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArchiveError(f"{where}: {shown(key)} is not JSON") from error
    return attrs


def _table(value: Any, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArchiveError(f"{where} is {shown(value)}, not a table")
    if keys is not None and value.keys() != set(keys):
        odd = sorted(value.keys() ^ set(keys))
        raise ArchiveError(f"{where} has missing or unknown keys: {shown(', '.join(odd))}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ArchiveError(f"{where} is {shown(value)}, not a list")
    return value


def _text(value: Any, where: str, longest: int | None = None) -> str:
    if not isinstance(value, str):
        raise ArchiveError(f"{where} is {shown(value)}, not a text")
    if longest is not None and not 0 < len(value) <= longest:
        raise ArchiveError(f"{where} has {len(value)} characters; accepted: 1 to {longest}")
    # PostgreSQL keeps no NUL, and no database half a surrogate pair.
    if "\0" in value or (not value.isascii() and _SURROGATE.search(value)):
        raise ArchiveError(f"{where} holds characters that no database keeps")
    return value


def _one_of(value: Any, where: str, accepted: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in accepted:
        raise ArchiveError(f"{where} is {shown(value)}; accepted: {', '.join(accepted)}")
    return value


def _integer(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_INTEGER:
        raise ArchiveError(f"{where} is {shown(value)}, not a whole number below 2^31")
    return value


def _number(value: Any, where: str, *, nan: bool = True) -> Number:
    if isinstance(value, str) and value in NON_FINITE.values() and (nan or value != "nan"):
        return value
    if type(value) not in (int, float) or not abs(value) <= _MAX_FLOAT:
        raise ArchiveError(f"{where} is {shown(value)}, not a finite number")
    return float(value)


def _time(value: Any, where: str) -> datetime | None:
    if value is None:
        return None
    try:
        time = datetime.fromisoformat(_text(value, where))
    except ValueError:
        time = None
    if time is None or time.tzinfo is not None:
        raise ArchiveError(f"{where} is {shown(value)}, not a time in UTC such as {_TIME}")
    return time
