"""The panel around a figure, and the layout, colours, points and lines that the figures share."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import plotly.graph_objects as go

from lorasweep.report.sweep_data import ArmData, SweepData, TrialData, find_metric_range
from lorasweep.wording import format_metric, format_score, format_setting, format_settings

METHOD_COLOURS = {"frozen": "#868e96", "full": "#d9622b", "lora": "#3578c6"}
"""Colours that hold on light and on dark paper."""
OTHER_COLOURS = ("#159588", "#9a63c4", "#b8901f", "#c94f7c", "#5f9e3f", "#2fa3c4", "#a8714a", "#7a7fd0")
REFERENCES = (("frozen", "frozen base", "top right"), ("full", "full fine-tuning", "bottom left"))
"""Methods whose score is drawn as a horizontal line: method, label, and where the label is clear of curves."""
MAX_LARGE_POINTS = 200
"""Points are drawn smaller and fainter if there are more than this, so that they don't hide each other."""
MAX_FIGURE_POINTS = 2_000
"""A figure has at most about this many points or lines: more make the page slow to open."""
DEFAULT_HEIGHT_PX = 400

T = TypeVar("T")
Point = tuple[Any, TrialData, float]
"""x value, trial and score."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A section of the page: figures with a text and notes, or a sentence that says why there is no figure."""

    key: str
    """The anchor in the page."""
    title: str
    text: str
    figures: tuple[go.Figure, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences below the figures."""


def choose_colours(data: SweepData) -> dict[str, str]:
    """Returns the colour of each arm: its method's colour, or a free colour if another arm has that already."""
    colours: dict[str, str] = {}
    free = iter(OTHER_COLOURS * (1 + len(data.arms) // len(OTHER_COLOURS)))
    for arm in data.arms:
        colour = METHOD_COLOURS.get(arm.row.method)
        colours[arm.name] = colour if colour and colour not in colours.values() else next(free)
    return colours


def escape(text: object) -> str:
    """Returns text for plotly, which would interpret some HTML tags in names."""
    return html.escape(str(text), quote=False)


def build_link(run: str) -> str:
    """Returns the link from the page to a run's folder, which is given relative to the sweep's."""
    return f"../{quote(run)}/"


def build_label(trial: TrialData) -> str:
    """Returns a point's hover text: arm and number, state if not complete, score and settings."""
    state = "" if trial.state == "complete" else f" ({trial.state})"
    lines = [f"{trial.name}{state}", format_score(trial.value), format_settings(trial.params)]
    return "<br>".join(escape(line) for line in lines)


def list_points(arm: ArmData, key: str, *, is_stopped: bool = False) -> list[Point]:
    """Returns an arm's complete trials with their value of a setting; with `is_stopped` those stopped early."""
    trials = [trial for trial in arm.trials if (trial.is_stopped_early if is_stopped else trial.is_complete)]
    return [(trial.numeric_setting(key), trial, trial.value) for trial in trials if trial.value is not None]


def select_evenly(groups: Sequence[Sequence[T]], *, key: Any, max_items: int) -> tuple[list[Sequence[T]], str]:
    """Returns groups with at most about `max_items` items in all, and a sentence if items are skipped.

    A large group is sorted by `key` and keeps every n-th item, the first among them. Groups have equal shares.
    """
    total, shown = sum(map(len, groups)), list(groups)
    if total <= max_items:
        return shown, ""
    for index, group in enumerate(groups):
        step = math.ceil(len(group) * len(groups) / max_items)
        shown[index] = sorted(group, key=key)[::step] if step > 1 else group
    drawn = sum(map(len, shown))
    return shown, f" {drawn:,} of {total:,} are drawn, evenly over their scores, the best among them."


def select_points(groups: Sequence[Sequence[Point]], data: SweepData) -> tuple[list[Sequence[Point]], str]:
    return select_evenly(groups, key=lambda point: data.sign * point[2], max_items=MAX_FIGURE_POINTS)


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


def build_rank_figure(data: SweepData, ranks: Iterable[float], *, y_title: str | None = None) -> go.Figure:
    """Returns an empty figure over rank, with a tick at each rank."""
    figure, ticks = build_figure(data, x_title="rank (log scale)", y_title=y_title), sorted(set(ranks))
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[format_setting(rank) for rank in ticks])
    return figure


def set_score_axis(figure: go.Figure, data: SweepData, scores: Sequence[float]) -> str:
    """Sets the range of scores, so that outliers don't flatten the rest, and draws the base's and full's scores.

    Returns a sentence about the scores outside the range, or an empty text.
    """
    limits = find_score_range(data, scores)
    if limits is None:
        return ""
    figure.update_yaxes(range=limits)
    for method, label, position in REFERENCES:
        score, colour = data.best_score(method), METHOD_COLOURS[method]
        if score is not None:
            figure.add_hline(
                y=score,
                line={"color": colour, "width": 1.2, "dash": "dot"},
                annotation={"text": label, "font": {"color": colour, "size": 12}},
                annotation_position=position,
            )
    cut = sum(not limits[0] <= score <= limits[1] for score in scores)
    return f" {cut} {'value lies' if cut == 1 else 'values lie'} outside the range shown." if cut else ""


def find_score_range(data: SweepData, scores: Sequence[float]) -> tuple[float, float] | None:
    """Returns the lowest and the highest score to show; None without scores.

    The range starts at the best score, or at the score of full fine-tuning if it is better. It ends at the worst score
    or at the frozen base's score, whichever is worse, but at most a quarter of the gain beyond the frozen base's score.
    Without a frozen base, or if no score is better than the base's, it ends at the 90 % quantile (at the worst score if
    there are fewer than 10). A margin is added at both ends, up to where the metric ends.
    """
    if not scores:
        return None
    signed = sorted(data.sign * score for score in scores)
    base, full = data.best_score("frozen"), data.best_score("full")
    best = min(signed[0], data.sign * full if full is not None else signed[0])
    worst = signed[-1]
    if base is not None and data.sign * base > best:
        worst = min(max(worst, data.sign * base), best + 1.25 * (data.sign * base - best))
    elif len(signed) >= 10:
        worst = min(worst, signed[int(0.9 * (len(signed) - 1))])
    low, high = sorted((data.sign * best, data.sign * worst))
    return pad_range(low, high, limits=find_metric_range(data.record))


def pad_range(low: float, high: float, *, limits: tuple[float, float]) -> tuple[float, float]:
    """Returns a range with a margin at both ends, which goes up to the limits."""
    pad = 0.06 * (high - low) or 0.05 * abs(low) or 1.0
    return max(low - pad, limits[0]), min(high + pad, limits[1])


def add_points(figure: go.Figure, points: Sequence[Point], colour: str, name: str, **trace: Any) -> None:
    """Adds trials as points with a hover text and a link to their runs. `trace` replaces settings of plotly's trace.

    A click on the legend entry `name` hides and shows them.
    """
    is_large = len(points) <= MAX_LARGE_POINTS
    marker = {"color": colour, "size": 8 if is_large else 5, "opacity": 0.75 if is_large else 0.5}
    settings = {
        "x": [x for x, _, _ in points],
        "y": [score for _, _, score in points],
        "mode": "markers",
        "showlegend": False,
        "marker": marker | trace.pop("marker", {}),
        "text": [build_label(trial) for _, trial, _ in points],
        "customdata": [build_link(trial.run) for _, trial, _ in points],
        "hovertemplate": "%{text}<extra></extra>",
        "cliponaxis": False,  # a point at the end of the axis is drawn whole
    }
    figure.add_scatter(name=escape(name), legendgroup=escape(name), **(settings | trace))


def add_line(
    figure: go.Figure, x: Sequence[Any], y: Sequence[float | None], colour: str, name: str, **trace: Any
) -> None:
    """Adds a line without hover text and legend entry, unless `trace` says otherwise; a y of None interrupts it."""
    line = {"color": colour, "width": 2} | trace.pop("line", {})
    settings = {"mode": "lines", "showlegend": False, "hoverinfo": "skip"} | trace
    figure.add_scatter(x=list(x), y=list(y), line=line, name=escape(name), legendgroup=escape(name), **settings)


def add_bars(figure: go.Figure, shares: Sequence[tuple[str, float]], colour: str, name: str) -> None:
    """Adds horizontal bars of named shares."""
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.add_bar(
        x=[share for _, share in shares],
        y=[escape(key) for key, _ in shares],
        orientation="h",
        name=escape(name),
        marker={"color": colour},
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
    )


def add_ring(figure: go.Figure, x: Any, y: float | None, colour: str, name: str) -> None:
    """Adds a ring around a point."""
    figure.add_scatter(
        x=[x],
        y=[y],
        mode="markers",
        legendgroup=escape(name),
        showlegend=False,
        marker={"color": colour, "symbol": "circle-open", "size": 16, "line": {"width": 2.2}},
        hoverinfo="skip",
    )


def add_heat_map(
    figure: go.Figure, x: Sequence[str], y: Sequence[str], z: Sequence[Sequence[Any]], **trace: Any
) -> None:
    """Adds a heat map over two axes of categories, darker for lower values."""
    colours = [[0, "#174a86"], [0.5, "#7db0e2"], [1, "#dce9f7"]]
    bar = {"thickness": 12, "outlinewidth": 0} | trace.pop("colorbar", {})
    figure.add_heatmap(x=x, y=y, z=z, hoverongaps=False, xgap=3, ygap=3, colorscale=colours, colorbar=bar, **trace)
    figure.update_xaxes(type="category", showgrid=False, categoryorder="array", categoryarray=x)
    figure.update_yaxes(type="category", showgrid=False, categoryorder="array", categoryarray=y)
