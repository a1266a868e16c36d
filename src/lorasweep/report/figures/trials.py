"""Figures of trials: score against the learning rate, over training steps, and against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from lorasweep.report.answers import follows_rate_law
from lorasweep.report.figures.panel import (
    Panel,
    Point,
    add_line,
    add_mark,
    add_points,
    build_figure,
    build_label,
    build_link,
    choose_colours,
    list_points,
    select_evenly,
    select_points,
    set_score_axis,
)
from lorasweep.report.sweep_data import ALPHA, LR, ArmData, SweepData, TrialData
from lorasweep.selection import find_winner

MAX_CURVES = 500
"""A figure has at most about this many curves: among more, nobody can tell one from another."""
MAX_CURVE_POINTS = 40
"""A curve has at most about this many points."""

COSTS = (
    ("trainable_params", 1, "trainable parameters (log scale)"),
    ("peak_memory_bytes", 2**20, "peak memory (MiB)"),
    ("wall_s", 1, "time of the run (s)"),
)
"""The field of a run's record, the value of one unit on the axis, and the axis title."""


def draw_score_by_lr(data: SweepData) -> Panel:
    """Returns score against learning rate: a figure for each arm with `confirm_each`, one for all others."""
    title, figures, left_out = "Score against learning rate", [], ""
    searches = [arm for arm in data.searches if len({lr for lr, _, _ in list_points(arm.trials, _find_lr)}) > 1]
    if not searches:
        return Panel(key="lr", title=title, text="No arm has complete trials at two learning rates.")
    split = [[arm for arm in data.arms if arm.arm == search.name] for search in searches]
    groups = [[one for arms in split if len(arms) == 1 for one in arms], *(arms for arms in split if len(arms) > 1)]
    for group in filter(None, groups):
        figure, note = _draw_rates(group, data)
        figures.append(figure)
        left_out = left_out or note
    text = (
        "Dots are complete trials, crosses the best value so far of trials that were stopped early. A ring is the "
        "trial whose setting was chosen, a diamond a setting that no trial has, with the score that the search's model "
        "predicts. u = lr · √α is used where α varies under Adam, because the best u is nearly the same at every "
        f"α.{left_out}"
    )
    return Panel(key="lr", title=title, text=text, figures=tuple(figures))


def _draw_rates(arms: Sequence[ArmData], data: SweepData) -> tuple[go.Figure, str]:
    """Returns a figure of score against rate, and a sentence about points that it does not show or an empty text."""
    alphas = {trial.numeric_setting(ALPHA) for arm in arms for trial in arm.trials if trial.value is not None}
    follows_law = all(follows_rate_law(trial) for arm in arms for trial in arm.trials if trial.value is not None)
    has_u = len(alphas) > 1 and None not in alphas and follows_law
    figure = build_figure(data, x_title=f"{'u = lr · √α' if has_u else 'learning rate'} (log scale)")
    figure.update_xaxes(type="log", exponentformat="e", dtick=1, minor={"ticks": "outside"})
    find_x, colours = _find_u if has_u else _find_lr, choose_colours(data)
    complete = [list_points(arm.trials, find_x) for arm in arms]
    stopped = [list_points(arm.trials, find_x, is_stopped=True) for arm in arms]
    shown, left_out = select_points([*complete, *stopped], data)
    for arm, dots, crosses in zip(arms, shown[: len(arms)], shown[len(arms) :], strict=True):
        colour = colours[arm.name]
        add_points(figure, dots, colour, arm.name, showlegend=True)
        add_points(figure, crosses, colour, arm.name, marker={"symbol": "x-thin-open"})
        if arm.best and (x := find_x(arm.best)):
            symbol = "diamond-open" if arm.best.is_predicted else "circle-open"
            add_mark(figure, x, arm.best.value, colour, arm.name, symbol=symbol, text=build_label(arm.best))
    cut = set_score_axis(figure, data, [score for points in (*complete, *stopped) for _, _, score in points])
    return figure, f"{left_out}{cut}"


def _find_lr(trial: TrialData) -> float | None:
    return trial.numeric_setting(LR)


def _find_u(trial: TrialData) -> float | None:
    """Returns the coordinate of the rate law."""
    lr, alpha = trial.numeric_setting(LR), trial.numeric_setting(ALPHA)
    return lr * math.sqrt(alpha) if lr and alpha and alpha > 0 else None


def draw_learning_curves(data: SweepData) -> Panel:
    """Returns every trial's validation curve, by arm."""
    title, colours = "Learning curves", choose_colours(data)
    arms = [arm for arm in data.arms if any(len(trial.curve) > 1 for trial in arm.trials)]
    if not arms:
        return Panel(key="curves", title=title, text="No run has two evaluations, so there is no curve to draw.")
    # no predicted setting: its run has another seed, so its curve is not comparable with those of the search
    winners = [find_winner(arm.trials, record=data.record) for arm in arms]
    others = [
        [trial for trial in arm.trials if trial is not best and trial.curve and trial.value is not None]
        for arm, best in zip(arms, winners, strict=True)
    ]
    shown, left_out = select_evenly(others, key=lambda trial: data.sign * trial.value, max_items=MAX_CURVES)
    figure = build_figure(data, x_title="training step")
    for arm, trials in zip(arms, shown, strict=True):
        x: list[int | None] = []
        y: list[float | None] = []
        for trial in trials:
            curve = trial.curve[:: 1 + len(trial.curve) // MAX_CURVE_POINTS]
            # A gap ends each curve, so that one trace holds all curves of an arm.
            x += [*(step for step, _ in curve), None]
            y += [*(score for _, score in curve), None]
        add_line(figure, x, y, colours[arm.name], arm.name, line={"width": 1}, opacity=0.35)
        stopped = [(t.curve[-1][0], t, t.curve[-1][1]) for t in trials if t.is_stopped_early]
        add_points(figure, stopped, colours[arm.name], arm.name, marker={"symbol": "x-thin-open"})
    for arm, best in zip(arms, winners, strict=True):  # after the faint curves, so that the bold ones lie above them
        if best:
            add_line(
                figure,
                [step for step, _ in best.curve],
                [score for _, score in best.curve],
                colours[arm.name],
                arm.name,
                line={"width": 3},
                showlegend=True,
                hoverinfo=None,
                customdata=[build_link(best.run)] * len(best.curve),
                hovertemplate=f"step %{{x}}: %{{y:.4f}}<br>{build_label(best)}<extra></extra>",
            )
    cut = set_score_axis(figure, data, [score for arm in arms for trial in arm.trials for _, score in trial.curve])
    text = (
        f"Validation score over training: the best trial of each arm or value bold, the others faint. Crosses are "
        f"trials that were paused or pruned.{left_out}{cut}"
    )
    return Panel(key="curves", title=title, text=text, figures=(figure,))


def draw_tradeoff(data: SweepData) -> Panel:
    """Returns score against each cost, over the complete trials of every arm that trains something."""
    title, figures, left_out = "Score against cost", [], ""
    trained = [
        [(t, t.record, t.value) for t in arm.trials if t.is_complete and t.record and t.trains] for arm in data.arms
    ]
    if not any(trained):
        return Panel(key="tradeoff", title=title, text="No complete trial that trains something has a readable record.")
    for field, unit, axis in COSTS:
        groups = [[(getattr(run, field) / unit, t, v) for t, run, v in arm if v is not None] for arm in trained]
        shown, left_out = select_points(groups, data)
        figures.append(_draw_cost(axis, groups, shown, data))
    return Panel(
        key="tradeoff",
        title=title,
        text=(
            "Complete trials against their cost. The stepped line joins the best trials: no trial is both cheaper and "
            f"better than a point on it. Click a point to open its run's folder.{left_out}"
        ),
        figures=tuple(figures),
    )


def _draw_cost(
    axis: str, groups: Sequence[Sequence[Point]], shown: Sequence[Sequence[Point]], data: SweepData
) -> go.Figure:
    figure, colours = build_figure(data, x_title=axis, height=340), choose_colours(data)
    figure.update_xaxes(type="log" if "log" in axis else "linear", exponentformat="SI")
    points = [point for group in groups for point in group]
    best: list[tuple[float, float]] = []
    for cost, _, score in sorted(points, key=lambda point: (point[0], data.sign * point[2])):
        if not best or data.sign * score < data.sign * best[-1][1]:
            best.append((cost, score))
    line = {"width": 1.5, "shape": "hv"}
    x, y = [cost for cost, _ in best], [score for _, score in best]
    add_line(figure, x, y, "#868e96", "best up to this cost", showlegend=True, line=line)
    for arm, dots in zip(data.arms, shown, strict=True):
        if dots:
            add_points(figure, dots, colours[arm.name], arm.name, showlegend=True)
    set_score_axis(figure, data, [score for _, _, score in points])
    return figure
