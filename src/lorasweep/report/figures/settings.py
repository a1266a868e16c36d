"""Figures of the settings: parallel coordinates, and the importance of each setting that Optuna estimated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lorasweep.report.downsampling import describe_downsampling, downsample_groups
from lorasweep.report.figures.panel import (
    Panel,
    ScoredTrial,
    add_bars,
    build_figure,
    colours_of,
    complete_trials,
    escape,
    score_range,
)
from lorasweep.report.sweep_data import ArmData, SweepData, finite_number
from lorasweep.wording import format_metric, format_setting, short_key

MIN_TRIALS = 3
"""Parallel coordinates of fewer complete trials than this show nothing."""
MAX_TICKS = 12
BEST_TO_WORST = [[0, "#d6336c"], [0.4, "#c48aa3"], [1, "#9aa5b1"]]
"""A colour scale that stands out on light and on dark paper at the good end only."""


def draw_parallel_coordinates(data: SweepData) -> Panel:
    """Returns a figure per arm that swept two or more keys: a line per complete trial through settings and score."""
    title = "Settings together"
    arms = [arm for arm in data.arms if len(arm.row.space) > 1 and len(complete_trials(arm)) >= MIN_TRIALS]
    if not arms:
        text = f"No arm swept two or more settings over at least {MIN_TRIALS} complete trials."
        return Panel(key="settings", title=title, text=text)
    groups = []
    for arm in arms:
        complete = complete_trials(arm)
        low, high = score_range(data, [score for _, score in complete]) or (0.0, 1.0)
        groups.append([(trial, score) for trial, score in complete if low <= score <= high])
    shown = downsample_groups(groups, key=lambda pair: pair[1])
    return Panel(
        key="settings",
        title=title,
        text=(
            f"One line per complete trial of {', '.join(f'`{arm.name}`' for arm in arms)}, "
            "the redder the better. Drag along an axis to keep only the lines that pass there."
            f"{describe_downsampling(shown, groups, file='trials.csv')}"
        ),
        figures=tuple(_draw_lines(arm, trials, data) for arm, trials in zip(arms, shown, strict=True)),
        file="trials.csv",
    )


def draw_importance(data: SweepData) -> Panel:
    """Returns each arm's importance of its swept settings as bars."""
    title, colours = "Importance of settings", colours_of(data)
    shares = {
        arm.name: {key: share for key, share in arm.row.importance.items() if finite_number(share) is not None}
        for arm in data.arms
    }
    shares = {name: found for name, found in shares.items() if len(found) > 1}
    if not shares:
        text = "The importance of settings is not known: it needs an arm with two swept settings and several trials."
        return Panel(key="importance", title=title, text=text)
    figure = build_figure(data, x_title="share of the score's variance", y_title=" ", barmode="group", height=280)
    for name, found in shares.items():
        rising = sorted(found.items(), key=lambda item: item[1])
        add_bars(figure, rising, colours[name], name, texttemplate="%{x:.0%}")
    return Panel(
        key="importance",
        title=title,
        text="The share of the score's variance over the trials that each setting explains, as Optuna estimates it.",
        figures=(figure,),
        columns=("arm", "setting", "share_of_variance"),
        rows=tuple((name, key, share) for name, found in shares.items() for key, share in found.items()),
    )


def _draw_lines(arm: ArmData, trials: Sequence[ScoredTrial], data: SweepData) -> go.Figure:
    scores = [score for _, score in trials]
    settings = [_build_axis(key, space, [t.setting(key) for t, _ in trials]) for key, space in arm.row.space.items()]
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
