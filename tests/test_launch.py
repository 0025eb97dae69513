"""How many workers there are, what each may take, and how often one is started again."""

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import begin, make_spec, trials, url, wait_until
from optuna.trial import TrialState

from data.sources import load_dataset
from storage.leases import LEASE_ATTR
from sweeps.assembly import Assembly
from sweeps.config import TrialConfig
from sweeps.footprint import ACTIVATIONS_SHARE, saved_bytes, worker_bytes
from sweeps.launch import (
    HEALTHY_SECONDS,
    MAX_RESTARTS,
    LocalWorkers,
    Restarts,
    ThisMachine,
    start_worker,
    worker_command,
)
from sweeps.machine import (
    GPU_CONTEXT_BYTES,
    GPU_MEMORY_SHARE,
    NOTHING_KNOWN,
    PROCESS_BYTES,
    Gpu,
    Machine,
    Need,
    Slot,
    cores,
    cpu_quota,
    divide,
    fewer,
    filled_in,
    free_memory,
    gpu_part,
    gpu_room,
    reason,
)
from sweeps.packing import counts, fewest_near_best, goes_on

GB = 10**9
"""Bytes."""


# Machines


@pytest.mark.parametrize(
    ("machine", "threads", "trials", "need", "workers"),
    [
        (Machine(8, None), 1, 100, NOTHING_KNOWN, 8),
        (Machine(8, None), 3, 100, NOTHING_KNOWN, 2),
        (Machine(8, None), 16, 100, NOTHING_KNOWN, 1),
        (Machine(8, None), 1, 3, NOTHING_KNOWN, 3),
        # Nine tenths of what is free.
        (Machine(8, 10 * GB), 1, 100, Need(memory=2 * GB), 4),
        (Machine(8, GB), 1, 100, Need(memory=2 * GB), 1),
        (Machine(8, 64 * GB), 1, 100, Need(memory=2 * GB), 8),
        # One a GPU, unless it was measured that more bring more.
        (Machine(8, None, (Gpu(0), Gpu(1))), 1, 100, NOTHING_KNOWN, 2),
        (Machine(8, None, (Gpu(0), Gpu(1))), 1, 100, Need(workers_per_gpu=3), 6),
        (Machine(8, 10 * GB, (Gpu(0), Gpu(1))), 1, 100, Need(2 * GB, workers_per_gpu=3), 4),
    ],
)
def test_auto_is_the_least_of_what_cores_memory_and_trials_are_enough_for(
    machine: Machine, threads: int, trials: int, need: Need, workers: int
) -> None:
    found = divide(machine, None, threads, trials, need)
    assert len(found) == workers
    assert reason(machine, threads, trials, need)


def test_workers_that_are_named_are_as_many_as_named() -> None:
    full = Need(memory=100 * GB)
    assert divide(Machine(4, GB), 6, 1, 100, full) == [Slot("cpu", 1)] * 6
    assert divide(Machine(4, GB), 6, 1, 2, full) == [Slot("cpu", 1)] * 2
    # More threads than a worker is meant to have change its numbers.
    assert divide(Machine(8, GB), 2, 1, 100, full) == [Slot("cpu", 1)] * 2
    assert divide(Machine(8, GB), 4, 4, 100, full) == [Slot("cpu", 2)] * 4


def test_what_binds_is_said() -> None:
    need = Need(memory=2 * GB)
    assert "cores" in reason(Machine(2, 64 * GB), 1, 100, need)
    tight = reason(Machine(8, 5 * GB), 1, 100, need)
    assert "memory allows (2.0 GB each, 5.0 GB free)" in tight
    assert "8" in tight
    assert "trials left" in reason(Machine(8, 64 * GB), 1, 3, need)


def test_workers_of_a_gpu_never_hold_more_than_was_free_on_it() -> None:
    for free in (6 * GB, 24 * GB, 80 * GB):
        for workers in range(1, 20):
            slots = divide(Machine(32, None, (Gpu(0, free),)), workers, 1, 100, NOTHING_KNOWN)
            assert len({slot.gpu_memory for slot in slots}) == 1
            limit = slots[0].gpu_memory
            assert (limit is None) == (workers == 1)
            if limit is not None and limit > 2**20:
                assert workers * (limit + GPU_CONTEXT_BYTES) <= GPU_MEMORY_SHARE * free
    # A trial that was measured fits into the part of as many as there is said to be room for.
    for peak in (GB // 10, GB, 7 * GB, 30 * GB):
        room = gpu_room(80 * GB, peak)
        part = gpu_part(80 * GB, room)
        assert part is None or part >= peak
        assert gpu_room(80 * GB, 2 * peak) <= room
    assert gpu_room(8 * GB, 30 * GB) == 1


def test_uneven_gpus_and_workers_get_parts_of_their_own_gpu() -> None:
    machine = Machine(8, None, (Gpu(0, 80 * GB), Gpu(1, 16 * GB)))
    slots = divide(machine, 3, 1, 100, NOTHING_KNOWN)
    assert [slot.device for slot in slots] == ["cuda:0", "cuda:1", "cuda:0"]
    assert slots[0].gpu_memory == slots[2].gpu_memory == gpu_part(80 * GB, 2)
    assert slots[1].gpu_memory is None
    assert {slot.threads for slot in slots} == {2}


def test_workers_of_one_gpu_of_several_share_that_one() -> None:
    several = filled_in(Machine(8, None, (Gpu(0), Gpu(1), Gpu(2))), [9 * GB, 80 * GB, 9 * GB])
    chosen = filled_in(Machine(8, None, (Gpu(1),)), [80 * GB])
    assert chosen.gpus == several.gpus[1:2]
    half = gpu_part(80 * GB + GPU_CONTEXT_BYTES, 2)
    assert half is not None
    assert divide(chosen, 2, 1, 100, NOTHING_KNOWN) == [Slot("cuda:1", 4, half)] * 2
    assert divide(chosen, None, 1, 100, Need(workers_per_gpu=2)) == [Slot("cuda:1", 4, half)] * 2
    assert divide(chosen, None, 1, 100, NOTHING_KNOWN) == [Slot("cuda:1", 8)]


def test_fewer_workers_have_all_that_more_had() -> None:
    slots = divide(Machine(16, None, (Gpu(0, 80 * GB),)), 5, 1, 100, NOTHING_KNOWN)
    two = fewer(slots)
    assert len(two) == 2
    first, second = slots[0].gpu_memory, two[0].gpu_memory
    assert first is not None
    assert second is not None
    assert 2 * (second + GPU_CONTEXT_BYTES) == pytest.approx(5 * (first + GPU_CONTEXT_BYTES))
    assert fewer(two) == [Slot("cuda:0", 14, None)]


def test_more_workers_are_tried_as_long_as_they_bring_more() -> None:
    assert list(counts(1)) == []
    assert list(counts(2)) == [2]
    assert list(counts(12)) == [2, 4, 8, 12]
    # Seconds of an epoch when so many train side by side.
    assert goes_on({1: 1.0, 2: 1.2})
    assert not goes_on({1: 1.0, 2: 1.95})
    assert not goes_on({1: 1.0, 2: 1.0, 4: 2.5})
    assert fewest_near_best({1: 1.0, 2: 1.7, 4: 1.75, 8: 1.6}) == 2
    assert fewest_near_best({1: 1.0, 2: 0.8}) == 1


# Control groups


def groups(folder: Path, line: str, **files: str) -> tuple[Path, Path]:
    """A tree of control groups, and the file that says which one a process is in."""
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    own = folder / "own"
    own.write_text(line, encoding="ascii")
    return folder / "cgroup", own


def test_a_containers_quota_counts_and_not_the_machines_cores(tmp_path: Path) -> None:
    # Version 2; the narrowest of the groups that a process lies in binds.
    outer, inner = "pod/cpu.max", "pod/box/cpu.max"
    tree = groups(
        tmp_path, "0::/pod/box\n", **{outer: "150000 100000\n", inner: "max 100000\n"}
    )  # fmt: skip
    assert cpu_quota(*tree) == 1.5
    assert cores(*tree) == 1
    # A container sees its own group as the top, whatever path it is told.
    top = groups(tmp_path / "top", "0::/../elsewhere\n", **{"cpu.max": "50000 100000\n"})
    assert cpu_quota(*top) == 0.5
    assert cores(*top) == 1
    # Version 1.
    old = groups(
        tmp_path / "old",
        "4:memory:/a\n3:cpu,cpuacct:/a\n0::/\n",
        **{
            "cpu,cpuacct/a/cpu.cfs_quota_us": "400000\n",
            "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert cpu_quota(*old) == 4.0
    assert cores(*old) == min(4, len(os.sched_getaffinity(0)))
    # A group may have any name, in any encoding.
    named = groups(tmp_path / "named", "", **{"cpu.max": "max 100000\n"})
    named[1].write_bytes("0::/köln/".encode() + b"\xe9\n")
    folder = named[0] / os.fsdecode("köln/".encode() + b"\xe9")
    folder.mkdir(parents=True)
    (folder / "cpu.max").write_text("250000 100000\n", encoding="ascii")
    assert cpu_quota(*named) == 2.5
    none = groups(tmp_path / "none", "0::/\n", **{"cpu.max": "max 100000\n"})
    assert cpu_quota(*none) is None
    assert cpu_quota(tmp_path / "nowhere", tmp_path / "nothing") is None


def test_affinity_counts(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_memory_is_what_is_free_within_the_narrowest_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n", encoding="ascii")
    tree = groups(
        tmp_path,
        "0::/box\n",
        **{
            "box/memory.max": "3000000000\n",
            "box/memory.current": "2500000000\n",
            # Files that were read give way.
            "box/memory.stat": "anon 1\ninactive_file 2000000000\n",
            "memory.max": "max\n",
        },
    )
    assert free_memory(*tree, meminfo) == 2_500_000_000
    old = groups(
        tmp_path / "old",
        "4:memory:/\n",
        **{
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "5\n",
        },
    )
    assert free_memory(*old, meminfo) == 8_192_000_000
    assert free_memory(tmp_path / "nowhere", tmp_path / "nothing", tmp_path / "no") is None


@pytest.mark.parametrize("norm", ["group", "fixup"])
def test_a_workers_memory_grows_with_its_batch_and_its_data(norm: str) -> None:
    assembly = Assembly(load_dataset("digits"), torch.device("cpu"))

    def config_of(batch: int) -> TrialConfig:
        train = {"global_batch_size": batch, "norm": norm}
        return make_spec(train=train).config({}, {"peak_lr": 0.1})

    small, large = (worker_bytes(assembly, config_of(batch), cuda=False) for batch in (128, 1024))
    assert PROCESS_BYTES < small < large < 2 * PROCESS_BYTES
    config = config_of(128)
    kept = (large - small) / (1024 - 128)
    model = assembly.model(config, 0)
    images = assembly.prepared(config).val_images[0][:64].clone()
    # Fixup keeps products of weights and scales too, as many whatever the batch.
    more = saved_bytes(model, images) - saved_bytes(model, images[:32].clone())
    assert ACTIVATIONS_SHARE * more / 32 == pytest.approx(kept, rel=0.05)


# A trial that does not fit


FITS_ALONE = """
import sys
import torch
from torch import nn

class Large(nn.Module):
    def __init__(self, size, classes):
        super().__init__()
        self.fc = nn.Linear(size, classes)
    def forward(self, x):
        if "--gpu-memory" in sys.argv and len(x) > 32:  # not when it is tried at its making
            raise ERROR
        return self.fc(x.flatten(1))

def large(*, norm_layer, num_classes, in_channels, image_size):
    return Large(in_channels * image_size**2, num_classes)
"""
"""A network that is out of memory wherever its worker has a part of the GPU only."""


@pytest.mark.parametrize(
    "error",
    [
        'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")',
        'RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")',
        "RuntimeError(\"loading state_dict: an exception occurred: ('CUDA out of memory.',)\")",
    ],
    ids=["PyTorch", "cuBLAS", "a checkpoint"],
)
def test_a_trial_that_does_not_fit_its_part_is_run_by_fewer_workers_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    (tmp_path / "fits.py").write_text(FITS_ALONE.replace("ERROR", error), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    begin(tmp_path, make_spec(train={"model": "fits:large", "width_factor": None, "epochs": 1}))
    said: list[str] = []
    slots = [Slot("cpu", 1, GB)] * 3
    variables = {"SWEEP_STORAGE": url(tmp_path)}
    with LocalWorkers(slots, ["worker", "tiny"], variables, said.append) as workers:
        wait_until(lambda: workers.poll() is not None)
        codes = workers.poll()
    assert codes == [0], said
    assert [trial.state for trial in trials(tmp_path)] == [TrialState.COMPLETE] * 3, said
    assert any("1 worker there, with all of its memory" in line for line in said)


# Processes that were started before


def test_expected_workers_are_the_ones_that_run_and_no_other_is_left(tmp_path: Path) -> None:
    begin(tmp_path, make_spec(train={"epochs": 1}))
    command, variables = worker_command("tiny", None), {"SWEEP_STORAGE": url(tmp_path)}
    said: list[str] = []
    with ThisMachine() as place:
        place.expect([Slot("cpu", 1)] * 2, command, variables)
        first, second = place._waiting[Slot("cpu", 1)]
        with place.launch([Slot("cpu", 1)], command, variables, said.append) as workers:
            assert first.poll() is not None
            wait_until(lambda: workers.poll() is not None)
            assert workers.poll() == [0], said
    found = {trial.system_attrs["sweep:provenance"]["threads"] for trial in trials(tmp_path)}
    assert found == {1}
    ran = {trial.system_attrs[LEASE_ATTR]["worker"] for trial in trials(tmp_path)}
    assert all(f"-{second.pid}-" in worker for worker in ran)


def test_memory_that_is_taken_after_the_beginning_leaves_the_number_of_workers_alone() -> None:
    with ThisMachine() as place:
        before = place.machine()
        # As processes do that are held ready.
        held = b"x" * (GB // 4)
        assert place.machine() == before
        need = Need(memory=GB // 4)
        assert place.plan(None, 1, 100, need) == divide(before, None, 1, 100, need)
        del held


def test_expected_workers_that_are_not_launched_end(tmp_path: Path) -> None:
    begin(tmp_path, make_spec(train={"epochs": 1}))
    with ThisMachine() as place:
        place.expect([Slot("cpu", 1)], worker_command("tiny", None), {"SWEEP_STORAGE": "no"})
        (process,) = place._waiting[Slot("cpu", 1)]
    assert process.poll() is not None
    # One whose launcher was killed hears the end of its input.
    orphan = start_worker(
        Slot("cpu", 1), [*worker_command("tiny", None), "--hold"], {"SWEEP_STORAGE": url(tmp_path)}
    )
    output, _ = orphan.communicate(timeout=120)
    assert (orphan.returncode, output) == (0, "")
    assert [trial.state for trial in trials(tmp_path)] == []


# Starting again


def test_a_worker_that_dies_at_its_start_is_given_up_for_good() -> None:
    now = [0.0]
    restarts = Restarts(2, clock=lambda: now[0])
    for _ in range(MAX_RESTARTS):
        restarts.note_start(0)
        now[0] += 1
        assert restarts.again(0)
    restarts.note_start(0)
    assert not restarts.again(0)
    now[0] += 10 * HEALTHY_SECONDS
    assert not restarts.again(0)
    assert restarts.again(1)


def test_a_worker_that_has_worked_for_a_while_is_started_again_without_end() -> None:
    now = [0.0]
    restarts = Restarts(1, clock=lambda: now[0])
    for _ in range(5 * MAX_RESTARTS):
        restarts.note_start(0)
        now[0] += HEALTHY_SECONDS + 1
        assert restarts.again(0)
