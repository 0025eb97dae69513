"""The benchmark of search strategies: its tables are whole, and a replay follows from its seed."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["fixup-cosine", "groupnorm-plateau"])
def test_a_table_is_that_of_its_command(name: str) -> None:
    asked = benchmark("curves").QUESTIONS[name]
    table = benchmark("replays").Table(asked.table)
    assert table.about["train"] == asked.train
    assert tuple(table.batches) == asked.batches
    assert table.seeds == list(asked.seeds)
    for setting, (lr, warmup, clip) in enumerate(asked.settings()):
        params = {"peak_lr": lr, "warmup_epochs": warmup, "clip_grad_norm": clip}
        assert table.params(setting) == params
        assert table.setting(params) == setting
    # What was complete has a score for each epoch, and what broke off cost less.
    assert np.isfinite(table.scores[table.complete]).all()
    assert (table.costs[~table.complete] < table.epochs).all()


def test_the_plateau_table_knows_when_rates_dropped() -> None:
    asked = benchmark("curves").QUESTIONS["groupnorm-plateau"]
    table = benchmark("replays").Table(asked.table)
    dropped = 0
    for setting in range(len(asked.settings())):
        curve = table.curve(0, setting, None)
        assert len(curve.rates) == len(curve.scores)
        falls = [now / before for before, now in itertools.pairwise(curve.rates) if now < before]
        assert falls == pytest.approx([asked.train["plateau_factor"]] * len(falls))
        dropped += bool(falls)
    assert dropped


def test_a_replay_follows_from_its_seed() -> None:
    replays = benchmark("replays")
    table, ours = replays.Table(), replays.strategies()["Sweep"]
    first, again, other = (replays.replay(table, ours, seed) for seed in (7, 7, 8))
    assert first == again != other
    for outcome in first:
        assert outcome.hit
        assert table.epochs <= outcome.epochs < table.costs[0].sum()
