"""The report in the terminal (rich): the answers and the subjects of one sweep, or several sweeps side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.report.answers import describe_answer
from lorasweep.report.choice import format_arm_score
from lorasweep.report.summary import Summary, summarize
from lorasweep.report.sweep_data import ArmData, SweepData
from lorasweep.wording import (
    UNKNOWN,
    count_percent_decimals,
    format_count,
    format_metric,
    format_score,
    format_settings,
    format_share_estimate,
)


def render_terminal(*folders: Path, verbose: bool = False) -> RenderableType:
    """Returns the answers and the table of one sweep, or several sweeps side by side.

    `verbose` adds the other sentences of the report.

    Raises:
        RecordError: A folder is not a sweep, or its record is damaged.
    """
    summaries = [summarize(folder) for folder in folders]
    if len(summaries) == 1:
        (summary,) = summaries
        remedy = [summary.learning.remedy] if summary.learning.remedy else []
        sentences = [
            *remedy,
            *summary.warnings,
            *(list_details(summary.data) if verbose else ()),
            *(summary.sentences if verbose else ()),
            *summary.data.problems,
        ]
        table = _draw_arms(summary)
        answers = [
            Text.assemble((line.question, "bold"), f" {line.text}", style="" if line.is_settled else "yellow")
            for line in summary.answers
        ]
    else:
        sweeps, answers = [summary.data for summary in summaries], []
        table = _draw_side_by_side(sweeps)
        sentences = describe_differences(sweeps)
    failures = [
        Text(headline if len(summaries) == 1 else f"{summary.data.folder}: {headline}", style="bold red")
        for summary in summaries
        if (headline := summary.learning.headline)
    ]
    return Group(*failures, *answers, table, *(Text(f"• {sentence}") for sentence in sentences))


def list_details(data: SweepData) -> list[str]:
    """Returns a sentence for each answer that is not in the three lines: on other methods, and on pairs."""
    lora = {arm.name for arm in data.arms if arm.row.method == "lora"}
    return [
        f"{describe_answer(answer, data)}."
        for answer in data.evidence.answers
        if answer.name == "pair" or answer.subject not in lora
    ]


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
    shares = [data.arm_share_of_full_gain(arm) for arm in data.arms]
    share_decimals = count_percent_decimals(interval for _, interval in shares)
    columns = {
        "arm": [arm.name for arm in data.arms],
        "best settings": [describe_setting(arm) for arm in data.arms],
        "test score": [format_arm_score(arm, data) for arm in data.arms],
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


def _draw_side_by_side(sweeps: Sequence[SweepData]) -> Table:
    table = Table(title="setting of each subject", title_justify="left", show_lines=True)
    table.add_column("subject", overflow="fold")
    for sweep in sweeps:
        table.add_column(Text(f"{sweep.record.name}\n{sweep.folder}"), overflow="fold")
    for name in dict.fromkeys(arm.name for sweep in sweeps for arm in sweep.arms):
        cells = [_describe_best(arm, sweep) if (arm := sweep.find_arm(name)) else UNKNOWN for sweep in sweeps]
        table.add_row(Text(name), *map(Text, cells))
    return table


def _describe_best(arm: ArmData, data: SweepData) -> str:
    """Returns a subject's score, on test data if it was confirmed, its share of full's gain, and its settings."""
    if arm.best is None:
        return describe_setting(arm)
    share, interval = data.arm_share_of_full_gain(arm)
    gain = f"{format_share_estimate(share, interval)} of full's gain; " if share is not None else ""
    return f"{format_arm_score(arm, data)}\n{gain}{describe_setting(arm)}"
