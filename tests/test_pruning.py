"""The pruner that judges each trial by its own warmup, in real Optuna studies."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import begin, make_spec, make_worker, trials
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from sweeps import search
from sweeps.attributes import CURVES, OUTCOME
from sweeps.errors import SpecError
from sweeps.spec import SweepSpec

TRAIN = {"dataset": "digits", "num_groups": 2, "epochs": 40, "schedule": "cosine"}
WARMUP = FloatDistribution(0.0, 30.0)


def spec(**changes: Any) -> SweepSpec:
    table: dict[str, Any] = {
        "train": TRAIN,
        "search": {"warmup_epochs": {"low": 0.0, "high": 30.0}},
        "pruner": {"type": "WarmupHalvingPruner", "tolerance": 0.01},
    }
    return SweepSpec.from_table({**table, **changes}, name="s")


def study_of(made: SweepSpec) -> optuna.Study:
    return optuna.create_study(pruner=search.build_pruner(made, {}), direction="maximize")


def curve(warmup: float, final: float, epochs: int = 40, shift: float = 0.5) -> list[float]:
    """Nothing is learnt for ten epochs at the full rate; those of the warmup count half."""
    return [0.1 + (final - 0.1) * min(1.0, max(0.0, (e - shift * warmup - 10) / 10))
            for e in range(1, epochs + 1)]  # fmt: skip


def run(
    study: optuna.Study,
    warmup: float,
    scores: list[float],
    rates: list[float] | None = None,
    outcome: str = "complete",
) -> int:
    """Report a curve as a worker does; the step at which it was pruned, or 0."""
    study.enqueue_trial({"warmup_epochs": warmup})
    trial = study.ask({"warmup_epochs": WARMUP})
    for step, score in enumerate(scores, start=1):
        curves = {"lr": (rates or [0.1] * len(scores))[:step]}
        study._storage.set_trial_system_attr(trial._trial_id, CURVES, curves)
        trial.report(score, step)
        if step < len(scores) and trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            return step
    trial.set_user_attr(OUTCOME, outcome)
    if outcome == "diverged":
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, scores[-1])
    return 0


def test_a_long_warmup_is_not_cut_for_being_slow_at_first() -> None:
    slow, fast = curve(24.0, 0.85), curve(0.0, 0.8)
    ours, theirs = study_of(spec()), study_of(spec(pruner={"type": "MedianPruner"}))
    for study in (ours, theirs):
        for _ in range(6):
            assert run(study, 0.0, fast) == 0
    assert run(theirs, 24.0, slow) > 0
    assert run(ours, 24.0, slow) == 0


def test_a_slow_trial_is_cut_at_its_own_rung_and_never_within_its_warmup() -> None:
    study = study_of(spec())
    for warmup in (0.0, 10.0, 20.0):
        assert run(study, warmup, curve(warmup, 0.8)) == 0
    # The first rung is at 12 epochs, those of the warmup counted half.
    assert run(study, 0.0, curve(0.0, 0.3)) == 12
    assert run(study, 10.0, curve(10.0, 0.3)) == 17
    assert run(study, 16.0, curve(16.0, 0.3)) == 20
    assert run(study, 30.0, curve(30.0, 0.3)) == 31


def test_half_of_equals_in_the_making_pass_a_rung() -> None:
    study = study_of(spec(pruner={"type": "WarmupHalvingPruner", "tolerance": 0.0}))
    ends = [run(study, 0.0, curve(0.0, final)) for final in (0.4, 0.5, 0.6, 0.7, 0.65, 0.55, 0.3)]
    # The first has nobody to be compared with; every next best passes; of six, three.
    assert ends == [0, 0, 0, 0, 0, 12, 12]


def test_a_trial_that_is_hardly_worse_passes_too() -> None:
    study = study_of(spec(pruner={"type": "WarmupHalvingPruner", "tolerance": 0.1}))
    for score in (0.8, 0.8, 0.71):
        assert run(study, 0.0, [score] * 40) == 0
    assert run(study, 0.0, [0.69] * 40) == 12


def test_a_trial_that_exploded_later_sets_no_bar() -> None:
    study = study_of(spec())
    assert run(study, 0.0, curve(0.0, 0.9)[:20], outcome="diverged") == 0
    assert run(study, 0.0, curve(0.0, 0.6)) == 0
    # Neither does it once it stands among others that do.
    assert run(study, 0.0, curve(0.0, 0.5)) == 12


def test_a_trial_at_its_high_rate_is_not_cut_because_others_have_dropped_theirs() -> None:
    before, after = [0.5] * 10, [0.8] * 30
    dropped, high = [0.1] * 10 + [0.01] * 30, [0.1] * 40
    cosine, plateau = study_of(spec()), study_of(spec(train={**TRAIN, "schedule": "plateau"}))
    for study in (cosine, plateau):
        run(study, 0.0, before + after, dropped)
        run(study, 0.0, before + after, dropped)
    assert run(cosine, 0.0, [0.55] * 40, high) == 12
    assert run(plateau, 0.0, [0.55] * 40, high) == 0
    assert run(plateau, 0.0, [0.45] * 40, high) == 12
    # One that has dropped as often as they have is compared with what they have.
    assert run(plateau, 0.0, [0.5] * 10 + [0.7] * 30, dropped) == 12


def test_with_seeds_the_rungs_are_in_the_first_training_and_at_the_end_of_each() -> None:
    study = study_of(spec(budget={"seeds": 3}))
    good = curve(0.0, 0.8)
    assert run(study, 0.0, good * 3) == 0
    assert run(study, 0.0, good * 3) == 0
    asked = [step for step in range(1, 120) if _reads(study, step)]
    assert asked == [12, 24, 40, 80]
    late = [*curve(0.0, 0.8)[:-1], 0.7]
    assert run(study, 0.0, late + [0.7] * 80) == 40


def _reads(study: optuna.Study, step: int) -> bool:
    """Whether a trial at that step looks at the others, which at a rung it falls behind."""
    trial = create_trial(
        state=TrialState.RUNNING,
        params={"warmup_epochs": 0.0},
        distributions={"warmup_epochs": WARMUP},
        intermediate_values={step: 0.0},
    )
    trial.number = 10**6
    return study.pruner.prune(study, trial)


def test_what_it_says_depends_on_the_study_alone() -> None:
    made = spec()
    study = study_of(made)
    ends = [run(study, w, curve(w, f)) for w, f in ((0.0, 0.8), (9.0, 0.7), (20.0, 0.9), (3, 0.5))]
    again = study_of(made)
    for trial, end in zip(study.trials, ends, strict=True):
        # A fresh pruner for each question, as after a worker was replaced.
        again.pruner = search.build_pruner(made, {})
        scores = list(trial.intermediate_values.values())
        if not end:
            assert run(again, trial.params["warmup_epochs"], scores) == 0
            continue
        assert run(again, trial.params["warmup_epochs"], [*scores, 0.9]) == end
    assert ends[-1] > 0


def test_between_rungs_it_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(spec())
    reads = []
    get_trials = study.get_trials

    def reading(**options: Any) -> Any:
        reads.append(options)
        return get_trials(**options)

    monkeypatch.setattr(study, "get_trials", reading)
    run(study, 5.0, curve(5.0, 0.8))
    assert len(reads) == 2, "a rung at 12 and one at 24 epochs"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"reduction_factor": 1}, "from 2"),
        ({"reduction_factor": 2.5}, "whole number"),
        ({"first_rung": 1.0}, "between 0 and 1"),
        ({"tolerance": -0.1}, "from 0 to 1"),
        ({"first_rungs": 0.5}, "did you mean 'first_rung'"),
        ({"seeds": 3}, "no key .seeds.; accepted: first_rung, reduction_factor, tolerance"),
        ({"config": "x"}, "no key .config."),
    ],
)
def test_its_mistakes_are_explained(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        search.check(spec(pruner={"type": "WarmupHalvingPruner", **arguments}))


def test_a_worker_asks_it(tmp_path: Path) -> None:
    made = make_spec(
        train={"epochs": 5, "warmup_epochs": 2.0},
        search={"peak_lr": {"choices": [1e-4, 0.1]}},
        pruner={"type": "WarmupHalvingPruner", "tolerance": 0.0},
        budget={"trials": 6},
        sampler={"type": "RandomSampler"},
    )
    begin(tmp_path, made)
    make_worker(tmp_path).run()
    for trial in trials(tmp_path)[1:]:
        slow = trial.params["peak_lr"] < 0.1
        assert (trial.state == TrialState.PRUNED) == slow, "0.3 × 5 epochs + 1, after the warmup"
        assert trial.last_step == (3 if slow else 5)
