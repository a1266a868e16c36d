"""What a score costs: score against trainable parameters, memory and time, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from lorasweep.report.advice import advise
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
from lorasweep.report.thinning import describe_thinning, thin_groups

Point = tuple[float, float, Trial]
"""Cost, score and trial."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Something that a score costs."""

    name: str
    """Field of a run's record."""
    axis: str
    is_log: bool
    unit: float = 1.0
    """What one unit on the axis is in the record's."""


COSTS = (
    Cost(name="trainable_params", axis="trainable parameters (log scale)", is_log=True),
    Cost(name="peak_memory_bytes", axis="peak memory (MiB)", is_log=False, unit=2**20),
    Cost(name="wall_s", axis="time of the run (s)", is_log=False),
)


def draw_tradeoff(data: SweepData) -> Panel:
    """Returns score against each cost, over the complete trials of every arm that trains something."""
    title = "What a score costs"
    trials = [pair for arm in data.arms for pair in complete_trials(arm)]
    usable = [(t, score) for t, score in trials if t.record and t.record.trainable_params > 0]
    if not usable:
        return Panel(key="tradeoff", title=title, text="No complete trial that trains something has a readable record.")
    groups = [[pair for pair in usable if pair[0].arm == arm.name] for arm in data.arms]
    shown = thin_groups(groups, key=lambda pair: pair[1])
    drawn = {trial.run for group in shown for trial, _ in group}
    points = {cost.name: [(getattr(t.record, cost.name), score, t) for t, score in usable] for cost in COSTS}
    text = (
        "Complete trials against what they cost. The stepped line is the Pareto front: "
        "no trial is both cheaper and better than a point on it. Click a point to open its run's folder."
        f"{describe_thinning(shown, groups, file='tradeoff.csv')}"
    )
    return Panel(
        key="tradeoff",
        title=title,
        text=text,
        figures=tuple(_draw(data, points[cost.name], cost, drawn) for cost in COSTS),
        notes=advise(data).kept_sentences,
        columns=(
            "arm",
            "trial",
            data.record.metric,
            *(f"{c.name}{end}" for c in COSTS for end in ("", "_front")),
            "run",
        ),
        rows=_rows(points, sign=data.sign),
    )


def pareto_front(points: Sequence[Point], *, sign: int) -> list[Point]:
    """Returns the points that no other beats in cost and score, by rising cost. Lower `sign * score` is better."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * point[1] < sign * front[-1][1]:
            front.append(point)
    return front


def _rows(points: dict[str, list[Point]], *, sign: int) -> tuple[tuple[Any, ...], ...]:
    """Returns each trial with its costs, and per cost whether it is on the front."""
    fronts = {name: {point[2].run for point in pareto_front(found, sign=sign)} for name, found in points.items()}
    return tuple(
        (
            trial.arm,
            trial.number,
            score,
            *(cell for name, found in points.items() for cell in (found[index][0], trial.run in fronts[name])),
            trial.run,
        )
        for index, (_, score, trial) in enumerate(points[COSTS[0].name])
    )


def _draw(data: SweepData, measured: Sequence[Point], cost: Cost, drawn: set[str]) -> go.Figure:
    figure, colours = build_figure(data, x_title=cost.axis, height=340), colours_of(data)
    figure.update_xaxes(type="log" if cost.is_log else "linear", exponentformat="SI")
    points = [(value / cost.unit, score, trial) for value, score, trial in measured]
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
        mine = [point for point in points if point[2].arm == arm.name and point[2].run in drawn]
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
