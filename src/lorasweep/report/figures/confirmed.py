"""Figures of the confirm stage: scores on test data, differences from a reference, and scores by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.figures.panel import (
    METHOD_COLOURS,
    Panel,
    build_figure,
    build_rank_figure,
    colours_of,
    escape,
    link_of,
)
from lorasweep.report.findings import describe_pair
from lorasweep.report.sweep_data import ArmData, SweepData, group_by_rank
from lorasweep.wording import format_estimate, format_metric, format_score

ROW_HEIGHT_PX = 34
THIN, THICK = 1.2, 4.5
"""The widths of error bars: thin over seeds and examples, thick over seeds alone."""


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
    rows = []
    for rerun in data.reruns:
        found = evidence.arm(rerun.arm)
        low, high = found.interval if found and found.interval else (None, None)
        mean = found.mean if found else None
        rows.append((rerun.arm, rerun.seed, rerun.value, rerun.state, mean, low, high, rerun.run))
    return Panel(
        key="confirmed",
        title=title,
        text=(
            "Rings are single seeds, dots their means. Bars are 95 % intervals of the mean: thick ones over seeds "
            "alone, on this test data; thin ones over other test data of its kind too. Differences are taken on the "
            f"same seeds and examples, so they are known better than the scores themselves.{base_text}"
        ),
        figures=tuple(figures),
        columns=("arm", "seed", data.record.metric, "state", "mean", "low", "high", "run"),
        rows=tuple(rows),
    )


def find_reference(data: SweepData) -> str | None:
    """Returns the arm that others are compared with: full fine-tuning, else the best confirmed one."""
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
    for group in groups:
        _add_rank_line(figure, group, data)
    full = data.evidence.arm(data.evidence.full)
    if full:
        colour = METHOD_COLOURS["full"]
        figure.add_hline(y=full.mean, line={"color": colour, "width": 1.2, "dash": "dot"})
        if full.seed_interval:
            low, high = full.seed_interval
            figure.add_hrect(y0=low, y1=high, fillcolor=colour, opacity=0.12, line_width=0)
    return (figure,)


def _add_rank_line(figure: go.Figure, group: Sequence[ArmData], data: SweepData) -> None:
    found = [(arm.rank, evidence) for arm in group if (evidence := data.evidence.arm(arm.name))]
    colour = colours_of(data)[group[0].name]
    ranks, means = [rank for rank, _ in found], [one.mean for _, one in found]
    thin = [(one.mean, one.interval if one.uses_examples else None) for _, one in found]
    figure.add_scatter(
        x=ranks,
        y=means,
        error_y=_error_bars(thin, colour, width=THIN),
        mode="markers",
        showlegend=False,
        hoverinfo="skip",
        marker={"color": colour, "size": 1},
    )
    figure.add_scatter(
        x=ranks,
        y=means,
        error_y=_error_bars([(one.mean, one.seed_interval) for _, one in found], colour, width=THICK),
        mode="lines+markers",
        name=escape(f"{group[0].row.method}, confirmed"),
        line={"color": colour, "width": 2},
        marker={"size": 8},
        text=[escape(f"{one.name}: {format_estimate(one.mean, one.interval)}") for _, one in found],
        hovertemplate="%{text}<extra></extra>",
    )


def _draw_scores(arms: Sequence[ArmData], data: SweepData) -> go.Figure:
    figure, colours = _build_row_figure(data, len(arms), x_title=format_metric(data.record.metric)), colours_of(data)
    for arm in reversed(arms):  # plotly draws the first row at the bottom
        found, colour = data.evidence.arm(arm.name), colours[arm.name]
        if found is None:
            continue
        scored = [rerun for rerun in arm.reruns if rerun.is_scored]
        figure.add_scatter(
            x=[rerun.value for rerun in scored],
            y=[escape(arm.name)] * len(scored),
            mode="markers",
            marker={"color": colour, "symbol": "circle-open", "size": 9, "opacity": 0.7},
            text=[escape(f"{arm.name}, seed {rerun.seed}: {format_score(rerun.value)}") for rerun in scored],
            customdata=[link_of(rerun.run) for rerun in scored],
            hovertemplate="%{text}<extra></extra>",
        )
        text = f"{arm.name}: {format_estimate(found.mean, found.interval)}"
        if found.uses_examples:
            _add_mean(figure, arm.name, found.mean, found.interval, colour, text=text, width=THIN)
        _add_mean(figure, arm.name, found.mean, found.seed_interval, colour, text=text, width=THICK)
    return figure


def _draw_differences(arms: Sequence[ArmData], reference: str, data: SweepData) -> go.Figure:
    others, colours = [arm for arm in arms if arm.name != reference], colours_of(data)
    x_title = f"{format_metric(data.record.metric)}, less that of {reference}"
    figure = _build_row_figure(data, len(others), x_title=x_title)
    figure.add_vline(x=0, line={"color": colours[reference], "width": 1.2, "dash": "dot"})
    for arm in reversed(others):
        pair = data.evidence.pair(arm.name, reference)
        if pair and pair.difference is not None:
            text = describe_pair(pair).replace("`", "")
            _add_mean(figure, arm.name, pair.difference, pair.interval, colours[arm.name], text=text)
    return figure


def _build_row_figure(data: SweepData, rows: int, *, x_title: str) -> go.Figure:
    height = 90 + ROW_HEIGHT_PX * max(rows, 2)
    figure = build_figure(data, x_title=x_title, y_title=" ", showlegend=False, height=height)
    figure.update_yaxes(type="category", showgrid=True)
    figure.update_xaxes(exponentformat="none", nticks=6)
    return figure


def _add_mean(
    figure: go.Figure,
    name: str,
    mean: float,
    interval: Interval | None,
    colour: str,
    *,
    text: str,
    width: float = 2.0,
) -> None:
    figure.add_scatter(
        x=[mean],
        y=[escape(name)],
        error_x=_error_bars([(mean, interval)], colour, width=width),
        mode="markers",
        marker={"color": colour, "size": 10},
        text=[escape(text)],
        hovertemplate="%{text}<extra></extra>",
    )


def _error_bars(values: Sequence[tuple[float, Interval | None]], colour: str, *, width: float) -> dict[str, Any]:
    """Returns plotly's error bars of values with their intervals; a value without an interval gets no bar."""
    if all(interval is None for _, interval in values):
        return {"visible": False}
    return {
        "type": "data",
        "symmetric": False,
        "array": [interval[1] - value if interval else None for value, interval in values],
        "arrayminus": [value - interval[0] if interval else None for value, interval in values],
        "color": colour,
        "thickness": width,
        "width": 0 if width == THICK else 4,
    }
