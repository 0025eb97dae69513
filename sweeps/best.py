"""`sweep best`: the weights and the settings of each study's best trial, as files to take along."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
import torch

from storage.checkpoints import CheckpointStore, default_checkpoint_dir, trial_key
from storage.engine import close_storage, open_storage, own_url
from sweeps.assembly import Assembly, dataset_identity, open_dataset
from sweeps.config import TrialConfig, Value
from sweeps.errors import SweepError
from sweeps.files import replacing
from sweeps.objective import Objective
from sweeps.status import TrialStatus, read_status
from sweeps.studies import StoredSweep, SweepStudy, check_fingerprint, stored_sweep

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def default_folder(name: str) -> Path:
    """Where the files of a sweep go, in the current folder."""
    return Path(f"{name}-best")


def write_best(
    name: str,
    storage_url: str,
    *,
    folder: Path,
    data_dir: Path | None,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> int:
    """Write each study's best trial: its settings as a sweep's file, its weights beside it.

    ``SWEEP-STUDY.toml`` is a sweep of this one configuration, every setting spelt out.
    ``SWEEP-STUDY.pt``, for ``torch.load(weights_only=True)``, is a dict of

    - ``sweep``, ``study``, ``trial``, ``accuracy``: whose it is; the accuracy, 0 to 1, is the
      trial's value, over several seeds their mean;
    - ``seed``: whose training the weights are; of several seeds, the last;
    - ``config``: every setting, as in ``[train]``;
    - ``classes``: their names, in the order of the logits;
    - ``mean``, ``std``: per channel, of pixels from 0 to 1, which images are normalised by;
    - ``network``: the arguments of ``models.build_model``;
    - ``weights``: its ``state_dict``, on the CPU; of federated training the server's network.

    Args:
        name: the sweep.
        storage_url: where it is.
        folder: created if it is not there; files of the same names are replaced.
        data_dir: where the data set is, None for its usual place. It is opened where there are
            weights to write.
        say: hears of each file that was written.
        warn: hears of each study that has no best trial, or whose best has no checkpoint here.

    Returns:
        The exit status: 0, or 1 if something is missing.

    Raises:
        SweepError: the store has no such sweep, it is a confirmation, no trial of it has completed,
            the images are others than its own, or the folder cannot be written.
        DataError: the data set is missing or broken.
    """
    store = open_storage(storage_url, read_only=True)
    try:
        sweep = stored_sweep(store, name)
        if sweep.spec.confirms:
            raise SweepError(
                f"{name} repeats configurations of {sweep.spec.confirms}, and has no best of its "
                f"own; sweep best {sweep.spec.confirms}"
            )
        return _write_all(store, sweep, storage_url, folder, data_dir, say, warn)
    finally:
        close_storage(store, storage_url)


def _write_all(
    store: BaseStorage,
    sweep: StoredSweep,
    storage_url: str,
    folder: Path,
    data_dir: Path | None,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> int:
    status = read_status(store, sweep)
    if not any(study.best for study in status.studies):
        raise SweepError(f"{sweep.spec.name}: no trial has completed yet, so there is no best one")
    checkpoints = CheckpointStore(default_checkpoint_dir(own_url(store, storage_url)))
    assemblies: dict[tuple[Value, ...], Assembly] = {}
    missing = 0
    for study, found in zip(sweep.studies, status.studies, strict=True):
        if found.best is None:
            missing += 1
            warn(f"{study.name}: no trial has completed yet")
            continue
        config = sweep.spec.config(study.cell, found.best.params)
        # A name that `sweep start` takes from the file.
        stem = re.sub(r"[^\w.-]", "-", study.name)
        settings = _as_sweep(sweep, study, found.best, config)
        _write(folder / f"{stem}.toml", settings.encode())
        say(str(folder / f"{stem}.toml"))
        key = trial_key(study.name, found.best.number)
        weights = None
        if checkpoints.path(key).exists():
            assembly = _assembly(assemblies, config, data_dir)
            check_fingerprint(study.name, study.fingerprint, assembly.dataset.fingerprint)
            weights = _weights(assembly, config, checkpoints, key, seeds=sweep.spec.budget.seeds)
        if weights is None:
            missing += 1
            file = folder / f"{stem}.pt"
            earlier = f"; {file}, of an earlier call, stays as it is" if file.exists() else ""
            warn(
                f"{study.name} #{found.best.number}: no weights, as its last checkpoint is not in "
                f"{checkpoints.root}: [budget] keep_checkpoints is "
                f"{sweep.spec.budget.keep_checkpoints!r}, and each machine has those of its own "
                f"workers unless SWEEP_CHECKPOINT_DIR is shared{earlier}"
            )
            continue
        whose = {
            "sweep": sweep.spec.name,
            "study": study.name,
            "trial": found.best.number,
            "accuracy": found.best.accuracy,
        }
        # Into memory first: PyTorch's error of a full disk does not say that it is full.
        content = io.BytesIO()
        torch.save({**whose, **weights}, content)
        _write(folder / f"{stem}.pt", content.getvalue())
        say(str(folder / f"{stem}.pt"))
    return 1 if missing else 0


def _as_sweep(
    sweep: StoredSweep, study: SweepStudy, trial: TrialStatus, config: TrialConfig
) -> str:
    """A sweep that trains one configuration, with as many seeds as its trial had."""
    table = {
        "title": f"{study.name} #{trial.number}",
        "question": f"What does the best configuration of {study.name} reach?",
        "train": config.as_dict(),
        "budget": {"trials": 1, "seeds": sweep.spec.budget.seeds},
    }
    return tomli_w.dumps(table)


def _assembly(
    assemblies: dict[tuple[Value, ...], Assembly], config: TrialConfig, data_dir: Path | None
) -> Assembly:
    identity = dataset_identity(config)
    if identity not in assemblies:
        assemblies[identity] = Assembly(open_dataset(config, data_dir), torch.device("cpu"))
    return assemblies[identity]


def _weights(
    assembly: Assembly, config: TrialConfig, checkpoints: CheckpointStore, key: str, *, seeds: int
) -> dict[str, Any] | None:
    """What the file has beside whose it is; None without a checkpoint of the trial's end."""
    trained = Objective(assembly).trained(config, checkpoints, key, seeds=seeds)
    if trained is None:
        return None
    seed, model = trained
    prepared = assembly.prepared(config)
    return {
        "seed": seed,
        "config": config.as_dict(),
        "classes": list(assembly.dataset.classes),
        "mean": prepared.mean,
        "std": prepared.std,
        "network": assembly.network(config, seed),
        "weights": {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()
        },
    }


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SweepError(
            f"cannot write {path} ({reason}); name another folder with --out"
        ) from None
