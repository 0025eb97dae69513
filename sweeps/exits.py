"""What people are told of an error that ends a command, and its exit status."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import typer

from sweeps.errors import SpecError, SweepError

# Typer does not export the class of all usage errors, only this child of it.
_USAGE_ERROR = typer.BadParameter.__base__


def told_of(error: Exception) -> tuple[str | None, int] | None:
    """One line for people, or None where all is said, and the exit status.

    Returns:
        None if the error is nobody's mistake but ours.
    """
    if isinstance(error, SpecError):
        return str(error), 2
    if isinstance(error, SweepError):
        return str(error), 1
    assert _USAGE_ERROR is not None
    if isinstance(error, _USAGE_ERROR):
        message = str(error.format_message())  # type: ignore[attr-defined]
        if not message:  # `sweep` alone has shown its help
            return None, 2
        message = message.replace("Value error, ", "")  # pydantic's, which Typer passes on
        message = message.removesuffix(".")
        stop = "" if message.endswith("?") else ";"
        where = getattr(getattr(error, "ctx", None), "command_path", "sweep")
        return f"{message}{stop} {where} --help lists what there is", 2
    if isinstance(error, ImportError):
        return _shadowed()
    # By name, as importing the leaves' own errors would load PyTorch for every mistake.
    names = {cls.__name__ for cls in type(error).__mro__}
    if "StorageURLError" in names:
        return str(error), 2
    if names & {"StorageError", "DataError", "CheckpointError"}:
        return str(error), 1
    if is_full_disk(error):
        assert isinstance(error, OSError)
        where = f" {error.filename}" if error.filename else ""
        return f"cannot write{where} ({error.strerror}); free some space there", 1
    if names & {"SQLAlchemyError", "StorageInternalError", "RpcError"}:
        from storage.retries import reason

        if "RpcError" in names:  # the server has said what to do
            return f"the database failed: {reason(error)}", 1
        full = "disk is full" in reason(error)  # SQLite's words
        advice = "free some space there" if full else "check it or restore a copy"
        return f"the database failed ({reason(error)}); {advice}, then run this again", 1
    return None


def _shadowed() -> tuple[str, int] | None:
    """Of a module of somebody else's that stands in front of one of Sweep's packages."""
    ours = Path(__file__).parents[1]
    for package in ("data", "models", "storage"):
        found = getattr(sys.modules.get(package), "__file__", None)
        if found is not None and not Path(found).is_relative_to(ours / package):
            return (
                f"{found} stands in front of Sweep's own package {package!r}; put what PYTHONPATH "
                "leads to in a folder without modules called data, models, storage or sweeps",
                1,
            )
    return None


def is_full_disk(error: Exception) -> bool:
    """Whether a write found no room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
