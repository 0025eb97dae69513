"""The answer in a table: the best setting of each study beside the settings that were known."""

from __future__ import annotations

from rich.table import Table

from sweeps.progress import describe_params
from sweeps.status import OUTCOMES, StudyStatus, SweepStatus, TrialStatus

VALIDATION_NOTE = {
    "holdout": "Accuracies are on images held out of training; the test images are untouched.",
    "test": (
        "Accuracies are on the test images, as in the post: the best of them is selected on "
        "what it is measured on, and so reads too high."
    ),
}


def answer_table(status: SweepStatus) -> Table:
    """For each study: the best complete trial, then every labelled `[[try]]`."""
    table = Table(title=status.title or status.name, title_justify="left", caption_justify="left")
    table.add_column("study", overflow="fold")
    table.add_column("setting", overflow="fold")
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    if status.searched:
        table.add_column("searched settings", overflow="fold", ratio=1)
    for study in status.studies:
        rows: list[tuple[str, TrialStatus]] = []
        if study.best is not None:
            rows.append(("best", study.best))
        rows.extend((t.label, t) for t in study.trials if t.label)
        if not rows:
            table.add_row(_short(status, study), "no complete trial yet")
        for position, (setting, trial) in enumerate(rows):
            cells = [
                _short(status, study) if position == 0 else "",
                setting,
                f"#{trial.number}",
                trial.outcome,
                _accuracy(trial),
            ]
            if status.searched:
                cells.append(describe_params(trial.params))
            table.add_row(
                *cells,
                style="bold" if setting == "best" else None,
                end_section=position == len(rows) - 1,
            )
    table.caption = VALIDATION_NOTE[status.validation]
    if status.seeds > 1:
        table.caption += f" Each is the mean over {status.seeds} seeds."
    return table


def outcome_lines(status: SweepStatus) -> list[str]:
    """One line for each study: how many trials ended how, and why those that diverged did."""
    lines = []
    for study in status.studies:
        counts = [
            f"{study.count(outcome)} {outcome}"
            for outcome in (*OUTCOMES, "running", "queued")
            if study.count(outcome)
        ]
        line = f"{study.name}: {study.finished} of {study.budget} trials; " + ", ".join(counts)
        lines.append(line)
        lines.extend(f"  #{t.number} {t.outcome}: {t.reason}" for t in study.trials if t.reason)
    return lines


def _short(status: SweepStatus, study: StudyStatus) -> str:
    return study.name.removeprefix(f"{status.name}/")


def _accuracy(trial: TrialStatus) -> str:
    if trial.accuracy is None or trial.outcome in ("diverged", "failed"):
        return "–"
    return f"{trial.accuracy:.4f}" if trial.outcome == "complete" else f"({trial.accuracy:.4f})"
