"""Settings that did well in one study of a sweep are tried in the others.

The studies of a sweep ask the same question under other conditions, and what is good at batch 128
is often good at 1024. With `[budget] carry_every = n`, every n-th trial of a study is not the
sampler's: it tries the best setting of the other studies that this one has not tried. It counts in
the study's budget like any other, and the sampler learns from it.

Such a trial has the user attribute :data:`CARRIED`, which says where its setting was found first.
No two trials of a study have the same: workers that claim trials at the same time never carry
one setting twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.trial_table import FIXED
from sweeps.config import Value, written
from sweeps.errors import SpecError
from sweeps.spec import SweepSpec

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

CARRIED = "carried_from"
"""User attribute of a trial that was carried: whence."""


@dataclass(frozen=True)
class Carried:
    """A setting of another study.

    Attributes:
        source: where it was found first, such as `global_batch_size=128 #12`.
        params: the searched settings.
    """

    source: str
    params: Mapping[str, Value]


def is_due(carry_every: int, number: int) -> bool:
    """Whether the trial with that number, if nothing else decides, is to try a carried setting."""
    return carry_every > 0 and number % carry_every == carry_every - 1


def is_undecided(trial: FrozenTrial) -> bool:
    """Whether nothing is settled yet about what a trial tries."""
    return not trial.params and FIXED not in trial.system_attrs


def candidates(
    spec: SweepSpec, here: int, trials: Sequence[Sequence[FrozenTrial]]
) -> Iterator[Carried]:
    """What a study may be given from the others, in the order in which it is tried.

    First the best of each other study, the nearest first, then the second best of each, and so
    on. A study is near that differs in few enumerated settings, and in those that are numbers by
    a small factor.

    Args:
        spec: the sweep.
        here: position of the study among the spec's cells.
        trials: of each study, in the order of the cells; of the others, only those that are
            complete count.
    """
    tried = [_settings(trial) for trial in trials[here]]
    marks = {trial.user_attrs.get(CARRIED) for trial in trials[here]}
    others = sorted(
        (i for i in range(len(trials)) if i != here),
        key=lambda i: (*_distance(spec.cells[here], spec.cells[i]), abs(i - here), i),
    )
    ranked = [
        (rank, nearness, i, trial)
        for nearness, i in enumerate(others)
        for rank, trial in enumerate(_best_first(trials[i]))
    ]
    for _, _, i, trial in sorted(ranked, key=lambda entry: entry[:2]):
        source = trial.user_attrs.get(CARRIED) or f"{_name(spec.cells[i])} #{trial.number}"
        if source in marks or trial.params in tried or not _fits(spec, here, trial.params):
            continue
        yield Carried(source, dict(trial.params))


def _best_first(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    complete = [t for t in trials if t.state.name == "COMPLETE" and t.value is not None]
    return sorted(complete, key=lambda t: (-(t.value or 0.0), t.number))


def _settings(trial: FrozenTrial) -> Mapping[str, Any]:
    return trial.params or trial.system_attrs.get(FIXED, {})


def _fits(spec: SweepSpec, here: int, params: Mapping[str, Value]) -> bool:
    """Whether the study could try a setting: the spaces of old trials may have been others."""
    if params.keys() != spec.search.keys():
        return False
    if not all(spec.search[name].contains(value) for name, value in params.items()):
        return False
    try:
        spec.config(spec.cells[here], params)
    except SpecError:
        return False
    return True


def _distance(one: Mapping[str, Value], other: Mapping[str, Value]) -> tuple[int, float]:
    """In how many enumerated settings two studies differ, and by what factor in the numbers."""
    differing = [name for name in one if one[name] != other[name]]
    factor = 0.0
    for name in differing:
        a, b = one[name], other[name]
        if _is_positive(a) and _is_positive(b):
            factor += abs(math.log(float(a) / float(b)))
    return len(differing), factor


def _is_positive(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _name(cell: Mapping[str, Value]) -> str:
    return ",".join(f"{name}={written(value)}" for name, value in cell.items())
