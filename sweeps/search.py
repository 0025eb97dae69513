"""From a spec to suggestions: distributions, sampler, pruner, and their seeds.

A suggestion depends on the spec's seed, the study and the trial's number (and on the finished
trials that the sampler learns from), not on which worker asked or how often it restarted:
every claim builds a fresh sampler with a seed of its own. Workers that share one sampler seed
would suggest the same parameters to each other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sweeps.config import TrialConfig, Value
from sweeps.errors import SpecError, first_line, nearest
from sweeps.space import Range
from sweeps.spec import SweepSpec

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

# GridSampler, BruteForceSampler and PartialFixedSampler end or wrap a study from within
# `tell`, which an exact budget does not allow; [each] enumerates instead.
SAMPLERS = ("TPESampler", "RandomSampler", "QMCSampler", "GPSampler")
PRUNERS = (
    "MedianPruner",
    "PercentilePruner",
    "SuccessiveHalvingPruner",
    "HyperbandPruner",
    "PatientPruner",
    "ThresholdPruner",
    "NopPruner",
    "WarmupHalvingPruner",
)


def distributions(space: Mapping[str, Range]) -> dict[str, BaseDistribution]:
    """Optuna's distribution of each searched parameter, by name, in the spec's order."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    settings = TrialConfig.settings()
    found: dict[str, BaseDistribution] = {}
    for name, r in space.items():
        if r.choices:
            found[name] = CategoricalDistribution(r.choices)
            continue
        assert r.low is not None
        assert r.high is not None
        if settings[name].kind is int:
            found[name] = IntDistribution(int(r.low), int(r.high), log=r.log, step=int(r.step or 1))
        else:
            found[name] = FloatDistribution(r.low, r.high, log=r.log, step=r.step)
    return found


def suggest(trial: Trial, space: Mapping[str, Range]) -> dict[str, Value]:
    """Ask for every searched parameter of a trial, all of them before its first report.

    A parameter that was suggested before, in an earlier attempt of the same trial, keeps its
    value.
    """
    params: dict[str, Value] = {}
    for name, distribution in distributions(space).items():
        params[name] = trial._suggest(name, distribution)
    return params


def draw(
    trial: Trial, space: Mapping[str, Range]
) -> tuple[dict[str, Value], dict[str, tuple[float, BaseDistribution]]]:
    """As `suggest`, but leave it to the caller to store what is new.

    A sampler draws one parameter after the other from one random state. Stored one by one, a
    worker killed between two of them would leave a trial whose next attempt draws the rest from
    a state that is behind. Nor is anything stored of what samplers tell each other of a suggestion
    that is under way: GPSampler would take what its last attempt left behind for another's.

    Returns:
        Every searched parameter; of those that the trial does not have yet, by name, the value in
        Optuna's internal representation and its distribution.
    """
    storage: Any = trial.storage
    kept: Any = _KeptBack(storage)
    trial.storage = trial.study._storage = kept
    try:
        return suggest(trial, space), kept.params
    finally:
        trial.storage = trial.study._storage = storage


class _KeptBack:
    """A storage that stores nothing of a trial, but keeps its parameters."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self.params: dict[str, tuple[float, BaseDistribution]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def set_trial_param(
        self, trial_id: int, name: str, value: float, distribution: BaseDistribution
    ) -> None:
        self.params[name] = (value, distribution)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        pass


def trial_seed(seed: int, study_name: str, number: int) -> int:
    """The sampler's seed for one trial: 32 bits of SHA-256 over its identity."""
    digest = hashlib.sha256(f"{seed}:{study_name}:{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def build_sampler(spec: SweepSpec, study_name: str, number: int) -> BaseSampler:
    """The sampler that suggests trial `number` of a study.

    Raises:
        SpecError: if `[sampler]` names no sampler that is offered, or unknown arguments.
    """
    import optuna

    # QMCSampler has one low-discrepancy sequence a study.
    drawn_by = 0 if spec.sampler["type"] == "QMCSampler" else number
    own = {"seed": trial_seed(spec.sampler["seed"], study_name, drawn_by)}
    built: BaseSampler = _build(optuna.samplers, "sampler", spec.sampler, SAMPLERS, own)
    if spec.sampler["type"] == "QMCSampler":
        _number_points(built, spec.search, number)
    return built


def _number_points(sampler: Any, space: Mapping[str, Range], number: int) -> None:
    """Let a QMCSampler give trial n the sequence's point n, in the whole search space.

    Optuna's counts points in the store, which skips one at each lost attempt and gives one to
    two workers that count at once; and it draws the first trials, and so all those that begin
    together, independently: with one seed, they would be the same.
    """
    searched = {n: d for n, d in distributions(space).items() if not d.single()}
    sampler.infer_relative_search_space = lambda study, trial: dict(searched)
    sampler._find_sample_id = lambda study, search_space: number


def build_pruner(spec: SweepSpec, cell: Mapping[str, Value]) -> BasePruner:
    """The pruner of the study of a cell.

    Raises:
        SpecError: if `[pruner]` names no pruner that is offered, or unknown arguments.
    """
    import optuna

    from sweeps import pruning

    given, kind = dict(spec.pruner), spec.pruner["type"]
    own: dict[str, Any] = {}
    if kind == "WarmupHalvingPruner":
        own["config"] = spec.lowest_config(cell)
        own["seeds"] = spec.budget.seeds
    if kind in ("SuccessiveHalvingPruner", "HyperbandPruner"):
        # Their "auto" is worked out by each process for itself and differs between workers.
        given.setdefault("min_resource", 1)
        if kind == "HyperbandPruner":
            config = spec.lowest_config(cell)
            given.setdefault("max_resource", config.epochs * spec.budget.seeds)
    if kind == "PatientPruner":
        own["wrapped_pruner"] = None
    module = pruning if kind == "WarmupHalvingPruner" else optuna.pruners
    built: BasePruner = _build(module, "pruner", given, PRUNERS, own)
    return built


def check(spec: SweepSpec) -> None:
    """Ask sampler and pruner once, so that a mistake in them shows before anything runs.

    Raises:
        SpecError: as `build_sampler` and `build_pruner` do, or if they fail when asked.
    """
    import optuna

    sampler, pruner = build_sampler(spec, spec.name, 0), build_pruner(spec, spec.cells[0])
    if "n_startup_trials" in _arguments(type(sampler)):
        # The first trials are drawn without the other arguments, which would fail the later ones.
        at_once = {**spec.sampler, "n_startup_trials": 1}
        sampler = build_sampler(dataclasses.replace(spec, sampler=at_once), spec.name, 0)
    study = optuna.create_study(sampler=sampler, pruner=pruner, direction="maximize")
    try:
        for _ in range(2):
            trial = study.ask()
            suggest(trial, spec.search)
            trial.report(0.5, 1)
            trial.should_prune()
            study.tell(trial, 0.5)
    except Exception as error:
        raise SpecError(
            f"[sampler] {_written(spec.sampler)} or [pruner] {_written(spec.pruner)} fails with "
            f"its arguments: {first_line(error)}"
        ) from error


def _build(
    module: Any,
    section: str,
    given: Mapping[str, Any],
    accepted: tuple[str, ...],
    own: Mapping[str, Any],
) -> Any:
    """An object of Optuna's, of what a file says (`given`) and what is not for it to say."""
    kind = given["type"]
    if kind not in accepted:
        raise SpecError(f"[{section}] type = {kind!r} is not offered; {nearest(kind, accepted)}")
    constructor = getattr(module, kind)
    known = {k: v for k, v in _arguments(constructor).items() if k not in own or k == "seed"}
    arguments = {k: v for k, v in given.items() if k != "type"}
    for name, value in arguments.items():
        if section == "sampler" and name == "seed":
            continue
        if name not in known:
            raise SpecError(f"[{section}] has no key {name!r}; {nearest(name, known)}")
        if not any(_is_of(value, word) for word in known[name]):
            words = " or ".join(_WORDS[word] for word in known[name])
            raise SpecError(f"[{section}] {name} = {value!r} is not {words}, as {kind} takes it")
    from optuna.exceptions import ExperimentalWarning

    try:
        with warnings.catch_warnings():
            # Every claim builds a sampler, and each would warn.
            warnings.simplefilter("ignore", ExperimentalWarning)
            return constructor(**{**arguments, **own})
    except (ImportError, OverflowError, TypeError, ValueError) as error:
        raise SpecError(
            f"[{section}] {_written(given)} refuses its arguments: {first_line(error)}"
        ) from error


_WORDS = {
    "bool": "true or false", "int": "a whole number", "float": "a finite number", "str": "a text",
}  # fmt: skip


def _arguments(constructor: Any) -> dict[str, list[str]]:
    """What a file may give a constructor: by name, the plain types that it is annotated with."""
    found = {}
    for name, parameter in inspect.signature(constructor.__init__).parameters.items():
        annotation = inspect.formatannotation(parameter.annotation).strip("'")
        words = [word for word in annotation.split(" | ") if word in _WORDS]
        if words:  # the rest are objects and functions of Python's
            found[name] = words
    return found


def _is_of(value: Any, word: str) -> bool:
    if word in ("bool", "str"):
        return isinstance(value, bool if word == "bool" else str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or (word == "float" and math.isfinite(value))


def _written(given: Mapping[str, Any]) -> str:
    """A sampler or a pruner as its section has it, without the seed."""
    arguments = [f"{k} = {v!r}" for k, v in given.items() if k not in ("type", "seed")]
    return f"{given['type']} ({', '.join(arguments)})" if arguments else str(given["type"])
