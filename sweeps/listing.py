"""`sweep list`: how far each sweep of a store is, all of them read at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from sweeps.limits import spent
from sweeps.spec import CONFIRMATION
from sweeps.studies import stored_sweeps

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


@dataclass(frozen=True)
class Listed:
    """How far one sweep is.

    Attributes:
        finished: trials that have ended, over all studies.
        budget: trials that it may run.
        running: trials that a worker has.
        done: as `SweepStatus.done`.
        confirms: the sweep that it confirms, or "".
        confirmation: the sweep that confirms it, or "".
        error: why this version of the program cannot read it, or "": then its name is all that is
            known.
    """

    name: str
    question: str = ""
    finished: int = 0
    budget: int = 0
    running: int = 0
    done: bool = False
    confirms: str = ""
    confirmation: str = ""
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    @property
    def cells(self) -> list[str]:
        """Its row for a terminal."""
        if self.error:
            return [self.name, "", "unreadable", ""]
        state = "done" if self.done else "not running"
        if self.running:
            state = f"{self.running} running"
        about = f"of {self.confirms}" if self.confirms else self.confirmation
        return [self.name, f"{self.finished} of {self.budget}", state, about]


def read_listed(store: BaseStorage) -> list[Listed]:
    """How far the sweeps of a store are, by name; of the trials no curve is read, and no attribute.

    Raises:
        StorageError: the store is neither a database nor served by `sweep serve`.
    """
    from storage.overview import OverviewReader

    sweeps, unreadable = stored_sweeps(store)
    ids = [study.study_id for sweep in sweeps for study in sweep.studies]
    read = OverviewReader(store).read(ids)
    confirmed = {sweep.spec.confirms for sweep in sweeps}
    listed = [Listed(name, error=str(error)) for name, error in unreadable.items()]
    for sweep in sweeps:
        parts = [(study, read[study.study_id]) for study in sweep.studies]
        ended = [sum(trial.finished for trial in trials) for _, trials in parts]
        met = all(count >= study.budget for count, (study, _) in zip(ended, parts, strict=True))
        epochs = sum(trial.step or 0 for _, trials in parts for trial in trials)
        name = sweep.spec.name
        listed.append(
            Listed(
                name=name,
                question=sweep.spec.question,
                finished=sum(ended),
                budget=sum(study.budget for study, _ in parts),
                running=sum(
                    trial.state == "RUNNING" and trial.number < study.budget
                    for study, trials in parts
                    for trial in trials
                ),
                done=met or bool(spent(store, sweep, epochs=epochs)),
                confirms=sweep.spec.confirms,
                confirmation=name + CONFIRMATION if name in confirmed else "",
            )
        )
    return sorted(listed, key=lambda one: one.name)


def presets_table(questions: Mapping[str, str]) -> Table:
    """The presets, and what each asks, for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("preset", no_wrap=True)
    table.add_column("question")
    for preset, question in questions.items():
        table.add_row(preset, Text(question))
    return table


def listed_table(sweeps: Sequence[Listed]) -> Table:
    """What `read_listed` has found, for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("sweep", no_wrap=True)
    table.add_column("trials", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("confirmation")
    for sweep in sweeps:
        table.add_row(*map(Text, sweep.cells))
    return table
