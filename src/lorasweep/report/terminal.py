"""The report in the terminal (rich): one sweep's arms, or several sweeps side by side. Comes after `summary`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.report.side_by_side import describe_cell, describe_differences, format_gain
from lorasweep.report.summary import ArmSummary, Summary, summarize
from lorasweep.report.tables import load_sweep_data
from lorasweep.wording import (
    UNKNOWN,
    format_bytes,
    format_count,
    format_estimate,
    format_metric,
    format_score,
    format_seconds,
    format_settings,
    format_share,
)

ARMS_SIDE_BY_SIDE = 4
MAX_NAME = 24
"""Characters of an arm's name that are kept on one line."""
STRONG = ("arm", "test score", "score")


def render_terminal(*folders: Path) -> RenderableType:
    """Returns what the sweeps in these folders found: a table and sentences for one, a table side by side for several.

    Raises:
        RecordError: A folder is not a sweep or its record is damaged.
    """
    data = [load_sweep_data(folder) for folder in folders]
    summaries = [summarize(sweep) for sweep in data]
    if len(summaries) == 1:
        return render_summary(summaries[0], problems=data[0].problems)
    labels = [f"{summary.sweep}\n{folder}" for summary, folder in zip(summaries, folders, strict=True)]
    return render_side_by_side(list(zip(labels, summaries, strict=True)), notes=describe_differences(data))


def render_summary(summary: Summary, *, problems: tuple[str, ...] = ()) -> RenderableType:
    """Returns one sweep's table with its sentences below: an arm per column while they fit a narrow terminal."""
    title = Text(f"{summary.sweep}: {format_metric(summary.metric)}", style="bold")
    rows = _rows(summary)
    if len(summary.arms) <= ARMS_SIDE_BY_SIDE:
        table = Table(show_header=False, show_lines=False, title=title, title_justify="left")
        table.add_column(style="dim")
        for _ in summary.arms:
            table.add_column(justify="right", overflow="fold")
        for name, cells in rows.items():
            table.add_row(name, *(Text(cell, style="bold" if name in STRONG else "") for cell in cells))
    else:
        table = Table(title=title, title_justify="left")
        for name, cells in rows.items():
            justify: Literal["left", "right"] = "left" if name in ("arm", "best settings") else "right"
            width = min(MAX_NAME, max(map(len, cells))) if name == "arm" else None
            table.add_column(name, justify=justify, overflow="fold", min_width=width)
        for arm_cells in zip(*rows.values(), strict=True):
            table.add_row(*map(Text, arm_cells))
    notes = [*summary.sentences, *problems]
    return Group(table, *(Text(f"• {note}") for note in notes))


def render_side_by_side(labelled: list[tuple[str, Summary]], *, notes: Sequence[str] = ()) -> RenderableType:
    """Returns several sweeps' arms side by side: per sweep the best score, its share of full's gain and its settings.

    Args:
        labelled: Heading and summary of each sweep; headings may repeat.
        notes: Sentences below the table.
    """
    summaries = [summary for _, summary in labelled]
    table = Table(title="best of each arm", title_justify="left", show_lines=True)
    table.add_column("arm", overflow="fold")
    for label, _ in labelled:
        table.add_column(Text(label), overflow="fold")
    for name in dict.fromkeys(arm.name for summary in summaries for arm in summary.arms):
        table.add_row(Text(name), *(Text(_side_text(summary, name)) for summary in summaries))
    return Group(table, *(Text(f"• {note}") for note in notes))


def _rows(summary: Summary) -> dict[str, list[str]]:
    """Returns the table by rows: a name, and a cell for each arm."""
    arms = summary.arms
    scores = [arm.best.score for arm in arms]
    confirmed = {
        "test score": [
            format_estimate(a.confirmed.mean, a.confirmed.interval) if a.confirmed else UNKNOWN for a in arms
        ]
    }
    return {
        "arm": [arm.name for arm in arms],
        "best settings": [
            format_settings(arm.best.params) if arm.best.params is not None else "no complete trial" for arm in arms
        ],
        **(confirmed if summary.evidence.arms else {}),
        "score": [format_score(score, beside=scores) for score in scores],
        "of full's gain": [format_gain(arm) for arm in arms],
        "trained": [format_count(arm.trainable_params) for arm in arms],
        "of base": [format_share(arm.trainable_fraction) for arm in arms],
        "adapter": [format_bytes(arm.adapter_bytes) for arm in arms],
        "memory": [format_bytes(arm.peak_memory_bytes) for arm in arms],
        "time": [format_seconds(arm.wall_s) for arm in arms],
        "trials": [format_trial_counts(arm) for arm in arms],
    }


def format_trial_counts(arm: ArmSummary) -> str:
    """Returns how many of an arm's trials are in each state: `9 complete, 7 pruned`."""
    counts = [(count, state) for state, count in vars(arm.trials).items() if count]
    return ", ".join(f"{count} {state}" for count, state in counts) or "none"


def _side_text(summary: Summary, name: str) -> str:
    cell = describe_cell(summary, name)
    if cell is None:
        return UNKNOWN
    return f"{cell.score}\n{cell.about}" if cell.about else cell.score
