"""Figures of several sweeps together: the arms' scores, and their scores against what they train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

import plotly.graph_objects as go

from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.figures.confirmed import ROW_HEIGHT, error_bars
from lorasweep.report.figures.panel import OTHER_COLOURS, Panel, build_figure, escape
from lorasweep.report.tables import SweepData
from lorasweep.wording import format_estimate, format_metric


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm of one sweep."""

    sweep: str
    arm: str
    score: float
    interval: Interval | None
    is_confirmed: bool
    trained: int | None
    """Trainable parameters."""
    link: str


def draw_together(data: Sequence[SweepData], labels: Sequence[str], prefixes: Sequence[str]) -> list[Panel]:
    """Returns the scores of all arms, and their scores against trainable parameters, per metric.

    Args:
        data: The sweeps.
        labels: What each is called.
        prefixes: The way from the page to each sweep's folder.
    """
    panels = []
    for number, metric in enumerate(dict.fromkeys(sweep.record.metric for sweep in data)):
        same = [index for index, sweep in enumerate(data) if sweep.record.metric == metric]
        points = [point for i in same for point in collect_points(data[i], labels[i], prefixes[i])]
        panels += _draw_metric(points, [labels[i] for i in same], data[same[0]], number=number)
    return panels


def collect_points(sweep: SweepData, label: str, prefix: str) -> list[Point]:
    """Returns a point per arm: its confirmed mean, else its best trial; the frozen base is left out."""
    points = []
    for arm in sweep.arms:
        found, best = sweep.evidence.arm(arm.name), arm.winner
        score = found.mean if found else best.value if best else None
        if arm.row.method == "frozen" or score is None or best is None:
            continue
        points.append(
            Point(
                sweep=label,
                arm=arm.name,
                score=score,
                interval=found.interval if found else None,
                is_confirmed=found is not None,
                trained=best.record.trainable_params if best.record else None,
                link=f"{prefix}/{quote(best.run)}/",
            )
        )
    return points


def _draw_metric(points: Sequence[Point], labels: Sequence[str], sweep: SweepData, *, number: int) -> list[Panel]:
    metric = format_metric(sweep.record.metric)
    if not points:
        return [Panel(key=f"scores-{number}", title=f"Scores: {metric}", text="No arm has a score.")]
    colours = {label: OTHER_COLOURS[index % len(OTHER_COLOURS)] for index, label in enumerate(labels)}
    text = "Dots are means on test data with 95 % intervals; rings are the best of a search on validation data."
    trained = [point for point in points if point.trained]
    figures = [_draw_scores(points, sweep, colours)]
    figures += [_draw_trained(trained, sweep, colours)] if trained else []
    return [Panel(key=f"scores-{number}", title=f"Scores: {metric}", text=text, figures=tuple(figures))]


def _draw_scores(points: Sequence[Point], sweep: SweepData, colours: dict[str, str]) -> go.Figure:
    names = list(dict.fromkeys(point.arm for point in points))
    figure = build_figure(
        sweep,
        x_title=format_metric(sweep.record.metric),
        y_title=" ",
        height=110 + ROW_HEIGHT * max(len(names), 2),
        scattermode="group",
    )
    figure.update_xaxes(range=_range_of(points))
    figure.update_yaxes(type="category", categoryarray=[escape(name) for name in reversed(names)])
    for label, colour in colours.items():
        _add(figure, [p for p in points if p.sweep == label], label, colour, by_arm=True)
    return figure


def _range_of(points: Sequence[Point]) -> tuple[float, float]:
    """Returns the scores to show: plotly by itself would begin at 0."""
    ends = [end for point in points for end in (point.score, *(point.interval or ()))]
    pad = 0.06 * (max(ends) - min(ends)) or 0.05 * abs(ends[0]) or 1.0
    return min(ends) - pad, max(ends) + pad


def _draw_trained(points: Sequence[Point], sweep: SweepData, colours: dict[str, str]) -> go.Figure:
    figure = build_figure(sweep, x_title="trainable parameters (log scale)")
    figure.update_xaxes(type="log", exponentformat="SI")
    for label, colour in colours.items():
        _add(figure, [p for p in points if p.sweep == label], label, colour, by_arm=False)
    return figure


def _add(figure: go.Figure, points: Sequence[Point], label: str, colour: str, *, by_arm: bool) -> None:
    bars = error_bars([(point.score, point.interval) for point in points], colour)
    scores = [point.score for point in points]
    figure.add_scatter(
        x=scores if by_arm else [point.trained for point in points],
        y=[escape(point.arm) for point in points] if by_arm else scores,
        **{"error_x" if by_arm else "error_y": bars},
        mode="markers",
        orientation="h" if by_arm else "v",  # sweeps stand side by side within an arm
        name=escape(label),
        marker={
            "color": colour,
            "size": 10,
            "symbol": ["circle" if point.is_confirmed else "circle-open" for point in points],
        },
        text=[escape(f"{label}, {p.arm}: {format_estimate(p.score, p.interval)}") for p in points],
        customdata=[point.link for point in points],
        hovertemplate="%{text}<extra></extra>",
    )
