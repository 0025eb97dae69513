"""Where workers run: processes on this machine, each pinned to its device and threads.

Other places, such as a Ray cluster, offer the same: a :class:`Place`, which makes :class:`Workers`.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Protocol

from sweeps.machine import (
    NOTHING_KNOWN,
    Machine,
    Need,
    Slot,
    divide,
    fewer,
    free_memory,
    gigabytes,
    this_machine,
    with_gpu_memory,
)

MAX_RESTARTS = 3
"""How often in a row a worker that was killed soon after its start is started again."""

HEALTHY_SECONDS = 60.0
"""A worker that has lived for longer did not die of its start: its restarts count from 0 again."""


NO_ROOM = 75
"""Exit status of a worker whose trial did not fit into its part of a GPU; `EX_TEMPFAIL`."""


def plan_slots(
    workers: int | None, threads: int, trials: int, need: Need, machine: Machine
) -> list[Slot]:
    """Divide a machine among workers, asking what is free on GPUs that they would share.

    Arguments as of :func:`sweeps.machine.divide`.
    """
    slots = divide(machine, workers, threads, trials, need)
    if len(slots) > len(machine.gpus) > 0:
        slots = divide(with_gpu_memory(machine), len(slots), threads, trials, need)
    return slots


class Restarts:
    """Whether a worker that was killed is started again, for each of `count` workers."""

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_a_row = [0] * count
        self._started = [0.0] * count

    def note_start(self, index: int) -> None:
        """A worker starts now."""
        self._started[index] = self._clock()

    def again(self, index: int) -> bool:
        """Whether to start it again, which counts; at most :data:`MAX_RESTARTS` in a row.

        Once the answer was no, it stays so.
        """
        if self._in_a_row[index] > MAX_RESTARTS:
            return False
        if self._clock() - self._started[index] > HEALTHY_SECONDS:
            self._in_a_row[index] = 0
        self._in_a_row[index] += 1
        return self._in_a_row[index] <= MAX_RESTARTS


class Workers(Protocol):
    """Running workers; use as a context, so that none outlives it."""

    def __enter__(self) -> Workers: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def poll(self) -> list[int] | None:
        """Restart workers that were killed; when all have ended, return their exit codes."""

    def stop(self) -> None:
        """Ask every worker to end after its running update."""

    def kill(self) -> None:
        """End every worker at once."""


class Place(Protocol):
    """Where workers may run."""

    def expect(
        self, slots: Sequence[Slot], command: Sequence[str], variables: Mapping[str, str]
    ) -> None:
        """Hear of what will most likely be launched."""

    def prepare(self, storage_url: str, say: Callable[[str], None]) -> None:
        """Make ready; refuse a store that workers there could not open."""

    def plan(
        self, workers: int | None, threads: int, trials: int, need: Need = NOTHING_KNOWN
    ) -> list[Slot]:
        """Divide the place among workers; arguments as of :func:`plan_slots`."""

    def launch(
        self,
        slots: Sequence[Slot],
        command: Sequence[str],
        variables: Mapping[str, str],
        say: Callable[[str], None],
    ) -> Workers:
        """Workers there, to be entered; arguments as of :class:`LocalWorkers`."""


class ThisMachine:
    """Processes of this machine; use as a context."""

    def __init__(self) -> None:
        # Read before there are processes that wait: what they hold is meant for workers.
        self._memory = free_memory()
        self._waiting: dict[Slot, list[subprocess.Popen[str]]] = {}
        self._expected: tuple[list[str], dict[str, str]] = ([], {})

    def __enter__(self) -> ThisMachine:
        return self

    def __exit__(self, *_: object) -> None:
        _end(self._waiting)

    def expect(
        self, slots: Sequence[Slot], command: Sequence[str], variables: Mapping[str, str]
    ) -> None:
        """Start processes for workers to come: they load PyTorch while the sweep is looked at."""
        self._expected = (list(command), dict(variables))
        for slot in slots:
            process = start_worker(slot, [*command, "--hold"], variables)
            self._waiting.setdefault(slot, []).append(process)

    def prepare(self, storage_url: str, say: Callable[[str], None]) -> None:
        """Nothing to do: a store that this process can open, its children can."""

    def machine(self) -> Machine:
        """What it was before any process was started here."""
        return dataclasses.replace(this_machine(), memory=self._memory)

    def plan(
        self, workers: int | None, threads: int, trials: int, need: Need = NOTHING_KNOWN
    ) -> list[Slot]:
        """As :func:`plan_slots`."""
        return plan_slots(workers, threads, trials, need, self.machine())

    def launch(
        self,
        slots: Sequence[Slot],
        command: Sequence[str],
        variables: Mapping[str, str],
        say: Callable[[str], None],
    ) -> Workers:
        """Worker processes, to be entered."""
        if (list(command), dict(variables)) != self._expected:
            _end(self._waiting)
        return LocalWorkers(slots, command, variables, say, self._waiting)


def open_place(on: str, gpus_per_worker: float | None = None) -> AbstractContextManager[Place]:
    """The place that `--on` names.

    Args:
        on: `local`, `ray` or `ray=ADDRESS`.
        gpus_per_worker: the share of a GPU that a worker on Ray takes, from 0 to 1.

    Raises:
        ValueError: there is no such place, or the share does not go with it.
        SweepError: Ray is not installed.
    """
    kind, given, address = on.partition("=")
    if kind not in ("local", "ray") or (given and (kind == "local" or not address)):
        raise ValueError(f"--on {on!r} is no place for workers; accepted: local, ray, ray=ADDRESS")
    if gpus_per_worker is not None and not 0 <= gpus_per_worker <= 1:
        raise ValueError(
            f"a worker uses one GPU or a share of one, so that --gpus-per-worker is from 0 to 1; "
            f"got {gpus_per_worker:g}"
        )
    if kind == "local":
        if gpus_per_worker is not None:
            raise ValueError("--gpus-per-worker goes with --on ray; here --workers N share GPUs")
        return ThisMachine()
    from sweeps.ray_cluster import RayCluster, parse_address

    return RayCluster(parse_address(address), gpus_per_worker)


class LocalWorkers:
    """Worker processes of this machine; use as a context, so that none outlives it.

    Args:
        slots: one process each.
        command: arguments of the `sweep` command for a worker, without its slot's.
        variables: environment variables for the workers, beside this process's own.
        say: receives what workers print, line by line, from threads of this object's.
        waiting: processes by their slot, which were started before with this command and these
            variables and wait for a line; those that are of use are taken out.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        command: Sequence[str],
        variables: Mapping[str, str],
        say: Callable[[str], None],
        waiting: Mapping[Slot, list[subprocess.Popen[str]]] | None = None,
    ) -> None:
        self._waiting = {} if waiting is None else waiting
        self._slots = list(slots)
        self._command = list(command)
        self._variables = dict(variables)
        self._say = say
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._restarts = Restarts(len(self._slots))
        self._stopping = False
        # GPUs whose workers are ending, to make room for fewer.
        self._clearing: set[str] = set()

    def __enter__(self) -> LocalWorkers:
        self._processes = [self._start(index) for index in range(len(self._slots))]
        _end(self._waiting)  # more than are needed
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process in self._processes:
            process.wait()
        for reader in self._readers:
            reader.join()

    def poll(self) -> list[int] | None:
        """Restart workers that were killed; when all have ended, return their exit codes."""
        for index, process in enumerate(self._processes):
            code = process.poll()
            device = self._slots[index].device
            if code is None or self._stopping or device in self._clearing:
                continue
            if code == NO_ROOM and self._clear(device):
                continue
            if code < 0 and self._restarts.again(index):
                name = signal.Signals(-code).name
                self._say(
                    f"worker {index} was ended by {name}; its trial goes back to the queue and "
                    "the worker starts again"
                )
                self._processes[index] = self._start(index)
        for device in [] if self._stopping else sorted(self._clearing):
            self._start_fewer(device)
        codes = [process.poll() for process in self._processes]
        return None if None in codes else [code for code in codes if code is not None]

    def _clear(self, device: str) -> bool:
        """End a GPU's workers, as a trial found no room beside the others'; False if it is alone.

        Their trials keep the completed epochs and go back to the queue.
        """
        there = [i for i, slot in enumerate(self._slots) if slot.device == device]
        if len(there) < 2:
            return False
        self._clearing.add(device)
        for index in there:
            if self._processes[index].poll() is None:
                self._processes[index].send_signal(signal.SIGTERM)
        return True

    def _start_fewer(self, device: str) -> None:
        """Start half as many workers on a GPU once all that were there have ended."""
        there = [i for i, slot in enumerate(self._slots) if slot.device == device]
        if any(self._processes[index].poll() is None for index in there):
            return
        self._clearing.remove(device)
        slots = fewer([self._slots[index] for index in there])
        room = "all of its memory"
        if slots[0].gpu_memory is not None:
            room = f"{gigabytes(slots[0].gpu_memory)} each"
        self._say(
            f"a trial did not fit beside the others on {device}; from now on {len(slots)} "
            f"worker{'s'[: len(slots) != 1]} there, with {room}"
        )
        for index in reversed(there[len(slots) :]):
            del self._slots[index], self._processes[index]
        self._restarts = Restarts(len(self._slots))
        for index, slot in zip(there, slots, strict=False):
            self._slots[index] = slot
            self._processes[index] = self._start(index)

    def stop(self) -> None:
        """Ask every worker to end after its running update."""
        self._stopping = True
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End every worker at once."""
        self._stopping = True
        for process in self._processes:
            if process.poll() is None:
                process.kill()

    def _start(self, index: int) -> subprocess.Popen[str]:
        slot = self._slots[index]
        self._restarts.note_start(index)
        process = self._waiting_process(slot)
        if process is None:
            process = start_worker(slot, self._command, self._variables)
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        self._readers.append(reader)
        return process

    def _waiting_process(self, slot: Slot) -> subprocess.Popen[str] | None:
        """One that was started before, told to go on; None without one that lives."""
        processes = self._waiting.get(slot, [])
        while processes:
            process = processes.pop()
            assert process.stdin is not None
            try:
                process.stdin.write("\n")
                process.stdin.flush()
            except BrokenPipeError:
                process.wait()
                continue
            return process
        return None

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._say(line.rstrip("\n"))


def _end(waiting: Mapping[Slot, list[subprocess.Popen[str]]]) -> None:
    """End processes that wait."""
    for processes in waiting.values():
        while processes:
            process = processes.pop()
            process.kill()
            process.communicate()


def worker_command(name: str, data_dir: Path | None) -> list[str]:
    """Arguments of the `sweep` command for a worker of a sweep, without its slot's."""
    where = [] if data_dir is None else ["--data-dir", str(data_dir.absolute())]
    return ["worker", name, *where]


def start_worker(
    slot: Slot, command: Sequence[str], variables: Mapping[str, str]
) -> subprocess.Popen[str]:
    """Start a process in a slot; arguments as of :class:`LocalWorkers`."""
    threads = str(slot.threads)
    # -P: a folder called `data` or `models` in the current directory is not ours.
    return subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "sweeps.cli", *command),
            *("--device", slot.device, "--threads", threads, "--child"),
            *(() if slot.gpu_memory is None else ("--gpu-memory", str(slot.gpu_memory))),
        ],
        env={
            **os.environ,
            **variables,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        },
        # Its end tells the worker that this process is gone.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Ctrl-C reaches this process alone, which passes it on.
        start_new_session=True,
    )
