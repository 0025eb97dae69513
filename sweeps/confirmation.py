"""What a confirmation has come to: a sweep's settings over fresh seeds, read from the store.

A trial's accuracy is that of one training, or of few, and the best trial was picked by it: part of
its lead is luck. The confirmation of a sweep NAME is the sweep NAME-confirm (`sweeps.confirm`),
whose runs share nothing with that choice: other seeds, and the test images, scored once by each
run. Which run belongs to which setting is told by its parameters alone, so that it stays so when
a merge gives trials other numbers.

A run that diverged is an outcome of its setting: it counts with the accuracy of a guess, which
is what its network is worth. Leaving it out would reward the setting that trains now and then. A
run that failed (out of memory, say) says nothing about accuracy and is left out. Both are told.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.config import Value
from sweeps.errors import plural
from sweeps.spec import CONFIRMATION
from sweeps.status import OUTCOMES, StudyStatus, SweepStatus, TrialStatus, read_status
from sweeps.studies import StoredSweep, stored_names, stored_sweep

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from storage.overview import TrialOverview

SEED = "seed"

Settings = tuple[tuple[str, Value], ...]
"""Searched settings, to tell equal ones."""


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


@dataclass(frozen=True)
class Comparison:
    """How far the best setting is ahead of a known one, over the seeds that both have.

    Attributes:
        ahead: the mean difference of their accuracies, positive where the best is better.
        p_value: of the two-sided paired t test; None where there is no spread to judge by.
        corrected: the same by Holm's method over all comparisons of the sweep.
    """

    ahead: Estimate
    p_value: float | None
    corrected: float | None


@dataclass(frozen=True)
class ConfirmedSetting:
    """A trial's settings and their runs.

    Attributes:
        setting: "best", the labels of known settings, or how it ranks among the trials.
        trial: the trial's number in the confirmed sweep, None if it is there no more.
        best: whether it is the best of its study.
        labels: of the `[[try]]` entries that have these settings.
        params: the searched settings.
        found: the trial's accuracy in the sweep, which the best one was picked by; None if it
            did not complete.
        runs: one for each seed, in the order of the seeds.
        versus: the best setting against this one, where this is a known one.
    """

    setting: str
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
        return _estimate([r.accuracy for r in self.runs if r.accuracy is not None])

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
            "setting": self.setting,
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
    """One study's settings, the best one first."""

    name: str
    validation: str
    settings: Sequence[ConfirmedSetting]

    @property
    def best(self) -> ConfirmedSetting | None:
        """The best setting of the study, if it has runs."""
        return next((s for s in self.settings if s.best), None)


@dataclass(frozen=True)
class Confirmation:
    """The confirmation of a sweep.

    Attributes:
        name: its own, as `sweep worker` takes it.
        confirms: the sweep that it confirms.
        done: whether all of its runs have ended.
        studies: by the names of the confirmed sweep's studies.
        trials: the confirmed settings of the confirmed sweep's trials, by (study, number).
    """

    name: str
    confirms: str
    done: bool
    studies: Sequence[ConfirmedStudy]
    trials: Mapping[tuple[str, int], ConfirmedSetting]

    def of_trial(self, study: str, number: int) -> ConfirmedSetting | None:
        """The settings of a trial of the confirmed sweep, if they have runs.

        Args:
            study: its name, with the sweep's or without.
            number: the trial's.
        """
        return self.trials.get((_short(study), number))

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
            for s in study.settings
        )

    @property
    def seeds(self) -> list[int]:
        """All seeds of the runs, in order."""
        return sorted({r.seed for st in self.studies for s in st.settings for r in s.runs})

    def count(self, outcome: str) -> int:
        """How many runs have this outcome."""
        return sum(s.count(outcome) for study in self.studies for s in study.settings)

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
                    "settings": [setting.as_dict() for setting in study.settings],
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
    names = stored_names(store)
    if confirmed:
        of = read_status(store, stored_sweep(store, confirmed)) if confirmed in names else None
        return dataclasses.replace(status, confirmation=_read(store, sweep, status, of))
    name = sweep.spec.name + CONFIRMATION
    if name in names and (runs := stored_sweep(store, name)).spec.confirms == sweep.spec.name:
        found = _read(store, runs, read_status(store, runs), status)
        return dataclasses.replace(status, confirmation=found)
    return status


def settings_of(params: Mapping[str, Value]) -> Settings:
    """A trial's searched settings but for the seed, equal for equal ones."""
    return tuple(sorted((name, value) for name, value in params.items() if name != SEED))


def _read(
    store: BaseStorage, sweep: StoredSweep, status: SweepStatus, of: SweepStatus | None
) -> Confirmation:
    """The runs of a confirmation, by the settings that the confirmed sweep has them for."""
    from storage.overview import OverviewReader

    read = OverviewReader(store).read(study.study_id for study in sweep.studies)
    studies = []
    for stored, study in zip(sweep.studies, status.studies, strict=True):
        runs = _runs({trial.number: trial for trial in read[stored.study_id]}, study)
        name = sweep.spec.confirms + study.name.removeprefix(sweep.spec.name)
        origin = next((s for s in (of.studies if of else ()) if s.name == name), None)
        settings = [_setting(origin, key, label, its) for key, (label, its) in runs.items()]
        settings.sort(key=lambda s: (not s.best, not s.labels, -(s.found or 0.0)))
        studies.append(ConfirmedStudy(name, study.validation, settings))
    studies = _compared(studies)
    confirmed = {
        (study.name, settings_of(setting.params)): setting
        for study in studies
        for setting in study.settings
    }
    by_trial = {
        (_short(study.name), trial.number): confirmed[at]
        for study in (of.studies if of else ())
        for trial in study.trials
        if (at := (study.name, settings_of(trial.params))) in confirmed
    }
    return Confirmation(sweep.spec.name, sweep.spec.confirms, status.done, studies, by_trial)


def _short(study: str) -> str:
    return study.partition("/")[2] or study


def _runs(
    trials: Mapping[int, TrialOverview], study: StudyStatus
) -> dict[Settings, tuple[str, list[Run]]]:
    """The runs of each setting by seed, with the name that it was enqueued under."""
    found: dict[Settings, tuple[str, dict[int, Run]]] = {}
    for seen in study.trials:
        trial = trials[seen.number]
        params = trial.params
        if SEED not in params:
            continue
        seed = int(params[SEED])
        name = seen.label.removesuffix(f", seed {seed}")
        _, runs = found.setdefault(settings_of(params), (name, {}))
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


def _setting(
    study: StudyStatus | None, key: Settings, name: str, runs: list[Run]
) -> ConfirmedSetting:
    trials = [t for t in study.trials if settings_of(t.params) == key] if study else []
    complete = [t for t in trials if t.outcome == "complete"]
    complete.sort(key=lambda t: (-(t.accuracy or 0.0), t.number))
    labels = [t.label for t in trials if t.label]
    best = bool(study and study.best and study.best in complete)
    trial = next(iter(complete), None) or next((t for t in trials if t.label), None)
    if best:
        setting = "best" + (f": {', '.join(labels)}" if labels else "")
    elif labels:
        setting = ", ".join(labels)
    elif trial is not None and study is not None:
        setting = f"rank {_rank(study, trial)}"
    else:
        setting = name
    return ConfirmedSetting(
        setting=setting,
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
        settings_of(t.params)
        for t in study.trials
        if t.outcome == "complete" and (t.accuracy, -t.number) > (trial.accuracy, -trial.number)
    }
    return 1 + len(better)


def _compared(studies: Sequence[ConfirmedStudy]) -> list[ConfirmedStudy]:
    """The best setting of each study against its known ones, corrected over all of them."""
    from sweeps.significance import holm

    found = {
        (i, k): comparison
        for i, study in enumerate(studies)
        for k, setting in enumerate(study.settings)
        if study.best and setting.labels and not setting.best
        and (comparison := _compare(study.best, setting)) is not None
    }  # fmt: skip
    corrected = holm([math.nan if c.p_value is None else c.p_value for c in found.values()])
    for at, p in zip(list(found), corrected, strict=True):
        found[at] = dataclasses.replace(found[at], corrected=_number(p))
    return [
        dataclasses.replace(
            study,
            settings=[
                dataclasses.replace(setting, versus=found.get((i, k)))
                for k, setting in enumerate(study.settings)
            ],
        )
        for i, study in enumerate(studies)
    ]


def _compare(best: ConfirmedSetting, known: ConfirmedSetting) -> Comparison | None:
    import numpy as np

    from sweeps.significance import paired_p_value

    theirs = {run.seed: run.accuracy for run in known.runs if run.accuracy is not None}
    differences = [
        run.accuracy - theirs[run.seed]
        for run in best.runs
        if run.accuracy is not None and run.seed in theirs
    ]
    # One pair says nothing.
    ahead = _estimate(differences, lowest=-1.0) if len(differences) > 1 else None
    if ahead is None:
        return None
    p = float(paired_p_value(np.array(differences)))
    return Comparison(ahead, _number(p), None)


def _estimate(values: Sequence[float], lowest: float = 0.0) -> Estimate | None:
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


# --- words --------------------------------------------------------------------------------------


UNCONFIRMED = "unconfirmed"


def shown_estimate(setting: ConfirmedSetting) -> str:
    """Mean, interval, and what is missing of it, for one cell of a table."""
    estimate = setting.estimate
    text = f"{estimate.mean:.4f}{_interval(estimate)}" if estimate else "–"
    told = _told(setting)
    left = sum(setting.count(outcome) for outcome in ("running", "queued"))
    told += [f"{left} of {len(setting.runs)} to come"] if left else []
    return text + (f" ({', '.join(told)})" if told else "")


def _told(setting: ConfirmedSetting) -> list[str]:
    return [f"{setting.count(o)} {o}" for o in ("diverged", "failed") if setting.count(o)]


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" [{estimate.low:.4f}, {estimate.high:.4f}]"


CONFIRMED_COLUMNS = ("confirmed", "confirmed_low", "confirmed_high", "confirmed_runs")
"""What a table of trials says of the confirmation of each, for programs."""


def confirmed_cells(
    confirmation: Confirmation | None, study: str, number: int
) -> dict[str, float | int | None]:
    """A trial's `CONFIRMED_COLUMNS`: mean, interval, and how many runs; nothing if unconfirmed."""
    setting = confirmation.of_trial(study, number) if confirmation else None
    estimate = setting.estimate if setting else None
    if estimate is None:
        return dict.fromkeys(CONFIRMED_COLUMNS)
    values = (estimate.mean, estimate.low, estimate.high, estimate.count)
    return dict(zip(CONFIRMED_COLUMNS, values, strict=True))


def confirmed_headline(confirmation: Confirmation) -> str:
    """What has become of the best accuracies, in one sentence."""
    best = [(study.name, study.best) for study in confirmation.studies if study.best]
    found = [(name, setting.estimate) for name, setting in best if setting.estimate]
    if not found:
        return "Unconfirmed so far: no run of a best setting with another seed has ended."
    parts = [
        f"{e.mean:.4f}{_interval(e)}"
        + (f" ({_short(name)})" if len(confirmation.studies) > 1 else "")
        for name, e in found
    ]
    so_far = _so_far([run for _, setting in best for run in setting.runs])
    return f"Confirmed{so_far}, on the test images with fresh seeds: {', '.join(parts)}."


def _so_far(runs: Sequence[Run]) -> str:
    """How many of some runs have ended, where others have not."""
    ended = sum(run.outcome in OUTCOMES for run in runs)
    return f" so far ({ended} of {len(runs)} runs)" if ended < len(runs) else ""


def confirmed_sentence(confirmation: Confirmation, study: str, trial: TrialStatus) -> str:
    """What the runs say of a trial's settings, in a sentence or two."""
    setting = confirmation.of_trial(study, trial.number)
    if setting is None:
        return "Unconfirmed: its settings were not trained with other seeds."
    estimate = setting.estimate
    if estimate is None:
        return "Unconfirmed so far: no run with another seed has ended."
    count = f"{estimate.count} run{'s' if estimate.count > 1 else ''}"
    said = f"Confirmed{_so_far(setting.runs)}: {estimate.mean:.4f} on the test images"
    said += f", the mean over {count}"
    if estimate.low is not None and estimate.high is not None:
        said += f", 95 % interval {estimate.low:.4f} to {estimate.high:.4f}"
    if setting.drop is not None and trial.accuracy == setting.found:
        side = "less" if setting.drop >= 0 else "more"
        said += f"; {abs(setting.drop):.4f} {side} than the sweep found"
        if setting.again is not None and not confirmation.on_test:
            said += f", on whose validation images the same runs reach {setting.again:.4f}"
    parts = [said + "."]
    if setting.count("diverged"):
        of = len(setting.runs)
        parts.append(f"{setting.count('diverged')} of {of} runs diverged, and count as a guess.")
    if setting.count("failed"):
        parts.append(f"{setting.count('failed')} of {len(setting.runs)} runs failed.")
    if setting.versus is not None:
        parts.append(_versus_sentence(setting.versus, confirmation.comparisons))
    return " ".join(parts)


def _versus_sentence(versus: Comparison, comparisons: int) -> str:
    ahead = versus.ahead
    side = "ahead of" if ahead.mean >= 0 else "behind"
    said = f"With the same seeds the best is {side} it by {abs(ahead.mean):.4f}"
    if versus.corrected is None:
        return said + ", in every pair alike: no test can be made of it."
    corrected = f", corrected for {comparisons} comparisons" if comparisons > 1 else ""
    evidence = "" if versus.corrected <= 0.05 else ": no evidence of a difference"
    return f"{said} (paired t test{corrected}: {p_text(versus.corrected)}){evidence}."


def p_text(p: float) -> str:
    """A p value as `p = 0.031` or `p < 0.001`."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def confirmed_notes(confirmation: Confirmation) -> list[str]:
    """What to keep in mind when reading the confirmed accuracies."""
    found = [
        f"Confirmed: mean accuracy on the test images after the last epoch, over runs with "
        f"{_seeds(confirmation.seeds)}, which {confirmation.confirms} did not use; in brackets its "
        "95\u00a0% interval by Student's t over seeds, for these test images and this split."
    ]
    if confirmation.on_test:
        found.append(
            f"{confirmation.confirms} scores its trials on the test images too: they have taken "
            "part in the choice of the best, and what is confirmed on them may still read too high."
        )
    else:
        found.append("Each run scored the test images once, and no trial did.")
    if confirmation.count("diverged"):
        found.append(
            "A run that diverged counts with the accuracy of a guess, 1 over the classes; with "
            "such runs among others an interval is rough, as they are far from a normal spread."
        )
    if failed := confirmation.count("failed"):
        found.append(
            f"{plural(failed, 'run')} failed and {'is' if failed == 1 else 'are'} left out; sweep "
            f"confirm {confirmation.confirms} runs again what failed once."
        )
    return found


def column_note(confirmation: Confirmation) -> str:
    """What the columns of `confirmation_rows` are."""
    found = "found: the accuracy in the sweep, which the best was picked by."
    if confirmation.on_test:
        return f"{found} luck: found - confirmed."
    return (
        f"{found} luck: found - what these runs reach on the same validation images. drop: found - "
        "confirmed; beyond the luck, it is how the test images differ."
    )


def comparison_lines(confirmation: Confirmation) -> list[str]:
    """The best of each study against its known settings, one line each, and what the test is."""
    lines = [
        f"{_short(study.name)}: best is ahead of {setting.setting} by "
        f"{versus.ahead.mean:+.4f}{_interval(versus.ahead)}"
        + (f", {p_text(versus.corrected)}" if versus.corrected is not None else "")
        for study in confirmation.studies
        for setting in study.settings
        if (versus := setting.versus)
    ]
    if tests := confirmation.comparisons:
        several = f", corrected by Holm's method for {tests} comparisons" if tests > 1 else ""
        lines.append(
            "p is that of the two-sided paired t test over the seeds that both settings have"
            f"{several}."
        )
    return lines


def _seeds(seeds: Sequence[int]) -> str:
    if not seeds:
        return "no seeds yet"
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"the seeds {seeds[0]} to {seeds[-1]}"
    return f"the seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def confirmation_columns(confirmation: Confirmation) -> list[str]:
    """What the table of a confirmation says of each setting."""
    columns = ["study", "setting", "runs", "found", "confirmed", "luck", "drop"]
    if confirmation.on_test:  # where they are the same
        columns.remove("drop")
    return columns


def confirmation_rows(confirmation: Confirmation) -> Iterator[tuple[bool, bool, list[str]]]:
    """Each setting: whether it is the best, whether it ends its study, and its text by column."""
    columns = confirmation_columns(confirmation)
    for study in confirmation.studies:
        for k, setting in enumerate(study.settings):
            cells = _cells(study, setting)
            row = [cells[column] for column in columns]
            yield setting.best, k == len(study.settings) - 1, row if k == 0 else ["", *row[1:]]


def _cells(study: ConfirmedStudy, setting: ConfirmedSetting) -> dict[str, str]:
    ended = sum(run.outcome in OUTCOMES for run in setting.runs)
    of = f" of {len(setting.runs)}" if ended < len(setting.runs) else ""
    told, estimate = _told(setting), setting.estimate
    return {
        "study": _short(study.name),
        "setting": setting.setting + ("" if setting.trial is None else f" (#{setting.trial})"),
        "runs": f"{ended}{of}" + (f" ({', '.join(told)})" if told else ""),
        "found": _accuracy(setting.found),
        "confirmed": f"{estimate.mean:.4f}{_interval(estimate)}" if estimate else "–",
        "luck": _signed(setting.luck),
        "drop": _signed(setting.drop),
    }  # fmt: skip


def _accuracy(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}"
