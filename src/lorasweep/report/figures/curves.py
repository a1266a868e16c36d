"""The learning curves: validation score over steps, the best trial of each arm bold and the others faint."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from lorasweep.report.figures.panel import Panel, build_figure, colours_of, escape, label_of, link_to, show_scores
from lorasweep.report.tables import Arm, SweepData, Trial
from lorasweep.report.thinning import describe_thinning, thin, thin_groups

FILE = "curves.csv"
MAX_CURVE_POINTS = 20_000
"""All curves together have at most about this many points; longer curves are thinned so that the page opens quickly."""
MAX_CURVES = 500
"""A figure has at most about this many curves: among more, nobody can tell one from another."""


def draw_learning_curves(data: SweepData) -> Panel:
    """Returns every trial's validation curve, by arm."""
    title, colours = "Learning curves", colours_of(data)
    arms = [arm for arm in data.arms if any(len(trial.curve) > 1 for trial in arm.trials)]
    if not arms:
        return Panel(key="curves", title=title, text="No run has two evaluations, so there is no curve to draw.")
    others = [[trial for trial in arm.trials if trial is not arm.best and trial.curve] for arm in arms]
    shown = thin_groups(others, key=lambda trial: _rank(trial, data), most=MAX_CURVES)
    per_curve = max(8, MAX_CURVE_POINTS // max(1, sum(map(len, shown))))
    figure = build_figure(data, x_title="training step")
    for arm, trials in zip(arms, shown, strict=True):
        _add_faint(figure, trials, arm.name, colours[arm.name], per_curve)
    for arm in arms:
        _add_best(figure, arm, colours[arm.name], per_curve)
    cut = show_scores(figure, data, [score for arm in arms for trial in arm.trials for _, score in trial.curve])
    return Panel(
        key="curves",
        title=title,
        text=(
            "Validation score over training: the best trial of each arm bold, the others faint."
            f"{describe_thinning(shown, others, file=FILE)}{cut}"
        ),
        figures=(figure,),
        file=FILE,
    )


def _rank(trial: Trial, data: SweepData) -> float:
    return math.inf if trial.value is None else data.sign * trial.value


def _add_faint(figure: go.Figure, trials: Sequence[Trial], arm: str, colour: str, points: int) -> None:
    x: list[int | None] = []
    y: list[float | None] = []
    for trial in trials:
        curve = thin(trial.curve, points)
        # a gap ends the line, so that one trace holds all curves of an arm
        x += [*(step for step, _ in curve), None]
        y += [*(score for _, score in curve), None]
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"color": colour, "width": 1},
        opacity=0.35,
        legendgroup=escape(arm),
        showlegend=False,
        hoverinfo="skip",
    )


def _add_best(figure: go.Figure, arm: Arm, colour: str, points: int) -> None:
    if arm.best is None:
        return
    curve = thin(arm.best.curve, points)
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
