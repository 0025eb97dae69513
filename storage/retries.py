"""Ask a store again that is locked, restarting or out of reach, and say so once.

Failures that pass by themselves (:func:`is_transient`) are repeated with back-off for
:data:`RETRY_SECONDS`: a database server may restart, a network may be gone for a while. The
process that waits says once that it does, and once when the store answers again. Asked to stop
while it waits, it stops.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

_logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 600.0
"""How long a locked or unreachable store is asked again."""

ANNOUNCE_SECONDS = 3.0
"""An outage is spoken of from this age on: a lock that others hold for a moment is none."""

STOP_SECONDS = 2.0
"""How long a store that does not answer is waited for once this process was asked to stop."""

_LONGEST_DELAY = 5.0
_NAP = 0.25


class StopRequestedError(Exception):
    """The store is away, and this process was asked to stop instead of waiting for it."""


@dataclass(frozen=True)
class _Policy:
    place: str = "the store"
    should_stop: Callable[[], bool] = lambda: False
    quiet: bool = False


class _State:
    """What this process knows of its store, shared by its threads."""

    def __init__(self) -> None:
        self.policy = _Policy()
        self._lock = threading.Lock()
        self._since: float | None = None
        self._announced = False
        self._outages = 0
        self._stop_seen: float | None = None

    def forget_stop(self) -> None:
        self._stop_seen = None

    def stop_overdue(self) -> bool:
        if not self.policy.should_stop():
            return False
        if self._stop_seen is None:
            self._stop_seen = time.monotonic()
        return time.monotonic() - self._stop_seen >= STOP_SECONDS

    @property
    def outages(self) -> int:
        return self._outages

    def failed(self, error: Exception, left: float) -> None:
        now = time.monotonic()
        with self._lock:
            if self._since is None:
                self._since = now
            if self._announced or now - self._since < ANNOUNCE_SECONDS:
                return
            self._announced = True
            self._outages += 1
        if not self.policy.quiet:
            _logger.warning(
                "%s does not answer (%s); trying again for %s",
                self.policy.place, reason(error), _in_words(left),
            )  # fmt: skip

    def answered(self) -> None:
        if self._since is None:
            return
        with self._lock:
            since, announced = self._since, self._announced
            self._since, self._announced = None, False
        if announced and since is not None and not self.policy.quiet:
            away = _in_words(time.monotonic() - since)
            _logger.warning("%s answers again, after %s", self.policy.place, away)


_state = _State()


@contextmanager
def patience(
    place: str, should_stop: Callable[[], bool] = lambda: False, *, quiet: bool = False
) -> Iterator[None]:
    """Say for all threads of this process what :func:`with_retries` does within the block.

    Args:
        place: the store's name in messages, as in "the store at sqlite:///sweep.db".
        should_stop: whether this process was asked to stop. Then a store that does not answer
            within :data:`STOP_SECONDS` is given up.
        quiet: says nothing of outages.
    """
    before = _state.policy
    _state.policy = _Policy(place, should_stop, quiet)
    _state.forget_stop()
    try:
        yield
    finally:
        _state.policy = before
        _state.forget_stop()


def stop_overdue() -> bool:
    """Whether this process was asked to stop :data:`STOP_SECONDS` ago or earlier."""
    return _state.stop_overdue()


def outages() -> int:
    """Count the outages of :data:`ANNOUNCE_SECONDS` or more that this process has met so far."""
    return _state.outages


def is_transient(error: BaseException) -> bool:
    """Whether a storage error may pass by itself: a lock, a deadlock or a lost connection."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import (
        DBAPIError,
        InterfaceError,
        OperationalError,
        PendingRollbackError,
    )
    from sqlalchemy.exc import TimeoutError as PoolTimeoutError

    # Set by storage.remote, so that gRPC need not be there to know its errors, and by
    # storage.errors for a store that cannot be opened yet.
    if (transient := getattr(error, "transient", None)) is not None:
        return bool(transient)
    cause: BaseException | None = error
    if isinstance(error, StorageInternalError):
        cause = error.__cause__
    # The latter: Optuna tries a read that failed once more in the session that broke with it, and
    # then closes that.
    if isinstance(cause, PoolTimeoutError | PendingRollbackError):
        return True
    if not isinstance(cause, DBAPIError):
        return False
    if type(cause.orig).__module__.startswith("sqlite3"):
        # Others, such as a full disk or a missing table, do not go away by waiting.
        return any(word in str(cause.orig) for word in ("locked", "busy"))
    return cause.connection_invalidated or isinstance(cause, OperationalError | InterfaceError)


def with_retries(fn: Callable[[], T], *, total_seconds: float | None = None) -> T:
    """Call ``fn``, again on transient storage failures, with exponential back-off.

    Args:
        fn: safe to repeat: a connection can break after its commit.
        total_seconds: how long to try; None is :data:`RETRY_SECONDS`.

    Raises:
        StopRequestedError: ``fn`` failed so, and the process was asked to stop (:func:`patience`).
        Exception: whatever ``fn`` raised that is not transient (:func:`is_transient`), or its
            last transient failure once the time has passed.
    """
    deadline = time.monotonic() + (RETRY_SECONDS if total_seconds is None else total_seconds)
    delay = 0.05
    while True:
        try:
            result = fn()
        except Exception as error:
            left = deadline - time.monotonic()
            if not is_transient(error):
                raise
            if stop_overdue():
                raise StopRequestedError(
                    f"stopped while {_state.policy.place} did not answer ({reason(error)})"
                ) from error
            if left <= 0:
                raise
            _state.failed(error, left)
        else:
            _state.answered()
            return result
        _sleep(min(left, delay * random.uniform(0.5, 1.0)))
        delay = min(2 * delay, _LONGEST_DELAY)


def reason(error: BaseException) -> str:
    """Return the first line of what lies at the bottom of a storage error."""
    from optuna.exceptions import StorageInternalError

    if isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    text = str(getattr(error, "orig", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _sleep(seconds: float) -> None:
    # In naps: a signal handler runs, but does not end a sleep.
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not stop_overdue():
        time.sleep(min(left, _NAP))


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes"
