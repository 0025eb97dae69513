"""How many workers share a GPU: as long as it has the memory, and one more brings more.

A small network leaves most of a GPU idle, so that several trials side by side take hardly longer
than one; from some number on they are only in each other's way. Where that is depends on network,
batch and GPU, and is measured: one worker a GPU, two, four and so on, for some seconds each, with
the trials that `sweep plan` measures with (`sweeps.planning.sampling`). What was measured is kept,
so that the next start finds it.

Memory sets the bound: the peak of the largest trial that was measured alone, with some slack, and
what each process takes beside its tensors (`sweeps.machine`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.errors import SweepError
from sweeps.machine import (
    Machine,
    Need,
    Slot,
    bounds,
    divide,
    gigabytes,
    gpu_room,
    throughputs,
    with_gpu_memory,
)
from sweeps.planning.sampling import Samplers
from sweeps.planning.speeds import Sample, keep_sample, kept_sample

if TYPE_CHECKING:
    from sweeps.planning.plan import Plan

WORTH = 1.05
"""Twice as many workers have to bring this much more than half as many did to be tried further."""

NEAR_BEST = 0.95
"""The fewest workers are taken that come this close to the best throughput: fewer hold more of the
memory each, and the sampler learns from more finished trials."""

PROBE_SECONDS = 4.0
"""For how long each number of workers is measured."""


def packed(
    plan: Plan,
    machine: Machine,
    *,
    threads: int,
    data_dir: Path | None,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Put as many workers on each GPU as bring the most, and say why.

    Args:
        plan: with one worker a GPU, whose speed is known.
        machine: where they run; has GPUs.
        threads: as of `[workers]`.
        data_dir: where the data set is, None for its usual place.
        say: hears what is being measured.

    Returns:
        The plan with its workers and their speed; as it was where one a GPU is all that fits, or
        nothing is known of the memory that a trial takes.
    """
    left = [study for study in plan.studies if study.trials_left]
    trials = sum(study.trials_left for study in left)
    peak = max(
        (plan.samples[shape.key].gpu_bytes for study in left for _, shape in study.shapes
         if shape.key in plan.samples),
        default=0,
    )  # fmt: skip
    if not (plan.known and peak and trials > len(machine.gpus)):
        return plan
    machine = with_gpu_memory(machine)
    free = min((gpu.free for gpu in machine.gpus if gpu.free is not None), default=0)
    room = gpu_room(free, peak)
    # A worker has a core at least, and a trial to run.
    gpus = len(machine.gpus)
    most = min(room, max(1, machine.cores // gpus), -(-trials // gpus))
    memory = bounds(machine, threads, trials, plan.need).get("memory", most * gpus)
    most = min(most, max(1, memory // gpus))
    # One of them, with its share of the cores, stands for all.
    one = dataclasses.replace(machine, gpus=machine.gpus[:1], cores=max(1, machine.cores // gpus))
    shape = max(
        ((study.epochs_left * share * plan.samples[s.key].epoch_seconds, n, s)
         for n, study in enumerate(left) for share, s in study.shapes),
        key=lambda found: found[:2],
    )[2]  # fmt: skip
    samples = {1: plan.samples[shape.key]}
    problem = ""
    with contextlib.ExitStack() as stack:
        running: Samplers | None = None
        try:
            for count in counts(most):
                slots = divide(one, count, threads, count, plan.need)
                found = kept_sample(shape.config, plan.dataset_images(shape), slots)
                if found is None:
                    say(f"measuring {count} workers on one GPU: {shape}")
                    if running is None:
                        running = stack.enter_context(Samplers(plan.spec, slots, data_dir))
                    else:
                        running.grow(slots[running.count :])
                    found = running.measure(shape, PROBE_SECONDS)
                    keep_sample(shape.config, plan.dataset_images(shape), slots, found)
                samples[count] = found
                if not goes_on({n: s.epoch_seconds for n, s in samples.items()}):
                    break
        except SweepError as error:
            # Whatever failed there, as many as were measured before did work.
            problem = f"packing: {error}"
    gain = throughputs({count: sample.epoch_seconds for count, sample in samples.items()})
    best = fewest_near_best(gain)
    need = Need(memory=plan.need.memory, workers_per_gpu=best)
    slots = divide(machine, None, threads, trials, need)
    return dataclasses.replace(
        plan,
        need=need,
        slots=slots,
        samples=_slowed(plan.samples, best / gain[best]),
        packing=_explained(gain, best, most, room, peak, slots),
        problems=[*plan.problems, problem] if problem else plan.problems,
    )


def counts(most: int) -> Iterator[int]:
    """The numbers of workers that are tried beside one: 2, 4, 8 and so on, and at last `most`."""
    count = 2
    while count < most:
        yield count
        count *= 2
    if most > 1:
        yield most


def goes_on(seconds: Mapping[int, float]) -> bool:
    """Whether to try more workers, from how long an epoch took with each number so far."""
    gain = throughputs(seconds)
    *before, last = gain.values()
    return last >= WORTH * max(before)


def fewest_near_best(gain: Mapping[int, float]) -> int:
    """The fewest workers whose throughput comes near the best.

    Args:
        gain: throughput by the number of workers.
    """
    best = max(gain.values())
    return min(count for count, value in gain.items() if value >= NEAR_BEST * best)


def _slowed(samples: Mapping[object, Sample], by: float) -> dict[object, Sample]:
    """The samples of one worker a GPU as they are to be expected beside others."""
    return {
        key: dataclasses.replace(
            sample,
            epoch_seconds=sample.epoch_seconds * by,
            begin_seconds=sample.begin_seconds * by,
        )
        for key, sample in samples.items()
    }


def _explained(
    gain: Mapping[int, float], best: int, most: int, room: int, peak: int, slots: list[Slot]
) -> str:
    tried = ", ".join(f"{count}: {value:.2f}x" for count, value in gain.items())
    limit = slots[0].gpu_memory
    part = f", {gigabytes(limit)} each" if limit is not None else ""
    bound = f"room for {room} (a trial took {gigabytes(peak)})"
    other = f"; cores, memory and trials for {most}" if most < room else ""
    return f"{best} on each GPU{part}; throughput by workers {tried}; {bound}{other}"
