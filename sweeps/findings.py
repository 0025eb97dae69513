"""What a report says of a sweep: its status with the curves behind it, and the answer in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.attributes import CURVES, DEVICE_ACCURACIES
from sweeps.config import TrialConfig, Value, written
from sweeps.confirmation import estimated, read_answer
from sweeps.confirmed import (
    CONFIRMED_COLUMNS,
    confirmed_cells,
    confirmed_headline,
    confirmed_notes,
    confirmed_sentence,
    shown_interval,
)
from sweeps.progress import describe_params
from sweeps.report import answer_note
from sweeps.spec import SweepSpec, within_sweep
from sweeps.status import OUTCOMES, StudyStatus, SweepStatus, TrialStatus
from sweeps.studies import StoredSweep

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

FEWEST_FOR_IMPORTANCE = 8
"""Complete trials of a study below which a parameter's importance is noise."""

ALWAYS_TOLD = (
    "dataset", "model", "norm", "num_devices", "split", "algorithm", "global_batch_size", "epochs",
)  # fmt: skip
"""Settings that a report names, whatever they are."""

TOLD = (
    "image_size", "noise_std", "num_train_images", "width_factor", "classes_per_device", "alpha",
    "participation", "local_steps", "optimizer", "schedule",
)  # fmt: skip
"""Those that it names where the sweep sets them."""

NEAR_END = 0.05
"""A value is at an end of its range when so small a part of the range is beyond it."""

USED_WITH: Mapping[str, tuple[str, tuple[Value, ...]]] = {
    "crop_padding": ("augment", ("crop", "crop-flip")),
    "num_groups": ("norm", ("group",)),
    "classes_per_device": ("split", ("classes",)),
    "alpha": ("split", ("dirichlet", "quantity")),
    "min_images_per_device": ("split", ("dirichlet", "quantity")),
    "local_steps": ("algorithm", ("fedavg", "scaffold")),
    "server_beta2": ("server_optimizer", ("adam",)),
    "server_epsilon": ("server_optimizer", ("adam",)),
    "plateau_factor": ("schedule", ("plateau",)),
    "plateau_patience": ("schedule", ("plateau",)),
    "plateau_threshold": ("schedule", ("plateau",)),
    "exponential_gamma": ("schedule", ("exponential",)),
    "lars_trust_coefficient": ("optimizer", ("lars",)),
    "muon_lr_factor": ("optimizer", ("muon",)),
    "muon_weight_decay": ("optimizer", ("muon",)),
}
"""Settings that a training looks at only where another one has one of these values."""

DRAWN_DIVERGED = 3
"""Curves of diverged trials that are kept for each study, those of a `[[try]]` first."""


@dataclass(frozen=True)
class StudyFindings:
    """One study, with what the figures need beside its status.

    Attributes:
        status: budget and trials.
        name: the study's name, without the sweep's.
        config: what its trials share; the parameters are at their lowest.
        validation_images: how many images an accuracy is measured on; None where nobody has counted
            them yet.
        curves: validation accuracy after each epoch, by trial number: of the best trial and of
            some that diverged. Over several seeds, the mean of a complete trial, and the last
            seed of any other.
        seed_accuracies: of each complete trial, by its number, the final accuracy with each seed;
            empty for one seed.
        device_accuracies: what the best trial's network is worth to each device whose classes are
            among the validation images (`sweeps.attributes`), the worst one's first.
        importance: share of each parameter, or empty where too few trials completed.
    """

    status: StudyStatus
    name: str
    config: TrialConfig
    validation_images: int | None
    curves: Mapping[int, Sequence[float]]
    seed_accuracies: Mapping[int, Sequence[float]]
    device_accuracies: Sequence[float]
    importance: Mapping[str, float]

    @property
    def best_seed_accuracies(self) -> Sequence[float]:
        """The best trial's final accuracy with each seed; empty for one seed."""
        best = self.status.best
        return self.seed_accuracies.get(best.number, ()) if best else ()

    @property
    def devices_differ(self) -> bool:
        """Whether the devices of the best trial are to have classes of their own."""
        params = self.status.best.params if self.status.best else {}
        return params.get("split", self.config.split) not in ("iid", "quantity")

    def standard_error(self, accuracy: float) -> float | None:
        """Binomial standard error of one training's accuracy, sqrt(p (1 - p) / n)."""
        images = self.validation_images
        return math.sqrt(accuracy * (1 - accuracy) / images) if images else None


@dataclass(frozen=True)
class Findings:
    """One sweep, as a report shows it."""

    spec: SweepSpec
    status: SweepStatus
    studies: Sequence[StudyFindings]

    @property
    def title(self) -> str:
        """What to call it."""
        return self.status.title or self.status.name


def read_findings(store: BaseStorage, sweep: StoredSweep) -> Findings:
    """Read a sweep's state, the curves to draw and the importances; writes nothing."""
    spec, status = sweep.spec, read_answer(store, sweep)
    seeds = spec.budget.seeds
    studies = []
    for stored, study in zip(sweep.studies, status.studies, strict=True):
        config = spec.lowest_config(stored.cell)
        recorded = {t.number: t for t in store.get_all_trials(stored.study_id, deepcopy=False)}
        diverged = [t for t in study.trials if t.outcome == "diverged"]
        diverged.sort(key=lambda t: (not t.label, t.number))
        drawn = [*([study.best] if study.best else []), *diverged[:DRAWN_DIVERGED]]
        complete = [recorded[t.number] for t in study.trials if t.outcome == "complete"]
        of_devices: list[float | None] = []
        if study.best:
            best = recorded[study.best.number]
            of_devices = best.system_attrs.get(DEVICE_ACCURACIES, [])
        studies.append(
            StudyFindings(
                status=study,
                name=within_sweep(study.name),
                config=config,
                validation_images=stored.scored_images,
                curves={t.number: _curve(recorded[t.number], config.epochs, seeds) for t in drawn},
                seed_accuracies={
                    t.number: [values[-1] for values in _per_seed(t, config.epochs)]
                    for t in (complete if seeds > 1 else ())
                },
                device_accuracies=sorted(a for a in of_devices if a is not None),
                importance=_importance(store, stored.name, len(complete), status.searched),
            )
        )
    return Findings(spec, status, studies)


def _per_seed(trial: FrozenTrial, epochs: int) -> list[list[float]]:
    values = trial.system_attrs.get(CURVES, {}).get("val_accuracy", [])
    return [values[start : start + epochs] for start in range(0, len(values), epochs)]


def _curve(trial: FrozenTrial, epochs: int, seeds: int) -> list[float]:
    if seeds == 1:
        return [value for _, value in sorted(trial.intermediate_values.items())]
    per_seed = _per_seed(trial, epochs)
    if trial.state.name == "COMPLETE":
        return [sum(column) / len(column) for column in zip(*per_seed, strict=False)]
    return per_seed[-1] if per_seed else []


def _importance(
    store: BaseStorage, study_name: str, complete: int, searched: Sequence[str]
) -> dict[str, float]:
    """PED-ANOVA's shares; empty where they would mean nothing."""
    from sweeps.importance import importance_shares

    if complete < FEWEST_FOR_IMPORTANCE or len(searched) < 2:
        return {}
    # Five trials at least are to count as good, and never more than half of them.
    found = importance_shares(store, study_name, min(0.5, max(0.1, 5 / complete)))
    return {name: found[name] for name in searched if name in found}


# --- words --------------------------------------------------------------------------------------


def headline(findings: Findings) -> str:
    """The best accuracies, and what their confirmation has made of them."""
    said = _best_accuracies(findings)
    confirmation = findings.status.confirmation
    return f"{said} {confirmed_headline(confirmation)}" if confirmation else said


def _best_accuracies(findings: Findings) -> str:
    best = [(s.name, s.status.best) for s in findings.studies]
    found = [(name, t, t.accuracy) for name, t in best if t and t.accuracy is not None]
    if not found:
        return "No trial has completed yet, so there is no best one."
    if len(findings.studies) == 1:
        return f"Best accuracy: {found[0][2]:.4f}, by trial #{found[0][1].number}."
    found.sort(key=lambda entry: -entry[2])
    if len(found) > 6:
        (high, _, most), (low, _, least) = found[0], found[-1]
        return (
            f"Best accuracies of {len(found)} studies: from {most:.4f} ({high}) down to "
            f"{least:.4f} ({low})."
        )
    return "Best accuracy: " + ", ".join(f"{value:.4f} ({name})" for name, _, value in found) + "."


def trained_sentence(spec: SweepSpec) -> str:
    """What all trials of a sweep share: the data, the network, the devices."""
    config = spec.lowest_config(spec.cells[0])
    differ = {*spec.search, *(name for cell in spec.cells for name in cell)}
    shared = {
        name: value
        for name, value in config.as_dict().items()
        if name not in differ and (name in ALWAYS_TOLD or (name in TOLD and name in spec.train))
    }
    seeds = spec.budget.seeds
    return f"Trained: {describe_params(shared)}" + (f" seeds={seeds}" if seeds > 1 else "")


def progress_sentence(status: SweepStatus) -> str:
    """How many trials ended how, and what is still to come."""
    count = {o: sum(s.count(o) for s in status.studies) for o in (*OUTCOMES, "running", "queued")}
    total = sum(study.budget for study in status.studies)
    ended = sum(count[outcome] for outcome in OUTCOMES)
    text = f"{ended} of {total} trials {'has' if ended == 1 else 'have'} ended"
    parts = [f"{count[outcome]} {outcome}" for outcome in OUTCOMES if count[outcome]]
    text += f": {', '.join(parts)}." if parts else "."
    if not status.done:
        text += (
            f" {count['running']} running and {count['queued']} queued: what stands here may "
            "still change."
        )
    return text


def study_sentences(findings: Findings, study: StudyFindings) -> list[str]:
    """The best trial of a study, then each known one against it."""
    best = study.status.best
    searched = bool(findings.status.searched)
    complete = study.status.count("complete")
    if best is None or best.accuracy is None:
        sentences = ["No trial has completed."]
    else:
        which = (
            f"the best of {complete} complete trials" if complete > 1 else "the only complete trial"
        )
        sentence = f"{which} is #{best.number}" + (f" (“{best.label}”)" if best.label else "")
        if best.carried_from:
            sentence += f" (carried from {best.carried_from})"
        sentence += f" with accuracy {best.accuracy:.4f}{_uncertainty(study, best.accuracy)}"
        if searched:
            sentence += f", at {describe_params(best.params)}"
        sentences = [sentence[0].upper() + sentence[1:] + "."]
        sentences += _on_worst_device(study, best)
        sentences += _at_the_end(findings.spec, study, best)
        sentences += _confirmed(findings, study, best)
    for trial in study.status.trials:
        if trial.label and trial is not best:
            sentences.append(_known(findings, study, trial))
            sentences += _confirmed(findings, study, trial)
    return sentences


def _on_worst_device(study: StudyFindings, best: TrialStatus) -> list[str]:
    """What a best trial is worth where it is worth least, if the devices' classes differ."""
    worst = best.worst_device_accuracy
    if worst is None or not study.devices_differ:
        return []
    return [f"On the classes of the device that it serves worst its accuracy is {worst:.4f}."]


def _at_the_end(spec: SweepSpec, study: StudyFindings, best: TrialStatus) -> list[str]:
    """Which parameters of a best trial stand at an end of what is searched, if any do.

    A known configuration may stand there by intention, an end at which the setting itself ends
    cannot be moved, `choices` have no ends, and what the trial made no use of stands anywhere.
    """
    found = []
    settings = {**study.config.as_dict(), **best.params}
    for name, value in best.params.items() if not best.label else ():
        decides, values = USED_WITH.get(name, (name, (value,)))
        if settings[decides] not in values:
            continue
        end = spec.search[name].end_near(value, NEAR_END) if name in spec.search else None
        setting = TrialConfig.setting(name, "[search]")
        if end is not None and end not in (setting.low, setting.high):
            found.append(f"{name} stands at the end of its range, {spec.search[name]}")
    return [f"{'; '.join(found)}: what is better may lie beyond."] if found else []


def _confirmed(findings: Findings, study: StudyFindings, trial: TrialStatus) -> list[str]:
    confirmation = findings.status.confirmation
    return [confirmed_sentence(confirmation, study.name, trial)] if confirmation else []


def _uncertainty(study: StudyFindings, accuracy: float) -> str:
    if values := study.best_seed_accuracies:
        interval = shown_interval(estimated(values))
        return f"{interval} (seeds from {min(values):.4f} to {max(values):.4f})"
    error = study.standard_error(accuracy)
    return "" if error is None else f" ± {error:.4f}"


def _known(findings: Findings, study: StudyFindings, trial: TrialStatus) -> str:
    name, best = f"“{trial.label}” (#{trial.number})", study.status.best
    if trial.outcome == "queued":
        return f"{name} has not run yet."
    if trial.outcome == "running":
        return f"{name} is running, {trial.step} epochs in."
    if trial.outcome in ("diverged", "failed"):
        return f"{name} {trial.outcome}{f': {trial.reason}' if trial.reason else ''}."
    if trial.outcome == "pruned":
        at = f" at {trial.accuracy:.4f}" if trial.accuracy is not None else ""
        return f"{name} was pruned after {trial.step} epochs{at}."
    if trial.accuracy is None or best is None or best.accuracy is None:
        return f"{name} ended as {trial.outcome}."
    behind = best.accuracy - trial.accuracy
    said = f"{name} reached {trial.accuracy:.4f}, "
    if round(behind, 4) == 0:
        return said + "as much."
    said += f"{behind:.4f} less"
    error = study.standard_error(best.accuracy)
    if findings.status.seeds == 1 and error is not None and behind <= error:
        said += (
            f": within the standard error of {error:.4f} that {study.validation_images:,} "
            "validation images give, and from a single seed, so no evidence of a difference"
        )
    return said + "."


def comparison_sentences(sweeps: Sequence[Findings]) -> list[str]:
    """The best accuracies of several sweeps, side by side for each setting that they share.

    Empty where no two of them have a study with equal enumerated settings, or only one is given.
    """
    shared: dict[str, list[tuple[float, str, StudyFindings]]] = {}
    for sweep in sweeps:
        for study in sweep.studies:
            best = study.status.best
            if best is not None and best.accuracy is not None:
                name = ", ".join(f"{k} = {written(v)}" for k, v in study.status.cell.items())
                shared.setdefault(name, []).append((best.accuracy, sweep.status.name, study))
    said = []
    for name, found in shared.items():
        if len(found) < 2:
            continue
        found.sort(key=lambda entry: -entry[0])
        parts = [
            f"{sweep} {value:.4f}{_uncertainty(study, value)}" for value, sweep, study in found
        ]
        sentence = f"{name}: {', '.join(parts)}" if name else ", ".join(parts)
        (high, _, first), (low, _, second) = found[0], found[1]
        errors = [s.standard_error(v) for s, v in ((first, high), (second, low))]
        if not any(s.best_seed_accuracies for s in (first, second)) and None not in errors:
            # Of the difference of two independent proportions.
            error = math.hypot(*(e for e in errors if e is not None))
            if high - low <= error:
                which = "the first two differ" if len(found) > 2 else "they differ"
                sentence += f"; {which} by less than the standard error of that, {error:.4f}"
        said.append(sentence + ".")
    return said


def notes(findings: Findings) -> list[str]:
    """What to keep in mind when reading the accuracies."""
    status = findings.status
    found = [answer_note(status)]
    measured = "was not measured"
    if status.confirmation:
        measured = "is what the confirmed intervals say"
    scored = any(study.status.best for study in findings.studies)
    if scored and status.seeds == 1 and any(s.validation_images for s in findings.studies):
        found.append(
            "± is one binomial standard error of the images scored. Each trial trained with one "
            f"seed: how far another seed would move its accuracy {measured}."
        )
    elif scored and status.seeds == 1:
        found.append(
            "Each trial trained with one seed: how far another seed would move its accuracy "
            f"{measured}."
        )
    selected = (s.status for s in findings.studies if s.status.count("complete") > 1)
    if status.confirmation:
        found += confirmed_notes(status.confirmation)
    elif any(study.validation == "holdout" for study in selected):
        found.append(
            "Unconfirmed: a best trial is chosen by the accuracy that it is reported with, so part "
            f"of its lead is luck; sweep confirm {status.name} tells how much, with fresh seeds."
        )
    return found


def ended_early(study: StudyFindings) -> Mapping[str, int]:
    """Epochs of the trials that ended: spent, and spared by pruning and by ending divergence.

    Failed trials count with what they spent.
    """
    found = {"spent": 0, "pruned": 0, "diverged": 0}
    for trial in study.status.trials:
        if trial.outcome in OUTCOMES:
            found["spent"] += trial.step
            if trial.outcome in ("pruned", "diverged"):
                found[trial.outcome] += max(0, study.status.steps_per_trial - trial.step)
    return found


def trial_rows(findings: Sequence[Findings]) -> tuple[list[str], list[dict[str, Any]]]:
    """Every trial of some sweeps, one row each, and the columns that they have.

    A setting that is enumerated or searched is a column of its own; where there is a confirmation,
    four more say what it found of each trial. The accuracy of a trial that did not complete is that
    of its last epoch.
    """
    axes = [name for f in findings for study in f.studies for name in study.status.cell]
    searched = [name for f in findings for name in f.status.searched]
    settings = {name: _column(name) for name in (*axes, *searched)}
    columns = [
        "study", "number", "outcome", "label", *settings.values(), "accuracy",
        "worst_device_accuracy", "epochs", "seconds", "reason", "carried_from",
    ]  # fmt: skip
    if any(f.status.seeds > 1 for f in findings):
        columns.insert(columns.index("accuracy") + 1, "seed_accuracies")
    confirmed = any(f.status.confirmation for f in findings)
    columns += CONFIRMED_COLUMNS if confirmed else ()
    rows = []
    found = [(f.status.confirmation, s) for f in findings for s in f.studies]
    for confirmation, of in found:
        study = of.status
        for trial in study.trials:
            values: Mapping[str, Value] = {**study.cell, **trial.params}
            rows.append(
                {
                    "study": study.name,
                    "number": trial.number,
                    "outcome": trial.outcome,
                    "label": trial.label,
                    **{column: _cell(values.get(name, "")) for name, column in settings.items()},
                    "accuracy": trial.accuracy,
                    **_seed_cell(columns, of.seed_accuracies.get(trial.number, ())),
                    "worst_device_accuracy": trial.worst_device_accuracy,
                    "epochs": trial.step,
                    "seconds": trial.seconds,
                    "reason": trial.reason,
                    "carried_from": trial.carried_from,
                    **(
                        confirmed_cells(confirmation, study.name, trial.number) if confirmed else {}
                    ),
                }
            )
    return columns, rows


def _seed_cell(columns: Sequence[str], accuracies: Sequence[float]) -> dict[str, str]:
    if "seed_accuracies" not in columns:
        return {}
    return {"seed_accuracies": ";".join(f"{accuracy:.6g}" for accuracy in accuracies)}


def _column(setting: str) -> str:
    """The column of a setting; `epochs` alone says what a trial has completed."""
    return "each.epochs" if setting == "epochs" else setting


def _cell(value: Value) -> Value:
    return written(value) if isinstance(value, bool) else value
