"""Leases: what a running trial says of who holds it, and whether that process is still there."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

LEASE_ATTR = "sweep:lease"
"""Trial system attribute with the lease as JSON.

Held: worker, host, pid, process_start, token, beat, attempt, deaths. Released: released, worker,
attempt, deaths, and released_token if its holder did it. Finished: finished (the state's name),
value, worker, host, token, attempt, deaths.
"""


def parse_lease(text: str | None) -> dict[str, Any]:
    """Return a lease from its text in the store; what is no lease is an empty one."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def count(lease: Mapping[str, Any], key: str) -> int:
    """Return a count that a lease holds; 0 where it holds none."""
    value = lease.get(key, 0)
    return value if isinstance(value, int) else 0


def released(text: str | None, *, died: bool) -> dict[str, Any]:
    """Return the lease of a trial that goes back to the queue.

    Args:
        text: the lease as stored while the trial ran.
        died: whether it ran out, instead of being given up by its holder.
    """
    before = parse_lease(text)
    held = "token" in before and "finished" not in before
    return {
        "released": True,
        # Not as "token": a foreign program that runs the trial next would look like its holder.
        **({"released_token": before["token"]} if held and not died else {}),
        "worker": before.get("worker"),
        # A running trial without a lease of ours was an attempt of another Optuna program.
        "attempt": count(before, "attempt") + (0 if held else 1),
        "deaths": count(before, "deaths") + int(died),
    }


def host_id() -> str:
    """Name the set of processes whose process ids this process can look up."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        # Containers may share host name and kernel, yet not their process ids.
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        pass  # Not Linux.
    return "|".join(parts)


def process_stat(pid: int) -> tuple[str, int] | None:
    """Return (state letter, start time in clock ticks since boot); None where not known."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


@lru_cache(maxsize=1)
def start_of(pid: int) -> int | None:
    """Return the start time of this process, as :func:`process_stat`; the id tells a fork."""
    stat = process_stat(pid)
    return None if stat is None else stat[1]


def process_gone(pid: int, start: int | None) -> bool:
    """Whether that process of this host has certainly ended. In doubt: False."""
    if os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # It exists and belongs to another user.
    stat = process_stat(pid)
    if stat is None:
        return False
    state, started = stat
    return state in "ZX" or (start is not None and started != start)
