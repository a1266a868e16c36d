"""Figures of trials: score by rank, against the learning rate, over training steps, and against cost."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from lorasweep.report.advice import advise
from lorasweep.report.figures.confirmed import draw_confirmed_by_rank, name_rank_group
from lorasweep.report.figures.panel import (
    Panel,
    Point,
    add_line,
    add_points,
    add_ring,
    build_figure,
    build_label,
    build_link,
    build_rank_figure,
    choose_colours,
    list_points,
    select_evenly,
    select_points,
    set_score_axis,
)
from lorasweep.report.sweep_data import LR, RANK, SweepData, group_by_rank

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


def draw_score_by_rank(data: SweepData) -> Panel:
    """Returns each complete trial's score at its rank, with a line through the best of each rank."""
    title, colours = "Score by rank", choose_colours(data)
    lines = _group_points_by_line(data)
    ranks = {rank for points in lines.values() for rank, _, _ in points}
    if len(ranks) < 2:
        text = "No two ranks have a complete trial, so there is nothing to compare."
        return Panel(key="rank", title=title, text=text)
    figure = build_rank_figure(data, ranks)
    shown, left_out = select_points([*lines.values()], data)
    for ((name, arm), points), dots in zip(lines.items(), shown, strict=True):
        add_points(figure, dots, colours[arm], name)
        # Sorted by falling quality within a rank, so that the best score of each rank is the last one kept.
        best = {rank: score for rank, _, score in sorted(points, key=lambda p: (p[0], -data.sign * p[2]))}
        add_line(figure, [*best], [*best.values()], colours[arm], f"{name}: best", showlegend=True, line={"width": 2.5})
    cut = set_score_axis(figure, data, [score for points in lines.values() for _, _, score in points])
    return Panel(
        key="rank",
        title=title,
        text=f"Each dot is a complete trial; the line joins the best of each rank.{left_out}{cut}",
        figures=(figure, *draw_confirmed_by_rank(data)),
        notes=tuple(rank.sentence for rank in advise(data).ranks),
    )


def draw_score_by_lr(data: SweepData) -> Panel:
    """Returns score against learning rate for each arm that swept it, with its best trial."""
    title, colours = "Score against learning rate", choose_colours(data)
    arms = [arm for arm in data.arms if len({lr for lr, _, _ in list_points(arm, LR)}) > 1]
    if not arms:
        return Panel(key="lr", title=title, text="No arm has complete trials at two learning rates.")
    figure = build_figure(data, x_title="learning rate (log scale)")
    figure.update_xaxes(type="log", exponentformat="e", dtick=1, minor={"ticks": "outside"})
    complete = [list_points(arm, LR) for arm in arms]
    stopped = [list_points(arm, LR, is_stopped=True) for arm in arms]
    shown, left_out = select_points([*complete, *stopped], data)
    for arm, dots, crosses in zip(arms, shown[: len(arms)], shown[len(arms) :], strict=True):
        colour = colours[arm.name]
        add_points(figure, dots, colour, arm.name, showlegend=True)
        add_points(figure, crosses, colour, arm.name, marker={"symbol": "x-thin-open"})
        if arm.best:
            add_ring(figure, arm.best.numeric_setting(LR), arm.best.value, colour, arm.name)
    cut = set_score_axis(figure, data, [score for points in (*complete, *stopped) for _, _, score in points])
    return Panel(
        key="lr",
        title=title,
        text=(
            "Dots are complete trials, rings the best trial of each arm, crosses the best value so far of trials that "
            f"were stopped early.{left_out}{cut}"
        ),
        figures=(figure,),
        notes=tuple(rate.sentence for rate in advise(data).rates),
    )


def draw_learning_curves(data: SweepData) -> Panel:
    """Returns every trial's validation curve, by arm."""
    title, colours = "Learning curves", choose_colours(data)
    arms = [arm for arm in data.arms if any(len(trial.curve) > 1 for trial in arm.trials)]
    if not arms:
        return Panel(key="curves", title=title, text="No run has two evaluations, so there is no curve to draw.")
    others = [[t for t in arm.trials if t is not arm.best and t.curve and t.value is not None] for arm in arms]
    shown, left_out = select_evenly(others, key=lambda t: data.sign * t.value, max_items=MAX_CURVES)
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
    for arm in arms:  # after the faint curves, so that the bold ones lie above them
        if arm.best:
            add_line(
                figure,
                [step for step, _ in arm.best.curve],
                [score for _, score in arm.best.curve],
                colours[arm.name],
                arm.name,
                line={"width": 3},
                showlegend=True,
                hoverinfo=None,
                customdata=[build_link(arm.best.run)] * len(arm.best.curve),
                hovertemplate=f"step %{{x}}: %{{y:.4f}}<br>{build_label(arm.best)}<extra></extra>",
            )
    cut = set_score_axis(figure, data, [score for arm in arms for trial in arm.trials for _, score in trial.curve])
    text = (
        f"Validation score over training: the best trial of each arm bold, the others faint. Crosses are trials that "
        f"were paused or pruned.{left_out}{cut}"
    )
    return Panel(key="curves", title=title, text=text, figures=(figure,))


def draw_tradeoff(data: SweepData) -> Panel:
    """Returns score against each cost, over the complete trials of every arm that trains something."""
    title, figures, left_out = "Score against cost", [], ""
    trained = [
        [(t, t.record, t.value) for t in arm.trials if t.is_complete and t.record and t.record.trainable_params > 0]
        for arm in data.arms
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


def _group_points_by_line(data: SweepData) -> dict[tuple[str, str], list[Point]]:
    """Returns complete trials over rank. The keys are the name of a line and the arm whose colour it has.

    An arm with several ranks has a line. Arms that differ in rank alone share one, as in the advice on ranks.
    """
    lines: dict[tuple[str, str], list[Point]] = {}
    groups = {arm.name: group for group in group_by_rank(data.arms) for arm in group}
    for arm in data.arms:
        points = [point for point in list_points(arm, RANK) if (point[0] or 0) > 0]
        if len({rank for rank, _, _ in points}) > 1:
            lines[arm.name, arm.name] = points
        elif points:
            group = groups.get(arm.name, [arm])
            lines.setdefault((name_rank_group(group), group[0].name), []).extend(points)
    return lines
