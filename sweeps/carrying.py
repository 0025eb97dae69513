"""Configurations that did well in one study of a sweep are tried early in the next.

The studies of a sweep ask the same question under other conditions, and what is good at batch 128
is often good at 1024. With `[budget] carry = n`, the first n trials of a study after its known
configurations are not the sampler's: they try the best of the studies before it. They count in the
study's budget like any other, and the sampler learns from them. Where the studies differ in their
batch size, the learning rate grows with it, as the linear scaling rule has it (Goyal et al. 2017,
arXiv 1706.02677, section 2.1), up to the end of its range.

So that there is something to carry, each study begins :data:`HEAD_START` trials after the one
before it; then they advance side by side.

Such a trial has the user attribute :data:`CARRIED`: where its configuration was found first.
No two trials of a study have the same: workers that claim trials at the same time never carry
one configuration twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.statements import FIXED
from sweeps.config import Value
from sweeps.errors import SpecError
from sweeps.spec import SweepSpec, cell_name

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

CARRIED = "carried_from"
"""User attribute of a trial that was carried: whence."""

HEAD_START = 8
"""Trials by which a study is ahead of the next: about as many as a sampler draws at random."""


@dataclass(frozen=True)
class Carried:
    """A configuration of another study.

    Attributes:
        source: where it was found first, such as `global_batch_size=128 #12`.
        params: its parameters, by name.
    """

    source: str
    params: Mapping[str, Value]


def is_due(spec: SweepSpec, here: int, number: int) -> bool:
    """Whether the trial of that number in a study is to try something carried, if there is any.

    Args:
        spec: the sweep.
        here: position of the study among the spec's cells.
        number: of the trial.
    """
    known = sum(t.applies_to(spec.cells[here]) for t in spec.tries)
    return here > 0 and known <= number < known + spec.budget.carry


def is_undecided(trial: FrozenTrial) -> bool:
    """Whether nothing is settled yet about what a trial tries."""
    return not trial.params and FIXED not in trial.system_attrs


def candidates(spec: SweepSpec, trials: Sequence[Sequence[FrozenTrial]]) -> Iterator[Carried]:
    """What a study may be given from those before it, in the order in which it is tried.

    First the best of each study, the nearest first, then the second best of each, and so on. A
    study is near that differs in few enumerated settings, and in those that are numbers by a
    small factor.

    Args:
        spec: the sweep.
        trials: of each study in the order of the spec's cells, up to the one that is to be given
            something; of those before it, only trials that are complete count.
    """
    here = len(trials) - 1
    tried = [_parameters(trial) for trial in trials[here]]
    marks = {trial.user_attrs.get(CARRIED) for trial in trials[here]}
    nearest = sorted(
        range(here), key=lambda i: (*_distance(spec.cells[here], spec.cells[i]), here - i)
    )
    ranked = [
        (rank, nearness, i, trial)
        for nearness, i in enumerate(nearest)
        for rank, trial in enumerate(_best_first(trials[i]))
    ]
    for _, _, i, trial in sorted(ranked, key=lambda entry: entry[:2]):
        source = trial.user_attrs.get(CARRIED) or f"{cell_name(spec.cells[i])} #{trial.number}"
        if trial.params.keys() != spec.search.keys():
            continue
        params = _scaled(spec, i, here, trial.params)
        if source not in marks and params not in tried and _fits(spec, here, params):
            yield Carried(source, params)


def _scaled(
    spec: SweepSpec, there: int, here: int, params: Mapping[str, Value]
) -> dict[str, Value]:
    """The parameters, the learning rate brought to this study's batch size."""
    found = {name: params[name] for name in spec.search}
    rates, rate = spec.search.get("peak_lr"), params.get("peak_lr")
    batches = [spec.cells[i].get("global_batch_size") for i in (there, here)]
    if rates is None or rates.low is None or rates.high is None or None in batches:
        return found
    scaled = float(rate) * float(batches[1]) / float(batches[0])  # type: ignore[arg-type]
    scaled = min(max(scaled, float(rates.low)), float(rates.high))
    return {**found, "peak_lr": scaled} if rates.contains(scaled) else found


def _best_first(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    complete = [t for t in trials if t.state.name == "COMPLETE" and t.value is not None]
    return sorted(complete, key=lambda t: (-(t.value or 0.0), t.number))


def _parameters(trial: FrozenTrial) -> Mapping[str, Any]:
    return trial.params or trial.system_attrs.get(FIXED, {})


def _fits(spec: SweepSpec, here: int, params: Mapping[str, Value]) -> bool:
    """Whether the study could try parameters: the spaces of old trials may have been others."""
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
