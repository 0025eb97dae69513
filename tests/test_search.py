"""Suggestions: Optuna's own, seeded by the trial and not by the worker."""

import math
import warnings
from typing import Any

import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from sweeps import search
from sweeps.errors import SpecError
from sweeps.spec import SweepSpec


def spec(**changes: Any) -> SweepSpec:
    table: dict[str, Any] = {
        "train": {"dataset": "digits", "num_groups": 2},
        "search": {
            "peak_lr": {"low": 0.01, "high": 1.0, "log": True},
            "warmup_epochs": {"low": 0.0, "high": 6.0, "step": 2.0},
            "plateau_patience": {"low": 1, "high": 9},
            "clip_grad_norm": {"choices": ["off", 1.0]},
        },
    }
    return SweepSpec.from_table({**table, **changes}, name="s")


def test_distributions_are_optunas() -> None:
    assert search.distributions(spec().search) == {
        "peak_lr": FloatDistribution(0.01, 1.0, log=True),
        "warmup_epochs": FloatDistribution(0.0, 6.0, step=2.0),
        "plateau_patience": IntDistribution(1, 9),
        "clip_grad_norm": CategoricalDistribution(("off", 1.0)),
    }


def suggested(sampler_table: dict[str, Any], study_name: str, count: int) -> list[dict[str, Any]]:
    """What a worker that restarts before every trial is suggested."""
    store = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=store, study_name=study_name, direction="maximize")
    found = []
    for number in range(count):
        made = spec(sampler=sampler_table)
        study = optuna.load_study(
            storage=store,
            study_name=study_name,
            sampler=search.build_sampler(made, study_name, number),
        )
        trial = study.ask()
        params = search.suggest(trial, made.search)
        found.append(params)
        study.tell(trial, params["peak_lr"])
    return found


@pytest.mark.parametrize("kind", ["TPESampler", "RandomSampler"])
def test_a_trial_is_suggested_the_same_whoever_asks(kind: str) -> None:
    first, again = (suggested({"type": kind, "seed": 3}, "s/a", 14) for _ in range(2))
    assert first == again
    assert suggested({"type": kind, "seed": 4}, "s/a", 14) != first
    assert suggested({"type": kind, "seed": 3}, "s/b", 14) != first
    rates = [params["peak_lr"] for params in first]
    assert len(set(rates)) == len(rates), "a seed was used twice"


@pytest.mark.parametrize("options", [{}, {"multivariate": True, "group": True}], ids=str)
@pytest.mark.parametrize("kind", search.SAMPLERS)
def test_no_claim_warns_of_experiments(kind: str, options: dict[str, Any]) -> None:
    table = {"type": kind, **(options if kind == "TPESampler" else {})}
    with warnings.catch_warnings():
        warnings.simplefilter("error", optuna.exceptions.ExperimentalWarning)
        assert search.build_sampler(spec(sampler=table), "s", 0)


def test_quasi_monte_carlo_points_are_one_sequence() -> None:
    points = suggested({"type": "QMCSampler", "scramble": True}, "s", 8)
    # What Sobol's points are for: of 8, each eighth of an axis has one.
    eighths = [int(8 * math.log(p["peak_lr"] / 0.01) / math.log(100)) for p in points]
    assert sorted(eighths) == list(range(8))


@pytest.mark.parametrize("kind", search.SAMPLERS)
def test_trials_asked_for_side_by_side_differ(kind: str) -> None:
    store = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=store, study_name="s", direction="maximize")
    rates = set()
    for number in range(8):
        study = optuna.load_study(
            storage=store,
            study_name="s",
            sampler=search.build_sampler(spec(sampler={"type": kind}), "s", number),
        )
        rates.add(search.suggest(study.ask(), spec().search)["peak_lr"])
    assert len(rates) == 8


@pytest.mark.parametrize("kind", search.SAMPLERS)
def test_every_sampler_on_offer_suggests(kind: str) -> None:
    assert len(suggested({"type": kind}, "s", 2)) == 2


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("MedianPruner", {"n_startup_trials": 2, "n_warmup_steps": 3}),
        ("PercentilePruner", {"percentile": 25.0}),
        ("SuccessiveHalvingPruner", {"reduction_factor": 3}),
        ("HyperbandPruner", {}),
        ("PatientPruner", {"patience": 3}),
        ("ThresholdPruner", {"lower": 0.2}),
        ("NopPruner", {}),
    ],
)
def test_every_pruner_on_offer_is_built(kind: str, arguments: dict[str, Any]) -> None:
    assert kind in search.PRUNERS
    made = spec(pruner={"type": kind, **arguments})
    assert type(search.build_pruner(made, {})).__name__ == kind


def test_hyperband_knows_the_longest_training() -> None:
    made = spec(pruner={"type": "HyperbandPruner"}, budget={"seeds": 2})
    assert search.build_pruner(made, {})._max_resource == 200  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sampler": {"type": "TPESampelr"}}, "did you mean 'TPESampler'"),
        ({"sampler": {"n_startup_trails": 3}}, "did you mean 'n_startup_trials'"),
        ({"pruner": {"type": "Median"}}, "did you mean 'MedianPruner'"),
        ({"pruner": {"n_warmup_step": 3}}, "did you mean 'n_warmup_steps'"),
        ({"pruner": {"n_warmup_steps": -3}}, "refuses"),
        ({"pruner": {"type": "PercentilePruner"}}, "refuses"),
        ({"pruner": {"n_startup_trials": -3}}, "n_startup_trials = -3"),
        ({"sampler": {"n_startup_trials": "3"}}, "= '3' is not a whole number"),
        ({"sampler": {"n_ei_candidates": "24"}}, "= '24' is not a whole number"),
        ({"sampler": {"n_ei_candidates": True}}, "= True is not a whole number"),
        ({"sampler": {"n_ei_candidates": 0}}, "n_ei_candidates = 0"),
        ({"sampler": {"multivariate": "yes"}}, "= 'yes' is not true or false"),
        ({"sampler": {"constraints_func": "f"}}, "accepted: consider_endpoints"),
        ({"sampler": {"type": "QMCSampler", "independent_sampler": []}}, "no key 'independent"),
        ({"pruner": {"type": "ThresholdPruner", "lower": math.nan}}, "lower = nan"),
        ({"pruner": {"type": "HyperbandPruner", "max_resource": 1.5}}, "text or a whole number"),
        ({"pruner": {"type": "NopPruner", "args": 1}}, "nothing is accepted"),
        ({"pruner": {"type": "PatientPruner", "wrapped_pruner": "x"}}, "min_delta, patience"),
        ({"pruner": {"type": "WarmupHalvingPruner", "seeds": 2}}, "no key 'seeds'"),
        ({"pruner": {"seed": 2}}, "no key 'seed'"),
    ],
)
def test_a_mistake_is_explained(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        search.check(spec(**change))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
