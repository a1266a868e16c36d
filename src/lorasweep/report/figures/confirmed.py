"""Figures of the confirm stage: scores on test data, differences from a reference, and scores by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.figures.panel import (
    METHOD_COLOURS,
    Panel,
    add_points,
    build_figure,
    build_rank_figure,
    choose_colours,
    escape,
    pad_range,
)
from lorasweep.report.findings import describe_pair
from lorasweep.report.sweep_data import ArmData, SweepData, find_metric_range, group_by_rank
from lorasweep.wording import format_estimate, format_metric

ROW_HEIGHT_PX = 34


def draw_confirmed(data: SweepData) -> Panel:
    """Returns each arm's mean on test data with its interval and seeds, and its paired difference from a reference."""
    title, evidence = "Confirmed on test data", data.evidence
    shown = [arm for arm in data.arms if arm.row.method != "frozen" and evidence.arm(arm.name)]
    if not shown:
        text = "Nothing was confirmed: every score is one seed on validation data. `confirm.seeds=5` adds the stage."
        return Panel(key="confirmed", title=title, text=text)
    base, reference = evidence.arm(evidence.base), find_reference(data)
    figures = [_draw_scores(shown, data)]
    if reference and len(shown) > 1:
        figures.append(_draw_differences(shown, reference, data))
    base_text = f" The frozen base scores {format_estimate(base.mean, base.interval)}." if base else ""
    return Panel(
        key="confirmed",
        title=title,
        text=(
            "Rings are single seeds, dots their means, bars the 95 % intervals of the means. Differences are taken on "
            f"the same seeds and examples, so they are known better than the scores themselves.{base_text}"
        ),
        figures=tuple(figures),
    )


def find_reference(data: SweepData) -> str | None:
    """Returns the arm that others are compared with: full fine-tuning, else the best confirmed arm."""
    if data.evidence.full:
        return data.evidence.full
    trained = [arm for arm in data.evidence.arms if arm.name != data.evidence.base]
    return min(trained, key=lambda arm: data.sign * arm.mean).name if trained else None


def draw_confirmed_by_rank(data: SweepData) -> tuple[go.Figure, ...]:
    """Returns the confirmed mean with its interval at each rank, a line for arms that differ in rank alone."""
    groups = [[arm for arm in group if data.evidence.arm(arm.name)] for group in group_by_rank(data.arms)]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return ()
    y_title = f"{format_metric(data.record.metric)}, test data"
    figure = build_rank_figure(data, [arm.rank or 1.0 for group in groups for arm in group], y_title=y_title)
    shown: list[float] = []
    for group in groups:
        found = [evidence for arm in group if (evidence := data.evidence.arm(arm.name))]
        shown += [end for one in found for end in (one.mean, *(one.interval or ()))]
        colour = choose_colours(data)[group[0].name]
        figure.add_scatter(
            x=[arm.rank for arm in group],
            y=[one.mean for one in found],
            error_y=_build_error_bars([(one.mean, one.interval) for one in found], colour),
            mode="lines+markers",
            name=escape(f"{name_rank_group(group)}, confirmed"),
            line={"color": colour, "width": 2},
            marker={"size": 8},
            text=[escape(f"{one.name}: {format_estimate(one.mean, one.interval)}") for one in found],
            hovertemplate="%{text}<extra></extra>",
            cliponaxis=False,
        )
    if full := data.evidence.arm(data.evidence.full):
        colour = METHOD_COLOURS["full"]
        shown += [full.mean, *(full.interval or ())]
        figure.add_hline(y=full.mean, line={"color": colour, "width": 1.2, "dash": "dot"})
        if full.interval:
            low, high = full.interval
            figure.add_hrect(y0=low, y1=high, fillcolor=colour, opacity=0.12, line_width=0)
    figure.update_yaxes(range=pad_range(min(shown), max(shown), limits=find_metric_range(data.record)))
    return (figure,)


def name_rank_group(group: Sequence[ArmData]) -> str:
    """Returns the name of the line of arms that differ in rank alone."""
    return group[0].name if len(group) == 1 else f"{group[0].name} to {group[-1].name}"


def _draw_scores(arms: Sequence[ArmData], data: SweepData) -> go.Figure:
    figure = _build_row_figure(data, len(arms), x_title=format_metric(data.record.metric))
    colours = choose_colours(data)
    shown: list[float] = []
    for arm in reversed(arms):  # plotly draws the first row at the bottom
        found = data.evidence.arm(arm.name)
        if found:
            points = [
                (run.value, run, run.value) for run in arm.confirm_runs if run.is_complete and run.value is not None
            ]
            rows = [escape(arm.name)] * len(points)
            add_points(figure, points, colours[arm.name], arm.name, y=rows, marker={"symbol": "circle-open"})
            text = f"{arm.name}: {format_estimate(found.mean, found.interval)}"
            _add_mean(figure, arm.name, found.mean, found.interval, colours[arm.name], text=text)
            shown += [*(score for score, _, _ in points), found.mean, *(found.interval or ())]
    figure.update_xaxes(range=pad_range(min(shown), max(shown), limits=find_metric_range(data.record)))
    return figure


def _draw_differences(arms: Sequence[ArmData], reference: str, data: SweepData) -> go.Figure:
    others, colours = [arm for arm in arms if arm.name != reference], choose_colours(data)
    x_title = f"{format_metric(data.record.metric)}, less that of {reference}"
    figure = _build_row_figure(data, len(others), x_title=x_title)
    figure.add_vline(x=0, line={"color": colours[reference], "width": 1.2, "dash": "dot"})
    shown = [0.0]
    for arm in reversed(others):
        pair = data.evidence.pair(arm.name, reference)
        if pair and pair.difference is not None:
            text = describe_pair(pair, groups=data.example_groups).replace("`", "")
            _add_mean(figure, arm.name, pair.difference, pair.interval, colours[arm.name], text=text)
            shown += [pair.difference, *(pair.interval or ())]
    low, high = find_metric_range(data.record)
    figure.update_xaxes(range=pad_range(min(shown), max(shown), limits=(low - high, high - low)))
    return figure


def _build_row_figure(data: SweepData, rows: int, *, x_title: str) -> go.Figure:
    height = 90 + ROW_HEIGHT_PX * max(rows, 2)
    figure = build_figure(data, x_title=x_title, y_title=" ", showlegend=False, height=height)
    figure.update_yaxes(type="category", showgrid=True)
    figure.update_xaxes(exponentformat="none", nticks=6)
    return figure


def _add_mean(figure: go.Figure, name: str, mean: float, interval: Interval | None, colour: str, *, text: str) -> None:
    figure.add_scatter(
        x=[mean],
        y=[escape(name)],
        error_x=_build_error_bars([(mean, interval)], colour),
        mode="markers",
        marker={"color": colour, "size": 10},
        text=[escape(text)],
        hovertemplate="%{text}<extra></extra>",
        cliponaxis=False,
    )


def _build_error_bars(values: Sequence[tuple[float, Interval | None]], colour: str) -> dict[str, Any]:
    """Returns plotly's error bars of values with their intervals; a value without an interval gets no bar."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [interval[1] - value if interval else None for value, interval in values],
        "arrayminus": [value - interval[0] if interval else None for value, interval in values],
        "color": colour,
        "thickness": 2,
        "width": 4,
        "visible": any(interval for _, interval in values),
    }
