"""Figures of the score against rank, against rank and α, and against the learning rate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from lorasweep.report.advice.advise import advise
from lorasweep.report.downsampling import describe_downsampling, downsample_groups
from lorasweep.report.figures.confirmed import draw_confirmed_by_rank
from lorasweep.report.figures.panel import (
    Panel,
    ScoredTrial,
    add_heat_map,
    add_line,
    add_points,
    add_ring,
    build_figure,
    build_rank_figure,
    colours_of,
    complete_trials,
    show_scores,
)
from lorasweep.report.sweep_data import ALPHA, LR, RANK, SweepData, TrialData
from lorasweep.wording import format_metric, format_score, format_setting

MAX_CELLS = 10
"""If an axis of the heat map has more values than this, they are rounded to powers of two."""
MULTIPLIER = "method.alpha_over_rank"
"""The key of α/r in a sweep that searches it."""


def draw_score_by_rank(data: SweepData) -> Panel:
    """Returns each complete trial's score at its rank, with a line through the best of each rank."""
    title, colours = "Score by rank", colours_of(data)
    groups = _group_trials_with_rank(data)
    ranks = {trial.number_at(RANK) or 0 for trials in groups.values() for trial, _ in trials}
    if len(ranks) < 2:
        text = "No two ranks have a complete trial, so there is nothing to compare."
        return Panel(key="rank", title=title, text=text)
    figure = build_rank_figure(data, ranks)
    shown = downsample_groups([*groups.values()], key=lambda pair: pair[1])
    for ((name, arm), trials), dots in zip(groups.items(), shown, strict=True):
        add_points(figure, _at(RANK, dots), colours[arm], name)
        best: dict[float, float] = {}
        for rank, _, score in _at(RANK, trials):
            best[rank or 0] = data.sign * min(data.sign * score, data.sign * best.get(rank or 0, score))
        line = dict(sorted(best.items()))
        add_line(figure, [*line], [*line.values()], colours[arm], f"{name}: best", showlegend=True, line={"width": 2.5})
    cut = show_scores(figure, data, [score for trials in groups.values() for _, score in trials])
    left_out = describe_downsampling(shown, [*groups.values()], file="rank.csv")
    return Panel(
        key="rank",
        title=title,
        text=f"Each dot is a complete trial; the line joins the best of each rank.{left_out}{cut}",
        figures=(figure, *draw_confirmed_by_rank(data)),
        notes=tuple(rank.sentence for rank in advise(data).ranks),
        columns=("arm", "trial", RANK, data.record.metric, "run"),
        rows=tuple(
            (arm, trial.number, rank, score, trial.run)
            for (_, arm), trials in groups.items()
            for rank, trial, score in _at(RANK, trials)
        ),
    )


def draw_rank_alpha(data: SweepData) -> Panel:
    """Returns a heat map over rank and α, or over rank and α/r if that was swept: the best score in each cell.

    If all trials of a cell were stopped early, the cell shows the best of their partial scores, in grey.
    """
    title = "Rank × α"
    over_rank = any(MULTIPLIER in arm.row.space for arm in data.arms)
    name = "α/r" if over_rank else "α"
    points = [(t, t.value, *_rank_and_alpha(t, over_rank=over_rank)) for t in data.trials if t.value is not None]
    points = [point for point in points if (point[0].is_complete or point[0].is_stopped_early) and min(point[2:]) > 0]
    rank_bins, rank_note = _bin_values([rank for _, _, rank, _ in points], "Ranks")
    alpha_bins, alpha_note = _bin_values([alpha for *_, alpha in points], name)
    cells: dict[tuple[float, float], list[tuple[bool, float]]] = defaultdict(list)
    for trial, score, rank, alpha in points:
        # The minimum of a cell is then a complete trial if there is one, however good a stopped trial's score is.
        cells[rank_bins[rank], alpha_bins[alpha]].append((not trial.is_complete, data.sign * score))
    ranks, alphas = sorted({rank for rank, _ in cells}), sorted({alpha for _, alpha in cells})
    if len(ranks) < 2 or len(alphas) < 2:
        return Panel(key="rank-alpha", title=title, text="Rank and α were not both swept.")
    best = {key: min(scores) for key, scores in sorted(cells.items())}
    figure = build_figure(data, x_title="rank", y_title=name)
    x, y = [format_setting(rank) for rank in ranks], [format_setting(alpha) for alpha in alphas]
    for stopped in (False, True):
        found = {key: data.sign * score for key, (is_stopped, score) in best.items() if is_stopped == stopped}
        if not found:
            continue
        grid = [[found.get((rank, alpha)) for rank in ranks] for alpha in alphas]
        text = [["" if score is None else format_score(score) for score in row] for row in grid]
        hover = f"rank %{{x}}, {name} %{{y}}: %{{text}}{', stopped early' if stopped else ''}<extra></extra>"
        shared = {"text": text, "texttemplate": "%{text}", "hovertemplate": hover}
        if stopped:
            grey = [[0, "#e9ecef"], [1, "#e9ecef"]]
            flat = [[None if score is None else 0.0 for score in row] for row in grid]
            add_heat_map(figure, x, y, flat, **shared, colorscale=grey, showscale=False)
        else:
            low, high = _colour_range(list(found.values()), data)
            reverse, bar = data.record.direction == "maximize", {"thickness": 12, "outlinewidth": 0}
            add_heat_map(figure, x, y, grid, **shared, zmin=low, zmax=high, reversescale=reverse, colorbar=bar)
    return Panel(
        key="rank-alpha",
        title=title,
        text=(
            f"Best {format_metric(data.record.metric)} in each cell. In grey cells all trials were stopped early, so "
            f"their scores are of fewer steps; empty cells were not tried.{rank_note}{alpha_note}"
        ),
        figures=(figure,),
        columns=(RANK, MULTIPLIER if over_rank else ALPHA, data.record.metric, "complete"),
        rows=tuple((rank, alpha, data.sign * score, not stopped) for (rank, alpha), (stopped, score) in best.items()),
    )


def draw_score_by_lr(data: SweepData) -> Panel:
    """Returns score against learning rate for each arm that swept it, with its best trial and the range as good."""
    title, colours = "Score against learning rate", colours_of(data)
    arms = [arm for arm in data.arms if len({trial.number_at(LR) for trial, _ in complete_trials(arm)}) > 1]
    if not arms:
        return Panel(key="lr", title=title, text="No arm has complete trials at two learning rates.")
    figure, advice = build_figure(data, x_title="learning rate (log scale)"), advise(data)
    figure.update_xaxes(type="log", exponentformat="e", dtick=1, minor={"ticks": "outside"})
    stopped = [[(t, t.value) for t in arm.trials if t.is_stopped_early and t.value is not None] for arm in arms]
    groups = [*map(complete_trials, arms), *stopped]
    shown = downsample_groups(groups, key=lambda pair: pair[1])
    for arm, dots, crosses in zip(arms, shown[: len(arms)], shown[len(arms) :], strict=True):
        colour = colours[arm.name]
        add_points(figure, _at(LR, dots), colour, arm.name, showlegend=True)
        add_points(figure, _at(LR, crosses), colour, arm.name, symbol="x-thin-open")
        if arm.best:
            add_ring(figure, arm.best.number_at(LR), arm.best.value, colour, arm.name)
            for rate in (rate for rate in advice.rates if rate.arm == arm.name):
                level = [arm.best.value, arm.best.value]
                add_line(figure, [rate.low, rate.high], level, colour, arm.name, line={"width": 9}, opacity=0.25)
    cut = show_scores(figure, data, [t.value for arm in arms for t in arm.trials if t.value is not None])
    return Panel(
        key="lr",
        title=title,
        text=(
            "Dots are complete trials, rings the best of each arm, crosses the best value so far of trials that were "
            "stopped early. The pale bar spans the learning rates that are as good as the best."
            f"{describe_downsampling(shown, groups, file='lr.csv')}{cut}"
        ),
        figures=(figure,),
        notes=(*(rate.sentence for rate in advice.rates), *(trend.sentence for trend in advice.trends)),
        columns=("arm", "trial", "state", LR, data.record.metric, "run"),
        rows=tuple((t.arm, t.number, t.state, t.number_at(LR), t.value, t.run) for arm in arms for t in arm.trials),
    )


def _at(key: str, trials: Sequence[ScoredTrial]) -> list[tuple[float | None, TrialData, float]]:
    """Returns the points of trials over a setting."""
    return [(trial.number_at(key), trial, score) for trial, score in trials]


def _group_trials_with_rank(data: SweepData) -> dict[tuple[str, str], list[ScoredTrial]]:
    """Returns complete trials by the name of their line and the arm that gives its colour.

    An arm with several ranks has a line of its own. Arms of one rank each share a line per method.
    """
    groups: dict[tuple[str, str], list[ScoredTrial]] = {}
    first: dict[str, str] = {}
    for arm in data.arms:
        trials = [(trial, score) for trial, score in complete_trials(arm) if (trial.number_at(RANK) or 0) > 0]
        if len({trial.number_at(RANK) for trial, _ in trials}) > 1:
            groups[arm.name, arm.name] = trials
        elif trials:
            name = first.setdefault(arm.row.method, arm.name)
            groups.setdefault((arm.row.method, name), []).extend(trials)
    return groups


def _rank_and_alpha(trial: TrialData, *, over_rank: bool) -> tuple[float, float]:
    """Returns a trial's rank and its α or α/r; 0 if it has none."""
    rank, alpha = trial.number_at(RANK) or 0, trial.number_at(ALPHA) or 0
    # α was computed from the swept α/r, so that the division has to be rounded back to it.
    return rank, float(f"{alpha / rank:.6g}") if over_rank and rank > 0 else alpha


def _bin_values(values: Sequence[float], name: str) -> tuple[dict[float, float], str]:
    """Returns the bin of each value, with a note if they are rounded to powers of two."""
    distinct = set(values)
    if len(distinct) <= MAX_CELLS:
        return {value: value for value in distinct}, ""
    return {value: 2.0 ** round(math.log2(value)) for value in distinct}, f" {name} are rounded to powers of two."


def _colour_range(scores: Sequence[float], data: SweepData) -> tuple[float, float]:
    """Returns the ends of the colour scale. Scores no better than the frozen base's all get the palest colour."""
    base = data.score_of("frozen")
    signed = [data.sign * score for score in scores]
    worst = min(max(signed), data.sign * base) if base is not None else max(signed)
    low, high = sorted((data.sign * worst, data.sign * min(signed)))
    return low, high
