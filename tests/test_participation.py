"""Trials of devices that take turns and share images, from their config to their accuracy."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dataset import Dataset
from data.sources import load_dataset
from storage.checkpoints import CheckpointStore
from sweeps.assembly import Assembly
from sweeps.config import TrialConfig
from sweeps.objective import Objective, Progress
from sweeps.training.loop import Interrupted

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


def config(**changes: Any) -> TrialConfig:
    settings: dict[str, Any] = {
        "dataset": "digits", "model": "resnet8", "width_factor": 0.25, "norm": "group",
        "num_groups": 2, "num_devices": 200, "participation": 0.05, "global_batch_size": 80,
        "split": "dirichlet", "alpha": 1.0, "min_images_per_device": 1, "augment": "none",
        "epochs": 3, "schedule": "cosine",
    }  # fmt: skip
    return TrialConfig.build({**settings, **changes})


def curve(
    objective: Objective, of: TrialConfig, store: CheckpointStore | None = None, stop_at: int = -1
) -> list[Progress]:
    """Train, and stop when asked for the stop_at-th time whether to, counted from 0."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop_at + 1

    seen: list[Progress] = []
    objective.run(
        of,
        seeds=1,
        on_epoch=seen.append,
        should_stop=should_stop,
        checkpoints=store,
        key="trial",
    )
    return seen


def numbers(progress: list[Progress]) -> list[tuple[float, ...]]:
    return [
        (p.step, p.score, p.result.train_loss, p.result.val_loss, p.result.lr) for p in progress
    ]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_trial_of_few_devices_a_round_goes_on_as_if_never_stopped(
    tmp_path: Path, digits: Dataset, norm: str
) -> None:
    wanted = config(norm=norm, shared_images=50)
    whole = curve(Objective(Assembly(digits, CPU)), wanted)
    store = CheckpointStore(tmp_path)
    for stop_at in (20, 20):  # 15 updates an epoch: within the second, then within the third
        with pytest.raises(Interrupted):
            curve(Objective(Assembly(digits, CPU)), wanted, store, stop_at)
    assert Objective(Assembly(digits, CPU)).completed_steps(wanted, store, "trial") == 2
    assert numbers(curve(Objective(Assembly(digits, CPU)), wanted, store)) == numbers(whole)


def test_settings_reach_the_batches(digits: Dataset) -> None:
    assembly = Assembly(digits, CPU)

    def shown(**changes: Any) -> list[tuple[list[int] | None, int]]:
        batches = assembly.batches(config(**changes), seed=0)
        assert batches.updates_per_epoch == 15  # 1,212 images, however many hold them
        return [
            (None if ids is None else ids.tolist(), each)
            for batch in batches.epoch(0)
            for ids, each in batch.blocks
        ]

    some = shown()
    assert [(len(ids or []), each) for ids, each in some] == [(10, 8)] * 15
    assert shown(shared_images=100) == some
    local = shown(algorithm="fedavg", local_steps=5)
    assert [ids for ids, _ in local] == [some[u // 5][0] for u in range(15)]
    everyone = {"num_devices": 10, "participation": 1.0}
    assert shown(**everyone) == [(None, 8)] * 15


def test_shared_images_train_on_every_device(digits: Dataset) -> None:
    assembly = Assembly(digits, CPU)
    alone, shared = (
        assembly.prepared(config(num_devices=10, participation=1.0, shared_images=n)).shards
        for n in (0, 100)
    )
    common = set(shared[0].tolist()).intersection(*(shard.tolist() for shard in shared))
    assert len(common) == 100
    assert not set(alone[0].tolist()).intersection(*(shard.tolist() for shard in alone))


def test_more_shared_images_than_there_are_is_refused_before_training(digits: Dataset) -> None:
    assembly = Assembly(digits, CPU)
    assembly.check(config(shared_images=100))
    too_many = dataclasses.replace(config(), shared_images=1203)
    with pytest.raises(ValueError, match="shared_images is 1203: it must be from 0 to 1202"):
        assembly.check(too_many)
