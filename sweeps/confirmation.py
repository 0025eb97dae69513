"""What a confirmation has come to: a sweep's configurations over fresh seeds, read from the store.

A trial's accuracy is that of one training, or of few, and the best trial was picked by it: part of
its lead is luck. The confirmation of a sweep NAME is the sweep NAME-confirm (`sweeps.confirm`),
whose runs share nothing with that choice: other seeds, and the test images, scored once by each
run. Which run belongs to which configuration is told by its parameters alone, so that it stays so
when a merge gives trials other numbers.

A run that diverged is an outcome of its configuration: it counts with the accuracy of a guess,
which is what its network is worth. Leaving it out would reward what trains now and then. A run that
failed (out of memory, say) says nothing about accuracy and is left out. Both are told.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.config import Value
from sweeps.errors import SweepError
from sweeps.spec import CONFIRMATION, within_sweep
from sweeps.status import StudyStatus, SweepStatus, TrialStatus, read_status
from sweeps.studies import StoredSweep, stored_sweep

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from storage.overview import TrialOverview

SEED = "seed"

Configuration = tuple[tuple[str, Value], ...]
"""A trial's parameters but for the seed, sorted by name: equal for equal ones."""


@dataclass(frozen=True)
class Run:
    """One training with one seed.

    Attributes:
        number: of its trial in the confirmation.
        seed: which no trial of the confirmed sweep has used.
        outcome: as of any trial.
        accuracy: on the test images, 0 to 1, after the last epoch; that of a guess where it
            diverged; None where it failed or has not ended.
        validation_accuracy: the same on the images that scored the sweep's trials.
        reason: why it diverged or failed, or "".
    """

    number: int
    seed: int
    outcome: str
    accuracy: float | None
    validation_accuracy: float | None
    reason: str


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with its interval of 95 % confidence.

    Attributes:
        low, high: the interval's ends; None where the runs have no spread to judge by.
        count: how many runs it is the mean of.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends of the interval, or the mean twice."""
        if self.low is None or self.high is None:
            return self.mean, self.mean
        return self.low, self.high


@dataclass(frozen=True)
class Comparison:
    """How far the best configuration is ahead of a known one, over the seeds that both have.

    Attributes:
        ahead: the mean difference of their accuracies, positive where the best is better.
        p_value: of the two-sided paired t test; None where there is no spread to judge by.
        corrected: the same by Holm's method over all comparisons of the sweep.
    """

    ahead: Estimate
    p_value: float | None
    corrected: float | None


@dataclass(frozen=True)
class ConfirmedConfiguration:
    """A trial's configuration, which is its parameters but for the seed, and its runs.

    Attributes:
        name: "best", the labels of known configurations, or how it ranks among the trials.
        trial: the trial's number in the confirmed sweep, None if it is there no more.
        best: whether it is the best of its study.
        labels: of the `[[try]]` entries that have it.
        params: the searched parameters.
        found: the trial's accuracy in the sweep, which the best one was picked by; None if it
            did not complete.
        runs: one for each seed, in the order of the seeds.
        versus: the best configuration against this one, where this is a known one.
    """

    name: str
    trial: int | None
    best: bool
    labels: Sequence[str]
    params: Mapping[str, Value]
    found: float | None
    runs: Sequence[Run]
    versus: Comparison | None = None

    def count(self, outcome: str) -> int:
        """How many runs have this outcome."""
        return sum(run.outcome == outcome for run in self.runs)

    @property
    def estimate(self) -> Estimate | None:
        """Mean accuracy on the test images; None before the first run has ended."""
        return estimated([r.accuracy for r in self.runs if r.accuracy is not None])

    @property
    def again(self) -> float | None:
        """Mean accuracy of the same runs on the images that scored the sweep's trials."""
        values = [r.validation_accuracy for r in self.runs if r.validation_accuracy is not None]
        return sum(values) / len(values) if values else None

    @property
    def luck(self) -> float | None:
        """By how much the sweep's accuracy exceeds that of these runs on the same images."""
        return None if self.again is None or self.found is None else self.found - self.again

    @property
    def drop(self) -> float | None:
        """By how much the sweep's accuracy exceeds the confirmed one."""
        estimate = self.estimate
        return None if estimate is None or self.found is None else self.found - estimate.mean

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        estimate = self.estimate
        return {
            "name": self.name,
            "trial": self.trial,
            "best": self.best,
            "labels": list(self.labels),
            "params": dict(self.params),
            "found": self.found,
            "confirmed": dataclasses.asdict(estimate) if estimate else None,
            "again": self.again,
            "luck": self.luck,
            "drop": self.drop,
            "diverged": self.count("diverged"),
            "failed": self.count("failed"),
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "versus": dataclasses.asdict(self.versus) if self.versus else None,
        }


@dataclass(frozen=True)
class ConfirmedStudy:
    """One study's configurations, the best one first."""

    name: str
    validation: str
    configurations: Sequence[ConfirmedConfiguration]

    @property
    def best(self) -> ConfirmedConfiguration | None:
        """The best configuration of the study, if it has runs."""
        return next((s for s in self.configurations if s.best), None)


@dataclass(frozen=True)
class Confirmation:
    """The confirmation of a sweep.

    Attributes:
        name: its own, as `sweep worker` takes it.
        confirms: the sweep that it confirms.
        done: whether all of its runs have ended.
        studies: by the names of the confirmed sweep's studies.
        trials: the configurations of the confirmed sweep's trials, by (study, number).
    """

    name: str
    confirms: str
    done: bool
    studies: Sequence[ConfirmedStudy]
    trials: Mapping[tuple[str, int], ConfirmedConfiguration]

    def of_trial(self, study: str, number: int) -> ConfirmedConfiguration | None:
        """The configuration of a trial of the confirmed sweep, if it has runs.

        Args:
            study: its name, with the sweep's or without.
            number: the trial's.
        """
        return self.trials.get((within_sweep(study), number))

    @property
    def on_test(self) -> bool:
        """Whether the sweep's own trials are scored on the test images."""
        return any(study.validation == "test" for study in self.studies)

    @property
    def comparisons(self) -> int:
        """How many tests there were, which Holm's correction counts."""
        return sum(
            s.versus is not None and s.versus.p_value is not None
            for study in self.studies
            for s in study.configurations
        )

    @property
    def seeds(self) -> list[int]:
        """All seeds of the runs, in order."""
        return sorted({r.seed for st in self.studies for s in st.configurations for r in s.runs})

    def count(self, outcome: str) -> int:
        """How many runs have this outcome."""
        return sum(s.count(outcome) for study in self.studies for s in study.configurations)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "name": self.name,
            "confirms": self.confirms,
            "done": self.done,
            "seeds": self.seeds,
            "comparisons": self.comparisons,
            "studies": [
                {
                    "name": study.name,
                    "validation": study.validation,
                    "configurations": [
                        configuration.as_dict() for configuration in study.configurations
                    ],
                }
                for study in self.studies
            ],
        }


def read_answer(store: BaseStorage, sweep: StoredSweep) -> SweepStatus:
    """A sweep's state as `read_status` has it, with its confirmation, if it has one."""
    return with_confirmation(store, sweep, read_status(store, sweep))


def with_confirmation(store: BaseStorage, sweep: StoredSweep, status: SweepStatus) -> SweepStatus:
    """A sweep's state with its confirmation, if it has one."""
    confirmed = sweep.spec.confirms
    if confirmed:
        origin = _readable(store, confirmed)
        of = read_status(store, origin) if origin else None
        return dataclasses.replace(status, confirmation=_read(store, sweep, status, of))
    runs = _readable(store, sweep.spec.name + CONFIRMATION)
    if runs and runs.spec.confirms == sweep.spec.name:
        found = _read(store, runs, read_status(store, runs), status)
        return dataclasses.replace(status, confirmation=found)
    return status


def _readable(store: BaseStorage, name: str) -> StoredSweep | None:
    """A sweep of the store; None if it has none of this name, or one of another version."""
    try:
        return stored_sweep(store, name)
    except SweepError:
        return None


def configuration_of(params: Mapping[str, Value]) -> Configuration:
    """A trial's parameters but for the seed, equal for equal ones."""
    return tuple(sorted((name, value) for name, value in params.items() if name != SEED))


def _read(
    store: BaseStorage, sweep: StoredSweep, status: SweepStatus, of: SweepStatus | None
) -> Confirmation:
    """The runs of a confirmation, by the configurations that the confirmed sweep has them for."""
    from storage.overview import OverviewReader

    read = OverviewReader(store).read(study.study_id for study in sweep.studies)
    studies = []
    for stored, study in zip(sweep.studies, status.studies, strict=True):
        runs = _runs({trial.number: trial for trial in read[stored.study_id]}, study)
        name = sweep.spec.confirms + study.name.removeprefix(sweep.spec.name)
        origin = next((s for s in (of.studies if of else ()) if s.name == name), None)
        configurations = [
            _configuration(origin, key, label, its) for key, (label, its) in runs.items()
        ]
        configurations.sort(key=lambda s: (not s.best, not s.labels, -(s.found or 0.0)))
        studies.append(ConfirmedStudy(name, study.validation, configurations))
    studies = _compared(studies)
    confirmed = {
        (study.name, configuration_of(configuration.params)): configuration
        for study in studies
        for configuration in study.configurations
    }
    by_trial = {
        (within_sweep(study.name), trial.number): confirmed[at]
        for study in (of.studies if of else ())
        for trial in study.trials
        if (at := (study.name, configuration_of(trial.params))) in confirmed
    }
    return Confirmation(sweep.spec.name, sweep.spec.confirms, status.done, studies, by_trial)


def _runs(
    trials: Mapping[int, TrialOverview], study: StudyStatus
) -> dict[Configuration, tuple[str, list[Run]]]:
    """The runs of each configuration by seed, with the name that it was enqueued under."""
    found: dict[Configuration, tuple[str, dict[int, Run]]] = {}
    for seen in study.trials:
        trial = trials[seen.number]
        params = trial.params
        if SEED not in params:
            continue
        seed = int(params[SEED])
        name = seen.label.removesuffix(f", seed {seed}")
        _, runs = found.setdefault(configuration_of(params), (name, {}))
        run = _run(trial, seen, seed)
        # Two stores that were merged may have computed the same one; one that failed runs again.
        before = runs.get(seed)
        if (
            before is None
            or before.outcome == "failed"
            or (before.accuracy is None and run.accuracy is not None)
        ):
            runs[seed] = run
    return {
        key: (name, [run for _, run in sorted(runs.items())]) for key, (name, runs) in found.items()
    }


def _run(trial: TrialOverview, seen: TrialStatus, seed: int) -> Run:
    accuracy = validation = None
    if seen.outcome == "complete":
        accuracy, validation = trial.value, trial.last
    elif seen.outcome == "diverged":
        accuracy = validation = trial.value
    return Run(trial.number, seed, seen.outcome, accuracy, validation, seen.reason)


def _configuration(
    study: StudyStatus | None, key: Configuration, name: str, runs: list[Run]
) -> ConfirmedConfiguration:
    trials = [t for t in study.trials if configuration_of(t.params) == key] if study else []
    complete = [t for t in trials if t.outcome == "complete"]
    complete.sort(key=lambda t: (-(t.accuracy or 0.0), t.number))
    labels = [t.label for t in trials if t.label]
    best = bool(study and study.best and study.best in complete)
    trial = next(iter(complete), None) or next((t for t in trials if t.label), None)
    if best:
        name = "best" + (f": {', '.join(labels)}" if labels else "")
    elif labels:
        name = ", ".join(labels)
    elif trial is not None and study is not None:
        name = f"rank {_rank(study, trial)}"
    return ConfirmedConfiguration(
        name=name,
        trial=trial.number if trial else None,
        best=best,
        labels=labels,
        params=dict(key),
        found=trial.accuracy if trial and trial.outcome == "complete" else None,
        runs=runs,
    )


def _rank(study: StudyStatus, trial: TrialStatus) -> int:
    assert trial.accuracy is not None
    better = {
        configuration_of(t.params)
        for t in study.trials
        if t.outcome == "complete" and (t.accuracy, -t.number) > (trial.accuracy, -trial.number)
    }
    return 1 + len(better)


def _compared(studies: Sequence[ConfirmedStudy]) -> list[ConfirmedStudy]:
    """The best configuration of each study against its known ones, corrected over all of them."""
    from sweeps.significance import holm

    found = {
        (i, k): comparison
        for i, study in enumerate(studies)
        for k, configuration in enumerate(study.configurations)
        if study.best and configuration.labels and not configuration.best
        and (comparison := _compare(study.best, configuration)) is not None
    }  # fmt: skip
    corrected = holm([math.nan if c.p_value is None else c.p_value for c in found.values()])
    for at, p in zip(list(found), corrected, strict=True):
        found[at] = dataclasses.replace(found[at], corrected=_number(p))
    return [
        dataclasses.replace(
            study,
            configurations=[
                dataclasses.replace(configuration, versus=found.get((i, k)))
                for k, configuration in enumerate(study.configurations)
            ],
        )
        for i, study in enumerate(studies)
    ]


def _compare(best: ConfirmedConfiguration, known: ConfirmedConfiguration) -> Comparison | None:
    import numpy as np

    from sweeps.significance import paired_p_value

    theirs = {run.seed: run.accuracy for run in known.runs if run.accuracy is not None}
    differences = [
        run.accuracy - theirs[run.seed]
        for run in best.runs
        if run.accuracy is not None and run.seed in theirs
    ]
    # One pair says nothing.
    ahead = estimated(differences, lowest=-1.0) if len(differences) > 1 else None
    if ahead is None:
        return None
    p = float(paired_p_value(np.array(differences)))
    return Comparison(ahead, _number(p), None)


def estimated(values: Sequence[float], lowest: float = 0.0) -> Estimate | None:
    """The mean of some accuracies, or of differences from -1 on; None of none."""
    import numpy as np

    from sweeps.significance import mean_interval

    if not values:
        return None
    mean, low, high = (float(x) for x in mean_interval(np.array(values)))
    if math.isnan(low):
        return Estimate(mean, None, None, len(values))
    # What lies outside cannot be, so nothing is lost by cutting it off.
    return Estimate(mean, max(lowest, low), min(1.0, high), len(values))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
