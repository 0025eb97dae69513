"""The answer in a table: the best trial of each study beside those that were known."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sweeps.confirmation import Confirmation
from sweeps.confirmed import (
    UNCONFIRMED,
    column_note,
    comparison_lines,
    confirmation_columns,
    confirmation_rows,
    confirmed_notes,
    shown_estimate,
)
from sweeps.errors import plural
from sweeps.progress import PlainTable, describe_params
from sweeps.spec import within_sweep
from sweeps.status import OUTCOMES, SweepStatus, TrialStatus

VALIDATION_NOTE = {
    "holdout": "Accuracies are on images held out of training, not on the test images.",
    "test": (
        "Accuracies are on the test images, as in the post: the best of them is selected on "
        "what it is measured on, and so reads too high."
    ),
}


ON_TEST = "Accuracies are on the test images."
"""Of the runs of a confirmation."""


@dataclass(frozen=True)
class AnswerRow:
    """One row of the answer.

    Attributes:
        study: the study's name, without the sweep's.
        configuration: "best", the label of a `[[try]]`, or both.
        trial: None where no trial of the study has completed and none is labelled.
        is_best: whether it is the best complete trial of its study.
    """

    study: str
    configuration: str
    trial: TrialStatus | None
    is_best: bool = False

    def cells(self, status: SweepStatus) -> list[str]:
        """Its text under each of `answer_columns`."""
        if self.trial is None:
            return [self.study, self.configuration, *[""] * (len(answer_columns(status)) - 2)]
        cells = [
            self.study, self.configuration, f"#{self.trial.number}", self.trial.outcome,
            _accuracy(self.trial),
        ]  # fmt: skip
        if status.confirmation:
            confirmed = status.confirmation.of_trial(self.study, self.trial.number)
            cells.append(shown_estimate(confirmed) if confirmed else UNCONFIRMED)
        return [*cells, describe_params(self.trial.params)] if status.searched else cells


def answer_columns(status: SweepStatus) -> list[str]:
    """What the answer says of each row."""
    columns = ["study", "configuration", "trial", "outcome", "accuracy"]
    columns += ["confirmed"] if status.confirmation else []
    return [*columns, "parameters"] if status.searched else columns


def answer_rows(status: SweepStatus) -> list[list[AnswerRow]]:
    """For each study: the best complete trial, then every labelled `[[try]]`."""
    found = []
    for study in status.studies:
        name = within_sweep(study.name)
        best = study.best
        rows = [AnswerRow(name, t.label, t) for t in study.trials if t.label and t != best]
        if best is not None:
            called = f"best: {best.label}" if best.label else "best"
            rows.insert(0, AnswerRow(name, called, best, is_best=True))
        found.append(rows or [AnswerRow(name, "no complete trial yet", None)])
    return found


def answer_note(status: SweepStatus) -> str:
    """What the accuracies of the answer are measured on."""
    scored: dict[str, list[str]] = {}
    for study in status.studies:
        scored.setdefault(study.validation, []).append(within_sweep(study.name))
    note = " ".join(
        # Studies may differ in it, where [each] says so.
        (f"{', '.join(names)}: " if len(scored) > 1 else "") + VALIDATION_NOTE[validation]
        for validation, names in scored.items()
    )
    if status.seeds > 1:
        note += f" Each is the mean over {status.seeds} seeds."
    if status.confirmation:
        note += (
            " Confirmed are means on the test images over runs with other seeds, with their "
            f"95\u00a0% interval; sweep status {status.confirmation.name} says more."
        )
    return note


def answer_table(status: SweepStatus) -> Table | FittedAnswer:
    """The answer for a terminal; of a confirmation, its configurations instead of its trials."""
    if status.confirms and status.confirmation:
        return _confirmation_table(_heading(status), status.confirmation)
    return FittedAnswer(status)


class FittedAnswer:
    """The answer's table; what it is too wide for stands below it: parameters, confirmed means."""

    def __init__(self, status: SweepStatus) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What fits the width that there is."""
        status, columns = self._status, answer_columns(self._status)
        free = options.update(width=10_000)
        below: list[str] = []
        table = _trial_table(status, columns)
        while Measurement.get(console, free, table).maximum > options.max_width and (
            columns[-1] in ("parameters", "confirmed")
        ):
            below.insert(0, columns.pop())
            table = _trial_table(status, columns)
        if not below:
            table.caption = answer_note(status)
        yield table
        if not below:
            return
        for rows in answer_rows(status):
            for row in rows:
                if row.trial is not None:
                    name = f"{row.study}, {row.configuration} (#{row.trial.number}):"
                    yield Text(name, style="bold" if row.is_best else "")
                    cells = dict(zip(answer_columns(status), row.cells(status), strict=True))
                    for column in below:
                        word = "" if column == "parameters" else f"{column} "
                        yield Padding(Text(word + cells[column]), (0, 0, 0, 2))
        yield Text(answer_note(status), style="table.caption")


def _heading(status: SweepStatus) -> str:
    return f"{status.name}: {status.title}" if status.title else status.name


def _trial_table(status: SweepStatus, columns: list[str]) -> Table:
    # As Text, so that no label is taken for Rich's markup.
    title = Text(_heading(status), style="table.title")
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        if column in ("study", "configuration", "parameters"):
            table.add_column(column, overflow="fold")
        else:
            right = column in ("trial", "accuracy")
            table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for rows in answer_rows(status):
        for position, row in enumerate(rows):
            cells = row.cells(status)[: len(columns)]
            table.add_row(
                *(Text(cell) for cell in (cells if position == 0 else ["", *cells[1:]])),
                style="bold" if row.is_best else None,
                end_section=position == len(rows) - 1,
            )
    return table


def trials_table(status: SweepStatus) -> Table:
    """Every trial, a row each."""
    title = Text(_heading(status), style="table.title")
    table = PlainTable(title=title, title_justify="left", caption_justify="left")
    for column in ("study", "trial", "outcome", "accuracy", "epochs", "label", "parameters"):
        number = column in ("trial", "accuracy", "epochs")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for study in status.studies:
        for trial in study.trials:
            cells = [within_sweep(study.name), f"#{trial.number}", trial.outcome, _accuracy(trial)]
            cells += [str(trial.step), trial.label, describe_params(trial.params)]
            best = study.best is not None and trial.number == study.best.number
            table.add_row(*cells, style="bold" if best else None)
    scored = ON_TEST if status.confirms else answer_note(status)
    table.caption = f"{scored} In brackets: that of a trial that did not complete."
    return table


def _confirmation_table(title: str, confirmation: Confirmation) -> Table:
    table = Table(
        title=Text(title, style="table.title"), title_justify="left", caption_justify="left"
    )
    for column in confirmation_columns(confirmation):
        number = column in ("found", "luck", "drop")
        table.add_column(
            column,
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=number,
            min_width=len(column),
        )
    for best, last, cells in confirmation_rows(confirmation):
        table.add_row(*map(Text, cells), style="bold" if best else None, end_section=last)
    table.caption = "\n".join(
        [*comparison_lines(confirmation), *confirmed_notes(confirmation), column_note(confirmation)]
    )
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
    if status.spent:
        left = sum(max(0, study.budget - study.finished) for study in status.studies)
        lines.append(
            f"the budget {status.spent} is spent, with {left} trials not finished; raised with "
            "--set, they go on"
        )
    return lines


def disk_line(name: str, storage_url: str) -> str:
    """What the checkpoints of a sweep hold of this machine's disk."""
    from storage.checkpoints import CheckpointStore, default_checkpoint_dir
    from storage.urls import is_grpc

    checkpoints = CheckpointStore(default_checkpoint_dir(storage_url))
    if is_grpc(storage_url):
        return "checkpoints lie on the machines of the workers"
    try:
        count, used = checkpoints.disk_usage(f"{name}/")
    except OSError as error:
        return f"the checkpoints in {checkpoints.root} cannot be seen ({error.strerror})"
    return f"{plural(count, 'checkpoint')} of {used / 1e6:.1f} MB in {checkpoints.root}"


def _accuracy(trial: TrialStatus) -> str:
    if trial.accuracy is None or trial.outcome in ("diverged", "failed"):
        return "–"
    return f"{trial.accuracy:.4f}" if trial.outcome == "complete" else f"({trial.accuracy:.4f})"
