"""The learning curves: validation score over steps, the best trial of each arm bold and the others faint."""

from __future__ import annotations

import plotly.graph_objects as go

from lorasweep.report.figures.panel import Panel, build_figure, colours_of, escape, label_of, link_to, show_scores
from lorasweep.report.runs import Curve
from lorasweep.report.tables import Arm, SweepData

MAX_POINTS = 20_000
"""Points of all curves together; longer curves are thinned so that the page opens quickly."""


def draw_learning_curves(data: SweepData) -> Panel:
    """Returns every trial's validation curve, by arm."""
    title, colours = "Learning curves", colours_of(data)
    arms = [arm for arm in data.arms if any(len(trial.curve) > 1 for trial in arm.trials)]
    if not arms:
        return Panel(key="curves", title=title, text="No run has two evaluations, so there is no curve to draw.")
    per_curve = max(8, MAX_POINTS // len(data.trials))
    figure = build_figure(data, x_title="training step")
    for arm in arms:
        _add_faint(figure, arm, colours[arm.name], per_curve)
    for arm in arms:
        _add_best(figure, arm, colours[arm.name], per_curve)
    cut = show_scores(figure, data, [score for arm in arms for trial in arm.trials for _, score in trial.curve])
    return Panel(
        key="curves",
        title=title,
        text=f"Validation score over training: the best trial of each arm bold, all others faint.{cut}",
        figures=(figure,),
        file="curves.csv",
    )


def thin_curve(curve: Curve, points: int) -> Curve:
    """Returns at most `points` (>= 2) evenly spaced points of a curve, its first and last among them."""
    if len(curve) <= points:
        return curve
    last = len(curve) - 1
    return tuple(curve[round(index * last / (points - 1))] for index in range(points))


def _add_faint(figure: go.Figure, arm: Arm, colour: str, points: int) -> None:
    x: list[int | None] = []
    y: list[float | None] = []
    for trial in arm.trials:
        if trial is not arm.best and trial.curve:
            curve = thin_curve(trial.curve, points)
            # a gap ends the line, so that one trace holds all curves of an arm
            x += [*(step for step, _ in curve), None]
            y += [*(score for _, score in curve), None]
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"color": colour, "width": 1},
        opacity=0.35,
        legendgroup=escape(arm.name),
        showlegend=False,
        hoverinfo="skip",
    )


def _add_best(figure: go.Figure, arm: Arm, colour: str, points: int) -> None:
    if arm.best is None:
        return
    curve = thin_curve(arm.best.curve, points)
    figure.add_scatter(
        x=[step for step, _ in curve],
        y=[score for _, score in curve],
        mode="lines",
        line={"color": colour, "width": 3},
        name=escape(arm.name),
        legendgroup=escape(arm.name),
        customdata=[link_to(arm.best)] * len(curve),
        hovertemplate=f"step %{{x}}: %{{y:.4f}}<br>{label_of(arm.best)}<extra></extra>",
    )
