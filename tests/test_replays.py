"""The benchmark of search strategies: its table is whole, and a replay follows from its seed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

BENCHMARKS = Path(__file__).parent / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_its_command() -> None:
    curves, table = benchmark("curves"), benchmark("replays").Table()
    assert table.about["train"] == curves.TRAIN
    assert tuple(table.batches) == curves.BATCHES
    assert table.seeds == list(curves.SEEDS)
    for setting, (lr, warmup, clip) in enumerate(curves.settings()):
        params = {"peak_lr": lr, "warmup_epochs": warmup, "clip_grad_norm": clip}
        assert table.params(setting) == params
        assert table.setting(params) == setting
    # What was complete has a score for each epoch, and what broke off cost less.
    assert np.isfinite(table.scores[table.complete]).all()
    assert (table.costs[~table.complete] < table.epochs).all()


def test_a_replay_follows_from_its_seed() -> None:
    replays = benchmark("replays")
    table, ours = replays.Table(), replays.strategies()["Sweep"]
    first, again, other = (replays.replay(table, ours, seed) for seed in (7, 7, 8))
    assert first == again != other
    for outcome in first:
        assert outcome.hit
        assert table.epochs <= outcome.epochs < table.costs[0].sum()
