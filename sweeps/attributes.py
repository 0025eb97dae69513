"""Attributes of a trial: what its worker writes there, pruners and views read.

`sweeps.carrying`, `sweeps.merging` and `storage` have those that are theirs alone.
"""

from collections.abc import Mapping
from typing import Any

OUTCOME = "outcome"
"""User attribute: how it ended, one of `sweeps.status.OUTCOMES`."""

REASON = "reason"
"""User attribute: why it diverged or failed, in a line."""

SECONDS = "seconds"
"""User attribute: time that its finished attempt took."""

WORST_DEVICE_ACCURACY = "worst_device_accuracy"
"""User attribute: validation accuracy, 0 to 1, of a complete trial on the classes of that device
where it is least, each with its share in the device's images; over several seeds, of the means."""

DEVICE_ACCURACIES = "sweep:device_accuracies"
"""System attribute: of each device what WORST_DEVICE_ACCURACY is the least of, in the devices'
order; null where no class of it is among the validation images."""

LABEL = "label"
"""User attribute: which `[[try]]` it is, or which run of a confirmation."""

CURVES = "sweep:curves"
"""System attribute: what was measured, by name, one number for each epoch."""

PROVENANCE = "sweep:provenance"
"""System attribute: where and with what it ran, by name."""

FAILURES = "sweep:failures"
"""System attribute: how often it raised an error."""

PROGRESS = "sweep:progress"
"""System attribute: the furthest epoch at which an attempt began (`step`), and the deaths of its
workers up to then (`deaths`), which do not count any more."""

DASHBOARD_PART = 2045
"""Characters of a text that optuna-dashboard keeps in one attribute."""


def in_parts(prefix: str, text: str, before: Mapping[str, Any]) -> dict[str, str]:
    """The attributes in which optuna-dashboard keeps a text.

    Args:
        prefix: of their names.
        text: of any length.
        before: the study's attributes; parts that a longer text has left there are blanked.
    """
    parts = [text[at : at + DASHBOARD_PART] for at in range(0, len(text), DASHBOARD_PART)]
    left = sum(name.startswith(prefix) for name in before) - len(parts)
    return {f"{prefix}{i}": part for i, part in enumerate(parts + [""] * max(0, left))}
