"""The pull loop in one process: what it claims, reports and tells, and what it survives."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from commands import environment
from helpers import TRAIN, begin, make_spec, make_worker, trials, url, wait_until
from optuna.trial import TrialState

from storage.checkpoints import CheckpointStore
from storage.engine import open_storage
from storage.leases import LEASE_ATTR
from storage.trials import Claim, TrialQueue
from sweeps import worker as worker_module
from sweeps.assembly import Assembly, open_dataset
from sweeps.attributes import CURVES, DEVICE_ACCURACIES, PROVENANCE, WORST_DEVICE_ACCURACY
from sweeps.config import TrialConfig
from sweeps.epochs import Reporter
from sweeps.errors import SpecError, SweepError
from sweeps.objective import Objective, Progress
from sweeps.search import SAMPLERS
from sweeps.status import read_status
from sweeps.stopping import StopRequest
from sweeps.studies import stored_sweep
from sweeps.training.loop import Diverged, Interrupted
from sweeps.worker import Worker, WorkerOptions


def test_the_budget_is_met_exactly_and_trials_say_what_they_were(tmp_path: Path) -> None:
    tries = [{"label": "known", "peak_lr": 0.05}]
    begin(tmp_path, make_spec(**{"try": tries}))
    make_worker(tmp_path).run()
    make_worker(tmp_path, worker_id="late").run()
    found = trials(tmp_path)
    assert [t.state for t in found] == [TrialState.COMPLETE] * 3
    assert found[0].params["peak_lr"] == 0.05
    assert found[0].user_attrs["label"] == "known"
    for trial in found:
        assert sorted(trial.intermediate_values) == [1, 2, 3]
        assert trial.value == trial.intermediate_values[3]
        assert 0 < trial.value <= 1
        assert trial.user_attrs["outcome"] == "complete"
        curves = trial.system_attrs[CURVES]
        assert {len(points) for points in curves.values()} == {3}
        assert curves["val_accuracy"][-1] == pytest.approx(trial.value, abs=1e-5)
        provenance = trial.system_attrs[PROVENANCE]
        assert provenance["optuna"] == optuna.__version__
        assert len(provenance["data_fingerprint"]) == 64
        assert provenance["precision"] == "float32"
    assert len({t.params["peak_lr"] for t in found}) == 3
    assert len(list((tmp_path / "checkpoints").glob("*.pt*"))) == 1  # the best one's


def test_one_worker_and_the_same_seed_give_the_same_trials(tmp_path: Path) -> None:
    curves = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        begin(tmp_path / place, make_spec())
        make_worker(tmp_path / place).run()
        curves.append(
            [(t.params, t.value, t.intermediate_values) for t in trials(tmp_path / place)]
        )
    assert curves[0] == curves[1]


def stop_after(step: int, stop: StopRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set `stop` as a signal would, once a step was reported."""
    report = Reporter.__call__

    def reporting(self: Any, progress: Progress) -> None:
        report(self, progress)
        if progress.step == step:
            stop.set()

    monkeypatch.setattr(Reporter, "__call__", reporting)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_suggestion_cut_short_is_made_again_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """After none, one, two and all of a trial's parameters, with a history to learn from."""
    search = {
        "peak_lr": {"low": 0.01, "high": 0.3, "log": True},
        "momentum": {"low": 0.5, "high": 0.95},
        "nesterov": {"choices": [False, True]},
    }
    sampler: dict[str, Any] = {"type": kind}
    if kind in ("TPESampler", "GPSampler"):
        sampler["n_startup_trials"] = 2
    spec = make_spec(
        train={"epochs": 1},
        search=search,
        sampler=sampler,
        pruner={"type": "HyperbandPruner"},
        budget={"trials": 4},
    )
    for place in ("whole", "cut"):
        (tmp_path / place).mkdir()
        begin(tmp_path / place, spec)
    make_worker(tmp_path / "whole").run()
    suggest = optuna.Trial._suggest
    cuts: list[tuple[int, int]] = []
    drawn = 0

    def cut_short(self: optuna.Trial, name: str, distribution: Any) -> Any:
        nonlocal drawn
        left = sum(number == self.number for number, _ in cuts)
        drawn = 0 if name == "peak_lr" else drawn
        if left == drawn < len(search):
            cuts.append((self.number, drawn))
            raise Interrupted
        value = suggest(self, name, distribution)
        drawn += 1
        if left == drawn == len(search):
            cuts.append((self.number, drawn))
            raise Interrupted
        return value

    monkeypatch.setattr(optuna.Trial, "_suggest", cut_short)
    make_worker(tmp_path / "cut").run()
    assert cuts == [(number, after) for number in range(4) for after in range(4)]
    whole, cut = trials(tmp_path / "whole"), trials(tmp_path / "cut")
    assert [t.params for t in cut] == [t.params for t in whole]
    assert [t.value for t in cut] == [t.value for t in whole]
    assert {t.system_attrs[LEASE_ATTR]["attempt"] for t in cut} == {5}


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_stopped_trial_goes_on_as_if_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: int
) -> None:
    spec = make_spec(train={"norm": "fixup"}, budget={"trials": 1, "seeds": seeds})
    for place in ("whole", "stopped"):
        (tmp_path / place).mkdir()
        begin(tmp_path / place, spec)
    make_worker(tmp_path / "whole").run()
    for step in range(1, 3 * seeds):
        with monkeypatch.context() as patch:
            stop = StopRequest()
            stop_after(step, stop, patch)
            make_worker(tmp_path / "stopped", stop=stop).run()
        (waiting,) = trials(tmp_path / "stopped")
        assert waiting.state == TrialState.WAITING
        assert sorted(waiting.intermediate_values) == list(range(1, step + 1))
    make_worker(tmp_path / "stopped").run()
    (whole,), (stopped,) = trials(tmp_path / "whole"), trials(tmp_path / "stopped")
    assert stopped.state == TrialState.COMPLETE
    assert stopped.params == whole.params
    assert stopped.intermediate_values == whole.intermediate_values
    assert stopped.value == whole.value
    ours, theirs = stopped.system_attrs[CURVES], whole.system_attrs[CURVES]
    for name in ("train_loss", "val_loss", "val_accuracy", "lr"):
        assert ours[name] == theirs[name]
    assert stopped.system_attrs[LEASE_ATTR]["attempt"] == 3 * seeds


def test_the_value_is_the_mean_over_seeds(tmp_path: Path) -> None:
    search = {"peak_lr": {"choices": [0.1]}}
    values = {}
    for name, seed, seeds in (("s0", 0, 1), ("s1", 1, 1), ("both", 0, 2)):
        spec = make_spec(
            name, train={"seed": seed}, search=search, budget={"trials": 1, "seeds": seeds}
        )
        begin(tmp_path, spec)
        make_worker(tmp_path, name).run()
        (trial,) = trials(tmp_path, name)
        values[name] = trial.value
        assert len(trial.intermediate_values) == 3 * seeds
    assert values["both"] == pytest.approx((values["s0"] + values["s1"]) / 2)


def test_a_trial_says_what_its_network_is_worth_to_the_device_that_it_serves_worst(
    tmp_path: Path,
) -> None:
    train = {"split": "classes", "classes_per_device": 3, "assignment": "ring", "num_devices": 8}
    spec = make_spec(train=train, budget={"trials": 1, "seeds": 2})
    begin(tmp_path, spec)
    make_worker(tmp_path).run()
    (trial,) = trials(tmp_path)
    config = spec.config({}, trial.params)
    assembly = Assembly(open_dataset(config, None), torch.device("cpu"))
    prepared = assembly.prepared(config)
    of_seeds = []
    for seed in (0, 1):
        training = assembly.training(config, seed)
        assert len(list(training.run())) == config.epochs
        model = training.global_model().eval()
        right: dict[int, list[bool]] = {}
        for image, label in zip(
            torch.cat([*prepared.val_images]), prepared.val_labels.tolist(), strict=True
        ):
            right.setdefault(label, []).append(model(image[None]).argmax().item() == label)
        accuracies = {k: sum(hits) / len(hits) for k, hits in right.items()}
        of_seeds.append(
            [
                sum(accuracies[k] for k in prepared.train_labels[shard].tolist()) / len(shard)
                for shard in prepared.shards
            ]
        )
    means = [sum(of_device) / 2 for of_device in zip(*of_seeds, strict=True)]
    assert trial.system_attrs[DEVICE_ACCURACIES] == pytest.approx(means, abs=1e-6)
    assert trial.user_attrs[WORST_DEVICE_ACCURACY] == min(trial.system_attrs[DEVICE_ACCURACIES])
    assert min(means) < trial.value < max(means)
    assert read_status(
        open_storage(url(tmp_path)), stored_sweep(open_storage(url(tmp_path)), "tiny")
    ).studies[0].trials[0].worst_device_accuracy == pytest.approx(min(means), abs=1e-6)


def test_a_device_without_validation_images_has_no_accuracy() -> None:
    train = {**TRAIN, "split": "classes", "classes_per_device": 2, "num_devices": 5}
    config = TrialConfig.build(train)
    assembly = Assembly(open_dataset(config, None), torch.device("cpu"))
    prepared = assembly.prepared(config)
    first = set(prepared.train_labels[prepared.shards[0]].tolist())
    prepared.val_labels.apply_(lambda k: next(c for c in range(10) if c not in first))
    found = assembly.device_accuracies(config, [0] * 10)
    assert found[0] is None
    assert 0.0 in found


def test_a_diverged_trial_is_pruned_with_its_reason(tmp_path: Path) -> None:
    search = {"peak_lr": {"choices": [1e6]}}
    begin(tmp_path, make_spec(train={"norm": "fixup"}, search=search))
    make_worker(tmp_path).run()
    for trial in trials(tmp_path):
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs["outcome"] == "diverged"
        assert "loss" in trial.user_attrs["reason"]
        assert trial.value is None
    store = open_storage(url(tmp_path))
    (study,) = read_status(store, stored_sweep(store, "tiny")).studies
    assert study.count("diverged") == 3
    assert study.best is None


def test_late_divergence_keeps_its_last_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Objective.run

    def diverging(self: Objective, *args: Any, on_epoch: Callable[..., None], **kw: Any) -> float:
        def then_diverge(progress: Progress) -> None:
            on_epoch(progress)
            if progress.step == 2:
                raise Diverged("loss is not finite at update 17", 2)

        return run(self, *args, on_epoch=then_diverge, **kw)

    monkeypatch.setattr(Objective, "run", diverging)
    begin(tmp_path, make_spec(budget={"trials": 1}))
    make_worker(tmp_path).run()
    (trial,) = trials(tmp_path)
    assert trial.state == TrialState.PRUNED
    assert trial.value == trial.intermediate_values[2]


def test_the_pruner_is_asked(tmp_path: Path) -> None:
    pruner = {"type": "ThresholdPruner", "lower": 0.999, "n_warmup_steps": 2}
    begin(tmp_path, make_spec(pruner=pruner))
    make_worker(tmp_path).run()
    for trial in trials(tmp_path):
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs["outcome"] == "pruned"
        assert trial.last_step == 2
        assert trial.value == trial.intermediate_values[2]


DIES_BEFORE_THE_QUESTION = """
import os
import optuna
from sweeps.cli import main
asked = []
optuna.Trial.should_prune = lambda self: os._exit(9) if len(asked) == 1 else asked.append(self)
main()
"""


def test_a_worker_that_died_between_report_and_question_leaves_the_question(tmp_path: Path) -> None:
    pruner = {"type": "ThresholdPruner", "lower": 0.999, "n_warmup_steps": 2}
    begin(tmp_path, make_spec(train={"epochs": 4}, pruner=pruner, budget={"trials": 1}))
    died = subprocess.run(
        [sys.executable, "-c", DIES_BEFORE_THE_QUESTION, "worker", "tiny", "--threads", "1"],
        cwd=tmp_path, env={**environment(), "SWEEP_CHECKPOINT_DIR": str(tmp_path / "checkpoints")},
        check=False,
    )  # fmt: skip
    assert died.returncode == 9
    (trial,) = trials(tmp_path)
    assert (trial.state, trial.last_step) == (TrialState.RUNNING, 2)
    make_worker(tmp_path).run()
    (trial,) = trials(tmp_path)
    assert (trial.state, trial.last_step) == (TrialState.PRUNED, 2)


DIES_WHILE_IT_SAVES = """
import os, threading
import optuna
from sweeps import objective
from sweeps.cli import main
objective.CHECKPOINT_SECONDS = 0.0
saved, fsync = [], os.fsync
def stuck(descriptor):
    if "checkpoint" in threading.current_thread().name:
        saved.append(descriptor)
        if len(saved) > {saves}:
            threading.Event().wait()
    fsync(descriptor)
os.fsync = stuck
asked = []
def should_prune(self):
    asked.append(self)
    if len(asked) == {epochs}:
        os._exit(9)
    return False
optuna.Trial.should_prune = should_prune
main()
"""


@pytest.mark.parametrize("seeds", [1, 2])
def test_an_epoch_whose_checkpoint_was_not_written_yet_is_trained_again(
    tmp_path: Path, seeds: int
) -> None:
    """Killed after the report and before the rename: the epoch is forgotten, then as it was."""
    spec = make_spec(train={"epochs": 2}, budget={"trials": 1, "seeds": seeds})
    (tmp_path / "whole").mkdir()
    begin(tmp_path / "whole", spec)
    make_worker(tmp_path / "whole").run()
    store = begin(tmp_path, spec)
    last = 2 * seeds - 1
    # Of each checkpoint its file is flushed, of the first one its folder too.
    flushed = last - 1 + (last > 1)
    code = DIES_WHILE_IT_SAVES.format(saves=flushed, epochs=last)
    died = subprocess.run(
        [sys.executable, "-c", code, "worker", "tiny", "--threads", "1"],
        cwd=tmp_path, env={**environment(), "SWEEP_CHECKPOINT_DIR": str(tmp_path / "checkpoints")},
        check=False,
    )  # fmt: skip
    assert died.returncode == 9
    (trial,) = trials(tmp_path)
    assert (trial.state, trial.last_step) == (TrialState.RUNNING, last)
    (study,) = stored_sweep(store, "tiny").studies
    config = spec.config(study.cell, trial.params)
    objective = Objective(Assembly(open_dataset(config, None), torch.device("cpu")))
    checkpoints = CheckpointStore(tmp_path / "checkpoints")
    assert objective.completed_steps(config, checkpoints, "tiny/0") == last - 1
    make_worker(tmp_path).run()
    (whole,), (resumed,) = trials(tmp_path / "whole"), trials(tmp_path)
    assert resumed.state == TrialState.COMPLETE
    assert resumed.params == whole.params
    assert resumed.intermediate_values == whole.intermediate_values
    assert resumed.system_attrs[LEASE_ATTR]["attempt"] == 2
    for name in ("train_loss", "val_loss", "val_accuracy", "lr"):
        assert resumed.system_attrs[CURVES][name] == whole.system_attrs[CURVES][name]


FREEZES_WHILE_IT_SAVES = """
import os, signal, sqlite3, threading
from sweeps import objective
from sweeps.cli import main
objective.CHECKPOINT_SECONDS = 3600.0
saved, fsync = [], os.fsync
def freezing(descriptor):
    if "checkpoint" in threading.current_thread().name:
        saved.append(descriptor)
        # After the first epoch's and its folder's comes the last one's.
        if len(saved) == 3:
            # Not in a transaction, which would keep everybody out of the store.
            store = sqlite3.connect("sweep.db", isolation_level=None, timeout=60)
            store.execute("BEGIN IMMEDIATE")
            store.execute("ROLLBACK")
            os.kill(os.getpid(), signal.SIGSTOP)
    fsync(descriptor)
os.fsync = freezing
main()
"""


def test_a_worker_that_was_frozen_does_not_put_back_its_checkpoint(tmp_path: Path) -> None:
    store = begin(tmp_path, make_spec(budget={"trials": 1}))
    checkpoints = CheckpointStore(tmp_path / "checkpoints")
    frozen = subprocess.Popen(
        [
            sys.executable, "-c", FREEZES_WHILE_IT_SAVES,
            "worker", "tiny", "--threads", "1", "--lease-seconds", "1",
        ],
        cwd=tmp_path, env={**environment(), "SWEEP_CHECKPOINT_DIR": str(checkpoints.root)},
    )  # fmt: skip
    try:
        assert os.WIFSTOPPED(os.waitpid(frozen.pid, os.WUNTRACED)[1])
        options = WorkerOptions(
            worker_id="w", device=torch.device("cpu"), poll_seconds=0.05, lease_seconds=1
        )
        Worker(store, checkpoints, "tiny", options, StopRequest()).run()
        (trial,) = trials(tmp_path)
        assert (trial.state, trial.system_attrs[LEASE_ATTR]["attempt"]) == (TrialState.COMPLETE, 2)
        written = checkpoints.path("tiny/0").read_bytes()
        frozen.send_signal(signal.SIGCONT)
        assert frozen.wait(120) == 0
    finally:
        frozen.kill()
        frozen.wait()
    assert checkpoints.path("tiny/0").read_bytes() == written
    assert [file.name for file in checkpoints.root.iterdir()] == [checkpoints.path("tiny/0").name]
    (trial,) = trials(tmp_path)
    assert sorted(trial.intermediate_values) == [1, 2, 3]


@pytest.mark.parametrize("end", ["stop", "prune", "diverge", "raise"])
def test_whatever_ends_a_trial_its_last_epoch_is_on_the_disk_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    ends = {"stop": Interrupted(), "diverge": Diverged("so", 2), "raise": RuntimeError("so")}
    reached = threading.Event()
    fsync, run = os.fsync, Objective.run
    covered: list[int] = []
    flushed: list[int] = []

    def slow(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == 3:  # after the first checkpoint and its folder
            assert reached.wait(60)
        fsync(descriptor)

    def running(
        self: Objective, config: TrialConfig, *, on_epoch: Callable[[Progress], None], **kw: Any
    ) -> float:
        def ending(progress: Progress) -> None:
            if progress.step == 2:
                reached.set()
            on_epoch(progress)
            if progress.step == 2:
                raise ends[end]

        try:
            return run(self, config, on_epoch=ending, **kw)
        finally:
            covered.append(self.completed_steps(config, kw["checkpoints"], kw["key"]))
            assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]

    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(Objective, "run", running)
    pruner = {"type": "ThresholdPruner", "lower": 0.999, "n_warmup_steps": 2}
    begin(tmp_path, make_spec(pruner=pruner if end == "prune" else {"type": "NopPruner"},
                              budget={"trials": 1}))  # fmt: skip
    monkeypatch.setattr(worker_module, "MAX_FAILURES", 1)
    stop = StopRequest()
    monkeypatch.setattr(TrialQueue, "release", lambda self, claim: stop.set())
    make_worker(tmp_path, stop=stop).run()
    assert covered == [2]


FINDS_THE_DISK_FULL = """
import errno, os, threading
from sweeps.cli import main
def full(descriptor):
    if "checkpoint" in threading.current_thread().name:
        raise OSError(errno.ENOSPC, "No space left on device")
os.fsync = full
main()
"""


def test_a_checkpoint_that_cannot_be_written_ends_the_worker(tmp_path: Path) -> None:
    begin(tmp_path, make_spec(budget={"trials": 1}))
    done = subprocess.run(
        [sys.executable, "-c", FINDS_THE_DISK_FULL, "worker", "tiny", "--threads", "1"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "cannot save checkpoint" in line]
    assert line.endswith("(No space left on device); free some space there")
    assert "Traceback" not in done.stderr
    (trial,) = trials(tmp_path)
    assert trial.state == TrialState.WAITING
    assert not list(tmp_path.glob("*.checkpoints/*"))


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool], error: Any) -> None:
    """Let the n-th training raise, before its first epoch."""
    run = Objective.run
    calls = iter(range(10**6))

    def maybe(self: Objective, *args: Any, **kw: Any) -> float:
        if fails(next(calls)):
            raise error()
        return run(self, *args, **kw)

    monkeypatch.setattr(Objective, "run", maybe)


def test_a_trial_that_raised_once_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda call: call == 1, lambda: RuntimeError("flaky"))
    begin(tmp_path, make_spec())
    make_worker(tmp_path).run()
    assert [t.state for t in trials(tmp_path)] == [TrialState.COMPLETE] * 3


def test_a_trial_that_raises_again_fails_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda call: call in (1, 2), lambda: RuntimeError("bad\nnews"))
    begin(tmp_path, make_spec())
    make_worker(tmp_path).run()
    found = trials(tmp_path)
    assert [t.state.name for t in found] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert found[1].user_attrs["outcome"] == "failed"
    assert found[1].user_attrs["reason"] == "RuntimeError: bad"
    assert "Traceback" in found[1].user_attrs["error"]


def test_trials_that_fail_alike_end_the_worker_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda call: True, lambda: RuntimeError("no such kernel"))
    begin(tmp_path, make_spec(budget={"trials": 20}))
    with pytest.raises(SweepError, match="RuntimeError: no such kernel"):
        make_worker(tmp_path).run()
    states = [t.state for t in trials(tmp_path)]
    assert states == [TrialState.FAIL] * 3


def test_a_trial_that_takes_its_workers_down_fails(tmp_path: Path) -> None:
    store = begin(tmp_path, make_spec(budget={"trials": 2}))
    (study,) = stored_sweep(store, "tiny").studies
    clock = [0.0]
    for death in range(3):
        dead = TrialQueue(store, worker_id=f"dead {death}", clock=lambda: clock[0])
        watcher = TrialQueue(store, worker_id="watcher", clock=lambda: clock[0])
        claim = dead.claim([(study.study_id, 1)])
        assert claim is not None
        watcher.requeue_abandoned([study.study_id])
        clock[0] += 61
        watcher.requeue_abandoned([study.study_id])
    make_worker(tmp_path).run()
    first, second = trials(tmp_path)
    assert first.state == TrialState.FAIL
    assert "3 workers died" in first.user_attrs["reason"]
    assert second.state == TrialState.COMPLETE


def test_a_trial_that_gets_on_may_lose_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preempted at every epoch, more often than a trial may die without getting anywhere."""
    store = begin(tmp_path, make_spec(train={"epochs": 6}, budget={"trials": 1}))
    (study,) = stored_sweep(store, "tiny").studies
    report = Reporter.__call__

    class Killed(BaseException):
        pass

    for step in range(1, 6):

        def dying(self: Any, progress: Progress, last: int = step) -> None:
            report(self, progress)
            if progress.step == last:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Reporter, "__call__", dying)
            with pytest.raises(Killed):
                make_worker(tmp_path, worker_id=f"w{step}").run()
        clock = [0.0]
        watcher = TrialQueue(store, worker_id="watcher", clock=lambda now=clock: now[0])
        watcher.requeue_abandoned([study.study_id])
        clock[0] += 61
        watcher.requeue_abandoned([study.study_id])
    make_worker(tmp_path).run()
    (trial,) = trials(tmp_path)
    assert trial.state == TrialState.COMPLETE
    assert trial.system_attrs[LEASE_ATTR]["deaths"] == 5
    assert sorted(trial.intermediate_values) == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_a_store_that_is_gone_is_not_taken_up(tmp_path: Path) -> None:
    spec = make_spec(budget={"trials": 1})
    begin(tmp_path, spec)
    taken_up: list[Any] = []
    stop = StopRequest()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(2, stop, patch)
        make_worker(tmp_path, stop=stop).run()
    assert list((tmp_path / "checkpoints").iterdir())
    for file in tmp_path.glob("sweep.db*"):
        file.unlink()
    begin(tmp_path, spec)
    with pytest.MonkeyPatch.context() as patch:
        load = Objective._load

        def loading(self: Any, *args: Any) -> Any:
            state = load(self, *args)
            taken_up.append((state["finished"], state["training"]))
            return state

        patch.setattr(Objective, "_load", loading)
        make_worker(tmp_path).run()
    assert taken_up == [([], None)]


def test_without_its_checkpoint_a_trial_starts_over_and_so_does_its_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine. What the lost attempt reported must not stand among the new."""
    begin(tmp_path, make_spec(budget={"trials": 1}))
    stop = StopRequest()
    with monkeypatch.context() as patch:
        stop_after(2, stop, patch)
        make_worker(tmp_path, stop=stop).run()
    store = open_storage(url(tmp_path))
    (waiting,) = trials(tmp_path)
    for step in (1, 2):
        store.set_trial_intermediate_value(waiting._trial_id, step, 0.0)
    for file in (tmp_path / "checkpoints").iterdir():
        file.unlink()
    make_worker(tmp_path).run()
    (trial,) = trials(tmp_path)
    assert trial.state == TrialState.COMPLETE
    assert sorted(trial.intermediate_values) == [1, 2, 3]
    accuracies = trial.system_attrs[CURVES]["val_accuracy"]
    assert list(trial.intermediate_values.values()) == pytest.approx(accuracies, abs=1e-5)


def test_known_settings_and_complete_trials_are_not_pruned(tmp_path: Path) -> None:
    pruner = {"type": "ThresholdPruner", "lower": 0.999, "n_warmup_steps": 3}
    tries = [{"label": "known", "peak_lr": 0.05}]
    begin(tmp_path, make_spec(train={"epochs": 4}, pruner=pruner, **{"try": tries}))
    make_worker(tmp_path).run()
    first, *others = trials(tmp_path)
    assert first.state == TrialState.COMPLETE
    assert {t.last_step for t in others} == {3}
    (tmp_path / "late").mkdir()
    begin(tmp_path / "late", make_spec(pruner=pruner))
    make_worker(tmp_path / "late").run()
    assert {t.state for t in trials(tmp_path / "late")} == {TrialState.COMPLETE}


def test_settings_that_contradict_each_other_cost_their_trial_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path, make_spec())
    config = type(make_spec()).config
    calls = iter(range(100))

    def contradicting(self: Any, cell: Any, params: Any) -> Any:
        if params.get("peak_lr") not in (None, 0.01) and next(calls) == 1:
            raise SpecError("a is too small for b")
        return config(self, cell, params)

    monkeypatch.setattr(type(make_spec()), "config", contradicting)
    make_worker(tmp_path).run()
    assert [t.state.name for t in trials(tmp_path)].count("FAIL") == 1
    assert [t.state.name for t in trials(tmp_path)].count("COMPLETE") == 2


def test_a_worker_that_lost_its_lease_drops_the_result_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after SIGSTOP past the lease: another worker has taken the trial over meanwhile."""
    begin(tmp_path, make_spec(budget={"trials": 2}))
    run = Objective.run
    thief: list[Any] = []

    def robbed(self: Objective, *args: Any, **kw: Any) -> float:
        value = run(self, *args, **kw)
        if not thief:
            store = open_storage(url(tmp_path))
            (study,) = stored_sweep(store, "tiny").studies
            clock = [0.0]
            queue = TrialQueue(store, worker_id="thief", clock=lambda: clock[0])
            queue.requeue_abandoned([study.study_id])
            clock[0] += 61
            claim = queue.claim([(study.study_id, 1)])
            assert claim is not None
            assert claim.number == 0
            thief.append((queue, claim))
        return value

    monkeypatch.setattr(Objective, "run", robbed)
    stop = StopRequest()
    robbed_worker = make_worker(tmp_path, stop=stop)
    thread = threading.Thread(target=robbed_worker.run)
    thread.start()
    wait_until(
        lambda: len(trials(tmp_path)) == 2 and trials(tmp_path)[1].state.is_finished(), seconds=60
    )
    assert trials(tmp_path)[0].state == TrialState.RUNNING
    queue, claim = thief[0]
    assert queue.finish(claim, TrialState.COMPLETE, 0.125)
    thread.join(60)
    assert not thread.is_alive()
    assert trials(tmp_path)[0].value == 0.125


@pytest.mark.parametrize("moment", ["report", "finish"])
def test_a_worker_whose_trial_was_finished_meanwhile_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Frozen before a write, which then finds a trial that somebody else has finished."""
    begin(tmp_path, make_spec(budget={"trials": 2}))
    write, finish = getattr(TrialQueue, moment), TrialQueue.finish
    writes = {"report": 2, "finish": 1}[moment]

    def frozen_before(self: TrialQueue, claim: Claim, *arguments: Any, **attrs: Any) -> bool:
        nonlocal writes
        if claim.number == 0:
            writes -= 1
            if writes == 0:
                assert finish(self, claim, TrialState.COMPLETE, 0.125)
        written: bool = write(self, claim, *arguments, **attrs)
        return written

    monkeypatch.setattr(TrialQueue, moment, frozen_before)
    make_worker(tmp_path).run()
    first, second = trials(tmp_path)
    assert writes == 0
    assert (first.state, first.value) == (TrialState.COMPLETE, 0.125)
    assert "sweep:failures" not in first.system_attrs
    assert second.state == TrialState.COMPLETE


def test_other_images_are_refused(tmp_path: Path) -> None:
    begin(tmp_path, make_spec(train={"noise_std": 0.5}))
    with pytest.raises(SweepError, match="not the one"):
        make_worker(tmp_path).run()
    assert {t.state for t in trials(tmp_path)} <= {TrialState.WAITING}


def test_a_sweep_that_is_not_there_is_named(tmp_path: Path) -> None:
    begin(tmp_path, make_spec())
    with pytest.raises(SweepError, match="did you mean 'tiny'"):
        make_worker(tmp_path, "tinny").run()
