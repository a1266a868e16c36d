"""The figure of score against learning rate: every arm's trials, its best and how flat that is, the fitted curve."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from lorasweep.report.advice import advise
from lorasweep.report.advice.noise import LR
from lorasweep.report.advice.rates import Parabola, RateAdvice, fit_arm
from lorasweep.report.figures.panel import (
    Panel,
    add_points,
    build_figure,
    colours_of,
    complete_trials,
    escape,
    label_of,
    link_to,
    show_scores,
)
from lorasweep.report.tables import Arm, SweepData, Trial
from lorasweep.report.thinning import describe_thinning, thin_groups

CURVE_POINTS = 40


def draw_score_by_lr(data: SweepData) -> Panel:
    """Returns score against learning rate for each arm that swept it, its best trial marked."""
    title, colours = "Score against learning rate", colours_of(data)
    arms = [arm for arm in data.arms if len({trial.number_at(LR) for trial, _ in complete_trials(arm)}) > 1]
    if not arms:
        return Panel(key="lr", title=title, text="No arm has complete trials at two learning rates.")
    figure = build_figure(data, x_title="learning rate (log scale)")
    figure.update_xaxes(type="log", exponentformat="e", dtick=1, minor={"ticks": "outside"})
    groups = [*map(complete_trials, arms), *map(_stopped_trials, arms)]
    shown = thin_groups(groups, key=lambda pair: pair[1])
    for arm, complete, stopped in zip(arms, shown[: len(arms)], shown[len(arms) :], strict=True):
        points = [(trial.number_at(LR), trial, score) for trial, score in complete]
        add_points(figure, points, colours[arm.name], arm.name, showlegend=True)
        _add_stopped(figure, [trial for trial, _ in stopped], arm.name, colours[arm.name])
        _mark_best(figure, arm, colours[arm.name])
        _add_fit(figure, fit_arm(arm, data), arm.name, colours[arm.name], sign=data.sign)
    advice = advise(data)
    for rate in advice.rates:
        _add_flat(figure, rate, data, colours[rate.arm])
    scores = [trial.value for arm in arms for trial in arm.trials if trial.value is not None]
    cut = show_scores(figure, data, scores)
    return Panel(
        key="lr",
        title=title,
        text=(
            "Dots are complete trials, rings the best of each arm, crosses the best value so far of trials that were "
            "stopped early. The pale bar spans the learning rates that are as good as the best; a dashed line is a "
            "parabola through the better trials of an arm that searched nothing else."
            f"{describe_thinning(shown, groups, file='lr.csv')}{cut}"
        ),
        figures=(figure,),
        notes=advice.rate_sentences,
        columns=("arm", "trial", "state", LR, data.record.metric, "run"),
        rows=tuple((t.arm, t.number, t.state, t.number_at(LR), t.value, t.run) for arm in arms for t in arm.trials),
    )


def _stopped_trials(arm: Arm) -> list[tuple[Trial, float]]:
    return [(trial, trial.value) for trial in arm.trials if trial.is_stopped_early and trial.value is not None]


def _add_stopped(figure: go.Figure, stopped: list[Trial], arm: str, colour: str) -> None:
    figure.add_scatter(
        x=[trial.number_at(LR) for trial in stopped],
        y=[trial.value for trial in stopped],
        mode="markers",
        legendgroup=escape(arm),
        showlegend=False,
        marker={"color": colour, "symbol": "x-thin-open", "size": 7, "opacity": 0.55},
        text=[label_of(trial) for trial in stopped],
        customdata=[link_to(trial) for trial in stopped],
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


def _add_fit(figure: go.Figure, fit: Parabola | None, name: str, colour: str, *, sign: int) -> None:
    if fit is None:
        return
    lrs = np.geomspace(fit.low, fit.high, CURVE_POINTS)
    scores = sign * (fit.curvature * np.log10(lrs / fit.lr) ** 2 + fit.lowest)
    figure.add_scatter(
        x=lrs.tolist(),
        y=scores.tolist(),
        mode="lines",
        legendgroup=escape(name),
        showlegend=False,
        hoverinfo="skip",
        line={"color": colour, "width": 1.5, "dash": "dash"},
    )


def _add_flat(figure: go.Figure, rate: RateAdvice, data: SweepData, colour: str) -> None:
    best = next((arm.best.value for arm in data.arms if arm.name == rate.arm and arm.best), None)
    figure.add_scatter(
        x=[rate.low, rate.high],
        y=[best, best],
        mode="lines",
        legendgroup=escape(rate.arm),
        showlegend=False,
        hoverinfo="skip",
        line={"color": colour, "width": 9},
        opacity=0.25,
    )
