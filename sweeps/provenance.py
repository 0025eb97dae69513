"""Where a trial runs, and with what."""

from __future__ import annotations

import functools
import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def new_worker_id(suffix: str) -> str:
    """A name for a worker that no other has: host, process, and what tells it apart there."""
    return f"{socket.gethostname()}-{os.getpid()}-{suffix}"


@functools.cache
def provenance(device: torch.device) -> dict[str, Any]:
    """What a result depends on beside its config."""
    packages = {
        name: metadata.version(name) for name in ("sweep", "optuna", "torch", "torchvision")
    }
    return {
        **packages,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


@functools.cache
def _git_commit() -> str | None:
    """The commit of this package's own checkout; None where it is installed as a package."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
