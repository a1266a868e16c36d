"""The report in the terminal (rich): one sweep's arms, or several sweeps side by side. Comes after `summary`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.report.summary import ArmSummary, Summary, summarize
from lorasweep.report.tables import load_sweep_data
from lorasweep.wording import (
    UNKNOWN,
    format_bytes,
    format_count,
    format_metric,
    format_score,
    format_seconds,
    format_settings,
    format_share,
)

ARMS_SIDE_BY_SIDE = 4
ROW_NAMES = (
    "arm",
    "best settings",
    "score",
    "of full's gain",
    "trained",
    "of base",
    "adapter",
    "memory",
    "time",
    "trials",
)


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
    return render_side_by_side(list(zip(labels, summaries, strict=True)))


def render_summary(summary: Summary, *, problems: tuple[str, ...] = ()) -> RenderableType:
    """Returns one sweep's table with its sentences below: an arm per column while they fit a narrow terminal."""
    title = Text(f"{summary.sweep}: {format_metric(summary.metric)}", style="bold")
    cells = [_cells(arm) for arm in summary.arms]
    if len(cells) <= ARMS_SIDE_BY_SIDE:
        table = Table(show_header=False, show_lines=False, title=title, title_justify="left")
        table.add_column(style="dim")
        for _ in cells:
            table.add_column(justify="right", overflow="fold")
        for name, *row in zip(ROW_NAMES, *cells, strict=True):
            table.add_row(name, *(Text(cell, style="bold" if name in ("arm", "score") else "") for cell in row))
    else:
        table = Table(title=title, title_justify="left")
        for name in ROW_NAMES:
            table.add_column(name, justify="left" if name in ROW_NAMES[:2] else "right", overflow="fold")
        for arm_cells in cells:
            table.add_row(*map(Text, arm_cells))
    notes = [*summary.sentences, *problems]
    return Group(table, *(Text(f"• {note}") for note in notes))


def render_side_by_side(labelled: list[tuple[str, Summary]]) -> RenderableType:
    """Returns several sweeps' arms side by side: per sweep the best score, its share of full's gain and its settings.

    Args:
        labelled: Heading and summary of each sweep; headings may repeat.
    """
    summaries = [summary for _, summary in labelled]
    table = Table(title="best of each arm", title_justify="left", show_lines=True)
    table.add_column("arm", overflow="fold")
    for label, _ in labelled:
        table.add_column(Text(label), overflow="fold")
    for name in dict.fromkeys(arm.name for summary in summaries for arm in summary.arms):
        table.add_row(Text(name), *(Text(_side_cell(summary, name)) for summary in summaries))
    return Group(table, *(Text(f"• {note}") for note in _differences(summaries)))


def _cells(arm: ArmSummary) -> tuple[str, ...]:
    return (
        arm.name,
        format_settings(arm.best.params) if arm.best.params is not None else "no complete trial",
        format_score(arm.best.score),
        format_share(arm.share_of_full_gain),
        format_count(arm.trainable_params),
        format_share(arm.trainable_fraction),
        format_bytes(arm.adapter_bytes),
        format_bytes(arm.peak_memory_bytes),
        format_seconds(arm.wall_s),
        format_trial_counts(arm),
    )


def format_trial_counts(arm: ArmSummary) -> str:
    """Returns how an arm's trials ended, in words: `9 complete, 7 pruned`."""
    counts = [(count, state) for state, count in vars(arm.trials).items() if count]
    return ", ".join(f"{count} {state}" for count, state in counts) or "none"


def _side_cell(summary: Summary, name: str) -> str:
    arm = next((arm for arm in summary.arms if arm.name == name), None)
    if arm is None:
        return UNKNOWN
    if arm.best.params is None:
        return "no complete trial"
    share = f"  {format_share(arm.share_of_full_gain)} of full's gain" if arm.share_of_full_gain is not None else ""
    return f"{format_score(arm.best.score)}{share}\n{format_settings(arm.best.params)}"


def _differences(summaries: list[Summary]) -> list[str]:
    metrics = dict.fromkeys(format_metric(summary.metric) for summary in summaries)
    one_seed = "One seed and validation data each; whether differences are more than chance is not tested yet."
    if len(metrics) == 1:
        return [one_seed]
    return [f"The sweeps have different metrics ({', '.join(metrics)}): scores can't be compared.", one_seed]
