"""Figures of trials: score against the learning rate, over training steps, and against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from lorasweep.config.run import ALPHA, LR
from lorasweep.record import Trial, find_winner
from lorasweep.report.figures.panel import (
    Panel,
    Point,
    add_line,
    add_markers,
    add_trials,
    build_figure,
    build_label,
    choose_colours,
    set_score_axis,
)
from lorasweep.report.sweep_data import ArmData, SweepData

MAX_CURVE_POINTS = 30
"""A curve has at most about this many points."""
COSTS = (
    ("trainable_params", 1, "trainable parameters (log scale)"),
    ("peak_memory_bytes", 2**20, "peak memory (MiB)"),
    ("wall_s", 1, "time of the run (s)"),
)
"""For each figure: the field of a run's record, the divisor of its values, and the title of the axis."""


def draw_score_by_lr(data: SweepData) -> Panel:
    """Returns score against learning rate: a figure for each arm with `confirm_each`, one for all others."""
    title = "Score against learning rate"
    searches = [
        arm.name for arm in data.searches if len({t.numeric_setting(LR) for t in arm.trials if t.is_complete}) > 1
    ]
    split = [[arm for arm in data.arms if arm.arm == name] for name in searches]
    groups = [[one for arms in split if len(arms) == 1 for one in arms], *(arms for arms in split if len(arms) > 1)]
    figures = tuple(_draw_rates(group, data) for group in groups if group)
    if not figures:
        return Panel(key="lr", title=title, text="No arm has complete trials at two learning rates.")
    text = (
        "Dots are complete trials, crosses the best value so far of trials that were stopped early. A ring is the "
        "trial whose setting was chosen, a diamond a setting that no trial has, with the score that the search's model "
        "predicts. u = lr · √α is used where α varies under Adam, because the best u is nearly the same at every α."
    )
    return Panel(key="lr", title=title, text=text, figures=figures)


def _draw_rates(arms: Sequence[ArmData], data: SweepData) -> go.Figure:
    scored = [trial for arm in arms for trial in arm.trials if trial.value is not None]
    has_u = len({trial.setting(ALPHA) for trial in scored}) > 1 and all(trial.follows_rate_law for trial in scored)

    def find_x(trial: Trial) -> float:
        """Returns the learning rate, or the coordinate of the rate law; 0 if it is not known."""
        alpha = trial.numeric_setting(ALPHA) or 0.0 if has_u else 1.0
        return (trial.numeric_setting(LR) or 0.0) * math.sqrt(max(alpha, 0.0))

    figure = build_figure(data, x_title=f"{'u = lr · √α' if has_u else 'learning rate'} (log scale)")
    figure.update_xaxes(type="log", exponentformat="e", dtick=1, minor={"ticks": "outside"})
    colours, scores = choose_colours(data), []
    for arm in arms:
        colour = colours[arm.name]
        points = [(x, t, t.value) for t in arm.trials if t.value is not None and (x := find_x(t)) > 0]
        complete = [point for point in points if point[1].is_complete]
        stopped = [point for point in points if point[1].is_stopped_early]
        scores += [score for _, _, score in (*complete, *stopped)]
        add_trials(figure, complete, colour, arm.name, showlegend=True)
        add_trials(figure, stopped, colour, arm.name, symbol="x-thin-open")
        if arm.best and (x := find_x(arm.best)):
            symbol = "diamond-open" if arm.best.is_predicted else "circle-open"
            text = [build_label(arm.best)]
            score = arm.best.value
            add_markers(figure, [x], [score], colour, arm.name, text=text, symbol=symbol, size=16, line_width=2)
    _set_axis(figure, data, scores)
    return figure


def draw_learning_curves(data: SweepData) -> Panel:
    """Returns every trial's validation curve, by arm."""
    title, colours = "Learning curves", choose_colours(data)
    arms = [arm for arm in data.arms if any(len(trial.curve) > 1 for trial in arm.trials)]
    if not arms:
        return Panel(key="curves", title=title, text="No run has two evaluations, so there is no curve to draw.")
    figure = build_figure(data, x_title="training step")
    for arm in arms:
        trials = [trial for trial in arm.trials if trial.curve and trial.value is not None]
        curves = [trial.curve[:: 1 + len(trial.curve) // MAX_CURVE_POINTS] for trial in trials]
        # a gap ends each curve, so that one trace holds all curves of an arm
        x = [step for curve in curves for step in (*(step for step, _ in curve), None)]
        y = [score for curve in curves for score in (*(score for _, score in curve), None)]
        add_line(figure, x, y, colours[arm.name], arm.name, line={"width": 1}, opacity=0.35)
        stopped = [(trial.curve[-1][0], trial, trial.curve[-1][1]) for trial in trials if trial.is_stopped_early]
        add_trials(figure, stopped, colours[arm.name], arm.name, symbol="x-thin-open")
    for arm in arms:  # after the faint curves, so that the bold ones lie above them
        # a predicted setting has no curve here: its run has another seed than the trials of the search
        if best := find_winner(arm.trials, record=data.record):
            add_line(
                figure,
                [step for step, _ in best.curve],
                [score for _, score in best.curve],
                colours[arm.name],
                arm.name,
                line={"width": 3},
                showlegend=True,
                hoverinfo=None,
                hovertemplate=f"{build_label(best)}<br>step %{{x}}: %{{y:.4f}}<extra></extra>",
            )
    _set_axis(figure, data, [score for arm in arms for trial in arm.trials for _, score in trial.curve])
    text = (
        "Validation score over training: the best trial of each arm or value bold, the others faint. Crosses are "
        "trials that were paused or pruned."
    )
    return Panel(key="curves", title=title, text=text, figures=(figure,))


def draw_tradeoff(data: SweepData) -> Panel:
    """Returns score against each cost, over the complete trials of every arm that trains something."""
    title = "Score against cost"
    trials = [trial for trial in data.trials if trial.is_complete and trial.trains and trial.value is not None]
    if not trials:
        return Panel(key="tradeoff", title=title, text="No complete trial that trains something has a readable record.")
    text = (
        "Complete trials against their cost. The stepped line joins the best trials: no trial is both cheaper and "
        "better than a point on it. Click a point to open its run's folder."
    )
    figures = [
        _draw_cost(axis, [(getattr(trial.record, field) / unit, trial, trial.value or 0.0) for trial in trials], data)
        for field, unit, axis in COSTS
    ]
    return Panel(key="tradeoff", title=title, text=text, figures=tuple(figures))


def _draw_cost(axis: str, points: Sequence[Point], data: SweepData) -> go.Figure:
    figure, colours = build_figure(data, x_title=axis, height=340), choose_colours(data)
    figure.update_xaxes(type="log" if "log" in axis else "linear", exponentformat="SI")
    best: list[tuple[float, float]] = []
    for cost, _, score in sorted(points, key=lambda point: (point[0], data.sign * point[2])):
        if not best or data.sign * score < data.sign * best[-1][1]:
            best.append((cost, score))
    x, y = zip(*best, strict=True)
    add_line(figure, x, y, "#868e96", "best up to this cost", showlegend=True, line={"width": 1.5, "shape": "hv"})
    for arm in data.arms:
        runs = {trial.run for trial in arm.trials}
        if shown := [point for point in points if point[1].run in runs]:
            add_trials(figure, shown, colours[arm.name], arm.name, showlegend=True)
    _set_axis(figure, data, [score for _, _, score in points])
    return figure


def _set_axis(figure: go.Figure, data: SweepData, scores: Sequence[float]) -> None:
    """Sets the range of scores so that it has the better half of them, and those that are near."""
    ranked = sorted(scores, key=lambda score: data.sign * score)
    half = 1 + len(ranked) // 2
    full, frozen = data.best_score("full"), data.best_score("frozen")
    set_score_axis(figure, data, ranked[:half], ranked[half:], full=full, frozen=frozen)
