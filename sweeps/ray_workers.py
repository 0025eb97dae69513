"""Worker processes on a Ray cluster: an actor for each, and what watches over them from here.

An actor runs `sweep worker` in a process of its own, whose threads are counted before PyTorch loads
and which hears of its actor's end by the end of its stdin. Calls that Ray makes again, losses of
nodes and workers that wait for room are hidden behind what `sweeps.launch.Workers` asks of all.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.launch import MAX_RESTARTS, Restarts
from sweeps.machine import Slot
from sweeps.ray_nodes import differences, installed, said

KILL_SECONDS = 5.0
"""How long a worker that is ended by force may take to say so before its actor is ended."""


class RayWorkers:
    """Worker processes on a Ray cluster; use as a context, so that none outlives it.

    Args:
        slots: one actor each.
        command: arguments of the `sweep` command for a worker, without its slot's.
        variables: environment variables for the workers. They go to each actor in a call, not in
            Ray's runtime environment or in a name, which its dashboard shows.
        say: receives what became of workers. What they print comes by Ray, to stderr.
        share: GPUs of each, from 0 to 1.
        strategy: Ray's scheduling strategy for the actors.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        command: Sequence[str],
        variables: Mapping[str, str],
        say: Callable[[str], None],
        *,
        share: float,
        strategy: Any = "DEFAULT",
    ) -> None:
        self._slots = list(slots)
        self._command = list(command)
        self._variables = dict(variables)
        self._say = say
        self._share = share
        self._strategy = strategy
        self._actors: list[Any] = []
        self._runs: list[Any] = []
        self._placed: list[Any] = []
        self._codes: list[int | None] = [None] * len(self._slots)
        self._restarts = Restarts(len(self._slots))
        self._stopping = False
        self._stdout = contextlib.redirect_stdout(sys.stderr)

    def __enter__(self) -> RayWorkers:
        import ray

        # Ray brings its own notices to stdout, which is for the answer.
        self._stdout = contextlib.redirect_stdout(sys.stderr)
        self._stdout.__enter__()
        for slot in self._slots:
            actor = ray.remote(SweepWorker).options(
                num_cpus=slot.threads,
                num_gpus=self._share,
                max_restarts=MAX_RESTARTS,
                # One call runs the worker, others end it meanwhile.
                max_concurrency=4,
                scheduling_strategy=self._strategy,
            )
            self._actors.append(actor.remote())
        self._placed = [actor.node.remote() for actor in self._actors]
        self._runs = [self._run(index) for index in range(len(self._slots))]
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.kill()
        finally:
            self._stdout.__exit__(None, None, None)

    def poll(self) -> list[int] | None:
        """Run workers again that were killed; when all have ended, return their exit codes."""
        for index in self._ready(self._runs):
            if self._codes[index] is not None:
                continue
            ended = self._ended(index)
            if ended.code < 0 and not self._stopping and self._restarts.again(index):
                self._say(
                    f"worker {index} was ended by {ended.reason}; its trial goes back to the "
                    "queue and the worker starts again"
                )
                self._runs[index] = self._run(index)
                continue
            self._codes[index] = ended.code
            if ended.code != 0 and not self._stopping:
                self._say(f"worker {index} ended with status {ended.code}: {ended.reason}")
        waiting = self._waiting()
        others = [code for i, code in enumerate(self._codes) if i not in waiting]
        if waiting and others and None not in others:
            self._drop(waiting)  # those that had room have ended, and so the sweep
        return None if None in self._codes else [c for c in self._codes if c is not None]

    def stop(self) -> None:
        """Ask every worker to end after its running update."""
        self._stopping = True
        self._drop(self._waiting())
        self._end(force=False)

    def kill(self) -> None:
        """End every worker at once."""
        import ray

        self._stopping = True
        self._drop(self._waiting())
        left = self._end(force=True)
        if left:
            # An actor that says so has seen its worker's end, so that its trial may be put back.
            ray.wait(left, num_returns=len(left), timeout=KILL_SECONDS)
        for index, actor in enumerate(self._actors):
            ray.kill(actor)
            if self._codes[index] is None:
                self._codes[index] = -9

    def _run(self, index: int) -> Any:
        slot = self._slots[index]
        self._restarts.note_start(index)
        command = [*self._command, "--device", slot.device, "--threads", str(slot.threads)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(slot.threads))
        return self._actors[index].run.remote(command, {**self._variables, **threads}, installed())

    def _end(self, *, force: bool) -> list[Any]:
        """Pass a request to end on; return the calls that it ends."""
        left = [index for index, code in enumerate(self._codes) if code is None]
        for index in left:
            self._actors[index].end.remote(force)
        return [self._runs[index] for index in left]

    def _drop(self, waiting: set[int]) -> None:
        """Give up on workers that have found no room."""
        import ray

        for index in waiting:
            ray.kill(self._actors[index])
            self._codes[index] = 0

    def _waiting(self) -> set[int]:
        """Workers for which there was no room yet."""
        placed = self._ready(self._placed)
        return {i for i, code in enumerate(self._codes) if code is None and i not in placed}

    @staticmethod
    def _ready(calls: list[Any]) -> set[int]:
        import ray

        if not calls:
            return set()
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        ended = set(done)
        return {index for index, call in enumerate(calls) if call in ended}

    def _ended(self, index: int) -> Ended:
        import ray

        try:
            found: Ended = ray.get(self._runs[index])
            return found
        except ray.exceptions.RayActorError as error:
            return Ended(-9, f"the loss of its process or node ({said(error)})")
        except ray.exceptions.RayError as error:
            return Ended(1, said(error))


@dataclass(frozen=True)
class Ended:
    """How a worker process ended.

    Attributes:
        code: its exit status, negative for a signal.
        reason: the signal's name, or the last line that the worker printed.
    """

    code: int
    reason: str


class SweepWorker:
    """One worker on a node: what the cluster runs as an actor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._ending = False

    def node(self) -> str:
        """Answer as soon as the actor has found its place."""
        return socket.gethostname()

    def run(
        self, command: list[str], variables: dict[str, str], versions: dict[str, str | None]
    ) -> Ended:
        """Run `sweep worker` to its end.

        Args:
            command: arguments of the `sweep` command.
            variables: environment variables beside the actor's own, in which Ray has put what
                `CUDA_VISIBLE_DEVICES` is here.
            versions: what the launcher has installed.
        """
        # A node that was not there when the launcher asked them all.
        if differing := differences(installed(), versions):
            return Ended(1, f"{socket.gethostname()} has {differing}")
        # Called again by a launcher that could not reach this actor for a while: one at a time.
        with self._lock:
            if self._ending:
                return Ended(0, "")
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sweeps.cli", *command, "--child"],
                env={**os.environ, **variables},
                # Its end tells the worker that this actor is gone.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            if self._ending:
                process.terminate()
            last = ""
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip() or last
                print(line, end="", file=sys.stderr, flush=True)
            code = process.wait()
        return Ended(code, _signal_name(-code) if code < 0 else last)

    def end(self, force: bool) -> None:
        """End the worker: after its running update, or at once."""
        self._ending = True
        process = self._process
        if process is None or process.poll() is not None:
            return
        if force:
            process.kill()
        else:
            process.terminate()


def _signal_name(number: int) -> str:
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
