"""Synthetic sweeps that are exported and imported: what the tests of archives share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from helpers import make_spec, save_checkpoint
from optuna.trial import TrialState

from storage.checkpoints import CheckpointStore, default_checkpoint_dir
from storage.engine import open_storage
from storage.trials import TrialQueue
from sweeps import search
from sweeps.spec import SweepSpec
from sweeps.studies import create_or_resume, stored_sweep
from sweeps.transfer import export_sweep, import_sweep

FINGERPRINT = "f" * 64


def create(store_url: str, name: str = "tiny", **changes: Any) -> SweepSpec:
    spec = make_spec(name, budget={"trials": 6}, **changes)
    create_or_resume(open_storage(store_url), spec, [FINGERPRINT] * len(spec.cells))
    return spec


def compute(
    store_url: str, count: int, *, low: float, finish: bool = True, study: int = 0
) -> list[int]:
    """Let a worker claim trials, decide peak_lr = low, low + 0.001, … and report three epochs."""
    store = open_storage(store_url)
    sweep = stored_sweep(store, "tiny")
    queue = TrialQueue(store, worker_id=f"w{low}")
    numbers = []
    for index in range(count):
        of = sweep.studies[study]
        claim = queue.claim([(of.study_id, 1000)])
        assert claim is not None
        trial = optuna.Trial(optuna.load_study(storage=store, study_name=of.name), claim.trial_id)
        ((name, distribution),) = search.distributions(sweep.spec.search).items()
        value = low + index / 1000
        store.set_trial_param(claim.trial_id, name, value, distribution)
        for step in (1, 2, 3) if finish else (1,):
            trial.report(value * step / 3, step)
        numbers.append(claim.number)
        if finish:
            store.set_trial_user_attr(claim.trial_id, "outcome", "complete")
            assert queue.finish(claim, TrialState.COMPLETE, value)
        else:
            checkpoints = CheckpointStore(default_checkpoint_dir(store_url))
            save_checkpoint(checkpoints, f"{of.name}/{claim.number}", {"of": value})
    return numbers


def export(store_url: str, file: Path, name: str = "tiny") -> Path:
    export_sweep(name, file, store_url, overwrite=True)
    return file


def bring(file: Path, store_url: str, **options: Any) -> tuple[str, list[str]]:
    said: list[str] = []
    options = {"merge": False, "rename": None, **options}
    return import_sweep(file, store_url, say=said.append, **options), said
