"""A request to a worker's process to stop."""

from __future__ import annotations


class StopRequest:
    """Asked for from a signal handler, seen from the loop.

    An event of `threading` would not do: its lock may be held by the very wait that the handler
    interrupts.
    """

    def __init__(self) -> None:
        self._asked = False
        self.exit_code = 0
        """What the process is to exit with once it has stopped."""

    def set(self, exit_code: int = 0) -> None:
        """Ask to stop. Of several requests the first one's exit code holds."""
        if not self._asked:
            self.exit_code = exit_code
        self._asked = True

    def is_set(self) -> bool:
        """Whether it was asked for."""
        return self._asked
