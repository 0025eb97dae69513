"""What may change between two starts of a sweep, and what a change means.

The trials that a study holds are compared with each other and learnt from, so what a trial *is*
may not change: another data set, network or number of seeds needs another name. What is asked
of the sweep may: its budget, its known configurations, where it searches and how.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sweeps.config import written
from sweeps.errors import SpecError
from sweeps.spec import TEXTS, SweepSpec, cell_name


@dataclass(frozen=True)
class Edit:
    """One difference between the stored spec and the one that is asked for.

    Attributes:
        key: dotted, as `--set` takes it.
        before, after: the values; None where there is none.
        meaning: what follows from it, in words.
    """

    key: str
    before: Any
    after: Any
    meaning: str

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} → {_shown(self.after)} ({self.meaning})"


_MEANINGS = {
    "budget.trials": "trials of each study from now on",
    "budget.hours": "wall-clock budget from now on",
    "budget.epochs_total": "epoch budget from now on",
    "budget.carry": "for trials that begin from now on",
    "budget.keep_checkpoints": "for trials that finish from now on",
    "workers.threads": "for workers that start from now on; on a CPU they round differently",
}


def edits(stored: SweepSpec, wanted: SweepSpec) -> list[Edit]:
    """List what a new spec changes of a stored one, texts left out.

    Raises:
        SpecError: if it changes what a trial is, naming every such difference.
    """
    found, refused = _compare(stored, wanted)
    if refused:
        shown = "; ".join(
            f"{key}: stored {_value(a)}, now {_value(b)}" for key, (a, b) in refused.items()
        )
        raise SpecError(
            f"{wanted.name} is in the store with other settings ({shown}); these decide what a "
            "trial is, so repeat the options it was begun with, or begin anew under another "
            "--name"
        )
    return found


def decisive_changes(stored: SweepSpec, wanted: SweepSpec) -> dict[str, tuple[Any, Any]]:
    """What differs between two specs of one sweep and decides what its trials are.

    Returns:
        Dotted key → (stored value, wanted value).
    """
    return _compare(stored, wanted)[1]


def differences(stored: SweepSpec, wanted: SweepSpec) -> dict[str, tuple[Any, Any]]:
    """What differs between two specs, as dotted key → (stored value, wanted value)."""
    before, after = (dict(_flatten(spec.as_dict())) for spec in (stored, wanted))
    return {
        key: (before.get(key), after.get(key))
        for key in [*before, *(k for k in after if k not in before)]
        if before.get(key) != after.get(key)
    }


def _compare(stored: SweepSpec, wanted: SweepSpec) -> tuple[list[Edit], dict[str, tuple[Any, Any]]]:
    found: list[Edit] = []
    refused: dict[str, tuple[Any, Any]] = {}
    for key, (before, after) in differences(stored, wanted).items():
        section = key.partition(".")[0]
        if key in TEXTS or key == "try" or section == "search":
            continue
        if key in _MEANINGS:
            found.append(Edit(key, before, after, _MEANINGS[key]))
        elif section == "sampler":
            meaning = "suggests from now on; what the seed alone gives from the start differs"
            found.append(Edit(key, before, after, meaning))
        elif section == "pruner":
            found.append(Edit(key, before, after, "prunes from now on"))
        else:
            refused[key] = (before, after)
    found += _search_edits(stored, wanted, refused)
    found += _try_edits(stored, wanted, refused)
    return found, refused


def _search_edits(
    stored: SweepSpec, wanted: SweepSpec, refused: dict[str, tuple[Any, Any]]
) -> list[Edit]:
    if stored.search == wanted.search:
        return []
    from optuna.distributions import check_distribution_compatibility

    from sweeps.search import distributions

    found = []
    for name in {**stored.search, **wanted.search}:
        before, after = stored.search.get(name), wanted.search.get(name)
        if before == after:
            continue
        shown = tuple(None if r is None else str(r) for r in (before, after))
        if before is None or after is None:
            refused[f"search.{name}"] = (shown[0], shown[1])
            continue
        old, new = (distributions({name: r})[name] for r in (before, after))
        try:
            check_distribution_compatibility(old, new)
        except ValueError:  # other choices, or log and not: Optuna compares no such trials
            refused[f"search.{name}"] = (shown[0], shown[1])
            continue
        meaning = "suggested from now on; trials so far stay"
        found.append(Edit(f"search.{name}", str(before), str(after), meaning))
    return found


def _try_edits(
    stored: SweepSpec, wanted: SweepSpec, refused: dict[str, tuple[Any, Any]]
) -> list[Edit]:
    found = []
    for cell in stored.cells if stored.cells == wanted.cells else ():
        before = {t.label: t.params for t in stored.tries if t.applies_to(cell)}
        after = {t.label: t.params for t in wanted.tries if t.applies_to(cell)}
        where = cell_name(cell)
        for label in {**before, **after}:
            key = f"[[try]] {label}" + (f" of {where}" if where else "")
            if label not in before:
                found.append(Edit(key, None, after[label], "queued next"))
            elif label not in after:
                found.append(Edit(key, before[label], None, "its trial stays"))
            elif before[label] != after[label]:
                refused[key] = (before[label], after[label])
    return found


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _value(value: Any) -> str:
    return "left out" if value is None else repr(value)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} = {_shown(part)}" for name, part in value.items())
    return written(value) if isinstance(value, bool | int | float | str) else str(value)
