"""`SweepSpec`: what a sweep declares, read from TOML, checked before anything runs.

A file has `title`, `question`, `source`, and the tables

- `[train]`: settings that every trial shares (the fields of `TrialConfig`);
- `[each]`: axes that are enumerated, one Optuna study for each combination of their values;
  `[[each]]`, a list of combinations, where a product says too much;
- `[search]`: what the sampler suggests, in Optuna's words;
- `[[try]]`: known configurations that run first;
- `[sampler]`, `[pruner]`: a class of Optuna's by name (`type`) and its arguments;
- `[budget]`: how much may be spent;
- `[workers]`: what a worker process is given;
- `[quick]`: what `--quick` overrides in all of the above.

`extends = "NAME"`, a preset or a file, starts from that sweep's tables and overrides them as
`[quick]` does. Presets and users' files go through the same parser. A parsed spec is stored with
each study as JSON, so that a worker needs the store and nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.config import TrialConfig, Value, written
from sweeps.errors import SpecError, nearest
from sweeps.sections import (
    Budget,
    Try,
    WorkerShare,
    parse_component,
    parse_each,
    parse_limits,
    parse_train,
    parse_tries,
    table_at,
)
from sweeps.space import Range, parse_search

SECTIONS = ("train", "each", "search", "try", "sampler", "pruner", "budget", "workers", "quick")
TEXTS = ("title", "question", "source")

CONFIRMATION = "-confirm"
"""The sweep that confirms the best of another is called after it, with this behind."""

MAX_EDGES = 4096
"""Combinations of a search space's edges that are checked before anything runs."""


@dataclass(frozen=True)
class SweepSpec:
    """A checked sweep. Make one with `sweeps.specfiles.load`, `from_table` or `from_dict`.

    Attributes:
        confirms: the sweep whose configurations this one trains again with other seeds, or "". The
            trials of a confirmation (`sweeps.confirm`) are those that are enqueued, `seed` is a
            searched parameter of theirs, and their value is their accuracy on the test images.
    """

    name: str
    title: str
    question: str
    source: str
    train: Mapping[str, Value]
    cells: tuple[Mapping[str, Value], ...]
    search: Mapping[str, Range]
    tries: tuple[Try, ...]
    sampler: Mapping[str, Any]
    pruner: Mapping[str, Any]
    budget: Budget
    workers: WorkerShare
    confirms: str = ""

    def study_name(self, cell: Mapping[str, Value]) -> str:
        """The Optuna study of `cell`, such as `fixup-largebatch/global_batch_size=1024`."""
        if not cell:
            return self.name
        return f"{self.name}/{cell_name(cell)}"

    def config(self, cell: Mapping[str, Value], params: Mapping[str, Value]) -> TrialConfig:
        """The training that a trial with `params` in the study of `cell` is.

        Raises:
            SpecError: if the values contradict each other.
        """
        return TrialConfig.build({**self.train, **cell, **params})

    def lowest_params(self) -> dict[str, Value]:
        """A point of the search space: every parameter at its lowest."""
        return {name: min(r.ends(), key=_order) for name, r in self.search.items()}

    def lowest_config(self, cell: Mapping[str, Value]) -> TrialConfig:
        """A training in the study of `cell`, to ask for what all of them share."""
        return self.config(cell, self.lowest_params())

    def edges(self) -> Iterator[dict[str, Value]]:
        """Every combination of the searched parameters' choices and ends, `MAX_EDGES` at most."""
        combinations = itertools.product(*(r.ends() for r in self.search.values()))
        for values in itertools.islice(combinations, MAX_EDGES):
            yield dict(zip(self.search, values, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """The spec as plain JSON values; `from_dict` reads it back."""
        return {
            "name": self.name,
            "title": self.title,
            "question": self.question,
            "source": self.source,
            "train": dict(self.train),
            "each": [dict(cell) for cell in self.cells],
            "search": {name: space.as_dict() for name, space in self.search.items()},
            "try": [
                {"label": t.label, "when": {k: list(v) for k, v in t.when.items()}, **t.params}
                for t in self.tries
            ],
            "sampler": dict(self.sampler),
            "pruner": dict(self.pruner),
            "budget": {k: v for k, v in dataclasses.asdict(self.budget).items() if v is not None},
            "workers": dataclasses.asdict(self.workers),
            **({"confirms": self.confirms} if self.confirms else {}),
        }

    def as_toml(self) -> str:
        """The spec as a file that `sweeps.specfiles.load` reads back; the name is the file's."""
        import tomli_w

        table = self.as_dict()
        del table["name"]
        return tomli_w.dumps({k: v for k, v in table.items() if v not in ({}, [], [{}])})

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> SweepSpec:
        """Read back what `as_dict` gave.

        Its edges were checked when it was made, and workers and views read it again and again.

        Raises:
            SpecError: if another version of the program wrote what this one cannot read.
        """
        table = dict(stored)
        name, confirms = table.pop("name"), table.pop("confirms", "")
        if confirms and confirmed_by(name) != confirms:
            raise SpecError(f"{name} cannot confirm {confirms!r}; it is called after another sweep")
        return cls._parse(table, name, confirms)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, name: str) -> SweepSpec:
        """Check a parsed TOML table.

        Raises:
            SpecError: naming the first key that is wrong and what is accepted there.
        """
        if "confirms" in table:
            raise SpecError(
                f"{name}: confirms = {table['confirms']!r} is what sweep confirm writes, and no "
                f"key of a file; run sweep confirm {table['confirms']}"
            )
        spec = cls._parse(table, name)
        _check_cells(spec)
        return spec

    @classmethod
    def _parse(cls, table: Mapping[str, Any], name: str, confirms: str = "") -> SweepSpec:
        _check_name(name)
        for key in table:
            if key not in SECTIONS and key not in TEXTS:
                raise SpecError(
                    f"{name}: there is no key {key!r}; {nearest(key, [*SECTIONS, *TEXTS])}"
                )
        texts = {text: table.get(text, "") for text in TEXTS}
        for text, value in texts.items():
            if not isinstance(value, str):
                raise SpecError(f"{name}: {text} = {value!r} is not a text")
        train = parse_train(table_at(table, "train"))
        cells = parse_each(table.get("each", {}))
        search = parse_search(table_at(table, "search"), seeds=bool(confirms))
        _check_once(train, cells, search)
        tries = parse_tries(table.get("try", []), cells, search)
        return cls(
            name=name,
            train=train,
            cells=cells,
            search=search,
            tries=tries,
            sampler=parse_component(table_at(table, "sampler"), "sampler", "TPESampler"),
            pruner=parse_component(table_at(table, "pruner"), "pruner", "MedianPruner"),
            budget=Budget(**parse_limits(table, "budget", Budget)),
            workers=WorkerShare(**parse_limits(table, "workers", WorkerShare)),
            confirms=confirms,
            **texts,
        )


def cell_name(cell: Mapping[str, Value]) -> str:
    """A cell as studies are named after it, such as `global_batch_size=1024`."""
    return ",".join(f"{name}={written(value)}" for name, value in cell.items())


def within_sweep(study: str) -> str:
    """A study's name without its sweep's, which has no slash; of a sweep's only study, its name."""
    return study.partition("/")[2] or study


def confirmed_by(name: str) -> str:
    """The sweep that a confirmation of this name confirms.

    Raises:
        SpecError: if it is no name of a confirmation.
    """
    confirmed = name.removesuffix(CONFIRMATION)
    if confirmed == name or not confirmed:
        raise SpecError(
            f"{name!r} cannot be a confirmation: it is called after the sweep that it confirms, "
            f"NAME{CONFIRMATION}"
        )
    return confirmed


def refuse_confirmations_name(name: str) -> None:
    """Refuse to call a sweep of a user's own as `sweep confirm` calls what it writes.

    Beside a sweep of the name without the ending it would be taken for its confirmation, and keep
    that from being made.

    Raises:
        SpecError: if it is such a name.
    """
    if name.endswith(CONFIRMATION):
        raise SpecError(
            f"a sweep cannot be called {name!r}: names that end in {CONFIRMATION} are those of "
            "what sweep confirm writes; choose another with --name"
        )


def _check_name(name: str) -> None:
    if not name or any(not (c.isalnum() or c in "-_.") for c in name):
        raise SpecError(
            f"a sweep cannot be called {name!r}; accepted: letters, digits, '-', '_' and '.'"
        )


def _check_once(
    train: Mapping[str, Value],
    cells: Sequence[Mapping[str, Value]],
    search: Mapping[str, Range],
) -> None:
    places = {"[train]": train, "[each]": cells[0], "[search]": search}
    for (one, first), (other, second) in itertools.combinations(places.items(), 2):
        for name in first:
            if name in second:
                raise SpecError(f"{name} stands in {one} and in {other}; keep one of them")


def _check_cells(spec: SweepSpec) -> None:
    """Build every config at the edges of the space, so that contradictions show at once."""
    for cell in spec.cells:
        tried = [t for t in spec.tries if t.applies_to(cell)]
        if not spec.search and spec.budget.trials > 1:
            raise SpecError(
                f"nothing is searched, so the {spec.budget.trials} trials of a study would all be "
                "the same; fill [search], or set [budget] trials = 1 (and seeds for repeats)"
            )
        if len(tried) > spec.budget.trials:
            raise SpecError(
                f"[budget] trials = {spec.budget.trials} is fewer than the {len(tried)} "
                f"[[try]] entries of {spec.study_name(cell)}"
            )
        lowest = spec.lowest_params()
        for params in (*spec.edges(), *({**lowest, **t.params} for t in tried)):
            try:
                spec.config(cell, params)
            except SpecError as error:
                names = [name for name in params if name in str(error)]
                where = ", ".join(f"{name} = {written(params[name])}" for name in names)
                reached = f" ([search] or [[try]] reaches {where})" if where else ""
                raise SpecError(f"{error}{reached}") from error


def _order(value: Value) -> tuple[bool, Value]:
    return (isinstance(value, str), value)
