"""Which trials take equally long: the settings that decide the speed of an epoch, and no others.

Learning rates and the like differ from trial to trial and cost nothing; the batch, the network or
whether gradients are clipped do. A study has as many shapes as its search space has such values.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from sweeps.config import TrialConfig, Value
from sweeps.errors import SpecError
from sweeps.space import Range
from sweeps.spec import SweepSpec

SPEED_SETTINGS = (
    "dataset", "image_size", "num_train_images", "validation", "validation_fraction", "augment",
    "model", "width_factor", "norm", "num_groups", "feature_norm", "num_devices", "participation",
    "algorithm", "local_steps", "local_momentum", "server_optimizer", "global_batch_size",
    "optimizer", "precision", "compile",
)  # fmt: skip
"""Settings whose value decides how long an epoch takes."""

SPEED_SWITCHES = (
    "clip_grad_norm", "agc_clip_factor", "virtual_features", "proximal_mu", "label_smoothing",
)  # fmt: skip
"""Settings of which only this matters: whether they are on."""

MAX_SHAPES = 8
"""Shapes that are measured of one study whose search space has more."""


@dataclass(frozen=True)
class Shape:
    """What decides how long an epoch takes, and a config that has it.

    Attributes:
        key: its settings, as :data:`SPEED_SETTINGS` and :data:`SPEED_SWITCHES` name them.
        cell: enumerated settings of a study that trains it.
        pinned: searched parameters that decide it.
        config: one with it.
    """

    key: tuple[tuple[str, Value], ...]
    cell: Mapping[str, Value]
    pinned: Mapping[str, Value]
    config: TrialConfig

    def __str__(self) -> str:
        c = self.config
        model = c.model if c.width_factor == 1 else f"{c.model} x{c.width_factor:g}"
        return f"{model}, {c.norm}, {c.algorithm}, batch {c.global_batch_size}"


def key_of(config: TrialConfig) -> tuple[tuple[str, Value], ...]:
    """What decides the speed of a config."""
    values = config.as_dict()
    return (
        *((name, values[name]) for name in SPEED_SETTINGS),
        *((name, _is_on(values[name])) for name in SPEED_SWITCHES),
    )


def shapes(spec: SweepSpec, cell: Mapping[str, Value]) -> list[tuple[float, Shape]]:
    """The shapes that the trials of a study can have, each with the share of trials to expect.

    A searched parameter counts with its choices, each equally often; a range of whole numbers with
    its ends (a sixth each) and its middle, by Simpson's rule; another with its ends.
    """
    axes = []
    for name, space in spec.search.items():
        if options := _options(name, space):
            axes.append([(name, value, share) for value, share in options])
    combinations = list(itertools.product(*axes))
    stride = -(-len(combinations) // MAX_SHAPES)
    found: dict[tuple[tuple[str, Value], ...], tuple[float, Shape]] = {}
    for combination in combinations[::stride]:
        pinned = {name: value for name, value, _ in combination}
        weight = 1.0
        for _, _, share in combination:
            weight *= share
        try:
            config = spec.config(cell, {**spec.lowest_params(), **pinned})
        except SpecError:
            continue  # only the edges of the space are checked
        key = key_of(config)
        before = found[key][0] if key in found else 0.0
        found[key] = (before + weight, Shape(key, cell, pinned, config))
    total = sum(weight for weight, _ in found.values())
    return [(weight / total, shape) for weight, shape in found.values()]


def _options(name: str, space: Range) -> list[tuple[Value, float]]:
    if name in SPEED_SWITCHES:
        choices = space.choices or space.ends()
        if not space.choices:
            return [(choices[-1], 1.0)]
        by_side: dict[bool, list[Value]] = {}
        for choice in choices:
            by_side.setdefault(_is_on(choice), []).append(choice)
        return [(side[0], len(side) / len(choices)) for side in by_side.values()]
    if name not in SPEED_SETTINGS:
        return []
    if space.choices:
        return [(choice, 1 / len(space.choices)) for choice in space.choices]
    low, *between, high = space.values()
    if not between:
        return [(low, 0.5), (high, 0.5)]
    return [(low, 1 / 6), (between[len(between) // 2], 4 / 6), (high, 1 / 6)]


def _is_on(value: Value) -> bool:
    return value != "off" and bool(value)
