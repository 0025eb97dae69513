"""Where a spec comes from: a preset or a user's file, with what `extends`, `--quick`, `--set` say.

All of it happens to TOML tables that nobody has checked yet; `SweepSpec.from_table` then reads the
outcome as if it had been written so.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sweeps.config import TrialConfig
from sweeps.errors import SpecError, first_line, nearest
from sweeps.sections import Budget, parse_each
from sweeps.spec import SECTIONS, TEXTS, SweepSpec, refuse_confirmations_name


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
        SpecError: if there is no such sweep, or anything in it is wrong, or it is called as a
            confirmation is.
    """
    table, found, depths = _read_all(name)
    fewer = _enumerates_above_tries(depths, quick=quick)
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
    spec = _overridden(table, overrides, found if rename is None else rename, fewer=fewer)
    refuse_confirmations_name(spec.name)
    return spec


def changed(spec: SweepSpec, overrides: Sequence[str] = (), rename: str | None = None) -> SweepSpec:
    """A spec that a store has, with other values.

    Args:
        spec: of the stored sweep.
        overrides: as of `load`.
        rename: call the sweep this instead.

    Raises:
        SpecError: if an override is wrong, or it is a confirmation, which nobody writes, or is
            to be called as one.
    """
    table = copy.deepcopy(spec.as_dict())
    name = table.pop("name")
    if rename is None:
        return _overridden(table, overrides, name)
    renamed = _overridden(table, overrides, rename)
    refuse_confirmations_name(renamed.name)
    return renamed


def read_table(name: str) -> tuple[dict[str, Any], str]:
    """Parse a preset or a file and what it extends, unchecked; return it and the sweep's name.

    Raises:
        SpecError: if one of them does not exist or is not TOML, or they extend each other.
    """
    table, found, _ = _read_all(name)
    return table, found


def written_alone(name: str) -> str | None:
    """The text of a preset or a file that says everything itself; None if it extends another.

    None too if there is none of this name.
    """
    if not name.endswith(".toml") and name not in presets():
        return None
    text, _ = _read_text(name)
    return None if "extends" in tomllib.loads(text) else text


def presets() -> list[str]:
    """The names of the sweeps that ship with the package, sorted."""
    files = resources.files("sweeps.presets").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def _read_all(name: str) -> tuple[dict[str, Any], str, dict[str, int]]:
    """What `read_table` gives, and by how many `extends` each of some parts is away."""
    table, found = _read_one(name)
    read, places = [name], {_place(name)}
    depths: dict[str, int] = {}
    _note_depths(table, 0, depths)
    while "extends" in table:
        base = table.pop("extends")
        if not isinstance(base, str):
            raise SpecError(f"extends = {base!r} is not the name of a preset or a file")
        if base.endswith(".toml"):
            base = str(Path(read[-1]).parent / base)
        extended, _ = _read_one(base)
        read.append(base)
        if _place(base) in places:
            raise SpecError(f"{' extends '.join(read)}: a sweep cannot extend itself")
        places.add(_place(base))
        _note_depths(extended, len(places) - 1, depths)
        table = _overlay(_without_moved(extended, table), table)
    return table, found, depths


def _note_depths(table: Mapping[str, Any], depth: int, depths: dict[str, int]) -> None:
    quick = table.get("quick")
    for part in ("each", "try"):
        if part in table:
            depths.setdefault(part, depth)
        if isinstance(quick, dict) and part in quick:
            depths.setdefault(f"quick.{part}", depth)


def _enumerates_above_tries(depths: Mapping[str, int], *, quick: bool) -> bool:
    """Whether `each` overrides one that the tries were written for."""
    each, tries = (f"quick.{p}" if quick and f"quick.{p}" in depths else p for p in ("each", "try"))
    if each not in depths or tries not in depths:
        return False
    return depths[each] < depths[tries] or (each != "each" and tries == "try")


def _overridden(
    table: dict[str, Any], overrides: Sequence[str], name: str, *, fewer: bool = False
) -> SweepSpec:
    """Apply `--set`; `fewer` if the table itself may enumerate less than its tries are for."""
    for text in overrides:
        _override(table, text)
    if fewer or any(text.lstrip().startswith("each") for text in overrides):
        _drop_tries_without_study(table)
    return SweepSpec.from_table(table, name=name)


def _place(name: str) -> str:
    """The file of a name, by whatever way it was named; a preset's own name."""
    return os.path.realpath(name) if name.endswith(".toml") else name


def _read_one(name: str) -> tuple[dict[str, Any], str]:
    text, found = _read_text(name)
    try:
        return tomllib.loads(text), found
    except RecursionError:
        raise SpecError(f"{name} nests its tables or lists too deeply to be read") from None
    except ValueError as error:  # beside what is not TOML, numbers of thousands of digits
        raise SpecError(f"{name} is not TOML: {first_line(error)}") from None


def _read_text(name: str) -> tuple[str, str]:
    if name.endswith(".toml"):
        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise SpecError(f"cannot read {name}: it is not UTF-8 text") from None
        except (OSError, ValueError) as error:  # ValueError: no path has a null byte
            reason = getattr(error, "strerror", None) or error
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
        read = tomllib.loads(f"value = {written.strip()}")
        value = read["value"] if len(read) == 1 else written.strip()
    except (ValueError, RecursionError):
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
            hint = nearest(key, [*settings, *budget, "workers.threads"])
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
    """Leave out the tries of studies that another `each` took away."""
    cells = parse_each(table.get("each", {}))

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
