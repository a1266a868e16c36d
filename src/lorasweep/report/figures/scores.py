"""Figures of the score against what was swept: by rank, rank × α, and by learning rate for each arm."""

from __future__ import annotations

import math
from collections import defaultdict

import plotly.graph_objects as go

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
from lorasweep.report.tables import Arm, SweepData, Trial
from lorasweep.wording import format_metric, format_score, format_setting

RANK, ALPHA, LR = "method.rank", "method.alpha", "optim.lr"
MAX_CELLS = 10
"""More different values than this along an axis are put together by powers of two."""

Scored = list[tuple[Trial, float]]


def draw_score_by_rank(data: SweepData) -> Panel:
    """Returns each complete trial's score at its rank, with a line through the best of each rank."""
    title, colours = "Score by rank", colours_of(data)
    groups = _rank_groups(data)
    ranks = sorted({rank for points in groups.values() for rank in _ranks(points)})
    if len(ranks) < 2:
        return Panel(
            key="rank", title=title, text="No two ranks have a complete trial, so there is nothing to compare."
        )
    figure = build_figure(data, x_title="rank (log scale)")
    figure.update_xaxes(type="log", tickvals=ranks, ticktext=[format_setting(rank) for rank in ranks])
    for (name, arm), points in groups.items():
        _add_points(figure, [(trial.number_at(RANK), trial, score) for trial, score in points], colours[arm], name)
        best = {rank: _best_at(points, rank, data) for rank in sorted(set(_ranks(points)))}
        line = {"color": colours[arm], "width": 2.5}
        figure.add_scatter(
            x=list(best),
            y=list(best.values()),
            mode="lines",
            name=escape(f"{name}: best"),
            line=line,
            hoverinfo="skip",
        )
    scores = [score for points in groups.values() for _, score in points]
    cut = show_scores(figure, data, scores)
    return Panel(
        key="rank",
        title=title,
        text=f"Each dot is a complete trial; the line joins the best of each rank.{cut}",
        figures=(figure,),
    )


def draw_rank_alpha(data: SweepData) -> Panel:
    """Returns a heat map: the best complete score at each rank and α."""
    title = "Rank × α"
    trials = [pair for arm in data.arms for pair in complete_trials(arm) if _has(pair[0], RANK, ALPHA)]
    rank_of, rank_note = _binning([trial.number_at(RANK) or 0 for trial, _ in trials], "Ranks")
    alpha_of, alpha_note = _binning([trial.number_at(ALPHA) or 0 for trial, _ in trials], "α")
    cells: dict[tuple[float, float], list[float]] = defaultdict(list)
    for trial, score in trials:
        cells[rank_of[trial.number_at(RANK) or 0], alpha_of[trial.number_at(ALPHA) or 0]].append(data.sign * score)
    ranks, alphas = sorted({rank for rank, _ in cells}), sorted({alpha for _, alpha in cells})
    if len(ranks) < 2 or len(alphas) < 2:
        return Panel(key="rank-alpha", title=title, text="Rank and α were not both swept over complete trials.")
    best = [[min(cells[r, a]) * data.sign if (r, a) in cells else None for r in ranks] for a in alphas]
    figure = build_figure(data, x_title="rank", y_title="α")
    figure.add_trace(_heat_map(data, [format_setting(r) for r in ranks], [format_setting(a) for a in alphas], best))
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    text = f"Best {format_metric(data.record.metric)} of the complete trials in each cell; empty cells were not tried."
    return Panel(key="rank-alpha", title=title, text=f"{text}{rank_note}{alpha_note}", figures=(figure,))


def draw_score_by_lr(data: SweepData) -> Panel:
    """Returns score against learning rate for each arm that swept it, its best trial marked."""
    title, colours = "Score against learning rate", colours_of(data)
    arms = [arm for arm in data.arms if len({trial.number_at(LR) for trial, _ in complete_trials(arm)}) > 1]
    if not arms:
        return Panel(key="lr", title=title, text="No arm has complete trials at two learning rates.")
    figure = build_figure(data, x_title="learning rate (log scale)")
    figure.update_xaxes(type="log", exponentformat="e", dtick=1, minor={"ticks": "outside"})
    for arm in arms:
        complete = [(trial.number_at(LR), trial, score) for trial, score in complete_trials(arm)]
        _add_points(figure, complete, colours[arm.name], arm.name, showlegend=True)
        _add_pruned(figure, arm, colours[arm.name])
        _mark_best(figure, arm, colours[arm.name])
    scores = [trial.value for arm in arms for trial in arm.trials if trial.value is not None]
    cut = show_scores(figure, data, scores)
    text = f"Dots are complete trials, rings the best of each arm, crosses pruned trials at their best so far.{cut}"
    return Panel(key="lr", title=title, text=text, figures=(figure,))


def _has(trial: Trial, *keys: str) -> bool:
    return all((trial.number_at(key) or 0) > 0 for key in keys)


def _rank_groups(data: SweepData) -> dict[tuple[str, str], Scored]:
    """Groups trials by arm, but arms of one rank each by their method, so that one line joins them."""
    groups: dict[tuple[str, str], Scored] = {}
    first: dict[str, str] = {}
    for arm in data.arms:
        points = [pair for pair in complete_trials(arm) if _has(pair[0], RANK)]
        if len(set(_ranks(points))) > 1:
            groups[arm.name, arm.name] = points
        elif points:
            name = first.setdefault(arm.row.method, arm.name)
            groups.setdefault((arm.row.method, name), []).extend(points)
    return groups


def _ranks(points: Scored) -> list[float]:
    return [trial.number_at(RANK) or 0 for trial, _ in points]


def _best_at(points: Scored, rank: float, data: SweepData) -> float:
    return data.sign * min(data.sign * score for trial, score in points if trial.number_at(RANK) == rank)


def _binning(values: list[float], name: str) -> tuple[dict[float, float], str]:
    distinct = set(values)
    if len(distinct) <= MAX_CELLS:
        return {value: value for value in distinct}, ""
    bins = {value: 2.0 ** round(math.log2(value)) for value in distinct}
    return bins, f" {name} are rounded to powers of two."


def _heat_map(data: SweepData, ranks: list[str], alphas: list[str], best: list[list[float | None]]) -> go.Heatmap:
    base = data.score_of("frozen")
    known = [score for row in best for score in row if score is not None]
    # cells no better than the base all get the palest colour
    worst = data.sign * max(data.sign * score for score in known)
    if base is not None and data.sign * base < data.sign * worst:
        worst = base
    ends = sorted((worst, data.sign * min(data.sign * score for score in known)))
    return go.Heatmap(
        x=ranks,
        y=alphas,
        z=best,
        zmin=ends[0],
        zmax=ends[1],
        text=[[format_score(score) if score is not None else "" for score in row] for row in best],
        texttemplate="%{text}",
        hovertemplate="rank %{x}, α %{y}: %{text}<extra></extra>",
        hoverongaps=False,
        xgap=3,
        ygap=3,
        colorscale=[[0, "#174a86"], [0.5, "#7db0e2"], [1, "#dce9f7"]],
        reversescale=data.record.direction == "maximize",
        colorbar={"thickness": 12, "outlinewidth": 0},
    )


def _add_points(
    figure: go.Figure,
    points: list[tuple[float | None, Trial, float]],
    colour: str,
    name: str,
    *,
    showlegend: bool = False,
) -> None:
    figure.add_scatter(
        x=[x for x, _, _ in points],
        y=[score for _, _, score in points],
        mode="markers",
        name=escape(name),
        legendgroup=escape(name),
        showlegend=showlegend,
        marker=marker_of(colour, len(points)),
        text=[label_of(trial) for _, trial, _ in points],
        customdata=[link_to(trial) for _, trial, _ in points],
        hovertemplate="%{text}<extra></extra>",
    )


def _add_pruned(figure: go.Figure, arm: Arm, colour: str) -> None:
    pruned = [trial for trial in arm.trials if trial.state == "pruned" and trial.value is not None]
    figure.add_scatter(
        x=[trial.number_at(LR) for trial in pruned],
        y=[trial.value for trial in pruned],
        mode="markers",
        legendgroup=escape(arm.name),
        showlegend=False,
        marker={"color": colour, "symbol": "x-thin-open", "size": 7, "opacity": 0.55},
        text=[label_of(trial) for trial in pruned],
        customdata=[link_to(trial) for trial in pruned],
        hovertemplate="%{text}<extra></extra>",
    )


def _mark_best(figure: go.Figure, arm: Arm, colour: str) -> None:
    if arm.best is None:
        return
    figure.add_scatter(
        x=[arm.best.number_at(LR)],
        y=[arm.best.value],
        mode="markers",
        legendgroup=escape(arm.name),
        showlegend=False,
        hoverinfo="skip",
        marker={"color": colour, "symbol": "circle-open", "size": 17, "line": {"width": 2.2}},
    )
