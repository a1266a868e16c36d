"""The report in the terminal (rich): the answers and the subjects of one sweep, or several sweeps side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.record import SweepRecord
from lorasweep.report.choice import find_score
from lorasweep.report.figures.text import render_scores_by_value
from lorasweep.report.summary import Summary, summarize
from lorasweep.report.sweep_data import ArmData, SweepData
from lorasweep.wording import (
    UNKNOWN,
    count_decimals,
    count_percent_decimals,
    format_count,
    format_estimate,
    format_metric,
    format_score,
    format_settings,
    format_share_estimate,
)

SEEDS = ("seed", "sweep.seed")
"""The settings in which sweeps of one definition differ."""


def render_terminal(*folders: Path) -> RenderableType:
    """Returns the results of one sweep as a table and sentences, or of several sweeps side by side.

    Raises:
        RecordError: A folder is not a sweep, or its record is damaged.
    """
    summaries = [summarize(folder) for folder in folders]
    if len(summaries) == 1:
        table = _draw_arms(summaries[0])
        sentences = [*summaries[0].sentences, *summaries[0].data.problems]
        answers = [
            Text.assemble((line.question, "bold"), f" {line.text}", style="" if line.is_settled else "yellow")
            for line in summaries[0].answers
        ]
        charts = [chart] if (chart := render_scores_by_value(summaries[0].data)) else []
    else:
        sweeps, answers, charts = [summary.data for summary in summaries], [], []
        table = _draw_side_by_side(sweeps)
        sentences = [*describe_spread(sweeps), *describe_differences(sweeps)]
    failures = [
        Text(headline if len(summaries) == 1 else f"{summary.data.folder}: {headline}", style="bold red")
        for summary in summaries
        if (headline := summary.learning.headline)
    ]
    return Group(*failures, *answers, *charts, table, *(Text(f"• {sentence}") for sentence in sentences))


def describe_differences(sweeps: Sequence[SweepData]) -> list[str]:
    """Returns the reasons why scores of the sweeps can't be compared, and a sentence about tests between sweeps."""
    traits: dict[str, list[str | None]] = {
        "metrics": [sweep.record.metric for sweep in sweeps],
        "test data": [_find_fingerprint(sweep, "data", "test") for sweep in sweeps],
        "validation data": [_find_fingerprint(sweep, "data", "validation") for sweep in sweeps],
        "base models": [_find_fingerprint(sweep, "base") for sweep in sweeps],
    }
    sentences = [
        f"The sweeps have different {name}: their scores can't be compared."
        for name, values in traits.items()
        if len({*values} - {None}) > 1
    ]
    tested = (
        "Questions were tested inside each sweep; differences between sweeps are not tested. "
        "A score without an interval is one seed on validation data."
    )
    return [*sentences, tested]


def _find_fingerprint(sweep: SweepData, *keys: str) -> str | None:
    """Returns the fingerprint of the data or the base model in the first run record that has one."""
    for record in (*(rerun.record for rerun in sweep.confirm_runs), *sweep.run_records):
        found = getattr(record, keys[0]) if record else {}
        for key in keys[1:]:
            found = found.get(key) or {}
        if found.get("fingerprint"):
            return str(found["fingerprint"])
    return None


def _draw_arms(summary: Summary) -> Table:
    """Returns a row for each subject; the page has more columns, which a terminal of 80 characters has no room for."""
    data = summary.data
    found = [data.evidence.subject(arm.name) for arm in data.arms]
    decimals = count_decimals(one.interval for one in found if one)
    shares = [data.arm_share_of_full_gain(arm) for arm in data.arms]
    share_decimals = count_percent_decimals(interval for _, interval in shares)
    columns = {
        "arm": [arm.name for arm in data.arms],
        "best settings": [describe_setting(arm) for arm in data.arms],
        "test score": [format_estimate(one.mean, one.interval, decimals=decimals) if one else UNKNOWN for one in found],
        "search score": list_search_scores(summary),
        "of full's gain": [format_share_estimate(*share, decimals=share_decimals) for share in shares],
        "trained": [format_count(arm.cost("trainable_params")) for arm in data.arms],
    }
    if not data.evidence.subjects:
        del columns["test score"]
    title = Text(f"{data.record.name}: {format_metric(data.record.metric)}", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        is_text = name in ("arm", "best settings")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=name == "arm")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def describe_setting(arm: ArmData) -> str:
    """Returns the settings of a subject, and whether they are predicted or those of a trial that stopped early.

    The value that the subject's name has is left out.
    """
    trial = arm.best or arm.so_far
    if trial is None:
        return "no complete trial"
    settings = format_settings({key: value for key, value in trial.params.items() if key != arm.key})
    if arm.best is None:
        return f"no complete trial; {settings} ({trial.state})"
    return f"{settings} (predicted)" if trial.is_predicted else settings


def list_search_scores(summary: Summary) -> list[str]:
    """Returns the score of each subject on validation data; a mark says if it is not final, or learned nothing."""
    data, learning = summary.data, summary.learning
    shown = [arm.best or arm.so_far for arm in data.arms]
    scores = [trial.value if trial else None for trial in shown]
    marks = []
    for arm, trial in zip(data.arms, shown, strict=True):
        is_worse = trial and arm.row.method != "frozen" and learning.is_better(trial) is False
        beaten = f" (not better than {learning.answer.name})" if is_worse and learning.answer else ""
        marks.append(f"{'' if arm.best or not trial else f' ({trial.state})'}{beaten}")
    return [f"{format_score(score, beside=scores)}{mark}" for score, mark in zip(scores, marks, strict=True)]


def is_one_definition(sweeps: Sequence[SweepData]) -> bool:
    """Returns whether sweeps ask the same questions of the same arms, so that they differ in their seeds alone."""

    def ask(record: SweepRecord) -> tuple[Any, ...]:
        kept = [{key: value for key, value in row.settings.items() if key not in SEEDS} for row in record.arms]
        arms = [replace(row, settings=settings) for row, settings in zip(record.arms, kept, strict=True)]
        return arms, record.metric, record.direction, record.margin, record.looks

    return len(sweeps) > 1 and all(ask(sweep.record) == ask(sweeps[0].record) for sweep in sweeps)


def describe_spread(sweeps: Sequence[SweepData]) -> list[str]:
    """Returns how often the answers of sweeps of one definition agree; empty for other sweeps."""
    if not is_one_definition(sweeps):
        return []
    first, parts = sweeps[0], []
    for answer in first.evidence.answers:
        found = [one.evidence.answer(answer.name, answer.subject) for one in sweeps]
        counts = Counter(one.verdict if one else "open" for one in found)
        question = answer.name.replace("_", " ")
        said = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        parts.append(f"`{answer.subject}` {question}: {said}")
    if not parts:
        return []
    return [f"Verdicts over {len(sweeps)} sweeps of one definition: {'; '.join(parts)}."]


def _draw_side_by_side(sweeps: Sequence[SweepData]) -> Table:
    """Returns a column for each sweep; for sweeps of one definition also one with the spread over them."""
    has_spread = is_one_definition(sweeps)
    table = Table(title="setting of each subject", title_justify="left", show_lines=True)
    table.add_column("subject", overflow="fold")
    for sweep in sweeps:
        table.add_column(Text(f"{sweep.record.name}\n{sweep.folder}"), overflow="fold")
    if has_spread:
        table.add_column(f"mean ± std [range] over {len(sweeps)} sweeps", overflow="fold")
    for name in dict.fromkeys(arm.name for sweep in sweeps for arm in sweep.arms):
        arms = [(sweep, sweep.find_arm(name)) for sweep in sweeps]
        cells = [_describe_best(arm, sweep) if arm else UNKNOWN for sweep, arm in arms]
        if has_spread:
            cells.append(_describe_spread_of([(sweep, arm) for sweep, arm in arms if arm]))
        table.add_row(Text(name), *map(Text, cells))
    return table


def _describe_spread_of(arms: Sequence[tuple[SweepData, ArmData]]) -> str:
    """Returns mean, standard deviation and range of a subject's score, and of its share of full's gain."""
    scores = [value for sweep, arm in arms if (value := find_score(arm, sweep)) is not None]
    shares = [share for sweep, arm in arms if (share := sweep.arm_share_of_full_gain(arm)[0]) is not None]
    lines = []
    percent = [100 * share for share in shares]
    for values, form, ending in ((scores, "{:.4g}", ""), (percent, "{:.1f}", " % of full's gain")):
        if len(values) > 1:
            numbers = (mean(values), stdev(values), min(values), max(values))
            average, spread, low, high = (form.format(number) for number in numbers)
            lines.append(f"{average} ± {spread} [{low}, {high}]{ending}")
    return "\n".join(lines) or UNKNOWN


def _describe_best(arm: ArmData, data: SweepData) -> str:
    """Returns a subject's score, on test data if it was confirmed, its share of full's gain, and its settings."""
    if arm.best is None:
        return describe_setting(arm)
    found = data.evidence.subject(arm.name)
    searched = format_score(arm.best.value, beside=[other.best.value for other in data.arms if other.best])
    score = format_estimate(found.mean, found.interval) if found else searched
    share, interval = data.arm_share_of_full_gain(arm)
    gain = f"{format_share_estimate(share, interval)} of full's gain; " if share is not None else ""
    return f"{score}\n{gain}{describe_setting(arm)}"
