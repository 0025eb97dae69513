"""Stores of each kind, a clock, and workers that do what they are told: for tests of trials."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from commands import PROCESSES
from helpers import together
from optuna.trial import TrialState

from storage.engine import open_storage
from storage.leases import LEASE_ATTR
from storage.trials import Claim, TrialQueue, enqueue

STORES = ["sqlite", "postgresql", "grpc"]


def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty store of the kind that a fixture is asked for, one of `STORES`."""
    if request.param == "postgresql":
        new_place: Callable[[], str] = request.getfixturevalue("postgres")
        yield new_place()
        return
    file = f"sqlite:///{tmp_path}/sweep.db"
    if request.param == "sqlite":
        yield file
        return
    pytest.importorskip("grpc", reason="gRPC is not installed")
    from storage.serve import StoreServer

    server = StoreServer(file, "127.0.0.1", 0)
    server.start()
    yield f"grpc://127.0.0.1:{server.port}"
    server.stop(grace=0)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, start: float = 0.0) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now


def new_study(url: str, name: str = "study", queued: int = 0) -> optuna.Study:
    study = optuna.create_study(storage=open_storage(url), study_name=name, direction="maximize")
    for number in range(queued):
        assert enqueue(study._storage, study._study_id, {"x": number / 1000}) == number
    return study


def trials(url: str, name: str = "study") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=open_storage(url)).trials


def lease(url: str, number: int = 0) -> dict[str, Any]:
    value = trials(url)[number].system_attrs[LEASE_ATTR]
    assert isinstance(value, dict)
    return value


def pull(url: str, worker_id: str, studies: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Work like a worker whose trials take no time, until nothing is left."""
    queue = TrialQueue(open_storage(url), worker_id=worker_id)
    done = []
    while True:
        claim = queue.claim(studies)
        if claim is not None:
            done.append((claim.study_id, claim.number))
            assert queue.finish(claim, TrialState.COMPLETE, float(claim.number))
        elif queue.pending(studies) == 0:
            return done
        else:
            time.sleep(0.02)


def pull_with(url: str, workers: int, studies: list[tuple[int, int]]) -> list[tuple[int, int]]:
    calls = [(url, f"w{number}", studies) for number in range(workers)]
    return sorted(item for done in together(pull, calls) for item in done)


def _remote(url: str, worker_id: str, pipe: Any) -> None:
    storage = open_storage(url)
    queue = TrialQueue(storage, worker_id=worker_id)
    while True:
        name, arguments = pipe.recv()
        try:
            if name == "report":
                claim, values = arguments
                study = optuna.load_study(study_name="study", storage=storage)
                trial = optuna.Trial(study, claim.trial_id)
                trial.suggest_float("x", 0.0, 1.0)
                for step, value in enumerate(values):
                    trial.report(value, step)
                pipe.send((True, None))
            else:
                pipe.send((True, getattr(queue, name)(*arguments)))
        except BaseException as error:
            pipe.send((False, error))


class Remote:
    """A worker process that does what it is told."""

    def __init__(self, url: str, worker_id: str) -> None:
        self._pipe, there = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=_remote, args=(url, worker_id, there), daemon=True)
        self.process.start()
        there.close()

    def tell(self, name: str, *arguments: Any) -> None:
        self._pipe.send((name, arguments))

    def answer(self) -> Any:
        assert self._pipe.poll(60), "the worker hangs"
        good, value = self._pipe.recv()
        if not good:
            raise value
        return value

    def __call__(self, name: str, *arguments: Any) -> Any:
        self.tell(name, *arguments)
        return self.answer()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(30)
        assert not self.process.is_alive()


def move_to_other_host(study: optuna.Study, claim: Claim) -> None:
    stored = study._storage.get_trial_system_attrs(claim.trial_id)[LEASE_ATTR]
    study._storage.set_trial_system_attr(claim.trial_id, LEASE_ATTR, stored | {"host": "elsewhere"})


def remotes(url: str) -> Iterator[Callable[[str], Remote]]:
    """A function that starts a worker; all are ended in the end."""
    started: list[Remote] = []

    def start(worker_id: str) -> Remote:
        started.append(Remote(url, worker_id))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()
