"""The errors that a user can cause or mend.

Everything below `sweeps.cli` raises; `sweeps.cli` alone prints and exits.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SweepError(Exception):
    """Something failed that a user can act on; one line: what, the value received, what to do.

    Exits with status 1.
    """


class SpecError(SweepError):
    """A sweep's description, or an option given with it, is wrong. Exits with status 2."""


def nearest(name: str, accepted: Iterable[str]) -> str:
    """Say which accepted name was probably meant, and list the accepted ones.

    Args:
        name: the name that was not understood.
        accepted: every name that would have been.

    Returns:
        A clause that completes an error message, without a leading space.
    """
    names = sorted(accepted)
    if not names:
        return "nothing is accepted here"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    # As peak_lr for lr, which is short of being alike.
    close += sorted((n for n in names if name in n.split("_")), key=len)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}accepted: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip()


def kind_and_line(error: BaseException) -> str:
    """The kind of an error and its first line, or the kind alone of one without words."""
    kind, words = type(error).__name__, str(error).strip()
    return f"{kind}: {first_line(error)}" if words else kind


def plural(count: int, one: str, many: str | None = None) -> str:
    """A number and what it counts, such as `1 study` or `2 studies`."""
    return f"{count} {one if count == 1 else many or one + 's'}"
