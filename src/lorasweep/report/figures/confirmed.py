"""Figures of the confirm stage: scores on test data with intervals, differences from full, scores by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lorasweep.report.advice.noise import rank_groups, rank_of
from lorasweep.report.confirmed import describe_pair
from lorasweep.report.evidence import ArmEvidence
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.figures.panel import METHOD_COLOURS, Panel, build_figure, colours_of, escape, link_of
from lorasweep.report.tables import Arm, SweepData
from lorasweep.wording import format_estimate, format_metric, format_score, format_setting

ROW_HEIGHT = 34
"""Pixels per arm."""
THIN, THICK = 1.2, 4.5


def draw_confirmed(data: SweepData) -> Panel:
    """Returns each arm's mean on test data with its interval and seeds, and its paired difference from a reference."""
    title, evidence = "Confirmed on test data", data.evidence
    shown = [arm for arm in data.arms if arm.row.method != "frozen" and evidence.arm(arm.name)]
    if not shown:
        text = "Nothing was confirmed: every score is one seed on validation data. `confirm.seeds=5` adds the stage."
        return Panel(key="confirmed", title=title, text=text)
    base = evidence.arm(evidence.base or "")
    beyond = f" The frozen base scores {format_estimate(base.mean, base.interval)}." if base else ""
    reference = find_reference(data)
    figures = [_draw_scores(shown, data)]
    if reference and len(shown) > 1:
        figures.append(_draw_differences(shown, reference, data))
    text = (
        "Rings are single seeds, dots their means. Bars are 95 % intervals of the mean: thick ones over seeds alone, "
        "on this test data; thin ones over other test data of its kind too. Differences are taken on the same seeds "
        f"and examples, so they are known better than the scores themselves.{beyond}"
    )
    return Panel(
        key="confirmed",
        title=title,
        text=text,
        figures=tuple(figures),
        columns=("arm", "seed", data.record.metric, "state", "mean", "low", "high", "run"),
        rows=tuple(_rows(data)),
    )


def find_reference(data: SweepData) -> str | None:
    """Returns the arm that others are compared with: full fine-tuning, else the best confirmed one."""
    if data.evidence.full:
        return data.evidence.full
    trained = [arm for arm in data.evidence.arms if arm.name != data.evidence.base]
    return min(trained, key=lambda arm: data.sign * arm.mean).name if trained else None


def draw_confirmed_by_rank(data: SweepData) -> tuple[go.Figure, ...]:
    """Returns the confirmed mean with its interval at each rank, a line for arms that differ in rank alone."""
    groups = [[arm for arm in group if data.evidence.arm(arm.name)] for group in rank_groups(data.arms)]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return ()
    figure = build_figure(data, x_title="rank (log scale)", y_title=f"{format_metric(data.record.metric)}, test data")
    ranks = sorted({rank_of(arm) or 1.0 for group in groups for arm in group})
    figure.update_xaxes(type="log", tickvals=ranks, ticktext=[format_setting(rank) for rank in ranks])
    for group in groups:
        _add_rank_line(figure, group, data)
    full = data.evidence.arm(data.evidence.full or "")
    if full:
        colour = METHOD_COLOURS["full"]
        figure.add_hline(y=full.mean, line={"color": colour, "width": 1.2, "dash": "dot"})
        if full.seed_interval:
            low, high = full.seed_interval
            figure.add_hrect(y0=low, y1=high, fillcolor=colour, opacity=0.12, line_width=0)
    return (figure,)


def _add_rank_line(figure: go.Figure, group: Sequence[Arm], data: SweepData) -> None:
    found = [(arm, evidence) for arm in group if (evidence := data.evidence.arm(arm.name))]
    colour = colours_of(data)[group[0].name]
    thin = [(one.mean, one.interval if one.uses_examples else None) for _, one in found]
    figure.add_scatter(
        x=[rank_of(arm) for arm, _ in found],
        y=[mean for mean, _ in thin],
        error_y=error_bars(thin, colour, width=THIN),
        mode="markers",
        showlegend=False,
        hoverinfo="skip",
        marker={"color": colour, "size": 1},
    )
    figure.add_scatter(
        x=[rank_of(arm) for arm, _ in found],
        y=[one.mean for _, one in found],
        error_y=error_bars([(one.mean, one.seed_interval) for _, one in found], colour, width=THICK),
        mode="lines+markers",
        name=escape(f"{group[0].row.method}, confirmed"),
        line={"color": colour, "width": 2},
        marker={"size": 8},
        text=[escape(f"{arm.name}: {format_estimate(one.mean, one.interval)}") for arm, one in found],
        hovertemplate="%{text}<extra></extra>",
    )


def bars_of(found: ArmEvidence) -> list[tuple[Interval | None, float]]:
    """Returns an arm's intervals with the width of their bars: over seeds and examples thin, over seeds alone thick."""
    both = [(found.interval, THIN)] if found.uses_examples else []
    return [*both, (found.seed_interval, THICK)]


def error_bars(values: Sequence[tuple[float, Interval | None]], colour: str, *, width: float = 2.0) -> dict[str, Any]:
    """Returns plotly's error bars of values with their intervals; no bar where there is none."""
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


def _draw_scores(arms: Sequence[Arm], data: SweepData) -> go.Figure:
    figure, colours = _rows_figure(data, len(arms), x_title=format_metric(data.record.metric)), colours_of(data)
    for arm in reversed(arms):  # the first at the top
        found = data.evidence.arm(arm.name)
        if found:
            _add_seeds(figure, arm, colours[arm.name])
            text = f"{arm.name}: {format_estimate(found.mean, found.interval)}"
            for interval, width in bars_of(found):
                _add_mean(figure, arm.name, (found.mean, interval), colours[arm.name], text=text, width=width)
    return figure


def _draw_differences(arms: Sequence[Arm], reference: str, data: SweepData) -> go.Figure:
    others = [arm for arm in arms if arm.name != reference]
    figure = _rows_figure(data, len(others), x_title=f"{format_metric(data.record.metric)}, less that of {reference}")
    colours = colours_of(data)
    figure.add_vline(x=0, line={"color": colours[reference], "width": 1.2, "dash": "dot"})
    for arm in reversed(others):
        pair = data.evidence.pair(arm.name, reference)
        if pair and pair.difference is not None:
            seen = pair.seen_from(arm.name)
            difference = (seen.difference or 0.0, seen.interval)
            _add_mean(figure, arm.name, difference, colours[arm.name], text=describe_pair(seen).replace("`", ""))
    return figure


def _rows_figure(data: SweepData, rows: int, *, x_title: str) -> go.Figure:
    figure = build_figure(data, x_title=x_title, y_title=" ", showlegend=False, height=90 + ROW_HEIGHT * max(rows, 2))
    figure.update_yaxes(type="category", showgrid=True)
    figure.update_xaxes(exponentformat="none", nticks=6)
    return figure


def _add_seeds(figure: go.Figure, arm: Arm, colour: str) -> None:
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


def _add_mean(
    figure: go.Figure, name: str, mean: tuple[float, Interval | None], colour: str, *, text: str, width: float = 2.0
) -> None:
    figure.add_scatter(
        x=[mean[0]],
        y=[escape(name)],
        error_x=error_bars([mean], colour, width=width),
        mode="markers",
        marker={"color": colour, "size": 10},
        text=[escape(text)],
        hovertemplate="%{text}<extra></extra>",
    )


def _rows(data: SweepData) -> list[tuple[Any, ...]]:
    found: dict[str, ArmEvidence | None] = {arm.name: data.evidence.arm(arm.name) for arm in data.arms}
    return [
        (rerun.arm, rerun.seed, rerun.value, rerun.state, *_summary(found[rerun.arm]), rerun.run)
        for rerun in data.reruns
    ]


def _summary(found: ArmEvidence | None) -> tuple[float | None, float | None, float | None]:
    low, high = found.interval if found and found.interval else (None, None)
    return (found.mean if found else None), low, high
