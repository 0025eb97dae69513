"""What is said of a plan: the estimate in one line, the studies in a table, and all in lines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table

from data.dataset import Outline
from sweeps.errors import plural
from sweeps.planning.plan import Plan
from sweeps.progress import PlainTable
from sweeps.spec import within_sweep

DAY = 86400.0
"""Seconds."""

SPLIT = (
    "num_devices", "split", "classes_per_device", "assignment", "alpha", "min_images_per_device",
    "shared_images",
)  # fmt: skip
"""Settings that the devices' shares depend on, and that may be searched."""


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


def plan_line(plan: Plan) -> str:
    """The estimate in one line."""
    left = [study for study in plan.studies if study.trials_left]
    trials = sum(study.trials_left for study in left)
    if not left:
        return "nothing is left to run"
    lengths = {study.epochs_per_trial for study in left}
    seeds = plan.spec.budget.seeds
    each = f" x {plural(lengths.pop() // seeds, 'epoch')}" if len(lengths) == 1 else ""
    each += f" x {seeds} seeds" if each and seeds > 1 else ""
    parts = [
        f"{plural(trials, 'trial')}{each} in {plural(len(left), 'study', 'studies')}",
        plural(len(plan.slots), "worker"),
    ]
    if not plan.known:
        return ", ".join(parts)
    speeds = sorted(plan.epoch_seconds(study) for study in left)
    first, last = (spoken(speed) for speed in (speeds[0], speeds[-1]))
    parts.append(f"{first} an epoch" if first == last else f"{first} to {last} an epoch")
    if plan.share.value < 1 and plan.saved >= 0.01:
        parts.append(f"{plan.saved:.0%} saved by pruning")
    return f"about {spoken(plan.seconds(pruning=True))}: " + ", ".join(parts)


def plan_table(plan: Plan) -> Table:
    """Each study's work and speed."""
    table = PlainTable(box=None, pad_edge=False, header_style="dim")
    table.add_column("study", overflow="fold", ratio=1)
    for column in ("trials", "done", "epochs each", "updates an epoch", "an epoch", "a trial"):
        table.add_column(column, justify="right", no_wrap=True)
    seeds = plan.spec.budget.seeds
    of_seeds = f" x {seeds} seeds" if seeds > 1 else ""
    for study in plan.studies:
        known = plan.knows(study)
        table.add_row(
            within_sweep(study.name),
            str(study.trials),
            str(study.finished),
            f"{study.epochs_per_trial // seeds:,}{of_seeds}",
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
    if plan.hours_left is not None:
        work += f"; the budget hours leaves {plan.hours_left:.3g}"
    if plan.epochs_budget_left is not None:
        work += f"; the budget epochs_total leaves {plan.epochs_budget_left:,}"
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
        *(f"split:      {line}" for line in _split_lines(plan)),
        f"device:     {_device_name(slot.device)}; {plural(len(plan.slots), 'worker')}, "
        f"{plural(slot.threads, 'thread')} each",
        *([f"workers:    {plan.packing}"] if plan.packing else []),
        f"disk:       {', '.join(disk)}",
    ]
    if plan.known:
        lines.append(f"time:       {plan_line(plan)}")
        if left and plan.share.value < 1:
            whole = spoken(plan.seconds(pruning=False))
            lines.append(f"unpruned:   about {whole}")
        if left and plan.spec.pruner["type"] != "NopPruner":
            lines.append(
                f"pruning:    trials that it may end run {plan.share.value:.0%} of their epochs "
                f"({plan.share.whence})"
            )
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


def _split_lines(plan: Plan) -> list[str]:
    """How the images are divided over the simulated devices, a line for each way there is."""
    found: dict[str, list[str]] = {}
    for study in plan.studies:
        images, classes = study.sizes.device_images, study.sizes.device_classes
        if images:
            held = f"{_span(images)} images and {_span(classes)} classes each"
            split = f"{plural(len(images), 'device')} with {held}"
            found.setdefault(split, []).append(within_sweep(study.name))
    searched = [name for name in plan.spec.search if name in SPLIT]
    where = f", at the lowest {' and '.join(searched)}" if searched else ""
    return [
        f"{split}{where}" + (f" ({'; '.join(names)})" if len(found) > 1 else "")
        for split, names in found.items()
    ]


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


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
