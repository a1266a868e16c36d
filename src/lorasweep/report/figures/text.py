"""The main figure as plain text for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.evidence.evidence import SubjectEvidence
from lorasweep.report.figures.confirmed import ScoreChart, find_band, find_interval, list_score_charts
from lorasweep.report.sweep_data import SweepData
from lorasweep.wording import format_metric, format_score

BAR_WIDTH = 40
MAX_NAME_WIDTH = 26
"""Longer names are cut, so that a row fits a terminal of 80 characters."""


def render_scores_by_value(data: SweepData) -> RenderableType | None:
    """Returns a table for each arm with `confirm_each`: a row per subject with its test score and a bar.

    Returns None if nothing that trains has test scores.
    """
    charts = list_score_charts(data)
    if not charts:
        return None
    direction = "lower" if data.sign > 0 else "higher"
    title = Text(f"{format_metric(data.record.metric)} on test data, {direction} is better", style="bold")
    full, base = data.evidence.full, data.evidence.base
    legend = [
        f"├─┤ {100 * data.evidence.confidence:.3g} % interval of the difference from {full}" if full else "├─┤ 95 %"
    ]
    legend += ["░ margin"] if find_band(data) else []
    legend += [f"┊ {base}"] if base else []
    return Group(title, *(_draw_chart(chart, data) for chart in charts), Text(", ".join(legend), style="dim"))


def _draw_chart(chart: ScoreChart, data: SweepData) -> Table:
    evidence = data.evidence
    names = dict.fromkeys(
        [*(arm.name for arm in (*chart.values, *chart.others)), *filter(None, (evidence.full, evidence.base))]
    )
    rows = [found for name in names if (found := evidence.subject(name))]
    table = Table.grid(padding=(0, 2))
    table.add_column(max_width=MAX_NAME_WIDTH, no_wrap=True, overflow="ellipsis")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(min_width=BAR_WIDTH, no_wrap=True)
    means = [one.mean for one in rows]
    for one in rows:
        is_enough = one.name == chart.smallest_sufficient
        name = Text(f"{one.name}{' (enough)' if is_enough else ''}", style="bold" if is_enough else "")
        table.add_row(name, format_score(one.mean, beside=means), _draw_bar(one, chart, data))
    low, high = (format_score(end, beside=chart.score_range) for end in chart.score_range)
    table.add_row("", "", Text(f"{low}{high:>{BAR_WIDTH - len(low)}}", style="dim"))
    return table


def _draw_bar(found: SubjectEvidence, chart: ScoreChart, data: SweepData) -> str:
    """Returns a line of characters; a later mark covers an earlier one."""
    low, high = chart.score_range
    cells = [" "] * BAR_WIDTH

    def locate(score: float) -> int:
        return round((score - low) / (high - low) * (BAR_WIDTH - 1))

    def fill(interval: Interval | None, character: str, ends: str = "") -> None:
        if interval is None:
            return
        start, stop = locate(interval[0]), locate(interval[1])
        for place in range(max(start, 0), min(stop, BAR_WIDTH - 1) + 1):
            cells[place] = character
        for place, end in zip((start, stop), ends, strict=False):
            if 0 <= place < BAR_WIDTH:  # an interval without an end goes on beyond the axis
                cells[place] = end

    fill(find_band(data), "░")
    base = data.evidence.subject(data.evidence.base)
    fill((base.mean, base.mean) if base else None, "┊")
    if found.name != data.evidence.full:
        fill(find_interval(found, data), "─", "├┤")
    if low <= found.mean <= high:
        cells[locate(found.mean)] = "●"
    else:
        cells[-1 if found.mean > high else 0] = "→" if found.mean > high else "←"
    return "".join(cells)
