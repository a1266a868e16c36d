"""The score against its cost: trainable parameters, memory and time, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from lorasweep.report.advice.advise import advise
from lorasweep.report.downsampling import describe_downsampling, downsample_groups
from lorasweep.report.figures.panel import (
    Panel,
    add_line,
    add_points,
    build_figure,
    colours_of,
    complete_trials,
    show_scores,
)
from lorasweep.report.sweep_data import SweepData, TrialData

Point = tuple[float, TrialData, float]
"""Cost, trial and score."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One kind of cost."""

    name: str
    """The field of a run's record."""
    axis: str
    is_log: bool = False
    unit: float = 1.0
    """The value in the record of one unit on the axis."""


COSTS = (
    Cost(name="trainable_params", axis="trainable parameters (log scale)", is_log=True),
    Cost(name="peak_memory_bytes", axis="peak memory (MiB)", unit=2**20),
    Cost(name="wall_s", axis="time of the run (s)"),
)


def draw_tradeoff(data: SweepData) -> Panel:
    """Returns score against each cost, over the complete trials of every arm that trains something."""
    title = "Score against cost"
    groups = [
        [(t, score) for t, score in complete_trials(arm) if t.record and t.record.trainable_params > 0]
        for arm in data.arms
    ]
    if not any(groups):
        return Panel(key="tradeoff", title=title, text="No complete trial that trains something has a readable record.")
    points = {cost: [_measure(cost, t, score) for group in groups for t, score in group] for cost in COSTS}
    fronts = {cost: {t.run for _, t, _ in pareto_front(found, sign=data.sign)} for cost, found in points.items()}
    shown = downsample_groups(groups, key=lambda pair: pair[1])
    figures = tuple(_draw(cost, found, shown, data) for cost, found in points.items())
    return Panel(
        key="tradeoff",
        title=title,
        text=(
            "Complete trials against their cost. The stepped line is the Pareto front: no trial is both cheaper and "
            "better than a point on it. Click a point to open its run's folder."
            f"{describe_downsampling(shown, groups, file='tradeoff.csv')}"
        ),
        figures=figures,
        notes=tuple(kept.sentence for kept in advise(data).kept),
        columns=(
            *("arm", "trial", data.record.metric),
            *(column for cost in COSTS for column in (cost.name, f"{cost.name}_front")),
            "run",
        ),
        rows=tuple(
            (
                *(t.arm, t.number, score),
                *(cell for cost in COSTS for cell in (getattr(t.record, cost.name), t.run in fronts[cost])),
                t.run,
            )
            for group in groups
            for t, score in group
        ),
    )


def pareto_front(points: Sequence[Point], *, sign: int) -> list[Point]:
    """Returns the points that no other beats in cost and score, by rising cost. Lower `sign * score` is better."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point[0], sign * point[2])):
        if not front or sign * point[2] < sign * front[-1][2]:
            front.append(point)
    return front


def _measure(cost: Cost, trial: TrialData, score: float) -> Point:
    return getattr(trial.record, cost.name) / cost.unit, trial, score


def _draw(
    cost: Cost, points: Sequence[Point], shown: Sequence[Sequence[tuple[TrialData, float]]], data: SweepData
) -> go.Figure:
    figure, colours = build_figure(data, x_title=cost.axis, height=340), colours_of(data)
    figure.update_xaxes(type="log" if cost.is_log else "linear", exponentformat="SI")
    front, step = pareto_front(points, sign=data.sign), {"width": 1.5, "shape": "hv"}
    x, y = [value for value, _, _ in front], [score for _, _, score in front]
    add_line(figure, x, y, "#868e96", "Pareto front", showlegend=True, line=step)
    for arm, trials in zip(data.arms, shown, strict=True):
        if trials:
            measured = [_measure(cost, trial, score) for trial, score in trials]
            add_points(figure, measured, colours[arm.name], arm.name, showlegend=True)
    show_scores(figure, data, [score for _, _, score in points])
    return figure
