"""A launcher beside its workers: signals and `sweep stop` are passed on, once gently, then hard."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sweeps.launch import Workers

POLL_SECONDS = 0.5


class Signals:
    """SIGINT and SIGTERM as they arrived."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __call__(self, number: int, _frame: object) -> None:
        """Take one in, as a signal handler."""
        self.received.append(number)


@contextmanager
def received_signals() -> Iterator[Signals]:
    """Collect the signals of the block, in which they do nothing else."""
    signals = Signals()
    before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(
    processes: Workers,
    signals: Signals,
    update: Callable[[], bool],
    say: Callable[[str], None],
) -> list[int]:
    """Watch workers until all have ended; pass signals and `sweep stop` on.

    Args:
        processes: the workers.
        signals: those that this process has received.
        update: shows how far the sweep is, and says whether it was asked to stop.
        say: prints a line.

    Returns:
        Their exit codes.
    """
    handled = 0
    asked = False
    while True:
        codes = processes.poll()
        requested = update()
        if codes is not None:
            return codes
        if requested and not asked:
            asked = True
            # Workers that are still starting would take the request for an old one.
            processes.stop()
        time.sleep(POLL_SECONDS)
        if len(signals.received) > handled:
            handled = len(signals.received)
            if handled == 1:
                say(
                    "stopping: each running trial keeps its completed epochs; again to stop at once"
                )
                processes.stop()
            else:
                processes.kill()
