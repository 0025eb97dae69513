"""The reference of a sweep's file, docs/toml.md, from the code that reads such files.

python -m sweeps.reference > docs/toml.md
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from sweeps.config import Setting, TrialConfig, written
from sweeps.search import PRUNERS, SAMPLERS
from sweeps.sections import Budget, WorkerShare

HEAD = """\
# The keys of a sweep's file

Made from the code: `python -m sweeps.reference`. How the tables work together is told in
[own-sweep.md](own-sweep.md).

Beside the tables, a file may have `title`, `question` and `source`, texts that every view shows,
and `extends = "NAME"`, a preset or a path ending in `.toml`, whose tables this file overrides.
"""

TABLES = f"""\
## `[each]`

Keys of `[train]` with a list of values; one Optuna study for each combination. `[[each]]`, a list
of tables, names the combinations one by one.

## `[search]`

Keys of `[train]` that the sampler suggests: `{{ low, high }}` with `log = true` or `step`, or
`{{ choices = [] }}`. A key stands in one of `[train]`, `[each]` and `[search]`.

## `[[try]]`

Known configurations, which run first and are never pruned: `label`, values of searched keys (the
sampler fills in those left out), and `when`, a table of enumerated keys and the values that they
are for.

## `[sampler]` and `[pruner]`

`type` names a class of Optuna's, the other keys are its arguments. `WarmupHalvingPruner` is Sweep's
own ([own-sweep.md](own-sweep.md)); it takes `reduction_factor`, `first_rung` and `tolerance`.
Unless given, the sampler's `seed` is 0, and `min_resource` of Optuna's pruners 1.

| table | default | accepted |
|---|---|---|
| `[sampler]` | `TPESampler` | {", ".join(f"`{name}`" for name in SAMPLERS)} |
| `[pruner]` | `MedianPruner` | {", ".join(f"`{name}`" for name in PRUNERS)} |
"""

QUICK = """\
## `[quick]`

What `--quick` overrides, table by table: `[quick.train]`, `[quick.each]`, `[[quick.try]]` and so
on.
"""


def markdown() -> str:
    """The page as Markdown."""
    parts = [HEAD, _train(), TABLES]
    for name, kind in (("budget", Budget), ("workers", WorkerShare)):
        parts.append(_limits(name, kind))
    return "\n".join([*parts, QUICK])


def _train() -> str:
    defaults = {f.name: f.default for f in dataclasses.fields(TrialConfig)}
    lines = [
        "## `[train]`\n",
        "What one training is. Keys marked with · cannot be searched: they are the same in all",
        "trials of a study.\n",
        "| key | default | accepted | meaning |",
        "|---|---|---|---|",
    ]
    for name, setting in TrialConfig.settings().items():
        key = f"`{name}`" + ("" if setting.searchable else " ·")
        default = f"`{_toml(defaults[name])}`"
        lines.append(f"| {key} | {default} | {_accepted(setting)} | {_cell(setting.doc)} |")
    return "\n".join([*lines, ""])


def _accepted(setting: Setting) -> str:
    return _cell(setting.accepted().replace(" | ", ", ").replace("'", "`"))


def _limits(table: str, kind: type[Any]) -> str:
    text = inspect.getdoc(kind) or ""
    summary, _, attributes = text.partition("Attributes:")
    intro = " ".join(summary.split())
    lines = [f"## `[{table}]`\n", f"{intro}\n", "| key | default | meaning |", "|---|---|---|"]
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", attributes, flags=re.M | re.S)
    for name, meaning in found:
        default = "–" if defaults[name] is None else f"`{_toml(defaults[name])}`"
        words = " ".join(meaning.split()).replace("; None sets no limit", "; left out, no limit")
        lines.append(f"| `{name}` | {default} | {_cell(words)} |")
    return "\n".join([*lines, ""])


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else written(value)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    print(markdown(), end="")
