"""The tables of a sweep's file beside the search space, each checked and brought into its form.

Whatever is wrong in one is a `SpecError` that names the key, the value and what is accepted there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.config import TrialConfig, Value
from sweeps.errors import SpecError, nearest
from sweeps.space import Range

TRY_WORDS = ("label", "when")

KEEP_CHECKPOINTS = ("best", "all", "none")

MAX_COUNT = 10**12
MAX_HOURS = 10.0**6


@dataclass(frozen=True)
class Try:
    """A known configuration, which runs before the sampler's own.

    Attributes:
        label: what outputs call it.
        params: values of searched parameters; the sampler fills in those left out.
        when: only in studies whose enumerated settings have one of these values.
    """

    label: str
    params: Mapping[str, Value]
    when: Mapping[str, tuple[Value, ...]]

    def applies_to(self, cell: Mapping[str, Value]) -> bool:
        """Whether it runs in the study of `cell`."""
        return all(cell[name] in values for name, values in self.when.items())


@dataclass(frozen=True)
class Budget:
    """How much may be spent.

    Whichever of `trials`, `hours` and `epochs_total` is met first ends the sweep. The latter two
    end it after the running epochs: trials that are not finished then keep their checkpoints,
    and go on when the budget is raised.

    Attributes:
        trials: trials of each study.
        seeds: trainings of each trial, with the seeds `seed`, `seed + 1`, …; the trial's value
            is their mean.
        hours: wall-clock time in which at least one worker was at work, over all starts; None
            sets no limit.
        epochs_total: epochs of all trials of all studies together; None sets no limit.
        keep_checkpoints: whose last checkpoint stays when a trial is finished: that of the
            "best" complete trial of each study, of "all" complete trials, or of "none".
        carry: so many trials of each study, the first after its known configurations, try the
            best configurations of the studies before it.
    """

    trials: int = 20
    seeds: int = 1
    hours: float | None = None
    epochs_total: int | None = None
    keep_checkpoints: str = "best"
    carry: int = 0


@dataclass(frozen=True)
class WorkerShare:
    """What each worker process is given of a machine without a GPU.

    Attributes:
        threads: CPU threads. A machine runs as many workers as it has cores for: trials side by
            side, of one thread each, use a machine better than one trial on all threads.
    """

    threads: int = 1


def table_at(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A table within a table, empty where it is left out.

    Raises:
        SpecError: if something else stands there.
    """
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise SpecError(f"{key} = {value!r} is not a table; write [{key}] and its keys below it")
    return value


def parse_train(table: Mapping[str, Any]) -> dict[str, Value]:
    """`[train]`: settings by name, each in its own type."""
    return {
        name: TrialConfig.setting(name, "[train]").check(name, value)
        for name, value in table.items()
    }


def parse_each(each: Any) -> tuple[Mapping[str, Value], ...]:
    """`[each]` or `[[each]]`: the cells of the sweep, one study each; one empty cell without it.

    Args:
        each: a table of axes, whose product is taken, or a list of cells.
    """
    if isinstance(each, dict):
        for name, values in each.items():
            TrialConfig.setting(name, "[each]")
            if not isinstance(values, list) or not values:
                raise SpecError(f"[each] {name} = {values!r} is not a list of values")
        rows: Iterable[Any] = (
            dict(zip(each, combination, strict=True))
            for combination in itertools.product(*each.values())
        )
    elif isinstance(each, list):
        rows = each or [{}]
    else:
        raise SpecError(f"each = {each!r} is neither a table of axes nor a list of tables")
    cells: list[Mapping[str, Value]] = []
    for row in rows:
        if not isinstance(row, dict):
            raise SpecError(f"[[each]] holds {row!r}, which is not a table")
        cell = {
            name: TrialConfig.setting(name, "[[each]]").check(name, value)
            for name, value in row.items()
        }
        if cells and cell.keys() != cells[0].keys():
            raise SpecError(
                f"[[each]] {cell!r} does not set the same keys as {dict(cells[0])!r}; every "
                "entry must set the same ones"
            )
        if cell in cells:
            raise SpecError(f"[each] has {cell!r} twice")
        cells.append(cell)
    return tuple(cells)


def parse_tries(
    given: Any, cells: Sequence[Mapping[str, Value]], search: Mapping[str, Range]
) -> tuple[Try, ...]:
    """`[[try]]`: the known configurations, in their order.

    Args:
        given: a list of tables.
        cells: from `parse_each`; every configuration has to run in one of them.
        search: from `sweeps.space.parse_search`; what a configuration may set, and within what.
    """
    if not isinstance(given, list) or any(not isinstance(entry, dict) for entry in given):
        raise SpecError("try is a list of tables; write [[try]] before each")
    tries: list[Try] = []
    for position, entry in enumerate(given, start=1):
        label = entry.get("label", f"try {position}")
        where = f"[[try]] {label!r}"
        if not isinstance(label, str) or not label:
            raise SpecError(f"{where}: label is not a text")
        params: dict[str, Value] = {}
        for name, value in entry.items():
            if name in TRY_WORDS:
                continue
            if name not in search:
                raise SpecError(f"{where} has no key {name!r}; {nearest(name, search)}")
            params[name] = TrialConfig.setting(name, where).check(name, value)
            if not search[name].contains(params[name]):
                raise SpecError(
                    f"{where}: {name} = {value!r} is outside the search space; accepted: "
                    f"{search[name]}, or no known configuration at all (try=[])"
                )
        attempt = Try(label, params, _parse_when(where, entry.get("when", {}), cells))
        if not any(attempt.applies_to(cell) for cell in cells):
            raise SpecError(f"{where}: no study of [each] matches when = {entry['when']!r}")
        for cell in cells:
            if attempt.applies_to(cell) and label in (t.label for t in tries if t.applies_to(cell)):
                raise SpecError(f"{where} stands twice for the same study; give each a label")
        tries.append(attempt)
    return tuple(tries)


def _parse_when(
    where: str, given: Any, cells: Sequence[Mapping[str, Value]]
) -> dict[str, tuple[Value, ...]]:
    if not isinstance(given, dict):
        raise SpecError(f"{where}: when = {given!r} is not a table such as {{ norm = 'group' }}")
    when: dict[str, tuple[Value, ...]] = {}
    for name, value in given.items():
        if name not in cells[0]:
            raise SpecError(f"{where}: when has no key {name!r}; {nearest(name, cells[0])}")
        values = value if isinstance(value, list) else [value]
        when[name] = tuple(TrialConfig.setting(name, where).check(name, v) for v in values)
    return when


def parse_component(table: Mapping[str, Any], section: str, default: str) -> dict[str, Any]:
    """`[sampler]` or `[pruner]`: a class of Optuna's and its arguments, which Optuna checks.

    Args:
        table: what is given.
        section: which of the two.
        default: the class where none is named.
    """
    parsed: dict[str, Any] = {"type": default, **table}
    if not isinstance(parsed["type"], str):
        raise SpecError(f"[{section}] type = {parsed['type']!r} is not the name of a class")
    if section == "sampler":
        seed = parsed.setdefault("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise SpecError(f"[sampler] seed = {seed!r} is not a whole number from 0")
    return parsed


def parse_limits(table: Mapping[str, Any], section: str, kind: type) -> dict[str, Any]:
    """`[budget]` or `[workers]`, whose keys are the fields of a dataclass.

    Args:
        table: of the whole sweep.
        section: which of the two.
        kind: the dataclass.
    """
    accepted = [f.name for f in dataclasses.fields(kind)]
    limits = dict(table_at(table, section))
    for key, value in limits.items():
        if key not in accepted:
            raise SpecError(f"[{section}] has no key {key!r}; {nearest(key, accepted)}")
        limits[key] = _parse_limit(f"[{section}] {key}", key, value)
    return limits


def _parse_limit(where: str, key: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    most = f" to {MAX_COUNT}" if number and value > MAX_COUNT else ""
    if key == "keep_checkpoints":
        if value not in KEEP_CHECKPOINTS:
            accepted = " | ".join(map(repr, KEEP_CHECKPOINTS))
            raise SpecError(f"{where} = {value!r} is not accepted; accepted: {accepted}")
    elif key == "carry":
        if not number or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            raise SpecError(f"{where} = {value!r} is not a whole number from 0{most}")
    elif key == "hours":
        if not number or not 0 < value <= MAX_HOURS:
            most = f" to {MAX_HOURS:g}" if number and value > MAX_HOURS else ""
            raise SpecError(f"{where} = {value!r} is not a number above 0{most}")
        return float(value)
    elif not number or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
        raise SpecError(f"{where} = {value!r} is not a whole number from 1{most}")
    return value
