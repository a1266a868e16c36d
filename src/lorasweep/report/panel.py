"""The panel around a figure, and the layout, colours, points and lines that the figures share."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from lorasweep.config.data import METRIC_RANGES
from lorasweep.record import Trial
from lorasweep.report.evidence.estimates import UNBOUNDED
from lorasweep.report.sweep_data import SubjectData, SweepData
from lorasweep.wording import format_metric, format_score, format_settings

METHOD_COLOURS = {"frozen": "#868e96", "full": "#d9622b", "lora": "#3578c6"}
"""Colours that are readable on a light and on a dark page."""
OTHER_COLOURS = ("#159588", "#9a63c4", "#b8901f", "#c94f7c", "#5f9e3f", "#2fa3c4", "#a8714a", "#7a7fd0")
RAMPS = (("#2fb5c4", "#7d3fc8"), ("#a3ad28", "#1c7a80"))
"""The first and the last colour of the values of an arm's key, smallest value first: one pair for each such arm."""
MAX_SHOWN_TRIALS = 300
"""Figures and table show at most about this many trials: more make the page large and slow to open."""
MAX_DISTANCE = 3
"""An outlier is inside an axis if its distance is at most this multiple of the range of all other scores."""
DEFAULT_HEIGHT_PX = 400
REFERENCE_WIDTH_PX = 128
"""The room beside a figure for the name of a method with its score."""

PlotPoint = tuple[Any, Trial, float]
"""x value, trial and score."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A section of the page: figures with a text, or a sentence that says why there is no figure."""

    key: str
    """The anchor in the page."""
    title: str
    text: str
    figures: tuple[go.Figure, ...] = ()


def select_trials(data: SweepData) -> SweepData:
    """Returns the sweep with at most about `MAX_SHOWN_TRIALS` trials.

    Each subject keeps every n-th trial in the order of scores, its best trial among them.
    """
    step = math.ceil(len(data.trials) / MAX_SHOWN_TRIALS)
    if step <= 1:
        return data

    def order(trial: Trial) -> tuple[bool, float]:
        return not trial.is_complete, math.inf if trial.value is None else data.sign * trial.value

    kept = {trial.run for arm in data.subjects for trial in sorted(arm.trials, key=order)[::step]}

    def thin(arm: SubjectData) -> SubjectData:
        return replace(arm, trials=tuple(trial for trial in arm.trials if trial.run in kept))

    return replace(data, subjects=tuple(map(thin, data.subjects)))


def choose_colours(data: SweepData) -> dict[str, str]:
    """Returns the colour of each arm, and of each value of a `confirm_each` key.

    An arm has its method's colour, or a free colour if another arm has that already. Values are shades of a ramp.
    """
    colours: dict[str, str] = {}
    free, ramps = itertools.cycle(OTHER_COLOURS), itertools.cycle(RAMPS)
    for search in data.record.arms:
        colour = METHOD_COLOURS.get(search.method)
        colours[search.name] = colour if colour and colour not in colours.values() else next(free)
    for search in data.record.arms:
        if search.key:
            subjects = [arm.name for arm in data.subjects if arm.arm == search.name]
            places = [place / max(len(subjects) - 1, 1) for place in range(len(subjects))]
            colours |= zip(subjects, sample_colorscale(list(next(ramps)), places), strict=True)
    return colours


def escape(text: object) -> str:
    """Returns text for plotly, which would interpret some HTML tags in names."""
    return html.escape(str(text), quote=False)


def build_link(run: str) -> str:
    """Returns the link from the page to a run's folder, which is given relative to the sweep's."""
    return f"../{quote(run)}/"


def build_label(trial: Trial) -> str:
    """Returns a point's hover text: arm and number, state if not complete, score and settings."""
    state = "" if trial.state == "complete" else f" ({trial.state})"
    lines = [f"{trial.name}{state}", format_score(trial.value), format_settings(trial.params)]
    return "<br>".join(escape(line) for line in lines)


def build_figure(data: SweepData, *, x_title: str, y_title: str | None = None, **layout: Any) -> go.Figure:
    """Returns an empty figure in the page's style; its y axis has the sweep's metric unless `y_title` is given.

    The page's script adds the colours of the light or dark page.
    """
    figure = go.Figure()
    figure.update_layout(
        template=None,
        autosize=True,
        height=DEFAULT_HEIGHT_PX,
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    figure.update_xaxes(title=escape(x_title), automargin=True, zeroline=False, ticks="outside")
    figure.update_yaxes(title=escape(y_title or format_metric(data.record.metric)), automargin=True, zeroline=False)
    figure.update_layout(**layout)
    return figure


def set_score_axis(
    figure: go.Figure,
    metric: str,
    scores: Sequence[float],
    others: Iterable[float] = (),
    **references: float | None,
) -> None:
    """Sets the range of scores, and draws a line across the figure for each method with a known score.

    The range has all of `scores`, and those of `others` and of the methods that are near, so that outliers don't
    flatten the rest. It ends at the limits of the metric. The title of the x axis says how many of `others` are
    outside, and a method outside has a name with an arrow and no line.
    """
    if not scores:
        return
    known = {name: score for name, score in references.items() if score is not None}
    low, high = min(scores), max(scores)
    reach = MAX_DISTANCE * (high - low) or math.inf
    near = [score for score in (*others, *known.values()) if low - reach <= score <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    pad = 0.06 * (high - low) or 0.05 * abs(low) or 1.0
    lowest, highest = METRIC_RANGES.get(metric, UNBOUNDED)
    low, high = max(low - pad, lowest), min(high + pad, highest)
    figure.update_yaxes(range=(low, high))
    figure.update_layout(margin={"r": REFERENCE_WIDTH_PX if known else 12})
    if num_outside := sum(not low <= score <= high for score in others):
        figure.layout.xaxis.title.text += f"<br>{num_outside} outside the range"
    for method, score in known.items():
        arrow, colour = "↑ " if score > high else "↓ " if score < low else "", METHOD_COLOURS[method]
        if not arrow:
            figure.add_hline(y=score, line={"color": colour, "width": 1.2, "dash": "dot"})
        figure.add_annotation(
            x=1,
            y=min(max(score, low), high),
            xref="paper",
            xanchor="left",
            yanchor="bottom" if score == max(known.values()) else "top",  # so that the names of close lines are apart
            text=f"{arrow}{method} {format_score(score)}",
            font={"color": colour, "size": 12},
            showarrow=False,
        )


def add_line(
    figure: go.Figure, x: Sequence[Any], y: Sequence[float | None], colour: str, name: str, **trace: Any
) -> None:
    """Adds a line without hover text and legend entry, unless `trace` says otherwise; a y of None interrupts it."""
    line = {"color": colour, "width": 2} | trace.pop("line", {})
    settings = {"mode": "lines", "showlegend": False, "hoverinfo": "skip"} | trace
    figure.add_scatter(x=list(x), y=list(y), line=line, name=escape(name), legendgroup=escape(name), **settings)


def add_markers(
    figure: go.Figure,
    x: Sequence[Any],
    y: Sequence[Any],
    colour: str,
    name: str,
    *,
    text: Sequence[str] = (),
    links: Sequence[str] = (),
    **marker: Any,
) -> None:
    """Adds points with hover texts, and links that a click opens; a click on the legend entry `name` hides them.

    `marker` has settings of plotly's marker, and `showlegend`.
    """
    figure.add_scatter(
        x=list(x),
        y=list(y),
        mode="markers",
        name=escape(name),
        legendgroup=escape(name),
        showlegend=marker.pop("showlegend", False),
        marker={"color": colour, "size": 8, **marker},
        text=list(text) or None,
        customdata=list(links) or None,
        hovertemplate="%{text}<extra></extra>" if text else None,
        hoverinfo=None if text else "skip",
        cliponaxis=False,  # a point at the end of the axis is drawn whole
    )


def add_trials(figure: go.Figure, points: Iterable[PlotPoint], colour: str, name: str, **marker: Any) -> None:
    """Adds trials as points with their settings as hover text and links to their runs."""
    found = list(points)
    add_markers(
        figure,
        [x for x, _, _ in found],
        [score for _, _, score in found],
        colour,
        name,
        text=[build_label(trial) for _, trial, _ in found],
        links=[build_link(trial.run) for _, trial, _ in found],
        opacity=0.75,
        **marker,
    )
