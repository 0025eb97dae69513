"""A sweep small enough for tests, on real images, and the command that runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import tomli_w
import torch
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from torch import nn

from storage.checkpoints import CheckpointStore
from storage.engine import open_storage
from sweeps import objective
from sweeps.config import TrialConfig
from sweeps.spec import SweepSpec
from sweeps.studies import create_or_resume
from sweeps.worker import StopRequest, Worker, WorkerOptions

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
    store = open_storage(url(tmp_path))
    dataset = objective.open_dataset(TrialConfig.build(TRAIN), None)
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


def command(*arguments: str) -> list[str]:
    """The `sweep` command of the interpreter that runs the tests."""
    return [sys.executable, "-P", "-m", "sweeps.cli", *arguments]


def run(*arguments: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the `sweep` command to its end."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def environment() -> dict[str, str]:
    """Ours, without what would redirect a sweep."""
    return {k: v for k, v in os.environ.items() if not k.startswith("SWEEP_")}
