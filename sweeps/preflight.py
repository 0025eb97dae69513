"""What `sweep start` and `sweep plan` look at before anything runs: data, networks, time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import torch
from rich.console import Console

from storage.engine import close_storage
from storage.errors import ElsewhereError, StorageError
from storage.urls import check_url
from sweeps import search
from sweeps.assembly import Assembly, Sizes, dataset_identity, open_dataset
from sweeps.config import TrialConfig, Value
from sweeps.edits import edits
from sweeps.errors import SpecError, SweepError, first_line
from sweeps.footprint import worker_bytes
from sweeps.launch import plan_slots
from sweeps.machine import Machine, Need, Slot, reason, this_machine
from sweeps.packing import packed
from sweeps.planning.measuring import glanced, measured, recalled
from sweeps.planning.plan import Plan, count, outlines
from sweeps.planning.sampling import sampling_dataset
from sweeps.planning.shapes import shapes
from sweeps.planning.words import DAY, plan_line
from sweeps.progress import can_ask, print_line, says_yes
from sweeps.spec import SweepSpec
from sweeps.studies import store_to_read, stored_names, stored_sweep

if TYPE_CHECKING:
    from data.dataset import Dataset

# Settings that the splits or the models may refuse.
STRUCTURAL = (
    "model", "width_factor", "norm", "num_groups", "batch_statistics", "num_devices", "split",
    "classes_per_device", "assignment", "alpha", "min_images_per_device", "shared_images",
    "algorithm",
)  # fmt: skip
MAX_STRUCTURES = 64


@dataclass(frozen=True)
class Checked:
    """What looking at the data sets of a sweep has found.

    Attributes:
        fingerprints: of each cell's data set.
        sizes: of an epoch of each cell.
        datasets: by `dataset_identity`.
        worker_bytes: what a worker takes of the machine's memory for the largest trial, about; 0
            where it is not known.
    """

    fingerprints: list[str]
    sizes: list[Sizes]
    datasets: dict[tuple[Value, ...], Dataset]
    worker_bytes: int = 0


def check_data(spec: SweepSpec, open_: Callable[[TrialConfig], Dataset], *, cuda: bool) -> Checked:
    """Open each cell's data set and try its splits and models.

    Args:
        spec: whose cells they are.
        open_: gives a trial's data set.
        cuda: whether workers would train on GPUs; they take another share of the machine's memory.
    """
    assemblies: dict[tuple[Value, ...], Assembly] = {}
    checked = Checked([], [], {})
    found: list[int] = []
    for cell in spec.cells:
        config = spec.lowest_config(cell)
        identity = dataset_identity(config)
        if identity not in assemblies:
            checked.datasets[identity] = open_(config)
            assemblies[identity] = Assembly(checked.datasets[identity], torch.device("cpu"))
        assembly = assemblies[identity]
        for params in _structures(spec):
            try:
                assembly.check(spec.config(cell, params))
            except ValueError as error:
                raise SpecError(f"{spec.study_name(cell)}: {error}") from error
        checked.fingerprints.append(assembly.dataset.fingerprint)
        checked.sizes.append(assembly.sizes(config))
        largest = max(
            (shape.config for _, shape in shapes(spec, cell)),
            key=lambda found: found.global_batch_size,
        )
        if dataset_identity(largest) == identity:
            found.append(worker_bytes(assembly, largest, cuda=cuda))
    return dataclasses.replace(checked, worker_bytes=max(found, default=0))


def load_data(spec: SweepSpec, data_dir: Path | None, err: Console) -> Checked:
    """Load each cell's data set, downloading what is missing, and check it.

    Raises:
        DataError: a data set is missing or broken.
        SpecError: its splits or models cannot be made.
    """
    say = partial(print_line, err)
    return check_data(
        spec,
        lambda config: open_dataset(config, data_dir, say),
        cuda=torch.cuda.device_count() > 0,
    )


def _structures(spec: SweepSpec) -> Iterator[dict[str, Value]]:
    """Points of the search space that differ in what splits and models are made from."""
    lowest = spec.lowest_params()
    axes = [
        [(name, value) for value in space.values()]
        for name, space in spec.search.items()
        if name in STRUCTURAL
    ]
    for combination in itertools.islice(itertools.product(*axes), MAX_STRUCTURES):
        yield {**lowest, **dict(combination)}


def plan_sweep(
    spec: SweepSpec,
    storage_url: str,
    *,
    data_dir: Path | None,
    workers: int | None,
    device: str | None,
    threads: int | None,
    seconds: float,
    began: float,
    err: Console,
) -> Plan:
    """Say what a sweep, or what is left of it, comes to; it is not started, and no store is made.

    Args:
        spec: what would run.
        storage_url: a store that may hold some of it.
        data_dir: where the data set is, None for its usual place.
        workers, threads: as `sweep start` would divide this machine; None for the usual.
        device: where every worker would run, None for the usual.
        seconds: for how long to measure; 0 only counts.
        began: when the command was started, by `time.perf_counter`.
        err: gets the progress.

    Raises:
        SpecError: the spec is wrong, or the store has another one under its name.
        DataError: the data set is missing and cannot be downloaded.
        SweepError: the device cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search.check(spec)
    check_url(storage_url)
    chosen = None if device is None else str(device_named(device))
    each = threads or spec.workers.threads
    machine = this_machine()
    if chosen is not None:
        gpus = tuple(gpu for gpu in machine.gpus if f"cuda:{gpu.index}" == chosen)
        machine = dataclasses.replace(machine, gpus=gpus)

    with err.status("looking at the data") as shown:
        data = outlines(spec, data_dir)
        checked = check_data(
            spec, lambda config: sampling_dataset(config, data_dir), cuda=bool(machine.gpus)
        )
        store = store_to_read(storage_url)
        try:
            if store is not None and spec.name in stored_names(store):
                edits(stored_sweep(store, spec.name).spec, spec)  # refuses what start would
            need = Need(memory=checked.worker_bytes)

            def slots(trials: int) -> list[Slot]:
                found = plan_slots(workers, each, trials, need, machine)
                return [
                    dataclasses.replace(
                        slot, device=chosen or slot.device, threads=threads or slot.threads
                    )
                    for slot in found
                ]

            planned = count(spec, checked.sizes, store, slots=slots, data=data, need=need)
        finally:
            if store is not None:
                close_storage(store, storage_url)
        planned = measured(planned, data_dir, seconds, began=began, say=shown.update)
        if workers is None:
            planned = _automatic(planned, machine, each, data_dir, shown.update)
        return planned


def _automatic(
    found: Plan,
    machine: Machine,
    threads: int,
    data_dir: Path | None,
    say: Callable[[str], None],
) -> Plan:
    """Choose the number of workers, as far as it is not a matter of cores, and say why it is so."""
    trials = sum(study.trials_left for study in found.studies)
    if machine.gpus:
        found = packed(found, machine, threads=threads, data_dir=data_dir, say=say)
    if found.packing or not trials:
        return found
    return dataclasses.replace(found, packing=reason(machine, threads, trials, found.need))


GLANCE_SECONDS = 1.0
"""How long a start may measure what was never measured on this machine."""


def estimate(
    spec: SweepSpec,
    storage_url: str,
    data_dir: Path | None,
    workers: int | None,
    checked: Checked,
    add_trials: int,
    machine: Machine,
    err: Console,
) -> Plan | None:
    """What the run will take, by what is known of this machine's speed, or by a glance at it.

    A GPU is looked at only where somebody may be asked, or the number of workers is to be found:
    that takes processes of its own, since its memory would stay with this one.

    Args:
        spec, storage_url, data_dir, workers, add_trials, err: as of `run_sweep`.
        checked: from `load_data`.
        machine: as it was before processes were held ready there, whose memory is the workers'.

    Returns:
        None where the speed is not known.
    """
    began = time.perf_counter()
    need = Need(memory=checked.worker_bytes)
    asked = can_ask(err)
    try:
        store = store_to_read(storage_url)
    except ElsewhereError:
        raise  # before anything is measured
    except StorageError:
        return None  # which opening it to write explains better
    try:
        found = count(
            spec,
            checked.sizes,
            store,
            slots=lambda left: plan_slots(workers, spec.workers.threads, left, need, machine),
            add_trials=add_trials,
            need=need,
        )
    finally:
        if store is not None:
            close_storage(store, storage_url)
    found = recalled(found)
    if not found.known:
        if found.slots[0].device == "cpu":
            found = glanced(
                found,
                lambda config: checked.datasets[dataset_identity(config)],
                GLANCE_SECONDS,
                threads=found.slots[0].threads,
            )
        elif asked or workers is None:
            with err.status("measuring") as shown:
                found = measured(found, data_dir, GLANCE_SECONDS, began=began, say=shown.update)
    if workers is None and found.slots[0].device != "cpu":
        with err.status("measuring") as shown:
            found = _automatic(found, machine, spec.workers.threads, data_dir, shown.update)
    return found if found.known else None


def agreed(found: Plan, err: Console) -> bool:
    """Ask before a long run, where there is somebody to ask."""
    if found.seconds(pruning=True) <= DAY:
        return True
    if not can_ask(err):
        return True
    print_line(err, plan_line(found))
    return says_yes(err, "start it?")


def device_named(name: str | None) -> torch.device:
    """The device that PyTorch calls so; without a name, a GPU if there is one.

    Raises:
        SweepError: it cannot be used.
    """
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"sweeps do not run on {device.type}")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda:0")  # `torch.cuda.set_device` wants the number
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SweepError(
            f"device {name!r} cannot be used ({first_line(error)}); accepted: 'cpu', or "
            "'cuda:0' and so on where PyTorch finds a GPU"
        ) from None
    return device
