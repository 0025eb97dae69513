"""The rows of whole studies, as they travel from one database to another.

Ids are the database's own and stand in no row here: a study is known by its name, a trial by its
number. optuna-dashboard keeps a trial's note under a key of the *study* that holds the trial's
id; such keys travel with their trial, with :data:`TRIAL_ID` in the id's place.
:mod:`storage.study_tables` reads and writes them, :mod:`storage.archive_checks` takes them from a
file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from storage.errors import StorageError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

TRIAL_ID = "{trial}"
"""Stands for a trial's id in the keys of :attr:`TrialRows.study_attrs`."""

OF_A_TRIAL = re.compile(r"dashboard:(\d+):(note_ver|note_str:\d+)|dashboard:artifacts:(\d+):.+")
"""Keys of system attributes of a study that are one of its trials'."""

NON_FINITE = {"INF_POS": "inf", "INF_NEG": "-inf", "NAN": "nan"}
"""Optuna's names of the numbers that its tables tell from others → as they stand in a `Number`."""

Number = float | str
"""A float, or `inf`, `-inf` or `nan`, as Optuna's tables tell them from numbers."""


class ArchiveError(StorageError):
    """A file that is not a whole archive, or that cannot be written; the message is one line."""


@dataclass(frozen=True)
class TrialRows:
    """One trial, as the tables have it.

    Attributes:
        number: within its study, from 0.
        state: the name of Optuna's `TrialState`.
        started, completed, heartbeat: naive UTC.
        params: name → (internal representation, distribution as JSON), in the order suggested.
        values: one for each objective, or none.
        intermediate: step → value.
        user_attrs, system_attrs: key → JSON text, as stored.
        study_attrs: system attributes of the study that are this trial's, see :data:`TRIAL_ID`.
        trial_id: in the database that it was read from; None if it comes from a file.
    """

    number: int
    state: str
    started: datetime | None = None
    completed: datetime | None = None
    heartbeat: datetime | None = None
    params: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    values: tuple[Number, ...] = ()
    intermediate: Mapping[int, Number] = field(default_factory=dict)
    user_attrs: Mapping[str, str] = field(default_factory=dict)
    system_attrs: Mapping[str, str] = field(default_factory=dict)
    study_attrs: Mapping[str, str] = field(default_factory=dict)
    trial_id: int | None = None

    @property
    def is_finished(self) -> bool:
        """Whether its state is COMPLETE, PRUNED or FAIL."""
        return self.state not in ("WAITING", "RUNNING")

    def external_params(self) -> dict[str, Any]:
        """Its parameters as Optuna shows them."""
        return {
            name: distribution(text).to_external_repr(value)
            for name, (value, text) in self.params.items()
        }

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; `storage.archive_checks.parse_study` reads them back."""
        return {
            "number": self.number,
            "state": self.state,
            "started": _iso(self.started),
            "completed": _iso(self.completed),
            "heartbeat": _iso(self.heartbeat),
            "params": {name: list(param) for name, param in self.params.items()},
            "values": list(self.values),
            "steps": list(self.intermediate),
            "intermediate_values": list(self.intermediate.values()),
            "user_attrs": dict(self.user_attrs),
            "system_attrs": dict(self.system_attrs),
            "study_attrs": dict(self.study_attrs),
        }


@dataclass(frozen=True)
class StudyRows:
    """One study and all its trials, in the order of their numbers.

    Attributes:
        name: Optuna's study name.
        directions: names of Optuna's `StudyDirection`, one for each objective.
        user_attrs, system_attrs: key → JSON text, as stored; without those of single trials.
        trials: all of them.
        study_id: in the database that it was read from; None if it comes from a file.
    """

    name: str
    directions: tuple[str, ...]
    user_attrs: Mapping[str, str]
    system_attrs: Mapping[str, str]
    trials: Sequence[TrialRows]
    study_id: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; `storage.archive_checks.parse_study` reads them back."""
        return {
            "name": self.name,
            "directions": list(self.directions),
            "user_attrs": dict(self.user_attrs),
            "system_attrs": dict(self.system_attrs),
            "trials": [trial.as_json() for trial in self.trials],
        }


def renumbered(trial: TrialRows, number: int, system_attrs: Mapping[str, str]) -> TrialRows:
    """The same trial under another number, with further system attributes."""
    return replace(
        trial, number=number, system_attrs={**trial.system_attrs, **system_attrs}, trial_id=None
    )


@lru_cache(maxsize=4096)
def distribution(text: str) -> BaseDistribution:
    """A distribution of Optuna's from its JSON.

    Raises:
        ArchiveError: it is none.
    """
    from optuna.distributions import json_to_distribution

    try:
        return json_to_distribution(text)
    except Exception as error:
        raise ArchiveError(f"{shown(text)} is not a distribution of Optuna's") from error


def shown(value: Any) -> str:
    """A value of a file in a message: short, on one line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()
