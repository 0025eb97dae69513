"""The `sweep` command as tests run it: a process for each.

It takes a new interpreter some seconds of a core to import PyTorch and Optuna, and a command a
fraction of one to do the rest. So that hundreds of commands fit into a run of the tests, most are
forks of a process that has imported them; arguments, folder, environment, output, signals and exit
status are a process's own all the same. The workers that a command starts are interpreters, as is
whatever runs `command` itself: where imports, a terminal, what a shell hands down, or the end of an
interpreter matter.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

PROCESSES = multiprocessing.get_context("forkserver")
# What every child would import again. One server of forks serves all test modules of a run.
PROCESSES.set_forkserver_preload(
    [
        "alembic.command", "filelock", "optuna.storages._rdb.models", "pytest",
        "plotly.graph_objects", "rich.progress", "sweeps.cli", "sweeps.confirm", "sweeps.run",
    ]
)  # fmt: skip


def environment() -> dict[str, str]:
    """Ours, without what would redirect a sweep."""
    return {k: v for k, v in os.environ.items() if not k.startswith("SWEEP_")}


def command(*arguments: str) -> list[str]:
    """The `sweep` command of the interpreter that runs the tests."""
    return [sys.executable, "-P", "-m", "sweeps.cli", *arguments]


class Fork:
    """A `sweep` command in a process of its own; what is of Popen's is named as there.

    Args:
        arguments: of the command.
        cwd: its folder.
        env: its environment.
        stdout, stderr: descriptors, which remain the caller's to close.
    """

    def __init__(
        self, *arguments: str, cwd: Path, env: dict[str, str], stdout: int, stderr: int
    ) -> None:
        self._process = PROCESSES.Process(
            target=_sweep,
            args=(arguments, str(cwd), env, _Handed(stdout), _Handed(stderr)),
            daemon=True,
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self, timeout: float = 120) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("sweep", timeout)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        # The server has heard of its end before this process does.
        if self._process.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Handed:
    """A descriptor that a child has too."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __getstate__(self) -> Any:
        return DupFd(self._descriptor)

    def __setstate__(self, handed: Any) -> None:
        self._descriptor = handed.detach()

    def become(self, descriptor: int) -> None:
        os.dup2(self._descriptor, descriptor)
        os.close(self._descriptor)


def _sweep(
    arguments: tuple[str, ...], cwd: str, env: dict[str, str], out: _Handed, err: _Handed
) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    out.become(1)
    err.become(2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.argv = ["sweep", *arguments]
    from sweeps.cli import main

    main()


def run(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run the `sweep` command to its end."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = Fork(
            *arguments, cwd=cwd, env=env or environment(), stdout=out.fileno(), stderr=err.fileno()
        )
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, code, _read(out), _read(err))


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


class Command:
    """A `sweep` command that runs, with what it has printed; use as a context."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        ours, theirs = os.pipe()
        self.process = Fork(*arguments, cwd=cwd, env=environment(), stdout=theirs, stderr=theirs)
        os.close(theirs)
        self._stream = os.fdopen(ours, encoding="utf-8")
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)
        self._reader.join(30)
        self._stream.close()

    @property
    def output(self) -> str:
        with self._changed:
            return "\n".join(self._lines)

    def line(self, text: str) -> str:
        """Wait for a line that holds a text."""

        def found() -> list[str]:
            return [line for line in self._lines if text in line]

        with self._changed:
            assert self._changed.wait_for(lambda: found() or not self._reader.is_alive(), 120), (
                f"{text!r} did not come: {self._lines}"
            )
            assert found(), f"ended without {text!r}: {self._lines}"
            return found()[0]

    def end(self) -> int:
        """Wait for its exit status."""
        code = self.process.wait(120)
        self._reader.join(30)
        return code

    def _read(self) -> None:
        for line in self._stream:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()
