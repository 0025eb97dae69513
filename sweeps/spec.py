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

import copy
import dataclasses
import itertools
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sweeps.config import Setting, TrialConfig, Value, written
from sweeps.errors import SpecError, nearest

SECTIONS = ("train", "each", "search", "try", "sampler", "pruner", "budget", "workers", "quick")
TEXTS = ("title", "question", "source")
TRY_WORDS = ("label", "when")

CONFIRMATION = "-confirm"
"""The sweep that confirms the best of another is called after it, with this behind."""

KEEP_CHECKPOINTS = ("best", "all", "none")

MAX_COUNT = 10**12
MAX_HOURS = 10.0**6

MAX_EDGES = 4096
"""Combinations of a search space's edges that are checked before anything runs."""


@dataclass(frozen=True)
class Range:
    """What may be suggested for one parameter, in Optuna's words.

    Either `choices`, or `low` and `high` with an optional `step`, or `log`.
    """

    low: float | int | None = None
    high: float | int | None = None
    step: float | int | None = None
    log: bool = False
    choices: tuple[Value, ...] = ()

    def contains(self, value: Value) -> bool:
        """Whether the sampler could suggest `value`."""
        if self.choices:
            return any(value == c and type(value) is type(c) for c in self.choices)
        if isinstance(value, str | bool) or self.low is None or self.high is None:
            return False
        if not self.low <= value <= self.high:
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-8)

    def values(self) -> Sequence[Value]:
        """Its choices, every whole number of it, or, of a continuous range, its two ends."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return range(self.low, self.high + 1, int(self.step or 1))
        return self.ends()

    def ends(self) -> Sequence[Value]:
        """Its choices, or its lowest and highest value."""
        if self.choices:
            return self.choices
        assert self.low is not None
        assert self.high is not None
        return (self.low, self.high)

    def __str__(self) -> str:
        if self.choices:
            return "one of " + ", ".join(map(written, self.choices))
        step = f" in steps of {self.step:g}" if self.step is not None else ""
        return f"{self.low:g} to {self.high:g}{step}{' (log)' if self.log else ''}"

    def as_dict(self) -> dict[str, Any]:
        """The keys that were given, as a TOML table would hold them."""
        if self.choices:
            return {"choices": list(self.choices)}
        table: dict[str, Any] = {"low": self.low, "high": self.high}
        if self.step is not None:
            table["step"] = self.step
        if self.log:
            table["log"] = True
        return table


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


def cell_name(cell: Mapping[str, Value]) -> str:
    """A cell as studies are named after it, such as `global_batch_size=1024`."""
    return ",".join(f"{name}={written(value)}" for name, value in cell.items())


@dataclass(frozen=True)
class SweepSpec:
    """A checked sweep. Make one with `load`, `from_table` or `from_dict`.

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
        return TrialConfig.build({**self.train, **cell, **params}, where="[train]")

    def lowest_params(self) -> dict[str, Value]:
        """A point of the search space: every parameter at its lowest."""
        return {name: min(r.ends(), key=_order) for name, r in self.search.items()}

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
        """The spec as a file that `load` reads back; the name is the file's."""
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
        train = _parse_train(_table(table, "train"))
        cells = _parse_each(table.get("each", {}))
        search = _parse_search(_table(table, "search"), seeds=bool(confirms))
        _check_once(train, cells, search)
        tries = _parse_tries(table.get("try", []), cells, search)
        return cls(
            name=name,
            train=train,
            cells=cells,
            search=search,
            tries=tries,
            sampler=_parse_component(_table(table, "sampler"), "sampler", "TPESampler"),
            pruner=_parse_component(_table(table, "pruner"), "pruner", "MedianPruner"),
            budget=Budget(**_parse_limits(table, "budget", Budget)),
            workers=WorkerShare(**_parse_limits(table, "workers", WorkerShare)),
            confirms=confirms,
            **texts,
        )


def load(
    name: str, *, quick: bool = False, overrides: Sequence[str] = (), rename: str | None = None
) -> SweepSpec:
    """Read a preset by its name or a user's file by its path.

    Args:
        name: a preset's name, or a path that ends in `.toml`.
        quick: apply the `[quick]` table; the sweep is then called `NAME-quick`.
        overrides: `key=value` texts (`--set`), applied last.
        rename: call the sweep this instead.

    Raises:
        SpecError: if there is no such sweep, or anything in it is wrong.
    """
    table, found = read_table(name)
    if quick:
        overlay = table.get("quick")
        if not isinstance(overlay, dict):
            raise SpecError(f"{found} has no [quick] table, so --quick has no meaning for it")
        for key in overlay:
            if key not in (*SECTIONS, *TEXTS) or key == "quick":
                accepted = [section for section in (*SECTIONS, *TEXTS) if section != "quick"]
                raise SpecError(f"[quick] has no key {key!r}; {nearest(key, accepted)}")
        table = _overlay(table, overlay)
        found += "-quick"
    elif "quick" in table:
        # A mistake in it shows now, not when somebody is in a hurry.
        load(name, quick=True)
    table.pop("quick", None)
    return _overridden(table, overrides, rename or found)


def changed(spec: SweepSpec, overrides: Sequence[str] = (), rename: str | None = None) -> SweepSpec:
    """A spec that a store has, with other values.

    Args:
        spec: of the stored sweep.
        overrides: as of `load`.
        rename: call the sweep this instead.

    Raises:
        SpecError: if an override is wrong, or it is a confirmation, which nobody writes.
    """
    table = copy.deepcopy(spec.as_dict())
    name = table.pop("name")
    return _overridden(table, overrides, rename or name)


def _overridden(table: dict[str, Any], overrides: Sequence[str], name: str) -> SweepSpec:
    for text in overrides:
        _override(table, text)
    if any(text.lstrip().startswith("each") for text in overrides):
        _drop_tries_without_study(table)
    return SweepSpec.from_table(table, name=name)


def read_table(name: str) -> tuple[dict[str, Any], str]:
    """Parse a preset or a file and what it extends, unchecked; return it and the sweep's name.

    Raises:
        SpecError: if one of them does not exist or is not TOML, or they extend each other.
    """
    table, found = _read_one(name)
    read = [name]
    while "extends" in table:
        base = table.pop("extends")
        if not isinstance(base, str):
            raise SpecError(f"extends = {base!r} is not the name of a preset or a file")
        if base.endswith(".toml"):
            base = str(Path(read[-1]).parent / base)
        if base in read:
            raise SpecError(f"{' extends '.join([*read, base])}: a sweep cannot extend itself")
        read.append(base)
        table = _overlay(_without_moved(_read_one(base)[0], table), table)
    return table, found


def written_alone(name: str) -> str | None:
    """The text of a preset or a file that says everything itself; None if it extends another.

    None too if there is none of this name.
    """
    if not name.endswith(".toml") and name not in presets():
        return None
    text, _ = _read_text(name)
    return None if "extends" in tomllib.loads(text) else text


def _read_one(name: str) -> tuple[dict[str, Any], str]:
    text, found = _read_text(name)
    try:
        return tomllib.loads(text), found
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{name} is not TOML: {error}") from None


def _read_text(name: str) -> tuple[str, str]:
    if name.endswith(".toml"):
        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise SpecError(f"cannot read {name}: {reason}") from None
        found = path.stem
    else:
        if name not in presets():
            hint = nearest(name, presets())
            raise SpecError(
                f"there is no preset {name!r}; {hint}; a file of your own ends in .toml"
            )
        text = (resources.files("sweeps.presets") / f"{name}.toml").read_text(encoding="utf-8")
        found = name
    return text, found


def presets() -> list[str]:
    """The names of the sweeps that ship with the package, sorted."""
    files = resources.files("sweeps.presets").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


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


def differences(stored: SweepSpec, wanted: SweepSpec) -> dict[str, tuple[Any, Any]]:
    """What differs between two specs, as dotted key → (stored value, wanted value)."""
    before, after = (dict(_flatten(spec.as_dict())) for spec in (stored, wanted))
    return {
        key: (before.get(key), after.get(key))
        for key in [*before, *(k for k in after if k not in before)]
        if before.get(key) != after.get(key)
    }


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _check_name(name: str) -> None:
    if not name or any(not (c.isalnum() or c in "-_.") for c in name):
        raise SpecError(
            f"a sweep cannot be called {name!r}; accepted: letters, digits, '-', '_' and '.'"
        )


def _table(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise SpecError(f"{key} = {value!r} is not a table; write [{key}] and its keys below it")
    return value


def _parse_train(table: Mapping[str, Any]) -> dict[str, Value]:
    return {name: _known(name, "[train]").check(name, value) for name, value in table.items()}


def _known(name: str, where: str) -> Setting:
    settings = TrialConfig.settings()
    if name not in settings:
        raise SpecError(f"{where} has no key {name!r}; {nearest(name, settings)}")
    return settings[name]


def _parse_each(each: Any) -> tuple[Mapping[str, Value], ...]:
    if isinstance(each, dict):
        for name, values in each.items():
            _known(name, "[each]")
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
        cell = {name: _known(name, "[[each]]").check(name, value) for name, value in row.items()}
        if cells and cell.keys() != cells[0].keys():
            raise SpecError(
                f"[[each]] {cell!r} does not set the same keys as {dict(cells[0])!r}; every "
                "entry must set the same ones"
            )
        if cell in cells:
            raise SpecError(f"[each] has {cell!r} twice")
        cells.append(cell)
    return tuple(cells)


def _parse_search(table: Mapping[str, Any], *, seeds: bool = False) -> dict[str, Range]:
    space: dict[str, Range] = {}
    for name, given in table.items():
        setting = _known(name, "[search]")
        if not setting.searchable and not (seeds and name == "seed"):
            raise SpecError(
                f"[search] {name}: it decides how trials are measured, so it cannot differ "
                "between the trials of a study; put it in [train] or [each]"
            )
        if not isinstance(given, dict):
            raise SpecError(
                f"[search] {name} = {given!r} is not a table; write {{ low = …, high = … }} "
                "or { choices = […] }"
            )
        space[name] = _parse_range(name, setting, given)
    return space


def _parse_range(name: str, setting: Setting, given: Mapping[str, Any]) -> Range:
    where = f"[search] {name}"
    accepted = ("low", "high", "step", "log", "choices")
    for key in given:
        if key not in accepted:
            raise SpecError(f"{where} has no key {key!r}; {nearest(key, accepted)}")
    if "choices" in given:
        if len(given) > 1:
            raise SpecError(f"{where}: choices stand alone, without low, high, step or log")
        choices = given["choices"]
        if not isinstance(choices, list) or not choices:
            raise SpecError(f"{where}: choices = {choices!r} is not a list of values")
        checked = tuple(setting.check(name, choice) for choice in choices)
        if len(set(checked)) < len(checked):
            raise SpecError(f"{where}: choices = {choices!r} has a value twice")
        return Range(choices=checked)
    if setting.kind is str:
        raise SpecError(f"{where} is a name, so it takes choices = […]")
    if setting.kind is bool:
        raise SpecError(f"{where} is true or false, so it takes choices = [true, false]")
    missing = [key for key in ("low", "high") if key not in given]
    if missing:
        raise SpecError(f"{where} lacks {' and '.join(missing)} (or choices)")
    low, high = (setting.check(f"{where}: {key}", given[key]) for key in ("low", "high"))
    if isinstance(low, str) or isinstance(high, str):
        raise SpecError(f"{where}: {setting.word!r} is no number; put it among choices = […]")
    if low >= high:
        raise SpecError(f"{where}: low = {low:g} is not below high = {high:g}")
    log, step = given.get("log", False), given.get("step")
    if not isinstance(log, bool):
        raise SpecError(f"{where}: log = {log!r} is not true or false")
    if step is not None:
        if log:
            raise SpecError(f"{where}: log and step exclude each other")
        if isinstance(step, bool) or not isinstance(step, int | float) or not step > 0:
            raise SpecError(f"{where}: step = {step!r} is not a number above 0")
        if step > high - low:
            raise SpecError(f"{where}: step = {step:g} is longer than high - low = {high - low:g}")
        if setting.kind is int and step != int(step):
            raise SpecError(f"{where}: step = {step:g} is not a whole number")
        # Optuna lowers `high` to the last step within the range.
        high = low + math.floor((high - low) / step + 1e-8) * step
        step = setting.kind(step)
    if log and low <= 0:
        raise SpecError(f"{where}: low = {low:g} must be above 0 where log = true")
    return Range(low=low, high=high, step=step, log=log)


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


def _parse_tries(
    given: Any, cells: Sequence[Mapping[str, Value]], search: Mapping[str, Range]
) -> tuple[Try, ...]:
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
            params[name] = _known(name, where).check(name, value)
            if not search[name].contains(params[name]):
                raise SpecError(
                    f"{where}: {name} = {value!r} is outside the search space; accepted: "
                    f"{search[name]}"
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
        when[name] = tuple(_known(name, where).check(name, v) for v in values)
    return when


def _parse_component(table: Mapping[str, Any], section: str, default: str) -> dict[str, Any]:
    parsed: dict[str, Any] = {"type": default, **table}
    if not isinstance(parsed["type"], str):
        raise SpecError(f"[{section}] type = {parsed['type']!r} is not the name of a class")
    if section == "sampler":
        seed = parsed.setdefault("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise SpecError(f"[sampler] seed = {seed!r} is not a whole number from 0")
    return parsed


def _parse_limits(table: Mapping[str, Any], section: str, kind: type) -> dict[str, Any]:
    """A section whose keys are the fields of a dataclass."""
    accepted = [f.name for f in dataclasses.fields(kind)]
    limits = dict(_table(table, section))
    for key, value in limits.items():
        if key not in accepted:
            raise SpecError(f"[{section}] has no key {key!r}; {nearest(key, accepted)}")
        limits[key] = _parse_limit(f"[{section}] {key}", key, value)
    return limits


def _parse_limit(where: str, key: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "keep_checkpoints":
        if value not in KEEP_CHECKPOINTS:
            accepted = " | ".join(map(repr, KEEP_CHECKPOINTS))
            raise SpecError(f"{where} = {value!r} is not accepted; accepted: {accepted}")
    elif key == "carry":
        if not number or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            raise SpecError(f"{where} = {value!r} is not a whole number from 0")
    elif key == "hours":
        if not number or not 0 < value <= MAX_HOURS:
            raise SpecError(f"{where} = {value!r} is not a number above 0")
        return float(value)
    elif not number or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
        raise SpecError(f"{where} = {value!r} is not a whole number from 1")
    return value


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


def _overlay(table: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `overlay` over a table.

    Settings, budgets and arguments are replaced key by key, ranges of the search whole, and so
    are `each`, `try`, and a sampler or pruner whose type changes.
    """
    merged = copy.deepcopy(dict(table))
    for section, value in overlay.items():
        if section == "quick" and isinstance(merged.get(section), dict) and isinstance(value, dict):
            merged[section] = _overlay(merged[section], value)
            continue
        whole = section in ("each", "try") or not isinstance(value, dict)
        base = merged.get(section)
        if (
            whole
            or not isinstance(base, dict)
            or (section in ("sampler", "pruner") and "type" in value)
        ):
            merged[section] = copy.deepcopy(value)
        else:
            base.update(copy.deepcopy(value))
    return merged


def _without_moved(base: dict[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of `base` the settings that `table` has in another section of its own."""
    places = {section: _names_in(table.get(section)) for section in ("train", "each", "search")}
    left = dict(base)
    for part in (left, left["quick"] if isinstance(left.get("quick"), dict) else {}):
        for section in ("train", "search"):
            if isinstance(part.get(section), dict):
                moved = set().union(*(names for s, names in places.items() if s != section))
                part[section] = {k: v for k, v in part[section].items() if k not in moved}
    return left


def _names_in(section: Any) -> set[str]:
    if isinstance(section, dict):
        return set(section)
    rows = section if isinstance(section, list) else []
    return {name for row in rows if isinstance(row, dict) for name in row}


def _override(table: dict[str, Any], text: str) -> None:
    """Apply one `key=value` of `--set`."""
    key, equals, written = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise SpecError(f"--set {text!r} is not of the form key=value")
    try:
        value = tomllib.loads(f"value = {written.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = written.strip()
    parts = key.split(".")
    settings = TrialConfig.settings()
    budget = [f.name for f in dataclasses.fields(Budget)]
    if len(parts) == 1 and parts[0] not in (*SECTIONS, *TEXTS):
        if parts[0] in budget:
            parts = ["budget", *parts]
        elif parts[0] in settings:
            parts = ["train", *parts]
            _refuse_enumerated(table, key)
        else:
            hint = nearest(key, [*settings, *budget])
            raise SpecError(f"--set {text!r}: there is no key {key!r}; {hint}")
    if parts[0] not in (*SECTIONS, *TEXTS) or parts[0] == "quick":
        accepted = [s for s in (*SECTIONS, *TEXTS) if s != "quick"]
        raise SpecError(
            f"--set {text!r}: there is no section {parts[0]!r}; {nearest(parts[0], accepted)}"
        )
    node = table
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise SpecError(f"--set {text!r}: {part!r} is not a table here")
    node[parts[-1]] = value


def _drop_tries_without_study(table: dict[str, Any]) -> None:
    """Leave out the tries of studies that `--set each…` took away."""
    cells = _parse_each(table.get("each", {}))

    def applies(entry: Any) -> bool:
        when = entry.get("when", {}) if isinstance(entry, dict) else {}
        if not isinstance(when, dict) or any(name not in cells[0] for name in when):
            return True
        wanted = {k: v if isinstance(v, list) else [v] for k, v in when.items()}
        return any(all(cell[k] in values for k, values in wanted.items()) for cell in cells)

    if isinstance(table.get("try"), list):
        table["try"] = [entry for entry in table["try"] if applies(entry)]


def _refuse_enumerated(table: Mapping[str, Any], key: str) -> None:
    if key in _names_in(table.get("each")):
        raise SpecError(f"{key} is enumerated by [each]; write --set each.{key}=[…]")
    if key in _names_in(table.get("search")):
        raise SpecError(
            f"{key} is searched; to fix it write --set 'search.{key}={{ choices = [VALUE] }}'"
        )
