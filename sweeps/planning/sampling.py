"""How long an epoch takes, measured by workers in a store that is thrown away.

What is measured is the worker's own loop (`sweeps.worker`), with its claims, suggestions, reports
and checkpoints, over a `Stopwatch`. A sampling process is given the device and threads that a
worker would have, and as many of them run side by side as there would be workers, so that what
they share (cores, memory, a GPU, the store) shows in their times. Pixels do not matter for speed:
a data set that is not there is made up.

Run as a module it is such a process: it reads a line of JSON for each thing to measure, and
answers each with a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import torch

from data.dataset import Dataset, made_dataset
from data.folders import cache_dir
from data.sources import load_dataset, outline
from storage.checkpoints import CheckpointStore
from storage.engine import close_storage, open_storage
from sweeps.assembly import dataset_identity
from sweeps.config import TrialConfig, Value
from sweeps.errors import SweepError, first_line
from sweeps.machine import Slot
from sweeps.objective import Objective
from sweeps.planning.shapes import Shape
from sweeps.planning.speeds import Sample
from sweeps.planning.stopwatch import Stopwatch
from sweeps.process import prepare_process
from sweeps.provenance import new_worker_id
from sweeps.sections import Budget
from sweeps.spec import SweepSpec
from sweeps.stopping import StopRequest
from sweeps.studies import SweepStudy, create_or_resume
from sweeps.worker import Worker, WorkerOptions

if TYPE_CHECKING:
    from sweeps.studies import StoredSweep

LEFT_SECONDS = 86400.0
"""A folder to measure in that is older than this is nobody's any more."""


class Samplers:
    """As many sampling processes as there would be workers; use as a context.

    Args:
        spec: of the sweep that is measured.
        slots: where workers would run; more may come with `grow`.
        data_dir: where the data set is, None for its usual place.
        prepared: seconds from the command to now; a start takes as many before its workers.
    """

    def __init__(
        self, spec: SweepSpec, slots: Sequence[Slot], data_dir: Path | None, prepared: float = 0.0
    ) -> None:
        self._spec = spec
        self._slots = list(slots)
        self._data_dir = data_dir
        self._prepared = prepared
        self._processes: list[subprocess.Popen[str]] = []
        self._stack = contextlib.ExitStack()
        self._began = 0.0
        self._startup: float | None = None

    def __enter__(self) -> Samplers:
        self._folder = Path(self._stack.enter_context(throwaway_folder()))
        self._url = f"sqlite:///{self._folder / 'sweep.db'}"
        self._store = open_storage(self._url)
        self._began = time.perf_counter()
        for slot in self._slots:
            self._processes.append(self._start(slot))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()
        # On a network folder an open file would stand in the way of removing its folder.
        close_storage(self._store, self._url)
        self._stack.close()

    @property
    def count(self) -> int:
        """How many processes there are."""
        return len(self._processes)

    def grow(self, slots: Sequence[Slot]) -> None:
        """Start more processes, beside those that are there."""
        for slot in slots:
            self._processes.append(self._start(slot))

    def measure(self, shape: Shape, seconds: float) -> Sample:
        """Measure a shape in all processes at once.

        Returns:
            The mean of what they measured.

        Raises:
            SweepError: it could not be measured, saying why.
        """
        name = f"sample-{secrets.token_hex(4)}"
        spec = self._spec
        alone = dataclasses.replace(
            spec,
            name=name,
            cells=({**shape.cell, **shape.pinned},),
            # Only a confirmation searches seeds; which one it is does not show in the time.
            search={
                n: space
                for n, space in spec.search.items()
                if n not in shape.pinned and n != "seed"
            },
            tries=(),
            budget=Budget(trials=10**6, seeds=spec.budget.seeds, keep_checkpoints="none"),
            confirms="",
        )
        create_or_resume(self._store, alone, ["made"])
        request = {"sweep": name, "seconds": seconds, "config": shape.config.as_dict()}
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its answer says what is wrong
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
        answers = [self._answer(process) for process in self._processes]
        for answer in answers:
            if "error" in answer:
                raise SweepError(answer["error"])
        found = [Sample(**answer["sample"]) for answer in answers]
        if self._startup is None:
            waited = max(answer["began"] for answer in answers) - self._began
            self._startup = self._prepared + waited
        return dataclasses.replace(
            found[0],
            epoch_seconds=statistics.mean(sample.epoch_seconds for sample in found),
            begin_seconds=statistics.mean(sample.begin_seconds for sample in found),
            gpu_bytes=max(sample.gpu_bytes for sample in found),
            startup_seconds=self._startup,
        )

    def _start(self, slot: Slot) -> subprocess.Popen[str]:
        threads = str(slot.threads)
        header = {
            "folder": str(self._folder),
            "device": slot.device,
            "threads": slot.threads,
            "data_dir": str(self._data_dir.absolute()) if self._data_dir else None,
        }
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sweeps.planning.sampling"],
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Ctrl-C reaches this process alone, which ends it.
            start_new_session=True,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(header) + "\n")
        process.stdin.flush()
        return process

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            return {"error": f"a sampling process ended with status {process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def sampling_dataset(config: TrialConfig, data_dir: Path | None) -> Dataset:
    """The data set of a config if that takes no decoding, else a made one of its sizes.

    Raises:
        DataError: it is missing and cannot be downloaded.
    """
    arguments: dict[str, Any] = {
        "data_dir": data_dir, "image_size": config.image_size, "noise_std": config.noise_std,
    }  # fmt: skip
    found = outline(config.dataset, **arguments)
    if found.present and found.decoded:
        return load_dataset(config.dataset, **arguments)
    return made_dataset(found)


def throwaway_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder for the store that is measured with, and an end to what others have left."""
    # Beside the decoded data sets: on a disk like the store's rather than in memory.
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # One that was ended by a signal has left its own.
        for left in cache.glob("plan-*"):
            with contextlib.suppress(FileNotFoundError):  # another has seen to it
                if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        return tempfile.TemporaryDirectory(prefix="plan-", dir=cache)
    except OSError:  # it cannot be written, and nothing is to stay there
        return tempfile.TemporaryDirectory(prefix="sweep-plan-")


class _SamplingWorker(Worker):
    """A worker whose objective is a stopwatch."""

    def __init__(self, *arguments: Any, watch: Stopwatch) -> None:
        super().__init__(*arguments)
        self._stopwatch = watch

    def _objective(self, study: SweepStudy, config: TrialConfig) -> Objective:
        return self._stopwatch

    def _spent(self, sweep: StoredSweep) -> bool:
        return False


def main() -> None:
    """Measure what stdin asks for, until its end: that of the process which asked."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    header = json.loads(sys.stdin.readline())
    device = torch.device(header["device"])
    prepare_process(device, header["threads"])
    folder = Path(header["folder"])
    data_dir = Path(header["data_dir"]) if header["data_dir"] else None
    store = open_storage(f"sqlite:///{folder / 'sweep.db'}")
    checkpoints = CheckpointStore(folder / f"checkpoints-{os.getpid()}")  # one writer of a key
    datasets: dict[tuple[Value, ...], Dataset] = {}
    for line in sys.stdin:
        request = json.loads(line)
        config = TrialConfig.build(request["config"])
        try:
            identity = dataset_identity(config)
            if identity not in datasets:
                datasets[identity] = sampling_dataset(config, data_dir)
            stop = StopRequest()
            watch = Stopwatch(datasets[identity], device, config, request["seconds"], stop)
            options = WorkerOptions(new_worker_id("plan"), device, poll_seconds=0.05)
            _SamplingWorker(store, checkpoints, request["sweep"], options, stop, watch=watch).run()
            sample = watch.sample(checkpoints)
            answer = {"sample": dataclasses.asdict(sample), "began": watch.called}
        except Exception as error:
            answer = {"error": first_line(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
