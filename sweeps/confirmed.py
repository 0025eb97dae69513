"""A confirmation in words: cells of tables, sentences, notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sweeps.confirmation import (
    Comparison,
    Confirmation,
    ConfirmedConfiguration,
    ConfirmedStudy,
    Estimate,
    Run,
)
from sweeps.errors import plural
from sweeps.spec import within_sweep
from sweeps.status import OUTCOMES, TrialStatus

UNCONFIRMED = "unconfirmed"


def shown_estimate(configuration: ConfirmedConfiguration) -> str:
    """Mean, interval, and what is missing of it, for one cell of a table."""
    estimate = configuration.estimate
    text = f"{estimate.mean:.4f}{shown_interval(estimate)}" if estimate else "–"
    told = _told(configuration)
    left = sum(configuration.count(outcome) for outcome in ("running", "queued"))
    told += [f"{left} of {len(configuration.runs)} to come"] if left else []
    return text + (f" ({', '.join(told)})" if told else "")


def _told(configuration: ConfirmedConfiguration) -> list[str]:
    return [
        f"{configuration.count(o)} {o}" for o in ("diverged", "failed") if configuration.count(o)
    ]


def shown_interval(estimate: Estimate | None) -> str:
    """An interval after its mean; nothing where there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f" [{estimate.low:.4f}, {estimate.high:.4f}]"


CONFIRMED_COLUMNS = ("confirmed", "confirmed_low", "confirmed_high", "confirmed_runs")
"""What a table of trials says of the confirmation of each, for programs."""


def confirmed_cells(
    confirmation: Confirmation | None, study: str, number: int
) -> dict[str, float | int | None]:
    """A trial's `CONFIRMED_COLUMNS`: mean, interval, and how many runs; nothing if unconfirmed."""
    configuration = confirmation.of_trial(study, number) if confirmation else None
    estimate = configuration.estimate if configuration else None
    if estimate is None:
        return dict.fromkeys(CONFIRMED_COLUMNS)
    values = (estimate.mean, estimate.low, estimate.high, estimate.count)
    return dict(zip(CONFIRMED_COLUMNS, values, strict=True))


def confirmed_headline(confirmation: Confirmation) -> str:
    """What has become of the best accuracies, in one sentence."""
    best = [(study.name, study.best) for study in confirmation.studies if study.best]
    found = [
        (name, configuration.estimate) for name, configuration in best if configuration.estimate
    ]
    if not found:
        return "Unconfirmed so far: no run of a best configuration with another seed has ended."
    parts = [
        f"{e.mean:.4f}{shown_interval(e)}"
        + (f" ({within_sweep(name)})" if len(confirmation.studies) > 1 else "")
        for name, e in found
    ]
    so_far = _so_far([run for _, configuration in best for run in configuration.runs])
    return f"Confirmed{so_far}, on the test images with fresh seeds: {', '.join(parts)}."


def _so_far(runs: Sequence[Run]) -> str:
    """How many of some runs have ended, where others have not."""
    ended = sum(run.outcome in OUTCOMES for run in runs)
    return f" so far ({ended} of {len(runs)} runs)" if ended < len(runs) else ""


def confirmed_sentence(confirmation: Confirmation, study: str, trial: TrialStatus) -> str:
    """What the runs say of a trial's configuration, in a sentence or two."""
    configuration = confirmation.of_trial(study, trial.number)
    if configuration is None:
        return "Unconfirmed: its parameters were not trained with other seeds."
    estimate = configuration.estimate
    if estimate is None:
        return "Unconfirmed so far: no run with another seed has ended."
    count = f"{estimate.count} run{'s' if estimate.count > 1 else ''}"
    said = f"Confirmed{_so_far(configuration.runs)}: {estimate.mean:.4f} on the test images"
    said += f", the mean over {count}"
    if estimate.low is not None and estimate.high is not None:
        said += f", 95 % interval {estimate.low:.4f} to {estimate.high:.4f}"
    if configuration.drop is not None and trial.accuracy == configuration.found:
        side = "less" if configuration.drop >= 0 else "more"
        said += f"; {abs(configuration.drop):.4f} {side} than the sweep found"
        if configuration.again is not None and not confirmation.on_test:
            said += f", on whose validation images the same runs reach {configuration.again:.4f}"
    parts = [said + "."]
    if configuration.count("diverged"):
        of = len(configuration.runs)
        parts.append(
            f"{configuration.count('diverged')} of {of} runs diverged, and count as a guess."
        )
    if configuration.count("failed"):
        parts.append(f"{configuration.count('failed')} of {len(configuration.runs)} runs failed.")
    if configuration.versus is not None:
        parts.append(_versus_sentence(configuration.versus, confirmation.comparisons))
    return " ".join(parts)


def _versus_sentence(versus: Comparison, comparisons: int) -> str:
    ahead = versus.ahead
    side = "ahead of" if ahead.mean >= 0 else "behind"
    said = f"With the same seeds the best is {side} it by {abs(ahead.mean):.4f}"
    if versus.corrected is None:
        return said + ", in every pair alike: no test can be made of it."
    corrected = f", corrected for {comparisons} comparisons" if comparisons > 1 else ""
    evidence = "" if versus.corrected <= 0.05 else ": no evidence of a difference"
    return f"{said} (paired t test{corrected}: {p_text(versus.corrected)}){evidence}."


def p_text(p: float) -> str:
    """A p value as `p = 0.031` or `p < 0.001`."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def confirmed_notes(confirmation: Confirmation) -> list[str]:
    """What to keep in mind when reading the confirmed accuracies."""
    found = [
        f"Confirmed: mean accuracy on the test images after the last epoch, over runs with "
        f"{_seeds(confirmation.seeds)}, which {confirmation.confirms} did not use; in brackets its "
        "95\u00a0% interval by Student's t over seeds, for these test images and this split."
    ]
    if confirmation.on_test:
        found.append(
            f"{confirmation.confirms} scores its trials on the test images too: they have taken "
            "part in the choice of the best, and what is confirmed on them may still read too high."
        )
    else:
        found.append("Each run scored the test images once, and no trial did.")
    if confirmation.count("diverged"):
        found.append(
            "A run that diverged counts with the accuracy of a guess, 1 over the classes; with "
            "such runs among others an interval is rough, as they are far from a normal spread."
        )
    if failed := confirmation.count("failed"):
        found.append(
            f"{plural(failed, 'run')} failed and {'is' if failed == 1 else 'are'} left out; sweep "
            f"confirm {confirmation.confirms} runs again what failed once."
        )
    return found


def column_note(confirmation: Confirmation) -> str:
    """What the columns of `confirmation_rows` are."""
    found = "found: the accuracy in the sweep, which the best was picked by."
    if confirmation.on_test:
        return f"{found} luck: found - confirmed."
    return (
        f"{found} luck: found - what these runs reach on the same validation images. drop: found - "
        "confirmed; beyond the luck, it is how the test images differ."
    )


def comparison_lines(confirmation: Confirmation) -> list[str]:
    """The best of each study against its known ones, one line each, and what the test is."""
    lines = [
        f"{within_sweep(study.name)}: best is ahead of {configuration.name} by "
        f"{versus.ahead.mean:+.4f}{shown_interval(versus.ahead)}"
        + (f", {p_text(versus.corrected)}" if versus.corrected is not None else "")
        for study in confirmation.studies
        for configuration in study.configurations
        if (versus := configuration.versus)
    ]
    if tests := confirmation.comparisons:
        several = f", corrected by Holm's method for {tests} comparisons" if tests > 1 else ""
        lines.append(
            "p is that of the two-sided paired t test over the seeds that both configurations have"
            f"{several}."
        )
    return lines


def _seeds(seeds: Sequence[int]) -> str:
    if not seeds:
        return "no seeds yet"
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"the seeds {seeds[0]} to {seeds[-1]}"
    return f"the seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def confirmation_columns(confirmation: Confirmation) -> list[str]:
    """What the table of a confirmation says of each configuration."""
    columns = ["study", "configuration", "runs", "found", "confirmed", "luck", "drop"]
    if confirmation.on_test:  # where they are the same
        columns.remove("drop")
    return columns


def confirmation_rows(confirmation: Confirmation) -> Iterator[tuple[bool, bool, list[str]]]:
    """Each one: whether it is the best, whether it ends its study, and its text by column."""
    columns = confirmation_columns(confirmation)
    for study in confirmation.studies:
        for k, configuration in enumerate(study.configurations):
            cells = _cells(study, configuration)
            row = [cells[column] for column in columns]
            yield (
                configuration.best,
                k == len(study.configurations) - 1,
                row if k == 0 else ["", *row[1:]],
            )


def _cells(study: ConfirmedStudy, configuration: ConfirmedConfiguration) -> dict[str, str]:
    ended = sum(run.outcome in OUTCOMES for run in configuration.runs)
    of = f" of {len(configuration.runs)}" if ended < len(configuration.runs) else ""
    told, estimate = _told(configuration), configuration.estimate
    return {
        "study": within_sweep(study.name),
        "configuration": configuration.name + _number_of(configuration),
        "runs": f"{ended}{of}" + (f" ({', '.join(told)})" if told else ""),
        "found": _accuracy(configuration.found),
        "confirmed": f"{estimate.mean:.4f}{shown_interval(estimate)}" if estimate else "–",
        "luck": _signed(configuration.luck),
        "drop": _signed(configuration.drop),
    }  # fmt: skip


def _number_of(configuration: ConfirmedConfiguration) -> str:
    return "" if configuration.trial is None else f" (#{configuration.trial})"


def _accuracy(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}"
