"""Figures of the score against rank, and against rank and α together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import plotly.graph_objects as go

from lorasweep.report.advice import advise
from lorasweep.report.advice.noise import ALPHA, RANK
from lorasweep.report.figures.confirmed import draw_confirmed_by_rank
from lorasweep.report.figures.panel import (
    Panel,
    add_points,
    build_figure,
    colours_of,
    complete_trials,
    escape,
    show_scores,
)
from lorasweep.report.tables import SweepData, Trial
from lorasweep.report.thinning import describe_thinning, thin_groups
from lorasweep.wording import format_metric, format_score, format_setting

MAX_CELLS = 10
"""More different values than this along an axis are put together by powers of two."""

MULTIPLIER = "method.alpha_over_rank"
"""The key of α/r where a sweep searches that."""

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
    shown = thin_groups([*groups.values()], key=lambda pair: pair[1])
    for ((name, arm), points), dots in zip(groups.items(), shown, strict=True):
        add_points(figure, _at_rank(dots), colours[arm], name)
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
    rows = [
        (arm, t.number, rank, score, t.run)
        for (_, arm), points in groups.items()
        for rank, t, score in _at_rank(points)
    ]
    return Panel(
        key="rank",
        title=title,
        text=f"Each dot is a complete trial; the line joins the best of each rank."
        f"{describe_thinning(shown, [*groups.values()], file='rank.csv')}{cut}",
        figures=(figure, *draw_confirmed_by_rank(data)),
        notes=advise(data).rank_sentences,
        columns=("arm", "trial", RANK, data.record.metric, "run"),
        rows=tuple(rows),
    )


def draw_rank_alpha(data: SweepData) -> Panel:
    """Returns a heat map over rank and α, or α/r where that was swept: the best score in each cell.

    A cell in which every trial was stopped early shows the best of their partial scores, without colour.
    """
    title = "Rank × α"
    over_rank = any(MULTIPLIER in arm.row.space for arm in data.arms)
    name = "α/r" if over_rank else "α"
    trials = [(trial, trial.value) for arm in data.arms for trial in arm.trials if _is_scored(trial)]
    points = [(trial, score, _strength(trial, over_rank=over_rank)) for trial, score in trials if score is not None]
    rank_of, rank_note = _binning([trial.number_at(RANK) or 0 for trial, *_ in points], "Ranks")
    alpha_of, alpha_note = _binning([strength for *_, strength in points], name)
    cells: dict[tuple[float, float], list[tuple[bool, float]]] = defaultdict(list)
    for trial, score, strength in points:  # a complete trial comes before every one that was stopped
        key = rank_of[trial.number_at(RANK) or 0], alpha_of[strength]
        cells[key].append((not trial.is_complete, data.sign * score))
    ranks, alphas = sorted({rank for rank, _ in cells}), sorted({alpha for _, alpha in cells})
    if len(ranks) < 2 or len(alphas) < 2:
        return Panel(key="rank-alpha", title=title, text="Rank and α were not both swept.")
    best = {key: min(scores) for key, scores in cells.items()}

    def grid(*, stopped: bool) -> list[list[float | None]]:
        found = {key: data.sign * score for key, (is_stopped, score) in best.items() if is_stopped == stopped}
        return [[found.get((r, a)) for r in ranks] for a in alphas]

    names = [format_setting(r) for r in ranks], [format_setting(a) for a in alphas]
    figure = build_figure(data, x_title="rank", y_title=name)
    if any(score is not None for row in grid(stopped=False) for score in row):
        figure.add_trace(_heat_map(data, *names, grid(stopped=False), y_name=name))
    if any(score is not None for row in grid(stopped=True) for score in row):
        figure.add_trace(_stopped_map(*names, grid(stopped=True), y_name=name))
    figure.update_xaxes(type="category", showgrid=False, categoryorder="array", categoryarray=names[0])
    figure.update_yaxes(type="category", showgrid=False, categoryorder="array", categoryarray=names[1])
    text = (
        f"Best {format_metric(data.record.metric)} in each cell. In grey cells all trials were stopped early, so their "
        "scores are of fewer steps; empty cells were not tried."
    )
    return Panel(
        key="rank-alpha",
        title=title,
        text=f"{text}{rank_note}{alpha_note}",
        figures=(figure,),
        columns=(RANK, MULTIPLIER if over_rank else ALPHA, data.record.metric, "complete"),
        rows=tuple((r, a, data.sign * score, not is_stopped) for (r, a), (is_stopped, score) in sorted(best.items())),
    )


def _is_scored(trial: Trial) -> bool:
    return _has(trial, RANK, ALPHA) and trial.value is not None and (trial.is_complete or trial.is_stopped_early)


def _strength(trial: Trial, *, over_rank: bool) -> float:
    """α, or α/r, rounded to what was swept: α was worked out from it."""
    alpha, rank = trial.number_at(ALPHA) or 0, trial.number_at(RANK) or 1
    return float(f"{alpha / rank:.6g}") if over_rank else alpha


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


def _at_rank(points: Sequence[tuple[Trial, float]]) -> list[tuple[float | None, Trial, float]]:
    return [(trial.number_at(RANK), trial, score) for trial, score in points]


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


def _stopped_map(ranks: list[str], alphas: list[str], best: list[list[float | None]], *, y_name: str) -> go.Heatmap:
    """Cells whose trials were all stopped early: their scores as text on grey."""
    return go.Heatmap(
        x=ranks,
        y=alphas,
        z=[[None if score is None else 0.0 for score in row] for row in best],
        text=[[format_score(score) if score is not None else "" for score in row] for row in best],
        texttemplate="%{text}",
        hovertemplate=f"rank %{{x}}, {y_name} %{{y}}: %{{text}}, stopped early<extra></extra>",
        hoverongaps=False,
        xgap=3,
        ygap=3,
        colorscale=[[0, "#e9ecef"], [1, "#e9ecef"]],
        showscale=False,
    )


def _heat_map(
    data: SweepData, ranks: list[str], alphas: list[str], best: list[list[float | None]], *, y_name: str
) -> go.Heatmap:
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
        hovertemplate=f"rank %{{x}}, {y_name} %{{y}}: %{{text}}<extra></extra>",
        hoverongaps=False,
        xgap=3,
        ygap=3,
        colorscale=[[0, "#174a86"], [0.5, "#7db0e2"], [1, "#dce9f7"]],
        reversescale=data.record.direction == "maximize",
        colorbar={"thickness": 12, "outlinewidth": 0},
    )
