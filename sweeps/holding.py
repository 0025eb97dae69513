"""Holding a trial while it runs: its lease is renewed, and a request to stop is met in time."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

from storage.retries import StopRequestedError, reason, with_retries
from storage.trials import Claim, LeaseLostError, TrialQueue
from sweeps.limits import Session
from sweeps.stopping import StopRequest
from sweeps.studies import StoredSweep

logger = logging.getLogger(__name__)

STOP_GRACE_SECONDS = 7.0
"""A worker that was told to stop and is still in the same update after this long ends at once."""

SIGN_SECONDS = 2.0
"""How often a worker in a trial looks whether it was told to stop."""


class Keeper:
    """Keeps the trial that a worker holds; use as a context.

    Within it a thread renews the held trial's lease, writes down that the worker is at work, and
    hears of requests to stop. It ends the process when one is not met in time.

    Args:
        queue: of the worker.
        session: of the worker.
        stop: how the worker is asked to stop.
        look: sets `stop` if the sweep's store asks for it.
    """

    def __init__(
        self,
        queue: TrialQueue,
        session: Session,
        stop: StopRequest,
        look: Callable[[StoredSweep], None],
    ) -> None:
        self._queue = queue
        self._session = session
        self._stop = stop
        self._look = look
        self._hold: _Hold | None = None
        self._keeping = threading.Lock()
        self._ended = threading.Event()
        # One for all trials: to begin one for each takes longer than a claim when cores are busy.
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextlib.contextmanager
    def leased(self, sweep: StoredSweep, claim: Claim) -> Iterator[threading.Event]:
        """Have the claim's lease renewed within the block; the event says that it was lost."""
        with_retries(self._session.record)
        hold = self._hold = _Hold(sweep, claim)
        try:
            yield hold.lost
        finally:
            hold.done.set()
            with self._keeping:  # what is under way for it ends first
                self._hold = None
        # Not after an error: a store that stayed away would be waited for once more.
        with contextlib.suppress(StopRequestedError):
            with_retries(self._session.record)

    def may_hold(self, claim: Claim, lost: threading.Event) -> bool:
        """Whether the claim's trial is this worker's still, as far as can be known.

        A worker that was frozen wakes up with a checkpoint half-written or an epoch half-trained,
        and another may have gone on from where it was. Its lease is too old then by its own clock.
        """
        hold = self._hold
        if lost.is_set() or hold is None:
            return False
        if time.monotonic() - hold.beat < self._queue.lease_seconds:
            return True
        try:
            return self._queue.owns(claim, total_seconds=0)
        except Exception:  # nobody takes a trial over through a store that does not answer
            return True

    def _keep(self) -> None:
        """Look after the held trial, from a thread of its own, until the end."""
        between_beats = self._queue.lease_seconds / 4
        between_signs = min(SIGN_SECONDS, between_beats)
        while not self._ended.wait(between_signs):
            with self._keeping:
                hold = self._hold
                if hold is None:
                    continue
                try:
                    # A lease is renewed now if it would otherwise be too late the next time.
                    self._sign(hold, beat_after=between_beats - between_signs)
                except Exception as error:
                    if not isinstance(error, LeaseLostError | StopRequestedError):
                        logger.error("cannot renew the lease: %s", reason(error))
                    hold.lost.set()

    def _sign(self, hold: _Hold, *, beat_after: float) -> None:
        """Renew the lease, write down that the worker is at work, hear of requests to stop.

        Ends the process when a request is not met in time.
        """
        if self._stop.is_set():
            self._end_in_time(hold.claim, hold.done)
        if hold.lost.is_set() or hold.done.is_set():
            return
        self._look(hold.sweep)
        if time.monotonic() >= hold.beat + beat_after:
            hold.beat = time.monotonic()
            self._queue.renew(hold.claim)
            with_retries(self._session.record)

    def _end_in_time(self, claim: Claim, done: threading.Event) -> None:
        """Wait for the running update; end the process if it takes too long.

        An epoch whose checkpoint is not on the disk by then is trained again, as after a kill.
        """
        if done.wait(STOP_GRACE_SECONDS):
            return

        def put_back() -> None:
            with contextlib.suppress(Exception):  # it goes to another worker in any case
                self._queue.release(claim)

        release = threading.Thread(target=put_back, daemon=True)
        release.start()
        release.join(timeout=1.0)  # a store that does not answer must not hold the process
        os._exit(self._stop.exit_code)


class _Hold:
    """The trial that a worker holds.

    Attributes:
        sweep: as it was when the trial was claimed.
        claim: of the trial.
        lost: set when it is not this worker's any more.
        done: set when the worker has done with it.
        beat: when the lease was renewed, on the monotonic clock.
    """

    def __init__(self, sweep: StoredSweep, claim: Claim) -> None:
        self.sweep = sweep
        self.claim = claim
        self.lost = threading.Event()
        self.done = threading.Event()
        self.beat = time.monotonic()
