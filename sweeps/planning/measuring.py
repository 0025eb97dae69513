"""A plan is filled with measurements: new ones, those kept of this machine, or a glance.

Each takes a plan and gives it back with the samples that it lacked, as far as they could be had;
what could not be measured stands among its problems.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sweeps.config import TrialConfig
from sweeps.errors import SweepError
from sweeps.planning.plan import Plan
from sweeps.planning.sampling import Samplers
from sweeps.planning.shapes import Shape
from sweeps.planning.speeds import Sample, keep_sample, kept_sample
from sweeps.planning.stopwatch import measure_here

if TYPE_CHECKING:
    from data.dataset import Dataset


def unmeasured(plan: Plan) -> list[Shape]:
    """The shapes that a plan lacks, those with small batches first."""
    found = {
        shape.key: shape
        for study in plan.studies
        if study.trials_left
        for _, shape in study.shapes
        if shape.key not in plan.samples
    }
    return sorted(found.values(), key=lambda shape: shape.config.global_batch_size)


def measured(
    plan: Plan,
    data_dir: Path | None,
    seconds: float,
    *,
    began: float,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Measure what a plan lacks, with as many processes as it has workers, and keep it.

    Args:
        plan: from `count`.
        data_dir: where the data set is, None for its usual place.
        seconds: for all shapes together; each takes one update at least.
        began: when the command was started, by `time.perf_counter`.
        say: hears what is being measured.
    """
    wanted = unmeasured(plan)
    samples, problems = dict(plan.samples), list(plan.problems)
    prepared = time.perf_counter() - began
    if wanted and seconds > 0:
        say("starting as many processes as there would be workers")
        with Samplers(plan.spec, plan.slots, data_dir, prepared) as samplers:
            spent = 0.0
            for place, shape in enumerate(wanted):
                say(f"measuring {place + 1} of {len(wanted)}: {shape}")
                # What one shape leaves is the others'.
                share = max(seconds - spent, 0.1) / (len(wanted) - place)
                asked = time.perf_counter()
                try:
                    sample = _same_images(shape, samples) or samplers.measure(shape, share)
                except SweepError as error:
                    problems.append(f"{shape}: {error}")
                else:
                    samples[shape.key] = sample
                    keep_sample(shape.config, plan.dataset_images(shape), plan.slots, sample)
                # The imports of the processes do not count.
                spent += time.perf_counter() - asked if place else share
    return _with(plan, samples, problems)


def recalled(plan: Plan) -> Plan:
    """Take what was measured on this machine before."""
    found = {
        shape.key: sample
        for shape in unmeasured(plan)
        if (sample := kept_sample(shape.config, plan.dataset_images(shape), plan.slots))
    }
    return _with(plan, {**plan.samples, **found}, plan.problems)


def glanced(
    plan: Plan, dataset_of: Callable[[TrialConfig], Dataset], seconds: float, *, threads: int
) -> Plan:
    """Measure what a plan lacks in this process, without a store, and keep nothing of it.

    When the seconds are over, shapes that are left are taken to be as fast, by the image, as those
    that were measured. Only for the CPU: a GPU's memory would stay with this process.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    samples, problems = dict(plan.samples), list(plan.problems)
    wanted = unmeasured(plan)
    until = time.perf_counter() + seconds
    try:
        for place, shape in enumerate(wanted):
            left = until - time.perf_counter()
            if left <= 0 and samples:
                break
            try:
                samples[shape.key] = measure_here(
                    dataset_of(shape.config),
                    torch.device("cpu"),
                    shape.config,
                    max(left, 0.05) / (len(wanted) - place),
                )
            except SweepError as error:
                problems.append(f"{shape}: {error}")
    finally:
        torch.set_num_threads(before)
    return _with(plan, _filled(plan, samples), problems)


def _same_images(shape: Shape, samples: Mapping[Any, Sample]) -> Sample | None:
    """A sample of a shape of another batch, measured with a batch smaller than either's."""

    def rest(key: Any) -> list[Any]:
        return [pair for pair in key if pair[0] != "global_batch_size"]

    for key, sample in samples.items():
        if sample.batch < dict(key)["global_batch_size"] and rest(key) == rest(shape.key):
            return sample
    return None


def _filled(plan: Plan, samples: Mapping[Any, Sample]) -> dict[Any, Sample]:
    """Give the shapes without a sample that of the first one with the fewest differences."""
    filled = dict(samples)
    for study in plan.studies:
        for _, shape in study.shapes:
            if shape.key not in filled and samples:
                filled[shape.key] = min(
                    samples.items(), key=lambda item: len(set(item[0]) ^ set(shape.key))
                )[1]
    return filled


def _with(plan: Plan, samples: Mapping[Any, Sample], problems: Sequence[str]) -> Plan:
    startup = max((sample.startup_seconds for sample in samples.values()), default=0.0)
    return dataclasses.replace(plan, samples=samples, problems=problems, startup_seconds=startup)
