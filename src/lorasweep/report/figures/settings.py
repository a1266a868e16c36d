"""A figure of the settings: a heat map over rank and α."""

from __future__ import annotations

import math

from lorasweep.report.figures.panel import (
    Panel,
    add_heat_map,
    build_figure,
    find_score_range,
    list_points,
)
from lorasweep.report.sweep_data import ALPHA, MULTIPLIER, RANK, SweepData
from lorasweep.wording import format_metric, format_score, format_setting

MAX_VALUES_PER_AXIS = 10
"""If an axis of the heat map has more values than this, they are rounded to powers of two."""


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


def _bin_values(values: set[float], name: str) -> tuple[dict[float, float], str]:
    """Returns the bin of each value, with a note if they are rounded to powers of two."""
    if len(values) <= MAX_VALUES_PER_AXIS:
        return {value: value for value in values}, ""
    return {value: 2.0 ** round(math.log2(value)) for value in values}, f" {name} are rounded to powers of two."
