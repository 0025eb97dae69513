"""What ends a sweep beside its trials: wall-clock time, epochs, and a request to stop.

All of it stands in the store, in system attributes of the sweep's first study, so that workers on
any machine see it through Optuna's own storage interface.

**Time.** Every worker keeps one record of when it began and when it was last at work. The time
that a sweep has taken is the length of the union of these spans: two workers side by side take
one hour in an hour, and a night in which none ran takes none. Clocks of machines are compared
only to find which spans overlap; one that is wrong shifts its own spans.

**Requests.** A request to stop raises a counter. A worker that sees another count than when it
began stops; one that begins later does not. Nothing needs to be cleared.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from sweeps.studies import StoredSweep

SESSION = "sweep:session:"
STOPS = "sweep:stops"

RECORD_SECONDS = 5.0


class Session:
    """One worker's record of the time that it was at work on a sweep.

    Args:
        store: where the sweep is.
        sweep: which one.
        worker_id: unique among all workers.
    """

    def __init__(self, store: BaseStorage, sweep: StoredSweep, worker_id: str) -> None:
        self._store = store
        self._study_id = sweep.studies[0].study_id
        # Process ids come back, above all in containers, and every start has a span of its own.
        self._key = f"{SESSION}{worker_id}:{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        # Later times are counted from here on a clock that nobody sets.
        self._began = time.time() - time.monotonic()
        self._first = self._now()
        self._recorded = float("-inf")

    def _now(self) -> float:
        # Rounded everywhere, so that what is recorded is never less than what was seen before.
        return round(self._began + time.monotonic(), 3)

    def record(self, *, at_once: bool = False) -> None:
        """Write that the worker is at work now.

        Args:
            at_once: also if that was done within the last few seconds.
        """
        with self._lock:
            now = self._now()
            if not at_once and now < self._recorded + RECORD_SECONDS:
                return
            self._store.set_study_system_attr(self._study_id, self._key, [self._first, now])
            self._recorded = now

    def seconds_spent(self) -> float:
        """Wall-clock time of the sweep until now, this worker's included."""
        attrs = self._store.get_study_system_attrs(self._study_id)
        return union([*_spans(attrs, but=self._key), (self._first, self._now())])


def seconds_spent(store: BaseStorage, sweep: StoredSweep) -> float:
    """Wall-clock time in which at least one worker was at work, as far as it was recorded."""
    return union(_spans(store.get_study_system_attrs(sweep.studies[0].study_id)))


def epochs_spent(store: BaseStorage, sweep: StoredSweep) -> int:
    """Epochs that the sweep's trials have completed, over all studies and seeds."""
    return sum(
        trial.last_step or 0
        for study in sweep.studies
        for trial in store.get_all_trials(study.study_id, deepcopy=False)
    )


def spent(
    store: BaseStorage,
    sweep: StoredSweep,
    session: Session | None = None,
    *,
    epochs: int | None = None,
) -> str:
    """Say which budget of time or epochs is spent; "" if none is.

    Args:
        store: where the sweep is.
        sweep: with its budget as it is now.
        session: of the worker that asks.
        epochs: as of `epochs_spent`, where that is known already.
    """
    budget = sweep.spec.budget
    if budget.hours is not None:
        seconds = session.seconds_spent() if session else seconds_spent(store, sweep)
        if seconds >= 3600 * budget.hours:
            return f"hours = {budget.hours:g}"
    if budget.epochs_total is not None:
        epochs = epochs_spent(store, sweep) if epochs is None else epochs
        if epochs >= budget.epochs_total:
            return f"epochs_total = {budget.epochs_total}"
    return ""


def request_stop(store: BaseStorage, sweep: StoredSweep) -> None:
    """Ask all workers of a sweep, on every machine, to end."""
    store.set_study_system_attr(sweep.studies[0].study_id, STOPS, stops(store, sweep) + 1)


def stops(store: BaseStorage, sweep: StoredSweep) -> int:
    """How often the workers of a sweep were asked to end."""
    return stops_in(store.get_study_system_attrs(sweep.studies[0].study_id))


def stops_in(attrs: Mapping[str, Any]) -> int:
    """The same, from the system attributes of the sweep's first study."""
    count = attrs.get(STOPS, 0)
    return count if isinstance(count, int) else 0


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans, each (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def is_span(value: object) -> bool:
    """Whether an attribute's value is a span as `Session` writes it."""
    return isinstance(value, list) and len(value) == 2 and all(type(t) is float for t in value)


def _spans(attrs: dict[str, Any], but: str = "") -> Iterable[tuple[float, float]]:
    for key, span in attrs.items():
        if key.startswith(SESSION) and key != but and is_span(span):
            yield span[0], span[1]
