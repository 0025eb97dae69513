"""What this process may use of its machine, and how many workers that is enough for.

All that asks the machine is in :func:`this_machine` and :func:`with_gpu_memory`; the rest is
arithmetic on what they found. Sizes are in bytes.

**On CPUs** there are as many workers as the cores that this process may use, each with the threads
that `[workers]` says: its affinity (`taskset`, SLURM) and the quota of its control group (a
container's `--cpus`) count, not the machine's size. A single thread a worker is the rule because
trials are independent and the steps of small networks are not worth dividing. Nothing is measured.

**On GPUs** several workers share one when that brings more trials an hour, which is measured
(`sweeps.packing`). Each may allocate an equal part of the memory that was free, less what every
process takes beside its tensors, and no more: together they never exhaust the GPU.

Everywhere the memory that is free, of the machine and of the control group, sets a bound, and so
does the number of trials that are left.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")

UNLIMITED = 2**60
"""Version 1 of the control groups says "no limit" with a number near 2^63."""

MEMORY_SHARE = 0.9
"""Of the memory that is free, what workers may be planned for: caches and other programs grow."""

PROCESS_BYTES = 450 * 10**6
"""What a worker process takes of its own: PyTorch, Optuna, a data set of a megabyte. Measured:
400 MB, without the libraries' files, which all workers share."""

GPU_MEMORY_SHARE = 0.92
"""Of a GPU's free memory, what its workers may take together."""

GPU_CONTEXT_BYTES = 800 * 2**20
"""What a process takes of a GPU beside its tensors: the CUDA context, and the code of PyTorch's
and cuDNN's kernels as it is loaded. No allocator counts it."""

GPU_PEAK_SLACK = 1.15
"""By how much a trial may exceed the peak that was measured: other shapes fragment differently."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        index: PyTorch's number of it.
        free: bytes that no process held; None where it was not asked.
    """

    index: int
    free: int | None = None


@dataclass(frozen=True)
class Machine:
    """What a process may use.

    Attributes:
        cores: whole cores, at least 1.
        memory: bytes that are free, None where that is not known.
        gpus: those that PyTorch sees, or some of them.
    """

    cores: int
    memory: int | None
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Need:
    """What one worker takes.

    Attributes:
        memory: bytes of the machine; 0 where it is not known.
        workers_per_gpu: how many on one GPU bring the most.
    """

    memory: int = 0
    workers_per_gpu: int = 1


NOTHING_KNOWN = Need()


@dataclass(frozen=True)
class Slot:
    """A place for one worker.

    Attributes:
        device: PyTorch's name, such as `cuda:0` or `cpu`.
        threads: CPU threads of its own.
        gpu_memory: bytes that it may allocate on a GPU that it shares; None sets no limit.
    """

    device: str
    threads: int
    gpu_memory: int | None = None


def bounds(machine: Machine, threads: int, trials: int, need: Need) -> dict[str, int]:
    """How many workers each thing is enough for, by its name; the least is what `auto` takes.

    Args:
        machine: where they would run.
        threads: CPU threads of a worker without a GPU.
        trials: how many are left; more workers would have nothing to do.
        need: what each takes.
    """
    found = {}
    if machine.gpus:
        found["GPUs"] = len(machine.gpus) * need.workers_per_gpu
    else:
        found["cores"] = machine.cores // threads
    if need.memory and machine.memory is not None:
        found["memory"] = int(MEMORY_SHARE * machine.memory) // need.memory
    found["trials"] = trials
    return {name: max(1, count) for name, count in found.items()}


def divide(
    machine: Machine, workers: int | None, threads: int, trials: int, need: Need
) -> list[Slot]:
    """Divide a machine among workers.

    Args:
        machine: where they run.
        workers: how many; None is as many as are of use: the least of :func:`bounds`.
        threads: CPU threads that a worker without a GPU is meant to have. With a GPU, it gets its
            share of the cores.
        trials: how many are left.
        need: what each takes.
    """
    count = workers or min(bounds(machine, threads, trials, need).values())
    count = max(1, min(count, trials))
    share = max(1, machine.cores // count)
    if not machine.gpus:
        return [Slot("cpu", min(threads, share))] * count
    slots = []
    for index in range(count):
        place = index % len(machine.gpus)
        together = len(range(place, count, len(machine.gpus)))
        gpu = machine.gpus[place]
        slots.append(Slot(f"cuda:{gpu.index}", share, gpu_part(gpu.free, together)))
    return slots


def gpu_part(free: int | None, workers: int) -> int | None:
    """What each of so many workers may allocate of a GPU; None where one has it to itself."""
    if workers < 2 or free is None:
        return None
    return max(2**20, int(GPU_MEMORY_SHARE * free) // workers - GPU_CONTEXT_BYTES)


def gpu_room(free: int, peak: int) -> int:
    """How many workers whose trials allocate so much a GPU has room for; at least 1."""
    each = int(GPU_PEAK_SLACK * peak) + GPU_CONTEXT_BYTES
    return max(1, int(GPU_MEMORY_SHARE * free) // each)


def fewer(slots: list[Slot]) -> list[Slot]:
    """Half as many workers of one GPU, with all of its memory among them; a single one has it all.

    Args:
        slots: two or more, all of one GPU.
    """
    count = len(slots) // 2
    first = slots[0]
    threads = first.threads * len(slots) // count
    if count == 1 or first.gpu_memory is None:
        return [Slot(first.device, threads)] * count
    each = (first.gpu_memory + GPU_CONTEXT_BYTES) * len(slots) // count - GPU_CONTEXT_BYTES
    return [Slot(first.device, threads, each)] * count


def reason(machine: Machine, threads: int, trials: int, need: Need) -> str:
    """Why `auto` takes as many workers as it does, in words."""
    found = bounds(machine, threads, trials, need)
    count = min(found.values())
    each = f"; {gigabytes(need.memory)} of memory each" if need.memory else ""
    if found["trials"] == count and min(v for k, v in found.items() if k != "trials") > count:
        return "as many as there are trials left"
    if found.get("memory") == count and found.get("cores", found.get("GPUs", count)) > count:
        beside = "GPUs" if machine.gpus else "cores"
        assert machine.memory is not None
        return (
            f"as many as memory allows ({gigabytes(need.memory)} each, "
            f"{gigabytes(machine.memory)} free); the {beside} have room for {found[beside]}"
        )
    if machine.gpus:
        return f"{need.workers_per_gpu} on each GPU{each}"
    return f"as many as the cores that this process may use have room for{each}"


def gigabytes(count: int) -> str:
    """A size in words."""
    return f"{count / 1e9:.1f} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"


# Asking the machine


def this_machine() -> Machine:
    """What this process may use; GPUs are counted, not opened."""
    import torch

    gpus = tuple(Gpu(index) for index in range(torch.cuda.device_count()))
    return Machine(cores(), free_memory(), gpus)


def expected_slots(workers: int | None, threads: int, trials: int) -> list[Slot]:
    """The slots that :func:`divide` will most likely give on a machine without a GPU; else none.

    It asks nothing of PyTorch, which has not loaded yet.
    """
    if workers == 0:
        return []
    if any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
        return []
    machine = Machine(cores(), free_memory())
    most = min(bounds(machine, threads, trials, Need(memory=PROCESS_BYTES)).values())
    return divide(machine, min(workers or most, most), threads, trials, NOTHING_KNOWN)


def with_gpu_memory(machine: Machine) -> Machine:
    """The same with what is free on each of its GPUs, asked by a process that ends at once.

    To ask opens a GPU, which then holds hundreds of megabytes for as long as the process lives.
    """
    indices = [str(gpu.index) for gpu in machine.gpus]
    done = subprocess.run(
        [sys.executable, "-P", "-c", _ASK_GPUS, *indices],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:  # whoever uses the GPU next says what is wrong with it
        return machine
    return filled_in(machine, json.loads(done.stdout))


def filled_in(machine: Machine, free: Sequence[int]) -> Machine:
    """The same with what is free on each of its GPUs.

    Args:
        machine: whose GPUs were asked.
        free: bytes of each, in their order, beside the context of the process that asked.
    """
    return dataclasses.replace(
        machine,
        gpus=tuple(
            Gpu(gpu.index, found + GPU_CONTEXT_BYTES)
            for gpu, found in zip(machine.gpus, free, strict=True)
        ),
    )


_ASK_GPUS = """\
import json, sys, torch
found = []
for index in map(int, sys.argv[1:]):
    torch.empty(1, device=f"cuda:{index}")
    found.append(torch.cuda.mem_get_info(index)[0])
print(json.dumps(found))
"""


def cores(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """Whole cores that this process may use: its affinity, and its control groups' quota.

    Args:
        root: where the control groups are.
        own: says which one this process is in.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(min(affinity or 1, cpu_quota(root, own) or float("inf"))))


def cpu_quota(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> float | None:
    """The cores' worth of time that the control groups allow; None sets no limit."""
    found = []
    for folder in _groups("cpu", root, own):
        quota, period = (_read(folder / "cpu.max") or "max 0").split()[:2]
        if quota == "max":
            quota = _read(folder / "cpu.cfs_quota_us") or "-1"
            period = _read(folder / "cpu.cfs_period_us") or "0"
        if int(quota) > 0 and int(period) > 0:
            found.append(int(quota) / int(period))
    return min(found, default=None)


def free_memory(
    root: Path = CGROUPS, own: Path = OWN_CGROUP, meminfo: Path = Path("/proc/meminfo")
) -> int | None:
    """Bytes that new processes may take: of the machine, and within its control groups' limits.

    What caches hold of files counts as free, as it gives way. None where it is not known.
    """
    found = []
    for line in (_read(meminfo) or "").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    for folder in _groups("memory", root, own):
        for limit, used, file in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most = _read(folder / limit)
            if most is None or most == "max" or int(most) >= UNLIMITED:
                continue
            stat = dict(
                line.split()[:2] for line in (_read(folder / "memory.stat") or "").splitlines()
            )
            held = int(_read(folder / used) or 0) - int(stat.get(file, 0))
            found.append(max(0, int(most) - max(0, held)))
    return min(found, default=None)


def _groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The control group of this process, and those that it lies in, whichever version they are."""
    for line in (_read(own) or "").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        tops = [root / names, root / controller] if names else [root / "unified", root]
        top = next((folder for folder in tops if folder.is_dir()), None)
        if top is None:
            continue
        folder = top / path.lstrip("/")
        if ".." in folder.parts or not folder.is_dir():
            folder = top  # a container sees its own group as the top
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder


def _read(file: Path) -> str | None:
    try:
        return os.fsdecode(file.read_bytes()).strip()  # a group may have any name
    except OSError:
        return None


def throughputs(seconds: Mapping[int, float]) -> dict[int, float]:
    """Of so many workers side by side, against one, from how long an epoch of each takes.

    Args:
        seconds: by the number of workers; that of one is among them.
    """
    return {count: count * seconds[1] / took for count, took in sorted(seconds.items())}
