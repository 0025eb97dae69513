"""How long a shape takes, and a memory of it: on this machine, with as many workers.

A measurement stands in the user's cache under a digest of all that it depends on: the shape, the
images, the host, its device, the workers beside it, PyTorch's version. Trials that a sweep has run
count as one too, so that the next start of a sweep like it knows its time at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.folders import cache_dir
from storage.leases import LEASE_ATTR
from storage.leases import count as count_of
from sweeps.attributes import PROVENANCE, SECONDS
from sweeps.config import TrialConfig
from sweeps.execution import has_matrix_units
from sweeps.files import replacing
from sweeps.machine import Slot
from sweeps.planning.shapes import key_of
from sweeps.studies import StoredSweep

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

STARTUP_SECONDS = 6.0
"""From the command to the first update, where that was not measured: mostly imports."""

FRESH_DAYS = 30
"""A kept measurement older than this is not used: drivers and neighbours change."""

FEW_EPOCHS = 3
"""Epochs of a trial from which its speed is kept."""


@dataclass(frozen=True)
class Sample:
    """How long a shape takes.

    Attributes:
        epoch_seconds: an epoch with its validation, checkpoint and report.
        begin_seconds: a trial beside its epochs.
        startup_seconds: from the command to the first update.
        checkpoint_bytes: 0 where it was not measured.
        updates: updates of the epoch that the time is for.
        batch: images of the batch that was measured; smaller than the shape's where one of its
            own would have taken too long.
        measured: "epochs", "updates", or "run": by trials of an earlier sweep.
        gpu_bytes: the most that its tensors held of a GPU; 0 where it was not measured.
    """

    epoch_seconds: float
    begin_seconds: float
    startup_seconds: float
    checkpoint_bytes: int
    updates: int
    batch: int
    measured: str
    gpu_bytes: int = 0


def kept_sample(config: TrialConfig, images: int, slots: Sequence[Slot]) -> Sample | None:
    """What was measured of a shape on this machine before, by as many workers; None if nothing.

    Args:
        config: has the shape.
        images: that a trial trains on or is scored on: one folder has other numbers than another.
        slots: where the workers run.
    """
    path = _kept_path(config, images, slots)
    try:
        if time.time() - path.stat().st_mtime > 86400 * FRESH_DAYS:
            return None
        return Sample(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def keep_sample(config: TrialConfig, images: int, slots: Sequence[Slot], sample: Sample) -> None:
    """Keep a measurement in the user's cache; where that cannot be written, do not."""
    path = _kept_path(config, images, slots)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(sample)), encoding="utf-8")


def keep_speeds(
    store: BaseStorage,
    sweep: StoredSweep,
    images: Mapping[str, int],
    slots: Sequence[Slot],
    since: datetime,
) -> None:
    """Keep how long the epochs of trials took that workers of this machine have run since.

    Args:
        store: has the trials.
        sweep: whose they are.
        images: as of `kept_sample`, by the names of its studies.
        slots: where the workers ran.
        since: local time; trials that began earlier had other workers beside them.
    """
    took: dict[Any, tuple[TrialConfig, int, list[float]]] = {}
    for study in sweep.studies:
        for trial in store.get_all_trials(study.study_id, deepcopy=False):
            seconds, steps = trial.user_attrs.get(SECONDS), trial.last_step or 0
            here = trial.system_attrs.get(PROVENANCE, {}).get("host") == socket.gethostname()
            # One that went on from a checkpoint has counted its last attempt's seconds only.
            whole = count_of(trial.system_attrs.get(LEASE_ATTR) or {}, "attempt") == 1
            fresh = trial.datetime_start is not None and trial.datetime_start >= since
            if not (seconds and steps >= FEW_EPOCHS and here and whole and fresh):
                continue
            config, number = sweep.spec.config(study.cell, trial.params), images[study.name]
            of_shape = took.setdefault((key_of(config), number), (config, number, []))
            of_shape[2].append(seconds / steps)
    for config, number, epochs in took.values():
        before = kept_sample(config, number, slots)
        sample = Sample(
            epoch_seconds=statistics.median(epochs),
            begin_seconds=0.0,  # it is in the epochs
            startup_seconds=STARTUP_SECONDS,
            checkpoint_bytes=0,
            updates=0,
            batch=config.global_batch_size,
            measured="run",
            gpu_bytes=before.gpu_bytes if before else 0,
        )
        keep_sample(config, number, slots, sample)


def _kept_path(config: TrialConfig, images: int, slots: Sequence[Slot]) -> Path:
    slot = slots[0]
    cuda = slot.device.startswith("cuda")
    identity = {
        "shape": key_of(config),
        "images": images,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(slot.device) if cuda else slot.device,
        # Workers on GPUs of their own are not in each other's way.
        "workers": sum(s.device == slot.device for s in slots),
        "threads": slot.threads,
        "bfloat16": cuda or has_matrix_units(),
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "speeds" / f"{digest[:24]}.json"
