"""The learning curves: validation score over steps, the best trial of each arm bold and the others faint."""

from __future__ import annotations

import math

from lorasweep.report.downsampling import describe_downsampling, downsample, downsample_groups
from lorasweep.report.figures.panel import (
    Panel,
    add_line,
    build_figure,
    colours_of,
    label_of,
    link_of,
    show_scores,
)
from lorasweep.report.sweep_data import SweepData

FILE = "curves.csv"
MAX_CURVE_POINTS = 20_000
"""All curves together have at most about this many points: more make the page slow to open."""
MIN_CURVE_POINTS = 8
MAX_CURVES = 500
"""A figure has at most about this many curves: among more, nobody can tell one from another."""


def draw_learning_curves(data: SweepData) -> Panel:
    """Returns every trial's validation curve, by arm."""
    title, colours = "Learning curves", colours_of(data)
    arms = [arm for arm in data.arms if any(len(trial.curve) > 1 for trial in arm.trials)]
    if not arms:
        return Panel(key="curves", title=title, text="No run has two evaluations, so there is no curve to draw.")
    others = [[trial for trial in arm.trials if trial is not arm.best and trial.curve] for arm in arms]
    shown = downsample_groups(
        others, key=lambda t: math.inf if t.value is None else data.sign * t.value, max_items=MAX_CURVES
    )
    max_points = max(MIN_CURVE_POINTS, MAX_CURVE_POINTS // max(1, sum(map(len, shown))))
    figure = build_figure(data, x_title="training step")
    for arm, trials in zip(arms, shown, strict=True):
        x: list[int | None] = []
        y: list[float | None] = []
        for trial in trials:
            curve = downsample(trial.curve, max_points)
            # A gap ends each curve, so that one trace holds all curves of an arm.
            x += [*(step for step, _ in curve), None]
            y += [*(score for _, score in curve), None]
        add_line(figure, x, y, colours[arm.name], arm.name, line={"width": 1}, opacity=0.35)
    for arm in arms:  # after the faint curves, so that the bold ones lie above them
        if arm.best:
            curve = downsample(arm.best.curve, max_points)
            add_line(
                figure,
                [step for step, _ in curve],
                [score for _, score in curve],
                colours[arm.name],
                arm.name,
                line={"width": 3},
                showlegend=True,
                hoverinfo=None,
                customdata=[link_of(arm.best.run)] * len(curve),
                hovertemplate=f"step %{{x}}: %{{y:.4f}}<br>{label_of(arm.best)}<extra></extra>",
            )
    cut = show_scores(figure, data, [score for arm in arms for trial in arm.trials for _, score in trial.curve])
    left_out = describe_downsampling(shown, others, file=FILE)
    return Panel(
        key="curves",
        title=title,
        text=f"Validation score over training: the best trial of each arm bold, the others faint.{left_out}{cut}",
        figures=(figure,),
        file=FILE,
    )
