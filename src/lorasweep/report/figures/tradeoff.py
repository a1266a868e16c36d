"""What a score costs: score against trainable parameters, memory and time, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from lorasweep.record import RunRecord
from lorasweep.report.figures.panel import (
    Panel,
    build_figure,
    colours_of,
    complete_trials,
    escape,
    label_of,
    link_to,
    marker_of,
    show_scores,
)
from lorasweep.report.tables import SweepData, Trial

Point = tuple[float, float, Trial]
"""Cost, score and trial."""

COSTS: tuple[tuple[str, bool, Callable[[RunRecord], float]], ...] = (
    ("trainable parameters (log scale)", True, lambda record: record.trainable_params),
    ("peak memory (MiB)", False, lambda record: record.peak_memory_bytes / 2**20),
    ("time of the run (s)", False, lambda record: record.wall_s),
)
"""Axis title, whether it is logarithmic, and the cost of a run."""


def draw_tradeoff(data: SweepData) -> Panel:
    """Returns score against each cost, over the complete trials of every arm that trains something."""
    title = "What a score costs"
    trials = [pair for arm in data.arms for pair in complete_trials(arm)]
    usable = [(t, score) for t, score in trials if t.record and t.record.trainable_params > 0]
    if not usable:
        return Panel(key="tradeoff", title=title, text="No complete trial that trains something has a readable record.")
    figures = tuple(
        _draw(data, [(cost(t.record), score, t) for t, score in usable if t.record], name, is_log=is_log)
        for name, is_log, cost in COSTS
    )
    text = (
        "Complete trials against what they cost. The stepped line is the Pareto front: "
        "no trial is both cheaper and better than a point on it. Click a point to open its run's folder."
    )
    return Panel(key="tradeoff", title=title, text=text, figures=figures)


def pareto_front(points: Sequence[Point], *, sign: int) -> list[Point]:
    """Returns the points that no other beats in cost and score, by rising cost. Lower `sign * score` is better."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * point[1] < sign * front[-1][1]:
            front.append(point)
    return front


def _draw(data: SweepData, points: list[Point], x_title: str, *, is_log: bool) -> go.Figure:
    figure, colours = build_figure(data, x_title=x_title, height=340), colours_of(data)
    figure.update_xaxes(type="log" if is_log else "linear", exponentformat="SI")
    front = pareto_front(points, sign=data.sign)
    line = {"color": "#868e96", "width": 1.5, "shape": "hv"}
    figure.add_scatter(
        x=[cost for cost, _, _ in front],
        y=[score for _, score, _ in front],
        mode="lines",
        line=line,
        name="Pareto front",
        hoverinfo="skip",
    )
    for arm in data.arms:
        mine = [point for point in points if point[2].arm == arm.name]
        if mine:
            _add_arm(figure, mine, arm.name, colours[arm.name])
    show_scores(figure, data, [score for _, score, _ in points])
    return figure


def _add_arm(figure: go.Figure, points: list[Point], name: str, colour: str) -> None:
    figure.add_scatter(
        x=[cost for cost, _, _ in points],
        y=[score for _, score, _ in points],
        mode="markers",
        name=escape(name),
        marker=marker_of(colour, len(points)),
        text=[label_of(trial) for _, _, trial in points],
        customdata=[link_to(trial) for _, _, trial in points],
        hovertemplate="%{text}<extra></extra>",
    )
