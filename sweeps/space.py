"""The search space of a sweep: what may be suggested for each parameter, in Optuna's words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.config import Setting, TrialConfig, Value, written
from sweeps.errors import SpecError, nearest


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

    def end_near(self, value: Value, share: float) -> float | int | None:
        """The end of a range that a value is near.

        Args:
            value: of a trial, which may have been drawn from another range before an edit.
            share: how near: this part of the range, where it is `log` of its logarithm.

        Returns:
            `low` or `high`; None far from both or beyond them, and of choices.
        """
        if self.low is None or self.high is None or isinstance(value, str | bool):
            return None
        if self.low == self.high or not self.low <= value <= self.high:
            return None
        low, at, high = (
            math.log(x) if self.log else float(x) for x in (self.low, value, self.high)
        )
        place = (at - low) / (high - low)
        if place <= share:
            return self.low
        return self.high if place >= 1 - share else None

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


def parse_search(table: Mapping[str, Any], *, seeds: bool = False) -> dict[str, Range]:
    """`[search]`: a range for each parameter, by name.

    Args:
        table: what is given.
        seeds: whether `seed` may be searched, as a confirmation does.

    Raises:
        SpecError: naming the first key that is wrong and what is accepted there.
    """
    space: dict[str, Range] = {}
    for name, given in table.items():
        setting = TrialConfig.setting(name, "[search]")
        if not setting.searchable and not (seeds and name == "seed"):
            raise SpecError(
                f"[search] {name}: it has to be the same in all trials of a study; put it in "
                "[train] or [each]"
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
        if not math.isfinite((high - low) / step):
            raise SpecError(f"{where}: step = {step:g} is too short to count in {high - low:g}")
        step = setting.kind(step)
        # Optuna lowers `high` to the last step within the range.
        high = low + math.floor((high - low) / step + 1e-8) * step
    if log and low <= 0:
        raise SpecError(f"{where}: low = {low:g} must be above 0 where log = true")
    return Range(low=low, high=high, step=step, log=log)
