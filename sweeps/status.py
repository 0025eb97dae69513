"""What a sweep has come to, read from the store: the one source of every view and table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.attributes import CURVES, LABEL, OUTCOME, REASON, SECONDS, WORST_DEVICE_ACCURACY
from sweeps.carrying import CARRIED
from sweeps.config import Value
from sweeps.limits import spent, stops
from sweeps.spec import SweepSpec
from sweeps.studies import StoredSweep, SweepStudy, stored_sweep

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from storage.overview import OverviewReader, TrialOverview
    from sweeps.confirmation import Confirmation

OUTCOMES = ("complete", "pruned", "diverged", "failed")
"""How a trial can end. Optuna knows a diverged trial as PRUNED, so that the sampler learns
from it, and a failed one as FAIL."""

_TO_COME = {"WAITING": "queued", "RUNNING": "running"}
_ENDED = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


@dataclass(frozen=True)
class TrialStatus:
    """One trial.

    Attributes:
        number: Optuna's, within the study.
        outcome: one of `OUTCOMES`, "running" or "queued".
        label: which `[[try]]` it is, or "".
        params: of the search.
        accuracy: validation accuracy, 0 to 1: the value of a complete trial, the latest score
            of any other; None before the first epoch.
        step: completed epochs, over all seeds.
        reason: why it diverged or failed, or "".
        seconds: time that its finished attempt took, or None.
        images_per_second: of the latest epoch of a running trial, or None.
        worker: who runs it, or "".
        carried_from: which trial of another study had its configuration first, or "".
        worst_device_accuracy: of a complete trial, validation accuracy on the classes of the device
            where it is least (`sweeps.attributes`), or None.
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
    worst_device_accuracy: float | None = None


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
        searched: the parameters that the sampler suggests.
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

    def as_dict(self, *, trials: bool = False) -> dict[str, Any]:
        """For `--json`: counts by outcome, budget, best trial and running ones of each study.

        Args:
            trials: add every trial.
        """
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
                    **({"trials": [dataclasses.asdict(t) for t in study.trials]} if trials else {}),
                }
                for study in self.studies
            ],
        }


class StatusReader:
    """Reads the state of one sweep again and again; trials that have ended are read once.

    Args:
        store: where it is.
        name: which one.
    """

    def __init__(self, store: BaseStorage, name: str) -> None:
        self._store = store
        self._name = name
        self._sweep: StoredSweep | None = None
        self._trials = trial_reader(store)

    def read(self) -> SweepStatus:
        """The state as it is now; another terminal may have raised the budget.

        Raises:
            SweepError: the store has no such sweep.
            StorageError: as `read_status`.
        """
        self._sweep = stored_sweep(self._store, self._name, before=self._sweep)
        return _status(self._store, self._sweep, self._trials)


def read_status(store: BaseStorage, sweep: StoredSweep) -> SweepStatus:
    """Read a sweep's state; writes nothing and takes no lock.

    Raises:
        StorageError: the store is neither a database nor served by `sweep serve`.
    """
    return _status(store, sweep, trial_reader(store))


def trial_reader(store: BaseStorage) -> OverviewReader:
    """Reads of trials what a `TrialStatus` says."""
    from storage.leases import LEASE_ATTR
    from storage.overview import OverviewReader

    return OverviewReader(
        store,
        user_attrs=(OUTCOME, LABEL, REASON, SECONDS, CARRIED, WORST_DEVICE_ACCURACY),
        running_attrs=(LEASE_ATTR, CURVES),
    )


def _status(store: BaseStorage, sweep: StoredSweep, trials_of: OverviewReader) -> SweepStatus:
    spec = sweep.spec
    read = trials_of.read(study.study_id for study in sweep.studies)
    epochs = sum(trial.step or 0 for trials in read.values() for trial in trials)
    return SweepStatus(
        name=spec.name,
        title=spec.title,
        question=spec.question,
        searched=list(spec.search),
        seeds=spec.budget.seeds,
        studies=[_study_status(spec, study, read[study.study_id]) for study in sweep.studies],
        spent=spent(store, sweep, epochs=epochs),
        stop_requests=stops(store, sweep),
        confirms=spec.confirms,
    )


def _study_status(
    spec: SweepSpec, study: SweepStudy, trials: Sequence[TrialOverview]
) -> StudyStatus:
    config = spec.lowest_config(study.cell)
    return StudyStatus(
        name=study.name,
        cell=study.cell,
        budget=study.budget,
        validation=config.validation,
        steps_per_trial=config.epochs * spec.budget.seeds,
        trials=[_trial_status(t) for t in trials if t.number < study.budget or t.finished],
        confirms=bool(spec.confirms),
    )


def _trial_status(trial: TrialOverview) -> TrialStatus:
    from storage.leases import LEASE_ATTR

    attrs, running = trial.user_attrs, trial.system_attrs
    outcome = _TO_COME.get(trial.state) or attrs.get(OUTCOME, _ENDED.get(trial.state, trial.state))
    speeds = running.get(CURVES, {}).get("images_per_second") or [None]
    lease = running.get(LEASE_ATTR) or {}
    return TrialStatus(
        number=trial.number,
        outcome=outcome,
        label=attrs.get(LABEL, ""),
        params=trial.params,
        accuracy=trial.value if trial.state == "COMPLETE" else trial.last,
        step=trial.step or 0,
        reason=attrs.get(REASON, ""),
        seconds=attrs.get(SECONDS),
        images_per_second=speeds[-1],
        worker=lease.get("worker", ""),
        carried_from=attrs.get(CARRIED, ""),
        worst_device_accuracy=attrs.get(WORST_DEVICE_ACCURACY),
    )
