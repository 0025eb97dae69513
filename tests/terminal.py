"""A pseudo-terminal with a `sweep` command on it: what is asked and shown only there."""

from __future__ import annotations

import os
import pty
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import command, environment


class Terminal:
    """A command on a pseudo-terminal of its own; use as a context."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command(*arguments),
            cwd=cwd,
            env=environment()
            | {"SWEEP_CACHE_DIR": str(cwd / "cache"), "TERM": "xterm", "COLUMNS": "120"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.output = ""
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(30)
        os.close(self.master)

    def wait_for(self, true: Callable[[str], Any]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: true(self.output) or self._ended, 120)
            assert true(self.output), self.output

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        code = self.process.wait(120)
        self._reader.join(30)
        return code

    def _read(self) -> None:
        while True:
            try:
                read = os.read(self.master, 4096)
            except OSError:  # the other end is closed
                read = b""
            with self._changed:
                self.output += read.decode(errors="replace")
                self._ended = not read
                self._changed.notify_all()
            if not read:
                return
