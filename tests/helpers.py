"""A sweep small enough for tests, on real images, and processes that act at one moment."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import tomli_w
import torch
from commands import PROCESSES
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from torch import nn

from storage.checkpoints import CheckpointStore
from storage.engine import open_storage
from sweeps.assembly import open_dataset
from sweeps.config import TrialConfig
from sweeps.spec import SweepSpec
from sweeps.stopping import StopRequest
from sweeps.studies import create_or_resume
from sweeps.worker import Worker, WorkerOptions

TRAIN: dict[str, Any] = {
    "dataset": "digits", "validation_fraction": 0.2, "augment": "none", "model": "resnet8",
    "width_factor": 0.25, "norm": "group", "num_groups": 2, "num_devices": 4, "split": "iid",
    "global_batch_size": 128, "epochs": 3, "schedule": "constant",
}  # fmt: skip
SEARCH: dict[str, Any] = {"peak_lr": {"low": 0.01, "high": 0.3, "log": True}}


def make_spec(name: str = "tiny", **changes: Any) -> SweepSpec:
    """A sweep of a few seconds; `train` is merged (None leaves a key out), the rest replaced."""
    train = {**TRAIN, **changes.get("train", {})}
    table: dict[str, Any] = {
        "question": "Does it run?",
        "search": SEARCH,
        "pruner": {"type": "NopPruner"},
        "budget": {"trials": 3},
        **changes,
        "train": {key: value for key, value in train.items() if value is not None},
    }
    return SweepSpec.from_table(table, name=name)


def write_spec(path: Path, **changes: Any) -> Path:
    """The same as a file for the command line."""
    table = make_spec(path.stem, **changes).as_dict()
    table.pop("name")
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return path


def begin(tmp_path: Path, spec: SweepSpec) -> BaseStorage:
    """Create a sweep's studies in a fresh store, as `sweep start` does before its workers."""
    return begin_at(url(tmp_path), spec)


def begin_at(storage_url: str, spec: SweepSpec) -> BaseStorage:
    """The same in any store."""
    store = open_storage(storage_url)
    dataset = open_dataset(TrialConfig.build(TRAIN), None)
    create_or_resume(store, spec, [dataset.fingerprint] * len(spec.cells))
    return store


def clip_units_slowly(model: nn.Module, factor: float) -> None:
    """Adaptive gradient clipping of a model, one unit after the other."""
    for name, parameter in model.named_parameters():
        if name.startswith("fc.") or parameter.ndim < 2:
            continue
        assert parameter.grad is not None
        for weight, gradient in zip(parameter.detach(), parameter.grad, strict=True):
            limit = factor * max(weight.norm().item(), 1e-3)
            if gradient.norm().item() > limit:
                gradient.copy_(gradient * limit / gradient.norm().item())


def url(tmp_path: Path) -> str:
    """The store of a test."""
    return f"sqlite:///{tmp_path / 'sweep.db'}"


def save_checkpoint(store: CheckpointStore, key: str, state: dict[str, Any]) -> None:
    """Save one state, and wait until it is on the disk."""
    with store.writer(key) as writer:
        writer.save(state)


def make_worker(
    tmp_path: Path, name: str = "tiny", *, stop: StopRequest | None = None, worker_id: str = "w"
) -> Worker:
    """A worker in this process."""
    torch.set_num_threads(1)
    options = WorkerOptions(worker_id=worker_id, device=torch.device("cpu"), poll_seconds=0.05)
    checkpoints = CheckpointStore(tmp_path / "checkpoints")
    store = open_storage(url(tmp_path))
    return Worker(store, checkpoints, name, options, stop or StopRequest())


def trials(tmp_path: Path, study_name: str = "tiny") -> list[FrozenTrial]:
    """A study's trials, read afresh."""
    return optuna.load_study(storage=open_storage(url(tmp_path)), study_name=study_name).trials


def wait_until(true: Callable[[], bool], *, seconds: int = 120) -> None:
    """Ask until the answer is yes."""
    asked = threading.Event()
    for _ in range(20 * seconds):
        if true():
            return
        asked.wait(0.05)
    raise AssertionError(f"it did not become true within {seconds} seconds")


def stop_postgres(server: Any, number: signal.Signals) -> None:
    """End it: with SIGINT as a restart does, with SIGQUIT without writing anything back."""
    process = server.get_postmaster_info().process
    os.kill(server.get_pid(), number)
    process.wait(30)


def _child(function: Callable[..., Any], arguments: tuple[Any, ...], pipe: Any, start: Any) -> None:
    start.wait(60)
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def together(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """Run each call in a process of its own, all let go at one moment; return the results."""
    start = PROCESSES.Barrier(len(calls))
    running = []
    for arguments in calls:
        here, there = PROCESSES.Pipe()
        process = PROCESSES.Process(target=_child, args=(function, arguments, there, start))
        process.start()
        there.close()
        running.append((process, here))
    results = []
    for process, pipe in running:
        assert pipe.poll(90), "a process hangs"
        results.append(pipe.recv())
        process.join(30)
    errors = [result for good, result in results if not good]
    assert not errors, "\n".join(errors)
    return [result for _, result in results]
