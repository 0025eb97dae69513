"""What a sweep has come to, read from the store: the one source of every view and table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.attributes import CURVES as CURVES
from sweeps.attributes import OUTCOME as OUTCOME
from sweeps.carrying import CARRIED
from sweeps.config import Value
from sweeps.limits import spent, stops
from sweeps.spec import SweepSpec
from sweeps.studies import LABEL, StoredSweep, SweepStudy

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

    from sweeps.confirmation import Confirmation

REASON = "reason"
SECONDS = "seconds"
PROVENANCE = "sweep:provenance"
FAILURES = "sweep:failures"
PROGRESS = "sweep:progress"
"""Deaths of a trial's workers up to the epoch where its latest attempt began."""

OUTCOMES = ("complete", "pruned", "diverged", "failed")
"""How a trial can end. Optuna knows a diverged trial as PRUNED, so that the sampler learns
from it, and a failed one as FAIL."""


@dataclass(frozen=True)
class TrialStatus:
    """One trial.

    Attributes:
        number: Optuna's, within the study.
        outcome: one of `OUTCOMES`, "running" or "queued".
        label: which `[[try]]` it is, or "".
        params: the searched settings.
        accuracy: validation accuracy, 0 to 1: the value of a complete trial, the latest score
            of any other; None before the first epoch.
        step: completed epochs, over all seeds.
        reason: why it diverged or failed, or "".
        seconds: time that its finished attempt took, or None.
        images_per_second: of the latest epoch, or None.
        worker: who runs it, or "".
        carried_from: which trial of another study had its settings first, or "".
    """

    number: int
    outcome: str
    label: str
    params: Mapping[str, Value]
    accuracy: float | None
    step: int
    reason: str
    seconds: float | None
    images_per_second: float | None
    worker: str
    carried_from: str = ""


@dataclass(frozen=True)
class StudyStatus:
    """One study: its budget and its trials.

    Attributes:
        cell: the enumerated settings.
        budget: trials that it may run.
        validation: what scores a trial, `holdout` or `test`.
        steps_per_trial: epochs of a trial that is not pruned, over all seeds.
        trials: all that are enqueued or have begun within the budget, and those that ended
            when it was larger.
        confirms: whether its trials are the runs of a confirmation.
    """

    name: str
    cell: Mapping[str, Value]
    budget: int
    validation: str
    steps_per_trial: int
    trials: Sequence[TrialStatus]
    confirms: bool = False

    def count(self, outcome: str) -> int:
        """How many trials have this outcome; "queued" counts those not yet created too."""
        if outcome == "queued":
            return max(0, self.budget - sum(t.outcome != "queued" for t in self.trials))
        return sum(t.outcome == outcome for t in self.trials)

    @property
    def finished(self) -> int:
        """Trials that have ended."""
        return sum(self.count(outcome) for outcome in OUTCOMES)

    @property
    def best(self) -> TrialStatus | None:
        """The complete trial with the highest accuracy; the earliest of equals.

        None in a confirmation: to pick the luckiest seed is what it is there against.
        """
        if self.confirms:
            return None
        complete = [t for t in self.trials if t.outcome == "complete"]
        return max(complete, key=lambda t: (t.accuracy, -t.number), default=None)


@dataclass(frozen=True)
class SweepStatus:
    """A sweep: what it asks and how far its studies are.

    Attributes:
        searched: the settings that the sampler suggests.
        seeds: trainings that a trial's accuracy is the mean of.
        spent: which budget of time or epochs is spent, or "".
        stop_requests: how often its workers were asked to end.
        confirms: the sweep that it confirms, or "".
        confirmation: what its own confirmation has come to, or the confirmation that it is;
            None if there is none, or nobody read it (`sweeps.confirmation.read_answer`).
    """

    name: str
    title: str
    question: str
    searched: Sequence[str]
    seeds: int
    studies: Sequence[StudyStatus]
    spent: str = ""
    stop_requests: int = 0
    confirms: str = ""
    confirmation: Confirmation | None = None

    @property
    def done(self) -> bool:
        """Whether a budget is met: every study's trials, or the sweep's time or epochs."""
        return bool(self.spent) or all(study.finished >= study.budget for study in self.studies)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: counts by outcome, budget, best trial and running ones of each study."""
        return {
            "name": self.name,
            "title": self.title,
            "question": self.question,
            "searched": list(self.searched),
            "seeds": self.seeds,
            "done": self.done,
            "spent": self.spent,
            "confirms": self.confirms,
            "confirmation": self.confirmation.as_dict() if self.confirmation else None,
            "studies": [
                {
                    "name": study.name,
                    "cell": dict(study.cell),
                    "budget": study.budget,
                    "validation": study.validation,
                    "counts": {
                        outcome: study.count(outcome)
                        for outcome in (*OUTCOMES, "running", "queued")
                    },
                    "best": dataclasses.asdict(study.best) if study.best else None,
                    "tries": [dataclasses.asdict(t) for t in study.trials if t.label],
                    "running": [
                        dataclasses.asdict(t) for t in study.trials if t.outcome == "running"
                    ],
                }
                for study in self.studies
            ],
        }


def read_status(store: BaseStorage, sweep: StoredSweep) -> SweepStatus:
    """Read a sweep's state; writes nothing and takes no lock."""
    spec = sweep.spec
    return SweepStatus(
        name=spec.name,
        title=spec.title,
        question=spec.question,
        searched=list(spec.search),
        seeds=spec.budget.seeds,
        studies=[_read_study(store, spec, study) for study in sweep.studies],
        spent=spent(store, sweep),
        stop_requests=stops(store, sweep),
        confirms=spec.confirms,
    )


def _read_study(store: BaseStorage, spec: SweepSpec, study: SweepStudy) -> StudyStatus:
    config = spec.config(study.cell, spec.lowest_params())
    trials = store.get_all_trials(study.study_id, deepcopy=False)
    return StudyStatus(
        name=study.name,
        cell=study.cell,
        budget=study.budget,
        validation=config.validation,
        steps_per_trial=config.epochs * spec.budget.seeds,
        trials=[_read_trial(t) for t in trials if t.number < study.budget or t.state.is_finished()],
        confirms=bool(spec.confirms),
    )


def _read_trial(trial: FrozenTrial) -> TrialStatus:
    from storage.leases import LEASE_ATTR

    state = trial.state.name
    ended = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    outcome = {"WAITING": "queued", "RUNNING": "running"}.get(state) or trial.user_attrs.get(
        OUTCOME, ended.get(state, state)
    )
    last = trial.last_step
    accuracy = trial.intermediate_values[last] if last is not None else None
    if state == "COMPLETE":
        accuracy = trial.value
    curves = trial.system_attrs.get(CURVES, {}).get("images_per_second") or [None]
    params = trial.params or trial.system_attrs.get("fixed_params", {})
    lease = trial.system_attrs.get(LEASE_ATTR) or {}
    return TrialStatus(
        number=trial.number,
        outcome=outcome,
        label=trial.user_attrs.get(LABEL, ""),
        params=params,
        accuracy=accuracy,
        step=last or 0,
        reason=trial.user_attrs.get(REASON, ""),
        seconds=trial.user_attrs.get(SECONDS),
        images_per_second=curves[-1],
        worker=lease.get("worker", "") if outcome == "running" else "",
        carried_from=trial.user_attrs.get(CARRIED, ""),
    )
