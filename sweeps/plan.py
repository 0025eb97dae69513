"""What a sweep comes to before it runs: trials, epochs, images, disk and time.

Counting is exact. The time is an estimate: what `sweeps.sampling` measured of an epoch, times the
epochs that are left, dealt to the workers as they would pull them. How many epochs a pruner leaves
is not known beforehand; it is taken from what the store holds, or else assumed (`epoch_share`).
"""

from __future__ import annotations

import dataclasses
import heapq
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from data.sources import Outline, outline
from storage.leases import LEASE_ATTR
from storage.leases import count as count_of
from sweeps.carrying import HEAD_START
from sweeps.config import TrialConfig, Value
from sweeps.errors import SpecError, SweepError, plural
from sweeps.limits import epochs_spent, seconds_spent
from sweeps.machine import NOTHING_KNOWN, Need, Slot
from sweeps.objective import Sizes, dataset_identity
from sweeps.progress import PlainTable
from sweeps.sampling import (
    STARTUP_SECONDS,
    Sample,
    Samplers,
    Shape,
    keep_sample,
    kept_sample,
    key_of,
    measure_here,
    shapes,
)
from sweeps.spec import SweepSpec
from sweeps.status import PROVENANCE, SECONDS, SweepStatus, read_status
from sweeps.studies import StoredSweep, stored_names, stored_sweep

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from data.sources import Dataset

LEFT_PAST_WARMUP = 0.45
"""Share of its epochs past the pruner's warmup that a trial runs which a median judges.

Half of the trials lie below the median when they are first judged; of the others, some do later.
Measured over the searched trials of one fixup-largebatch --quick: 0.44.
"""

PASS_BY_TOLERANCE = 5.0
"""Of the trials below the best that pass a rung of `WarmupHalvingPruner`, the share that its
tolerance lets pass too, in proportion to it.

Half of them at the usual 0.1, which makes 0.75 of all epochs. Measured on the curves of
`tests/benchmarks/replays.py`: sweeps of 8 trials a study ran 0.70 of them, of 40 trials 0.77, the
wait for warmups and the trials that died or exploded included.
"""

MAX_DEALT = 10_000
"""Trials of a study alike that are dealt to the workers one by one."""

FEW_TRIALS = 5
"""Finished trials from which the store's own share of epochs is taken."""

FEW_EPOCHS = 3
"""Epochs of a trial from which its speed is kept."""

TRIAL_BYTES = 2500
EPOCH_BYTES = 140
"""What a trial and an epoch add to a SQLite store; measured on sweeps of 60 epochs a trial."""

DAY = 86400.0


@dataclass(frozen=True)
class StudyPlan:
    """One study.

    Attributes:
        name: of the study.
        cell: its enumerated settings.
        trials: its budget.
        finished: trials that have ended.
        open: of each trial that stands in the store or is a known configuration, and has not ended:
            its number, the epochs that it has behind it, and whether it is a known configuration,
            which no pruner ends.
        fresh: the numbers of all others.
        epochs_per_trial: over all seeds.
        sizes: of an epoch.
        shapes: what is to be measured, with the share of trials that have it.
    """

    name: str
    cell: Mapping[str, Value]
    trials: int
    finished: int
    open: Sequence[tuple[int, int, bool]]
    fresh: range
    epochs_per_trial: int
    sizes: Sizes
    shapes: Sequence[tuple[float, Shape]]

    @property
    def trials_left(self) -> int:
        """Trials that have not ended."""
        return len(self.open) + len(self.fresh)

    @property
    def epochs_left(self) -> int:
        """Epochs that they have before them, if none is pruned."""
        begun = sum(max(0, self.epochs_per_trial - step) for _, step, _ in self.open)
        return begun + self.epochs_per_trial * len(self.fresh)


@dataclass(frozen=True)
class Share:
    """How many of its epochs a trial runs that a pruner may end.

    Attributes:
        value: from 0 to 1.
        whence: where it comes from, in words.
        free: trials of each study that run before the pruner judges any.
    """

    value: float
    whence: str
    free: int = 0


@dataclass(frozen=True)
class Plan:
    """A sweep that has not run, or not to its end.

    Attributes:
        slots: where its workers would run.
        data: each data set that it needs.
        samples: what was measured of each shape; those that are missing were not.
        problems: why a shape could not be measured, in words.
        share: what the pruner leaves.
        hours_left, epochs_budget_left: of the budgets of time and epochs; None sets no limit.
        startup_seconds: from the command to the first update.
        need: what a worker takes.
        packing: why there are as many workers, in words; "" where they were named.
    """

    spec: SweepSpec
    studies: Sequence[StudyPlan]
    slots: Sequence[Slot]
    data: Sequence[Outline]
    samples: Mapping[Any, Sample]
    problems: Sequence[str]
    share: Share
    hours_left: float | None
    epochs_budget_left: int | None
    startup_seconds: float
    need: Need = NOTHING_KNOWN
    packing: str = ""

    @property
    def known(self) -> bool:
        """Whether the speed of every study that has trials left is."""
        return all(self.knows(study) for study in self.studies if study.trials_left)

    def knows(self, study: StudyPlan) -> bool:
        """Whether the speed of a study is known."""
        return all(shape.key in self.samples for _, shape in study.shapes)

    def epoch_seconds(self, study: StudyPlan) -> float:
        """Of an epoch of a study, over the shapes that its trials can have."""
        return sum(weight * self.samples[shape.key].epoch_seconds for weight, shape in study.shapes)

    def trial_seconds(self, study: StudyPlan, epochs: float | None = None) -> float:
        """Of a trial that runs so many epochs; all of them if None."""
        begin = sum(w * self.samples[shape.key].begin_seconds for w, shape in study.shapes)
        count = study.epochs_per_trial if epochs is None else epochs
        return begin + count * self.epoch_seconds(study)

    def seconds(self, *, pruning: bool) -> float:
        """Until the sweep is done, with these workers.

        Args:
            pruning: expect the pruner to end trials; without, every trial runs to its end.
        """
        queue, epochs = [], 0.0
        workers = max(1, len(self.slots))
        lag = HEAD_START if self.spec.budget.carry else 0
        for place, study in enumerate(self.studies):
            if not study.trials_left:
                continue
            begin = self.trial_seconds(study, 0)
            for first, count, left in self._left(study, pruning):
                number = first + lag * place
                epochs += count * left
                seconds = begin + left * self.epoch_seconds(study)
                if count <= MAX_DEALT:
                    queue += [(number + n, place, seconds) for n in range(count)]
                else:  # too many to tell one from another
                    share = count * seconds / workers
                    queue += [(number, place, share) for _ in range(workers)]
        # As `storage.trials.TrialQueue.claim` has it: the lowest number first, where a study is
        # ahead of the next as much lower, of equals that of the study listed first.
        ends = [0.0] * workers
        for _, _, seconds in sorted(queue):
            heapq.heapreplace(ends, ends[0] + seconds)
        total = max(ends)
        limit = self.epochs_budget_left
        if limit is not None and epochs > limit:
            total *= limit / epochs
        if self.hours_left is not None:
            total = min(total, 3600 * self.hours_left)
        return total + self.startup_seconds if queue else 0.0

    def _left(self, study: StudyPlan, pruning: bool) -> Iterator[tuple[int, int, float]]:
        """What a study has before it: (first number, trials, epochs of each) in order."""
        whole = float(study.epochs_per_trial)
        judged = whole * self.share.value if pruning else whole
        for number, step, known in study.open:
            free = known or number < self.share.free
            yield number, 1, max(0.0, (whole if free else judged) - step)
        first, last = study.fresh.start, study.fresh.stop
        between = min(max(first, self.share.free), last)
        for begin, end, epochs in ((first, between, whole), (between, last, judged)):
            if end > begin:
                yield begin, end - begin, epochs

    @property
    def saved(self) -> float:
        """Share of the time that pruning saves."""
        whole = self.seconds(pruning=False)
        return 1 - self.seconds(pruning=True) / whole if whole else 0.0

    def line(self) -> str:
        """The estimate in one line."""
        left = [study for study in self.studies if study.trials_left]
        trials = sum(study.trials_left for study in left)
        if not left:
            return "nothing is left to run"
        lengths = {study.epochs_per_trial for study in left}
        each = f" x {plural(lengths.pop(), 'epoch')}" if len(lengths) == 1 else ""
        parts = [
            f"{plural(trials, 'trial')}{each} in {plural(len(left), 'study', 'studies')}",
            plural(len(self.slots), "worker"),
        ]
        if not self.known:
            return ", ".join(parts)
        speeds = sorted(self.epoch_seconds(study) for study in left)
        first, last = (spoken(speed) for speed in (speeds[0], speeds[-1]))
        parts.append(f"{first} an epoch" if first == last else f"{first} to {last} an epoch")
        if self.share.value < 1 and self.saved >= 0.01:
            parts.append(f"{self.saved:.0%} saved by pruning")
        return f"about {spoken(self.seconds(pruning=True))}: " + ", ".join(parts)

    def images(self, *, left: bool) -> int:
        """Training images that all trials together take in, each pass counted, unpruned."""
        return sum(
            study.sizes.images_per_epoch
            * (study.epochs_left if left else study.trials * study.epochs_per_trial)
            for study in self.studies
        )

    def checkpoint_bytes(self) -> tuple[int, int] | None:
        """What checkpoints hold of the disk (at the end, at most while it runs), if measured.

        Those of studies that have no trials left lie there already, and do not count.
        """
        left = [study for study in self.studies if study.trials_left]
        if not (left and self.known):
            return None
        sizes = [
            max(self.samples[shape.key].checkpoint_bytes for _, shape in study.shapes)
            for study in left
        ]
        if not all(sizes):
            return None
        rule = self.spec.budget.keep_checkpoints
        counts = [{"best": 1, "none": 0}.get(rule, study.trials) for study in left]
        kept = sum(count * size for count, size in zip(counts, sizes, strict=True))
        # A save writes the new one before the old one goes.
        return kept, kept + 2 * len(self.slots) * max(sizes)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`. Seconds and bytes; None where it was not measured."""
        known = self.known
        checkpoints = self.checkpoint_bytes()
        left = [study.epochs_left for study in self.studies]
        every = [study.trials * study.epochs_per_trial for study in self.studies]
        return {
            "name": self.spec.name,
            "workers": len(self.slots),
            "device": self.slots[0].device,
            "threads": self.slots[0].threads,
            "worker_memory_bytes": self.need.memory or None,
            "workers_from": self.packing or None,
            "total": {
                "studies": len(self.studies),
                "trials": sum(study.trials for study in self.studies),
                "epochs": sum(every),
                "images": self.images(left=False),
            },
            "remaining": {
                "trials": sum(study.trials_left for study in self.studies),
                "epochs": sum(left),
                "images": self.images(left=True),
            },
            "data": [
                {
                    "name": found.name,
                    "place": str(found.place) if found.place else None,
                    "present": found.present,
                    "decoded": found.decoded,
                    "download_bytes": found.download_bytes,
                    "cache_bytes": found.cache_bytes,
                }
                for found in self.data
            ],
            "disk": {
                "checkpoint_bytes": checkpoints[0] if checkpoints else None,
                "checkpoint_bytes_at_most": checkpoints[1] if checkpoints else None,
                "store_bytes": self.store_bytes(),
            },
            "seconds": self.seconds(pruning=True) if known else None,
            "seconds_without_pruning": self.seconds(pruning=False) if known else None,
            "startup_seconds": self.startup_seconds if known else None,
            "epoch_share": self.share.value,
            "epoch_share_from": self.share.whence,
            "problems": list(self.problems),
            "studies": [
                {
                    "name": study.name,
                    "cell": dict(study.cell),
                    "trials": study.trials,
                    "finished": study.finished,
                    "trials_left": study.trials_left,
                    "epochs_per_trial": study.epochs_per_trial,
                    "epochs_left": study.epochs_left,
                    **dataclasses.asdict(study.sizes),
                    "epoch_seconds": self.epoch_seconds(study) if self.knows(study) else None,
                    "trial_seconds": self.trial_seconds(study) if self.knows(study) else None,
                    "shapes": [
                        {
                            "shape": str(shape),
                            "settings": dict(shape.pinned),
                            "weight": weight,
                            **(
                                dataclasses.asdict(self.samples[shape.key])
                                if shape.key in self.samples
                                else {}
                            ),
                        }
                        for weight, shape in study.shapes
                    ],
                }
                for study in self.studies
            ],
        }

    def store_bytes(self) -> int:
        """By how much a SQLite store would still grow, if no trial is pruned."""
        trials = sum(study.trials_left for study in self.studies)
        return TRIAL_BYTES * trials + EPOCH_BYTES * sum(s.epochs_left for s in self.studies)


def count(
    spec: SweepSpec,
    sizes: Sequence[Sizes],
    store: BaseStorage | None,
    *,
    slots: Callable[[int], Sequence[Slot]],
    add_trials: int = 0,
    data: Sequence[Outline] = (),
    need: Need = NOTHING_KNOWN,
) -> Plan:
    """Count what there is to do; nothing is measured.

    Args:
        spec: of the sweep.
        sizes: of an epoch of each of its cells.
        store: that may have some of it already; None where there is none.
        slots: divides a machine among workers, given how many trials are left.
        add_trials: by how many the budget of each stored study would grow.
        data: its data sets.
        need: what a worker takes.
    """
    added = add_trials
    budgets: dict[str, int] = {}
    status, hours, epochs = None, spec.budget.hours, spec.budget.epochs_total
    if store is not None and spec.name in stored_names(store):
        sweep = stored_sweep(store, spec.name)
        status = read_status(store, sweep)
        if spec.confirms:  # each of its studies has the runs that were enqueued there
            budgets = {study.name: study.budget for study in sweep.studies}
        # A budget that is edited says how many there are, those added before included.
        elif sweep.spec.budget.trials == spec.budget.trials:
            added += sweep.studies[0].budget - spec.budget.trials
        hours = None if hours is None else max(0.0, hours - seconds_spent(store, sweep) / 3600)
        epochs = None if epochs is None else max(0, epochs - epochs_spent(store, sweep))
    studies = [
        _study_plan(
            spec, cell, size, status, budgets.get(spec.study_name(cell), spec.budget.trials + added)
        )
        for cell, size in zip(spec.cells, sizes, strict=True)
    ]
    return Plan(
        spec=spec,
        studies=studies,
        slots=slots(sum(study.trials_left for study in studies)),
        data=data,
        samples={},
        problems=(),
        share=epoch_share(spec, status, store),
        hours_left=hours,
        epochs_budget_left=epochs,
        startup_seconds=0.0,
        need=need,
    )


def outlines(spec: SweepSpec, data_dir: Path | None) -> list[Outline]:
    """Each data set that a sweep needs, as far as it is known without reading its images.

    Raises:
        DataError: one is missing and cannot be downloaded.
    """
    found: dict[tuple[Value, ...], Outline] = {}
    for cell in spec.cells:
        of = spec.config(cell, spec.lowest_params())
        if dataset_identity(of) not in found:
            found[dataset_identity(of)] = outline(
                of.dataset, data_dir=data_dir, image_size=of.image_size, noise_std=of.noise_std
            )
    return list(found.values())


def _study_plan(
    spec: SweepSpec,
    cell: Mapping[str, Value],
    sizes: Sizes,
    status: SweepStatus | None,
    budget: int,
) -> StudyPlan:
    config = spec.config(cell, spec.lowest_params())
    name = spec.study_name(cell)
    tried = sum(attempt.applies_to(cell) for attempt in spec.tries)
    finished, begun = 0, tried
    left = dict.fromkeys(range(tried), (0, True))
    stored = {study.name: study for study in status.studies} if status else {}
    if study := stored.get(name):
        finished = study.finished
        # Optuna numbers trials without a gap.
        begun = max((trial.number + 1 for trial in study.trials), default=0)
        left = {
            trial.number: (trial.step, bool(trial.label))
            for trial in study.trials
            if trial.outcome in ("running", "queued")
        }
    return StudyPlan(
        name=name,
        cell=cell,
        trials=budget,
        finished=finished,
        open=[(number, step, known) for number, (step, known) in sorted(left.items())],
        fresh=range(begun, max(begun, budget)),
        epochs_per_trial=config.epochs * spec.budget.seeds,
        sizes=sizes,
        shapes=shapes(spec, cell),
    )


def epoch_share(spec: SweepSpec, status: SweepStatus | None, store: BaseStorage | None) -> Share:
    """How many of its epochs a trial runs that the sweep's pruner may end.

    Taken from this sweep's own finished trials; failing these, from those of the store's sweeps
    with the same pruner, search and epochs. Else by the kind of the pruner: a median leaves
    `LEFT_PAST_WARMUP` past its warmup, a percentile its percentage; `WarmupHalvingPruner` passes
    the best and, by `PASS_BY_TOLERANCE`, those near them; successive halving promotes
    one in `reduction_factor` at each rung (Li et al. 2018, arXiv 1810.05934, algorithm 1), and
    of Hyperband's brackets (Li et al. 2018, arXiv 1603.06560) each has as many trials.
    """
    if spec.pruner["type"] == "NopPruner":
        return Share(1.0, "no pruner")
    ran: list[float] = []
    if status is not None:
        ran = _ran(status)
        if len(ran) >= FEW_TRIALS:
            return Share(
                sum(ran) / len(ran), f"as in the {len(ran)} searched trials that this sweep has run"
            )
    if store is not None:
        for name in stored_names(store):
            try:
                other = stored_sweep(store, name)
            except SpecError:  # of another version; it is in nobody's way here
                continue
            alike = all(
                getattr(other.spec, part) == getattr(spec, part) for part in ("pruner", "search")
            )
            if alike and _length(other.spec) == _length(spec) and name != spec.name:
                ran += _ran(read_status(store, other))
        if len(ran) >= FEW_TRIALS:
            return Share(
                sum(ran) / len(ran),
                f"as in the {len(ran)} searched trials of sweeps like it in the store",
            )
    return _assumed_share(spec)


def _length(spec: SweepSpec) -> int:
    return spec.config(spec.cells[0], spec.lowest_params()).epochs * spec.budget.seeds


def _ran(status: SweepStatus) -> list[float]:
    """The share of its epochs that each finished trial ran which a pruner could have ended."""
    return [
        trial.step / study.steps_per_trial
        for study in status.studies
        for trial in study.trials
        if trial.outcome in ("complete", "pruned", "diverged") and not trial.label
    ]


def _assumed_share(spec: SweepSpec) -> Share:
    length, kind = _length(spec), str(spec.pruner["type"])
    if kind in ("MedianPruner", "PercentilePruner"):
        warmup = min(length, int(spec.pruner.get("n_warmup_steps", 0)))
        left = LEFT_PAST_WARMUP
        if kind == "PercentilePruner":
            left = float(spec.pruner.get("percentile", 25.0)) / 100
        return Share(
            (warmup + left * (length - warmup)) / length,
            f"assumed: a trial that {kind} judges runs {left:.0%} of its epochs past step {warmup}",
            free=int(spec.pruner.get("n_startup_trials", 5)),
        )
    if kind == "WarmupHalvingPruner":
        first = float(spec.pruner.get("first_rung", 0.3)) * length / spec.budget.seeds
        factor = int(spec.pruner.get("reduction_factor", 2))
        near = min(1.0, PASS_BY_TOLERANCE * float(spec.pruner.get("tolerance", 0.1)))
        passing = 1 / factor + near * (1 - 1 / factor)
        return Share(
            _halved(length, max(1, round(first)), factor, passing),
            f"assumed: at each rung {kind} lets {passing:.0%} of the trials pass",
        )
    if kind in ("SuccessiveHalvingPruner", "HyperbandPruner"):
        factor = int(spec.pruner.get("reduction_factor", 4 if kind.startswith("S") else 3))
        least = spec.pruner.get("min_resource", 1)
        least = least if isinstance(least, int) else 1
        rate = int(spec.pruner.get("min_early_stopping_rate", 0))
        rungs = [rate]
        if kind == "HyperbandPruner":
            while least * factor ** len(rungs) <= length:
                rungs.append(len(rungs))
        value = sum(_halved(length, least * factor**first, factor) for first in rungs) / len(rungs)
        return Share(value, f"assumed: {kind} promotes one trial in {factor} at each rung")
    return Share(1.0, f"assumed: {kind} ends no trial")


def _halved(length: int, rung: int, factor: int, passing: float | None = None) -> float:
    """Share of its epochs that a trial runs on average.

    Args:
        length: epochs of a whole one.
        rung: at which epoch the first rung is; each is `factor` times as far as the one before.
        passing: the share of trials that pass a rung; None is 1 in `factor`.
    """
    passing = 1 / factor if passing is None else passing
    ran, alive, before = 0.0, 1.0, 0
    while rung < length:
        ran += alive * (rung - before)
        before, rung, alive = rung, rung * factor, alive * passing
    return (ran + alive * (length - before)) / length


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
                    keep_sample(shape.config, plan.slots, sample)
                # The imports of the processes do not count.
                spent += time.perf_counter() - asked if place else share
    return _with(plan, samples, problems)


def _same_images(shape: Shape, samples: Mapping[Any, Sample]) -> Sample | None:
    """What was measured of a shape that differs in its batch alone, with a batch of neither."""

    def rest(key: Any) -> list[Any]:
        return [pair for pair in key if pair[0] != "global_batch_size"]

    for key, sample in samples.items():
        if sample.batch < dict(key)["global_batch_size"] and rest(key) == rest(shape.key):
            return sample
    return None


def recalled(plan: Plan) -> Plan:
    """Take what was measured on this machine before."""
    found = {
        shape.key: sample
        for shape in unmeasured(plan)
        if (sample := kept_sample(shape.config, plan.slots))
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


def keep_speeds(
    store: BaseStorage, sweep: StoredSweep, slots: Sequence[Slot], since: datetime
) -> None:
    """Keep how long the epochs of trials took that workers of this machine have run since."""
    took: dict[Any, tuple[TrialConfig, list[float]]] = {}
    for study in sweep.studies:
        for trial in store.get_all_trials(study.study_id, deepcopy=False):
            seconds, steps = trial.user_attrs.get(SECONDS), trial.last_step or 0
            here = trial.system_attrs.get(PROVENANCE, {}).get("host") == socket.gethostname()
            # One that went on from a checkpoint has counted its last attempt's seconds only.
            whole = count_of(trial.system_attrs.get(LEASE_ATTR) or {}, "attempt") == 1
            fresh = trial.datetime_start is not None and trial.datetime_start >= since
            if not (seconds and steps >= FEW_EPOCHS and here and whole and fresh):
                continue
            config = sweep.spec.config(study.cell, trial.params)
            took.setdefault(key_of(config), (config, []))[1].append(seconds / steps)
    for config, epochs in took.values():
        before = kept_sample(config, slots)
        sample = Sample(
            epoch_seconds=statistics.median(epochs),
            begin_seconds=0.0,  # it is in the epochs
            startup_seconds=STARTUP_SECONDS,
            checkpoint_bytes=0,
            updates=0,
            batch=config.global_batch_size,
            measured="run",
            gpu_bytes=before.gpu_bytes if before else 0,
        )
        keep_sample(config, slots, sample)


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


def spoken(seconds: float) -> str:
    """A time in words, to two digits: `0.35 s`, `62 s`, `25 min`, `7.5 h`, `3.2 days`."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    for unit, length, most in (("s", 1.0, 90), ("min", 60.0, 90), ("h", 3600.0, 48)):
        if seconds < most * length:
            count = seconds / length
            return f"{count:.1f} {unit}" if count < 9.95 else f"{count:.0f} {unit}"
    days = seconds / DAY
    return f"{days:.1f} days" if days < 9.95 else f"{days:,.0f} days"


def plan_table(plan: Plan) -> Table:
    """Each study's work and speed."""
    table = PlainTable(box=None, pad_edge=False, header_style="dim")
    table.add_column("study", overflow="fold", ratio=1)
    for column in ("trials", "done", "epochs each", "updates an epoch", "an epoch", "a trial"):
        table.add_column(column, justify="right", no_wrap=True)
    for study in plan.studies:
        known = plan.knows(study)
        table.add_row(
            study.name.removeprefix(f"{plan.spec.name}/"),
            str(study.trials),
            str(study.finished),
            f"{study.epochs_per_trial:,}",
            f"{study.sizes.updates_per_epoch:,}",
            spoken(plan.epoch_seconds(study)) if known else "–",
            spoken(plan.trial_seconds(study)) if known else "–",
        )
    return table


def plan_lines(plan: Plan) -> list[str]:
    """What a plan comes to, a line each, as `label: text`."""
    left = [study for study in plan.studies if study.trials_left]
    work = (
        f"{plural(sum(s.trials_left for s in left), 'trial')}, "
        f"{sum(s.epochs_left for s in left):,} epochs, "
        f"{plan.images(left=True):,} training images"
    )
    if any(study.finished for study in plan.studies):
        work += f"; of {sum(s.trials for s in plan.studies)} trials in all"
    for limit, name in ((plan.hours_left, "hours"), (plan.epochs_budget_left, "epochs_total")):
        if limit is not None:
            work += f"; the budget {name} leaves {limit:,.3g}"
    slot = plan.slots[0]
    disk = [f"store {_megabytes(plan.store_bytes())}"]
    if kept := plan.checkpoint_bytes():
        disk.insert(
            0, f"checkpoints {_megabytes(kept[0])} (while it runs, at most {_megabytes(kept[1])})"
        )
    disk += [f"decoded {found.name} {_megabytes(found.cache_bytes)}" for found in plan.data]
    lines = [
        f"to run:     {work}",
        *(f"data:       {_data_line(found)}" for found in plan.data),
        f"device:     {_device_name(slot.device)}; {plural(len(plan.slots), 'worker')}, "
        f"{plural(slot.threads, 'thread')} each",
        *([f"workers:    {plan.packing}"] if plan.packing else []),
        f"disk:       {', '.join(disk)}",
    ]
    if plan.known:
        lines.append(f"time:       {plan.line()}")
        if left and plan.share.value < 1:
            whole = spoken(plan.seconds(pruning=False))
            lines.append(f"unpruned:   about {whole}")
        if left and plan.spec.pruner["type"] != "NopPruner":
            lines.append(f"pruning:    {plan.share.value:.0%} of the epochs, {plan.share.whence}")
    else:
        lines.append("time:       not measured")
    smaller = {
        str(shape): plan.samples[shape.key].batch
        for study in left
        for _, shape in study.shapes
        if shape.key in plan.samples
        and plan.samples[shape.key].batch != shape.config.global_batch_size
    }
    lines += [
        f"note:       {shape}: measured with {batch} images, as one of its updates takes too long"
        for shape, batch in smaller.items()
    ]
    lines += [f"note:       {problem}" for problem in plan.problems]
    return lines


def _data_line(found: Outline) -> str:
    if found.place is None:
        return f"{found.name}, within its package"
    if found.present:
        decoded = "" if found.decoded else "; the first start decodes it"
        return f"{found.name} in {found.place}{decoded}"
    return (
        f"{found.name} is not in {found.place}; start downloads {_megabytes(found.download_bytes)} "
        "(times here are of made images, alike in their sizes)"
    )


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return device


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"
