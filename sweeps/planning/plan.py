"""What a sweep comes to before it runs: trials, epochs, images, disk and time.

Counting is exact. The time is an estimate: what was measured of an epoch, times the epochs that
are left, dealt to the workers as they would pull them.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.dataset import Outline
from data.sources import outline
from sweeps.assembly import Sizes, dataset_identity
from sweeps.carrying import HEAD_START
from sweeps.config import Value
from sweeps.limits import epochs_spent, seconds_spent
from sweeps.machine import NOTHING_KNOWN, Need, Slot
from sweeps.planning.shapes import Shape, shapes
from sweeps.planning.share import Share, epoch_share
from sweeps.planning.speeds import Sample
from sweeps.spec import SweepSpec
from sweeps.status import SweepStatus, read_status
from sweeps.studies import stored_names, stored_sweep

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

MAX_DEALT = 10_000
"""Trials of a study alike that are dealt to the workers one by one."""

TRIAL_BYTES = 2500
EPOCH_BYTES = 140
"""What a trial and an epoch add to a SQLite store; measured on sweeps of 60 epochs a trial."""


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
    def dataset_images(self) -> int:
        """Images that a trial trains on or is scored on."""
        return self.sizes.train_images + self.sizes.val_images

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
        """Whether every study that has trials left has a known speed."""
        return all(self.knows(study) for study in self.studies if study.trials_left)

    def knows(self, study: StudyPlan) -> bool:
        """Whether the speed of a study is known."""
        return all(shape.key in self.samples for _, shape in study.shapes)

    def dataset_images(self, shape: Shape) -> int:
        """Images that a trial of a shape trains on or is scored on."""
        return next(
            study.dataset_images
            for study in self.studies
            if shape.key in {of.key for _, of in study.shapes}
        )

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
        of = spec.lowest_config(cell)
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
    config = spec.lowest_config(cell)
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
