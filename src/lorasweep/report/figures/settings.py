"""Figures of the settings: a heat map over rank and α, parallel coordinates, and the importance of each setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lorasweep.record import MIN_IMPORTANCE_TRIALS
from lorasweep.report.figures.panel import (
    Panel,
    Point,
    add_bars,
    add_heat_map,
    build_figure,
    choose_colours,
    escape,
    find_score_range,
    list_points,
    select_points,
)
from lorasweep.report.sweep_data import ALPHA, MULTIPLIER, RANK, ArmData, SweepData
from lorasweep.wording import format_metric, format_score, format_setting, short_key

MAX_VALUES_PER_AXIS = 10
"""If an axis of the heat map has more values than this, they are rounded to powers of two."""
MIN_TRIALS = 3
"""Parallel coordinates of fewer complete trials than this show nothing."""
MAX_TICKS = 12
BEST_TO_WORST = [[0, "#d6336c"], [0.4, "#c48aa3"], [1, "#9aa5b1"]]
"""A colour scale that stands out on light and on dark paper at the good end only."""


def draw_rank_alpha(data: SweepData) -> Panel:
    """Returns a heat map over rank and α, or over rank and α/r if that was swept: the best score in each cell."""
    title, is_over_rank = "Rank × α", any(MULTIPLIER in arm.row.space for arm in data.arms)
    name = "α/r" if is_over_rank else "α"
    points = []
    for arm in data.arms:
        for rank, trial, score in list_points(arm, RANK):
            alpha = trial.numeric_setting(ALPHA)
            if rank and alpha and min(rank, alpha) > 0:
                # α was computed from the swept α/r, so that the division has to be rounded back to it.
                points.append((rank, float(f"{alpha / rank:.6g}") if is_over_rank else alpha, score))
    rank_bins, rank_note = _bin_values({rank for rank, _, _ in points}, "Ranks")
    alpha_bins, alpha_note = _bin_values({alpha for _, alpha, _ in points}, name)
    # The worst score comes first. The dict keeps the last score of each cell, which is the best.
    points.sort(key=lambda point: -data.sign * point[2])
    best = {(rank_bins[rank], alpha_bins[alpha]): score for rank, alpha, score in points}
    ranks, alphas = sorted({rank for rank, _ in best}), sorted({alpha for _, alpha in best})
    if len(ranks) < 2 or len(alphas) < 2:
        return Panel(key="rank-alpha", title=title, text="Rank and α were not both swept.")
    figure = build_figure(data, x_title="rank", y_title=name)
    low, high = find_score_range(data, [*best.values()]) or (None, None)
    grid = [[best.get((rank, alpha)) for rank in ranks] for alpha in alphas]
    add_heat_map(
        figure,
        [format_setting(rank) for rank in ranks],
        [format_setting(alpha) for alpha in alphas],
        grid,
        text=[["" if score is None else format_score(score) for score in row] for row in grid],
        texttemplate="%{text}",
        hovertemplate=f"rank %{{x}}, {name} %{{y}}: %{{text}}<extra></extra>",
        zmin=low,
        zmax=high,
        reversescale=data.record.direction == "maximize",
    )
    return Panel(
        key="rank-alpha",
        title=title,
        text=(
            f"Best {format_metric(data.record.metric)} of the complete trials in each cell; empty cells have none."
            f"{rank_note}{alpha_note}"
        ),
        figures=(figure,),
    )


def draw_parallel_coordinates(data: SweepData) -> Panel:
    """Returns a figure per arm that swept two or more keys: a line per complete trial through settings and score.

    Trials whose score is outside `find_score_range` are left out.
    """
    title, groups = "Settings together", {}
    for arm in (arm for arm in data.arms if len(arm.row.space) > 1):
        # The x value of a point is not drawn here, so that any key would do.
        low, high = find_score_range(data, [score for _, _, score in list_points(arm, RANK)]) or (0.0, 1.0)
        groups[arm.name] = [point for point in list_points(arm, RANK) if low <= point[2] <= high]
    arms = [arm for arm in data.arms if len(groups.get(arm.name, ())) >= MIN_TRIALS]
    if not arms:
        text = f"No arm swept two or more settings over at least {MIN_TRIALS} complete trials with usual scores."
        return Panel(key="settings", title=title, text=text)
    shown, left_out = select_points([groups[arm.name] for arm in arms], data)
    return Panel(
        key="settings",
        title=title,
        text=(
            f"A line is a complete trial of {', '.join(f'`{arm.name}`' for arm in arms)}, "
            f"the redder the better. Trials with far worse scores are not drawn. Drag along an axis to keep only the "
            f"lines that pass there.{left_out}"
        ),
        figures=tuple(_draw_lines(arm, points, data) for arm, points in zip(arms, shown, strict=True)),
    )


def draw_importance(data: SweepData) -> Panel:
    """Returns the importance of each arm's swept settings as bars."""
    title, colours = "Importance of settings", choose_colours(data)
    arms = [arm for arm in data.arms if len(arm.row.importance) > 1]
    if not arms:
        text = (
            "The importance of settings is not shown: it needs an arm with two swept settings and "
            f"{MIN_IMPORTANCE_TRIALS} complete trials."
        )
        return Panel(key="importance", title=title, text=text)
    figure = build_figure(data, x_title="share of the score's variance", y_title=" ", barmode="group", height=280)
    for arm in arms:
        add_bars(figure, sorted(arm.row.importance.items(), key=lambda item: item[1]), colours[arm.name], arm.name)
    text = "The share of the score's variance over the trials that each setting explains, as Optuna estimates it."
    return Panel(key="importance", title=title, text=text, figures=(figure,))


def _bin_values(values: set[float], name: str) -> tuple[dict[float, float], str]:
    """Returns the bin of each value, with a note if they are rounded to powers of two."""
    if len(values) <= MAX_VALUES_PER_AXIS:
        return {value: value for value in values}, ""
    return {value: 2.0 ** round(math.log2(value)) for value in values}, f" {name} are rounded to powers of two."


def _draw_lines(arm: ArmData, points: Sequence[Point], data: SweepData) -> go.Figure:
    scores = [score for _, _, score in points]
    settings = [_build_axis(key, space, [t.setting(key) for _, t, _ in points]) for key, space in arm.row.space.items()]
    figure = build_figure(data, x_title="", y_title=" ", margin={"l": 60, "r": 60, "t": 60, "b": 28})
    figure.add_parcoords(
        dimensions=[
            *settings,
            {"label": escape(format_metric(data.record.metric)), "values": scores, "tickformat": ".4~g"},
        ],
        labelfont={"size": 13},
        line={
            "color": scores,
            "colorscale": BEST_TO_WORST,
            "reversescale": data.record.direction == "maximize",
        },
    )
    return figure


def _build_axis(key: str, space: Any, values: list[Any]) -> dict[str, Any]:
    """Returns plotly's axis for a swept key: a range of numbers, in logarithms if it is searched so, or choices."""
    label = escape(short_key(key))
    if isinstance(space, dict) and all(isinstance(value, int | float) for value in values):
        if not space.get("log"):
            return {"label": label, "values": values}
        logs = [math.log10(value) for value in values if value > 0]
        low, high = min(logs, default=0.0), max(logs, default=1.0)
        ticks = [low + (high - low) * step / 4 for step in range(5)]
        names = [format_setting(10**tick) for tick in ticks]
        return {"label": label, "values": logs, "tickvals": ticks, "ticktext": names}
    choices = space if isinstance(space, list) else list(dict.fromkeys(map(str, values)))
    names = [format_setting(choice) for choice in choices]
    positions = {name: position for position, name in enumerate(names)}
    return {
        "label": label,
        "values": [positions.get(format_setting(value)) for value in values],
        "tickvals": list(range(len(names)))[:MAX_TICKS],
        "ticktext": [escape(name) for name in names][:MAX_TICKS],
        "range": [0, max(len(names) - 1, 1)],
    }
