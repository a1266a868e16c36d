"""The panel around a figure, and the layout, colours, axes and points that the figures share."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from lorasweep.record import Trial
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.sweep_data import SweepData
from lorasweep.wording import format_score, format_settings

METHOD_COLOURS = {"frozen": "#868e96", "full": "#d9622b", "lora": "#3578c6"}
"""Colours that are readable on a light and on a dark page."""
OTHER_COLOURS = ("#159588", "#9a63c4", "#b8901f", "#c94f7c", "#5f9e3f", "#2fa3c4", "#a8714a", "#7a7fd0")
RAMPS = (("#2fb5c4", "#7d3fc8"), ("#a3ad28", "#1c7a80"))
"""The first and the last colour of the values of an arm's key, smallest value first: one pair for each such arm."""
MAX_DISTANCE = 3
"""An outlier is inside an axis if its distance is at most this multiple of the range of all other scores."""
REFERENCE_WIDTH_PX = 128
"""The room beside a figure for the name of a method with its score."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A section of the page: figures with a text, or a sentence that says why there is no figure."""

    key: str
    """The anchor in the page."""
    title: str
    text: str
    figures: tuple[go.Figure, ...] = ()


def choose_colours(data: SweepData) -> dict[str, str]:
    """Returns the colour of each arm, and of each value of a `confirm_each` key.

    An arm has its method's colour, or a free colour if another arm has that already. Values are shades of a ramp.
    """
    colours: dict[str, str] = {}
    free, ramps = itertools.cycle(OTHER_COLOURS), itertools.cycle(RAMPS)
    for row in data.record.arms:
        colour = METHOD_COLOURS.get(row.method)
        colours[row.name] = colour if colour and colour not in colours.values() else next(free)
        if row.key:
            places = [place / max(len(row.subjects) - 1, 1) for place in range(len(row.subjects))]
            shades = sample_colorscale(list(next(ramps)), places)
            colours |= {subject.name: shade for subject, shade in zip(row.subjects, shades, strict=True)}
    return colours


def escape(text: object) -> str:
    """Returns text for plotly, which would interpret some HTML tags in names."""
    return html.escape(str(text), quote=False)


def build_link(run: str) -> str:
    """Returns the link from the page to a run's folder, which is given relative to the sweep's."""
    return f"../{quote(run)}/"


def build_figure(x_title: str, y_title: str) -> go.Figure:
    """Returns an empty figure in the page's style. The page's script adds the colours of the light or dark page."""
    axis = {"automargin": True, "zeroline": False}
    layout = {
        "template": None,
        "autosize": True,
        "height": 400,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"title": escape(x_title), "ticks": "outside", **axis},
        "yaxis": {"title": escape(y_title), **axis},
    }
    return go.Figure(layout=layout)


def set_score_axis(
    figure: go.Figure, scores: Sequence[float], others: Iterable[float] = (), **references: float | None
) -> None:
    """Sets the range of scores, and draws a line across the figure for each method with a known score.

    The range has all of `scores`, and those of `others` and of the methods that are near, so that outliers don't
    flatten the rest. The title of the x axis says how many of `others` are outside.
    """
    if not scores:
        return
    low, high = min(scores), max(scores)
    reach = MAX_DISTANCE * (high - low) or math.inf
    known = {name: score for name, score in references.items() if score is not None}
    known = {name: score for name, score in known.items() if low - reach <= score <= high + reach}
    near = [score for score in others if low - reach <= score <= high + reach]
    low, high = min([low, *near, *known.values()]), max([high, *near, *known.values()])
    pad = 0.06 * (high - low) or 0.05 * abs(low) or 1.0
    figure.update_yaxes(range=(low - pad, high + pad))
    figure.update_layout(margin={"r": REFERENCE_WIDTH_PX if known else 12})
    if num_outside := sum(not low - pad <= score <= high + pad for score in others):
        figure.layout.xaxis.title.text += f"<br>{num_outside} outside the range"
    for method, score in known.items():
        colour, is_highest = METHOD_COLOURS[method], score == max(known.values())
        side = "bottom" if is_highest else "top"  # so that names of close lines are apart
        name = {"text": f"{method} {format_score(score)}", "font": {"color": colour, "size": 12}}
        place = {"x": 1, "xanchor": "left", "yanchor": side}
        figure.add_hline(y=score, line={"color": colour, "width": 1.2, "dash": "dot"}, annotation=name | place)


def add_point(
    figure: go.Figure, x: Any, y: float | None, colour: str, name: str, *, text: str = "", **trace: Any
) -> None:
    """Adds a point with a hover text. `trace` may have `marker`, `showlegend`, and an `interval` of y for a bar."""
    interval: Interval | None = trace.pop("interval", None)
    if interval and y is not None:
        ends = {"array": [interval[1] - y], "arrayminus": [y - interval[0]]}
        trace["error_y"] = {"type": "data", "symmetric": False, "thickness": 4, "width": 0, **ends}
    _add_markers(figure, colour, name, x=[x], y=[y], text=[text], **trace)


def add_trials(
    figure: go.Figure, points: Sequence[tuple[Any, Trial, float | None]], colour: str, name: str, **trace: Any
) -> None:
    """Adds runs as points (x, run, score), with their settings as hover text and links to their folders."""
    trace["marker"] = {"opacity": 0.75} | trace.get("marker", {})
    _add_markers(
        figure,
        colour,
        name,
        x=[x for x, _, _ in points],
        y=[score for _, _, score in points],
        text=[
            describe_point(
                f"{trial.name}{'' if trial.state == 'complete' else f' ({trial.state})'}", score, trial.params
            )
            for _, trial, score in points
        ],
        customdata=[build_link(trial.run) for _, trial, _ in points],
        **trace,
    )


def _name_run(trial: Trial) -> str:
    return trial.name if trial.state == "complete" else f"{trial.name} ({trial.state})"


def describe_point(name: str, score: float | None, params: dict[str, Any]) -> str:
    """Returns a point's hover text: arm and number, state if not complete, score and settings."""
    lines = [name, format_score(score), format_settings(params)]
    return "<br>".join(escape(line) for line in lines)


def _add_markers(figure: go.Figure, colour: str, name: str, **trace: Any) -> None:
    given = {"mode": "markers", "showlegend": False, "hovertemplate": "%{text}<extra></extra>"} | trace
    given["marker"] = {"color": colour, "size": 8} | trace.get("marker", {})
    # a click on the legend entry hides all traces of its group; a point at the end of the axis is drawn whole
    figure.add_scatter(name=escape(name), legendgroup=escape(name), cliponaxis=False, **given)
