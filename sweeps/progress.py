"""A running sweep on a terminal, or as plain lines where there is none."""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from sweeps.config import Value, written
from sweeps.spec import within_sweep
from sweeps.status import OUTCOMES, SweepStatus, TrialStatus

SIGNAL_SECONDS = 0.2
"""How often a question looks for signals while it waits for its answer."""


def print_line(console: Console, line: str) -> None:
    """Print a line as it is: nothing in it is Rich's markup, and a narrow terminal breaks none."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def can_ask(console: Console) -> bool:
    """Whether somebody is there to answer a question."""
    return console.is_terminal and sys.stdin.isatty()


def says_yes(console: Console, question: str) -> bool:
    """Ask on a terminal; whatever is not yes is no.

    Args:
        console: of the terminal.
        question: without what may be answered.
    """
    console.print(f"{question} [y/N] ", end="", highlight=False, markup=False, soft_wrap=True)
    # Not `input`: a signal that comes just before it blocks is not handled until it returns.
    while not select.select([sys.stdin], [], [], SIGNAL_SECONDS)[0]:
        pass
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class View(Protocol):
    """Shows a sweep's state as it changes."""

    def __enter__(self) -> View: ...
    def __exit__(self, *_: object) -> None: ...
    def update(self, status: SweepStatus) -> None: ...  # noqa: D102
    def say(self, line: str) -> None: ...  # noqa: D102


def open_view(console: Console, hint: str = "") -> View:
    """A live view on a terminal, plain lines elsewhere.

    Args:
        console: where it goes.
        hint: what Ctrl-C does, shown below a live view.
    """
    return LiveView(console, hint) if console.is_terminal else PlainView(console)


class PlainView:
    """One line for each trial that ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: set[tuple[str, int]] | None = None

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, status: SweepStatus) -> None:
        """Print what has ended since the last update; what had ended before the first is old."""
        ended = {
            (study.name, trial.number): (study, trial)
            for study in status.studies
            for trial in study.trials
            if trial.outcome not in ("running", "queued")
        }
        if self._seen is None:
            self._seen = set(ended)
        total = sum(study.budget for study in status.studies)
        for key in [key for key in ended if key not in self._seen]:
            self._seen.add(key)
            study, trial = ended[key]
            self.say(f"[{len(self._seen)}/{total}] {study.name} {describe(trial)}")

    def say(self, line: str) -> None:
        """Print one line, whole."""
        print_line(self._console, line)


class JsonView:
    """One line of JSON for each change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, Any] | None = None

    def __enter__(self) -> JsonView:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, status: SweepStatus) -> None:
        """Print the state if it is another than before."""
        state = status.as_dict()
        if state != self._shown:
            self._shown = state
            self.say(json.dumps(state))

    def say(self, line: str) -> None:
        """Print one line, whole, at once."""
        self._console.file.write(line + "\n")
        self._console.file.flush()


class LiveView:
    """Studies, running trials and time left, redrawn in place.

    Args:
        console: a terminal.
        hint: what Ctrl-C does.
    """

    def __init__(self, console: Console, hint: str = "") -> None:
        self._console = console
        self._hint = hint
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._task = self._bar.add_task("trials", total=None, left="")
        self._start: tuple[float, float] | None = None
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.__exit__(None, None, None)

    def update(self, status: SweepStatus) -> None:
        """Redraw."""
        total = sum(study.budget for study in status.studies)
        finished = sum(study.finished for study in status.studies)
        done = finished + sum(
            min(1.0, trial.step / study.steps_per_trial)
            for study in status.studies
            for trial in study.trials
            if trial.outcome == "running"
        )
        self._bar.update(
            self._task,
            total=total,
            completed=done,
            description=f"{finished} of {total} trials",
            left=self._time_left(done, total),
        )
        self._live.update(
            Group(
                Text(f"{status.name}: {status.question}", style="bold"),
                self._bar,
                study_table(status),
                _running_table(status),
                _best_lines(status),
                Text(self._hint, style="dim"),
            )
        )

    def say(self, line: str) -> None:
        """Print one line above the view."""
        print_line(self._console, line)

    def _time_left(self, done: float, total: int) -> str:
        """By the speed since this run began; what earlier runs did must not count into it."""
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)
        began, before = self._start
        if done - before < 0.05:
            return "time left: –"
        seconds = (now - began) * (total - done) / (done - before)
        return f"about {timedelta(seconds=round(max(0.0, seconds)))} left"


def describe(trial: TrialStatus) -> str:
    """A trial in one line: number, outcome, accuracy, parameters."""
    parts = [f"#{trial.number}", trial.outcome]
    if trial.accuracy is not None:
        parts.append(f"{trial.accuracy:.4f}")
    if trial.label:
        parts.append(f"“{trial.label}”")
    if trial.carried_from:
        parts.append(f"carried from {trial.carried_from}")
    parts.append(describe_params(trial.params))
    if trial.reason:
        parts.append(f"({trial.reason})")
    if trial.seconds is not None:
        parts.append(f"{trial.seconds:.1f} s")
    return "  ".join(part for part in parts if part)


def describe_params(params: Mapping[str, Value]) -> str:
    """Parameters as `name=value`, numbers to four digits."""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={written(value)}"
        for name, value in params.items()
    )


class PlainTable(Table):
    """A table whose cells are text: what users call their tries is no markup."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row; a `str` stands for itself."""
        super().add_row(*(Text(c) if isinstance(c, str) else c for c in cells), **options)


def study_table(status: SweepStatus) -> Table:
    """Each study's trials by outcome and its best accuracy so far."""
    table = PlainTable(box=None, pad_edge=False, header_style="dim")
    table.add_column("study", overflow="fold", ratio=1)
    for column in ("done", "complete", "pruned", "diverged", "failed", "running", "best"):
        table.add_column(column, justify="right", no_wrap=True)
    for study in status.studies:
        best = study.best
        table.add_row(
            within_sweep(study.name),
            f"{study.finished}/{study.budget}",
            *(str(study.count(outcome)) for outcome in (*OUTCOMES, "running")),
            f"{best.accuracy:.4f}" if best and best.accuracy is not None else "–",
        )
    return table


def _best_lines(status: SweepStatus) -> Text:
    """The parameters of each study's best, a line each."""
    lines = [
        f"best of {study.name.removeprefix(f'{status.name}/')}: {describe_params(best.params)}"
        for study in status.studies
        if (best := study.best) and best.params
    ]
    return Text("\n".join(lines), style="dim", overflow="ellipsis", no_wrap=True)


def _running_table(status: SweepStatus) -> Table:
    table = PlainTable(box=None, pad_edge=False, header_style="dim")
    table.add_column("running", overflow="fold", ratio=1)
    for column in ("trial", "epoch", "accuracy", "images/s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("worker", overflow="ellipsis", no_wrap=True, max_width=24)
    for study in status.studies:
        for trial in study.trials:
            if trial.outcome == "running":
                table.add_row(
                    within_sweep(study.name),
                    f"#{trial.number}",
                    f"{trial.step}/{study.steps_per_trial}",
                    f"{trial.accuracy:.4f}" if trial.accuracy is not None else "–",
                    f"{trial.images_per_second:,.0f}" if trial.images_per_second else "–",
                    trial.worker,
                )
    return table
