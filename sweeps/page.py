"""`sweep report`: the page that answers a sweep's question, and its tables as files.

The page is one file that asks nothing of a network: its content security policy forbids every
request. plotly.js is compressed in it, which is a third of its size, and unpacked by the browser.
Whatever comes from the store is text that somebody else may have written, and is escaped.
"""

from __future__ import annotations

import base64
import csv
import gzip
import html
import io
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path

from sweeps.errors import SweepError
from sweeps.figures import Figure
from sweeps.files import replacing
from sweeps.findings import (
    Findings,
    comparison_sentences,
    headline,
    notes,
    progress_sentence,
    study_sentences,
    trained_sentence,
    trial_rows,
)
from sweeps.report import answer_columns, answer_note, answer_rows
from sweeps.spec import within_sweep
from sweeps.status import OUTCOMES

PAGE = "index.html"

MAX_REASONS = 10
"""Reasons of diverged and failed trials that are listed for each study."""


def default_folder(names: Sequence[str]) -> Path:
    """Where a report on these sweeps goes, in the current folder."""
    return Path(f"{'+'.join(names)}-report")


def write_report(findings: Sequence[Findings], figures: Sequence[Figure], folder: Path) -> Path:
    """Write the page and its tables; files of an earlier report are replaced one by one.

    Args:
        findings: of one sweep, or of several that share the figures.
        figures: made of these.
        folder: created if it is not there.

    Returns:
        The page's path.

    Raises:
        SweepError: if the folder cannot be written.
    """
    files = {
        "results.csv": results_csv(findings),
        "table.md": table_markdown(findings),
        "figures.json": figures_json(figures),
        PAGE: page_html(findings, figures, datetime.now(UTC)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SweepError(
            f"cannot write the report to {folder} ({reason}); name another folder with --out"
        ) from None
    return folder / PAGE


# --- tables -------------------------------------------------------------------------------------


def results_csv(findings: Sequence[Findings]) -> str:
    """Every trial, one row each."""
    columns, rows = trial_rows(findings)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table_markdown(findings: Sequence[Findings]) -> str:
    """The answer table of each sweep, in Markdown."""
    parts = []
    for sweep in findings:
        status = sweep.status
        columns = answer_columns(status)
        rule = ["---:" if column in ("trial", "accuracy") else "---" for column in columns]
        lines = [_markdown_row(columns), f"|{'|'.join(rule)}|"]
        for rows in answer_rows(status):
            lines += [_markdown_row(row.cells(status)) for row in rows]
        parts.append(f"## {_markdown(_named(sweep))}")
        parts += [_markdown(status.question)] if status.question else []
        parts.append(_markdown(trained_sentence(sweep.spec)))
        parts += ["\n".join(lines), answer_note(status), progress_sentence(status)]
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown, cells))} |"


def _markdown(text: str) -> str:
    """Text that Markdown leaves as it is, on one line."""
    escaped = re.sub(r"([\\`*\[\]|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
    # An underscore inside a word, as in peak_lr, emphasizes nothing.
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)


def figures_json(figures: Sequence[Figure]) -> str:
    """What the page draws: titles, captions, and Plotly's data and layout of every panel."""
    # A figure a line: indented numbers would take a line each.
    lines = [json.dumps(f.as_dict(), allow_nan=False, separators=(",", ":")) for f in figures]
    return "[\n" + ",\n".join(lines) + "\n]\n"


# --- the page -----------------------------------------------------------------------------------


def page_html(findings: Sequence[Findings], figures: Sequence[Figure], written: datetime) -> str:
    """The whole page."""
    many = len(findings) > 1
    titles = dict.fromkeys(sweep.title if many else _named(sweep) for sweep in findings)
    title = " · ".join(titles)
    body = "".join(_answer(sweep, heading=many) for sweep in findings)
    if said := comparison_sentences(findings):
        items = "".join(f"<li>{_text(sentence)}</li>" for sentence in said)
        body = f'<section class="headline"><ul>{items}</ul></section>{body}'
    if figures:
        body += "".join(_figure(figure) for figure in figures)
    else:
        body += "<p>There is nothing to draw yet.</p>"
    one = findings[0].status
    head = f"<h1>{_text(title)}</h1>"
    if not many:
        head += f'<p class="question">{_text(one.question)}</p>' if one.question else ""
        source = findings[0].spec.source
        head += f'<p class="source">Source: {_text(source)}</p>' if source else ""
        head += _trained(findings[0])
    version = metadata.version("sweep")
    when = f"{written:%Y-%m-%d %H:%M} UTC"
    foot = (
        f"Written {when} by sweep {version}, Optuna {metadata.version('optuna')}. Beside this "
        "page: results.csv (every trial), table.md (the answer), figures.json (what is drawn)."
    )
    template = (resources.files("sweeps") / "page.html").read_text(encoding="utf-8")
    values = {
        "TITLE": _text(title),
        "HEAD": head,
        "BODY": body,
        "FOOT": _text(foot),
        "FIGURES": _script_safe(figures_json(figures)),
        "PLOTLY": _packed_plotly() if figures else "",
    }
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: values[match[1]], template)


def _answer(sweep: Findings, *, heading: bool) -> str:
    status = sweep.status
    parts = []
    if heading:
        parts.append(f"<h2>{_text(_named(sweep))}</h2>")
        parts += [f'<p class="question">{_text(status.question)}</p>'] if status.question else []
        parts.append(_trained(sweep))
    parts.append(f'<p class="headline">{_text(headline(sweep))}</p>')
    items = []
    for study in sweep.studies:
        said = " ".join(study_sentences(sweep, study))
        name = f"<strong>{_text(study.name)}:</strong> " if len(sweep.studies) > 1 else ""
        items.append(f"<li>{name}{_text(said)}</li>")
    parts.append(f"<ul>{''.join(items)}</ul>")
    parts.append(f"<p>{_text(progress_sentence(status))}</p>")
    parts += [f'<p class="note">{_text(note)}</p>' for note in notes(sweep)]
    parts.append(_answer_table(sweep))
    parts.append(_counts(sweep))
    return f'<section class="answer">{"".join(parts)}</section>'


def _named(sweep: Findings) -> str:
    name = sweep.status.name
    return f"{sweep.title} ({name})" if sweep.title != name else name


def _trained(sweep: Findings) -> str:
    return (
        f'<p class="source">{_text(trained_sentence(sweep.spec))}</p>'
        f"<details><summary>The sweep as TOML</summary><pre>{_text(sweep.spec.as_toml())}</pre>"
        "</details>"
    )


def _answer_table(sweep: Findings) -> str:
    status = sweep.status
    columns = answer_columns(status)
    body = ""
    for rows in answer_rows(status):
        for position, row in enumerate(rows):
            cells = row.cells(status)
            if position:
                cells[0] = ""
            kind = ' class="best"' if row.is_best else ""
            body += f"<tr{kind}>{_cells(columns, cells)}</tr>"
    heads = "".join(f"<th{_align(column)}>{_text(column)}</th>" for column in columns)
    kind = ' class="settings"' if status.searched else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _cells(columns: Sequence[str], cells: Sequence[str]) -> str:
    return "".join(
        f"<td{_align(column)}>{_text(cell)}</td>"
        for column, cell in zip(columns, cells, strict=True)
    )


def _align(column: str) -> str:
    return ' class="number"' if column in ("trial", "accuracy", "of", *_COUNTED) else ""


_COUNTED = (*OUTCOMES, "running", "queued")


def _counts(sweep: Findings) -> str:
    """How the trials of each study ended, folded; with the reasons of those that went wrong."""
    shown = [o for o in _COUNTED if any(s.status.count(o) for s in sweep.studies)]
    columns = ["study", *shown, "of"]
    rows, reasons = "", ""
    for study in sweep.studies:
        counts = [str(study.status.count(outcome)) for outcome in shown]
        rows += f"<tr>{_cells(columns, [study.name, *counts, str(study.status.budget)])}</tr>"
        told = [t for t in study.status.trials if t.reason]
        for trial in told[:MAX_REASONS]:
            said = f"{within_sweep(study.status.name)} #{trial.number} {trial.outcome}: "
            reasons += f"<li>{_text(said + trial.reason)}</li>"
        if len(told) > MAX_REASONS:
            reasons += (
                f"<li>{_text(study.name)}: {len(told) - MAX_REASONS} more in results.csv</li>"
            )
    heads = "".join(f"<th{_align(column)}>{_text(column)}</th>" for column in columns)
    return (
        "<details><summary>Trials by outcome</summary>"
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        f"</div>{f'<ul>{reasons}</ul>' if reasons else ''}</details>"
    )


def _figure(figure: Figure) -> str:
    panels = ""
    for index, panel in enumerate(figure.panels):
        title = f"<h3>{_text(panel.title)}</h3>" if panel.title else ""
        height = panel.plot.layout.height
        panels += (
            f'<div class="panel">{title}<div class="plot" id="{figure.key}-{index}" '
            f'style="height:{height}px"></div></div>'
        )
    # Four stand two by two.
    wide = {1: " one", 4: " four"}.get(len(figure.panels), "")
    return (
        f"<figure><h2>{_text(figure.title)}</h2><figcaption>{_text(figure.caption)}</figcaption>"
        f'<div class="panels{wide}">{panels}</div></figure>'
    )


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _script_safe(text: str) -> str:
    """JSON that no `</script>` or `<!--` within ends early."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _packed_plotly() -> str:
    source = (resources.files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(source, compresslevel=6, mtime=0)).decode("ascii")
