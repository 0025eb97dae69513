"""Options that several `sweep` commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_STORAGE = "sqlite:///sweep.db"

AUTO: Any = "auto"
"""As many workers as the place has use for: -1 once parsed, which commands hand on as None."""


def parse_folder(text: str) -> Path:
    """A path; ~ in the environment, which no shell has seen, is the user's folder too."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        return Path(text)


Storage = Annotated[
    str,
    typer.Option(
        "--storage",
        envvar="SWEEP_STORAGE",
        help="The store: SQLAlchemy URL of a database, or grpc://HOST:PORT of sweep serve.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="SWEEP_DATA_DIR",
        parser=parse_folder,
        metavar="PATH",
        help="Where the data set is (or goes): for `images`, the folder or zip itself.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the sweep; repeatable."),
]
Quick = Annotated[
    bool, typer.Option("--quick", metavar="", help="The sweep's small version, for a CPU.")
]
Name = Annotated[str | None, typer.Option("--name", help="Keep the sweep under this name.")]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON instead of tables.")]


def parse_workers(text: str) -> int:
    """A number of workers; -1 for auto."""
    if text == "auto":
        return -1
    if not text.isdecimal():
        raise typer.BadParameter(
            f"{text!r} is no number of workers; accepted: auto, 0, 1, 2 and so on"
        )
    return int(text)


def parse_planned_workers(text: str) -> int:
    """The same, of workers that are to do something."""
    if text != "auto" and (not text.isdecimal() or int(text) == 0):
        raise typer.BadParameter(
            f"{text!r} is no number of workers; accepted: auto, 1, 2 and so on"
        )
    return parse_workers(text)


def wanted(workers: int) -> int | None:
    """How many workers were asked for; None where it was left to the place."""
    return None if workers < 0 else workers


Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        parser=parse_workers,
        metavar="N",
        help="Worker processes; auto is as many as cores, GPUs, memory and trials have use for; "
        "0 leaves all to workers that join from elsewhere.",
    ),
]
PlannedWorkers = Annotated[
    int,
    typer.Option(
        "--workers",
        parser=parse_planned_workers,
        metavar="N",
        help="Worker processes; auto is as many as cores, GPUs, memory and trials have use for.",
    ),
]
WorkersOfRuns = Annotated[
    int,
    typer.Option(
        "--workers",
        parser=parse_workers,
        metavar="N",
        help="Worker processes; auto is one per GPU; without GPUs, as many as cores, memory and "
        "runs allow; 0 leaves all to workers that join from elsewhere.",
    ),
]
On = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="PLACE",
        help="Where workers run: local, ray, or ray=ADDRESS for a Ray cluster.",
    ),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker",
        metavar="SHARE",
        show_default=False,
        help="With --on ray: the share of a GPU that each worker takes, from 0 to 1.",
    ),
]
