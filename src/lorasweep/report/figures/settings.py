"""Figures of the settings together: parallel coordinates, and how much each mattered as the sweep computed it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lorasweep.report.figures.panel import (
    Panel,
    build_figure,
    colours_of,
    complete_trials,
    escape,
    score_range,
)
from lorasweep.report.runs import finite_number
from lorasweep.report.tables import Arm, SweepData, Trial
from lorasweep.report.thinning import describe_thinning, thin_groups
from lorasweep.wording import format_metric, format_setting, short_key

MIN_TRIALS = 3
"""Fewer complete trials than this say nothing as parallel coordinates."""
MAX_TICKS = 12
BEST_TO_WORST = [[0, "#d6336c"], [0.4, "#c48aa3"], [1, "#9aa5b1"]]
"""Stands out on light and on dark paper at the good end only."""


def draw_parallel_coordinates(data: SweepData) -> Panel:
    """Returns a figure per arm that swept two or more keys: a line per complete trial through settings and score."""
    title = "Settings together"
    arms = [arm for arm in data.arms if len(arm.row.space) > 1 and len(complete_trials(arm)) >= MIN_TRIALS]
    if not arms:
        text = f"No arm swept two or more settings over at least {MIN_TRIALS} complete trials."
        return Panel(key="settings", title=title, text=text)
    groups = [_in_range(arm, data) for arm in arms]
    shown = thin_groups(groups, key=lambda pair: pair[1])
    text = (
        f"One line per complete trial of {', '.join(f'`{arm.name}`' for arm in arms)}, "
        "the redder the better. Drag along an axis to keep only the lines that pass there."
        f"{describe_thinning(shown, groups, file='trials.csv')}"
    )
    figures = tuple(_parallel(arm, lines, data) for arm, lines in zip(arms, shown, strict=True))
    return Panel(key="settings", title=title, text=text, figures=figures, file="trials.csv")


def draw_importance(data: SweepData) -> Panel:
    """Returns each arm's importance of its swept settings as bars."""
    title, colours = "What mattered", colours_of(data)
    arms = [arm for arm in data.arms if len(_shares(arm)) > 1]
    if not arms:
        text = "The importance of settings is not known: it needs an arm with two swept settings and several trials."
        return Panel(key="importance", title=title, text=text)
    figure = build_figure(data, x_title="share of the score's variance", y_title=" ", barmode="group", height=280)
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    for arm in arms:
        rising = sorted(_shares(arm).items(), key=lambda item: item[1])
        figure.add_bar(
            x=[share for _, share in rising],
            y=[escape(key) for key, _ in rising],
            orientation="h",
            name=escape(arm.name),
            marker={"color": colours[arm.name]},
            texttemplate="%{x:.0%}",
            hovertemplate="%{y}: %{x:.0%}<extra></extra>",
        )
    text = "How much of the score's variance over the trials each setting explains, as Optuna estimates it."
    rows = tuple((arm.name, key, share) for arm in arms for key, share in _shares(arm).items())
    columns = ("arm", "setting", "share_of_variance")
    return Panel(key="importance", title=title, text=text, figures=(figure,), columns=columns, rows=rows)


def _in_range(arm: Arm, data: SweepData) -> list[tuple[Trial, float]]:
    complete = complete_trials(arm)
    low, high = score_range(data, [score for _, score in complete]) or (0.0, 1.0)
    return [(trial, score) for trial, score in complete if low <= score <= high]


def _parallel(arm: Arm, shown: Sequence[tuple[Trial, float]], data: SweepData) -> go.Figure:
    dimensions = [_dimension(key, arm, [trial for trial, _ in shown]) for key in arm.row.space]
    metric = {
        "label": escape(format_metric(data.record.metric)),
        "values": [score for _, score in shown],
        "tickformat": ".4~g",
    }
    figure = build_figure(data, x_title="", y_title=" ", margin={"l": 60, "r": 60, "t": 60, "b": 28})
    figure.add_parcoords(
        dimensions=[*dimensions, metric],
        labelfont={"size": 13},
        line={
            "color": [score for _, score in shown],
            "colorscale": BEST_TO_WORST,
            "reversescale": data.record.direction == "maximize",
        },
    )
    return figure


def _dimension(key: str, arm: Arm, trials: list[Trial]) -> dict[str, Any]:
    space, values = arm.row.space[key], [trial.setting(key) for trial in trials]
    label = escape(short_key(key))
    if isinstance(space, dict) and all(isinstance(value, int | float) for value in values):
        return _log_dimension(label, values) if space.get("log") else {"label": label, "values": values}
    choices = space if isinstance(space, list) else list(dict.fromkeys(map(str, values)))
    names = [format_setting(choice) for choice in choices]
    places = {name: place for place, name in enumerate(names)}
    return {
        "label": label,
        "values": [places.get(format_setting(value)) for value in values],
        "tickvals": list(range(len(names)))[:MAX_TICKS],
        "ticktext": [escape(name) for name in names][:MAX_TICKS],
        "range": [0, max(len(names) - 1, 1)],
    }


def _log_dimension(label: str, values: list[float]) -> dict[str, Any]:
    logs = [math.log10(value) for value in values if value > 0]
    low, high = min(logs, default=0.0), max(logs, default=1.0)
    ticks = [low + (high - low) * step / 4 for step in range(5)]
    return {
        "label": label,
        "values": logs,
        "tickvals": ticks,
        "ticktext": [format_setting(10**tick) for tick in ticks],
    }


def _shares(arm: Arm) -> dict[str, float]:
    known = {key: finite_number(share) for key, share in arm.row.importance.items()}
    return {key: share for key, share in known.items() if share is not None}
