"""The panel around a figure, and the layout, colours, points and lines that the figures share."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import plotly.graph_objects as go

from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.sweep_data import SweepData, TrialData
from lorasweep.wording import format_metric, format_score, format_settings

METHOD_COLOURS = {"frozen": "#868e96", "full": "#d9622b", "lora": "#3578c6"}
"""Colours that hold on light and on dark paper."""
OTHER_COLOURS = ("#159588", "#9a63c4", "#b8901f", "#c94f7c", "#5f9e3f", "#2fa3c4", "#a8714a", "#7a7fd0")
RAMPS = (("#2fb5c4", "#7d3fc8"), ("#a3ad28", "#1c7a80"))
"""The first and the last colour of the values of an arm's key, smallest value first: one pair for each such arm."""
MAX_LARGE_POINTS = 200
"""Points are drawn smaller and fainter if there are more than this, so that they don't hide each other."""
MAX_FIGURE_POINTS = 2_000
"""A figure has at most about this many points or lines: more make the page slow to open."""
MAX_BAR_SPANS = 0.5
"""An axis shows the ends of intervals up to this multiple of the range of scores beyond it. Intervals of two seeds may
be so wide that nothing else could be seen."""
DEFAULT_HEIGHT_PX = 400
PIXELS_PER_CHARACTER = 8
"""The width of a character of the names beside a figure, rounded up."""

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
    """Returns the colour of each arm, and of each value of a `confirm_each` key.

    An arm has its method's colour, or a free colour if another arm has that already. Values are shades of a ramp.
    """
    colours: dict[str, str] = {}
    free = iter(OTHER_COLOURS * (1 + len(data.searches) // len(OTHER_COLOURS)))
    for search in data.searches:
        colour = METHOD_COLOURS.get(search.row.method)
        colours[search.name] = colour if colour and colour not in colours.values() else next(free)
    split = [search.name for search in data.searches if search.row.confirm_each]
    for place, name in enumerate(split):
        subjects = [arm.name for arm in data.arms if arm.arm == name]
        colours |= zip(subjects, _spread_colours(len(subjects), RAMPS[place % len(RAMPS)]), strict=True)
    return colours


def _spread_colours(count: int, ramp: tuple[str, str]) -> list[str]:
    """Returns colours that lead from one end of a ramp to the other."""
    first, last = ([int(end[place : place + 2], 16) for place in (1, 3, 5)] for end in ramp)
    shares = [place / max(count - 1, 1) for place in range(count)]
    mixed = [[round(a + share * (b - a)) for a, b in zip(first, last, strict=True)] for share in shares]
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in mixed]


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


def list_points(
    trials: Iterable[TrialData], find_x: Callable[[TrialData], float | None], *, is_stopped: bool = False
) -> list[Point]:
    """Returns the complete trials whose x value is positive; with `is_stopped` those that were stopped early."""
    chosen = [trial for trial in trials if (trial.is_stopped_early if is_stopped else trial.is_complete)]
    return [(x, trial, trial.value) for trial in chosen if trial.value is not None and (x := find_x(trial) or 0.0) > 0]


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


def set_score_axis(figure: go.Figure, data: SweepData, scores: Sequence[float]) -> str:
    """Sets the range of scores, so that outliers don't flatten the rest, and draws the base's and full's scores.

    Returns a sentence about the scores outside the range, or an empty text.
    """
    limits = find_score_range(data, scores)
    if limits is None:
        return ""
    figure.update_yaxes(range=limits)
    scores_by_method = {method: data.best_score(method) for method in ("full", "frozen")}
    add_references(figure, {name: (name, score) for name, score in scores_by_method.items() if score is not None})
    cut = sum(not limits[0] <= score <= limits[1] for score in scores)
    return f" {cut} {'value lies' if cut == 1 else 'values lie'} outside the range shown." if cut else ""


def add_references(figure: go.Figure, references: Mapping[str, tuple[str, float]]) -> None:
    """Adds a line across the figure for each method, with its name and score at the right.

    Args:
        figure: The figure, whose range of scores is set.
        references: For each method the name and the score. One outside the range has a name with an arrow and no line.
    """
    low, high = figure.layout.yaxis.range
    highest, width = max((score for _, score in references.values()), default=0.0), 12
    for method, (name, score) in references.items():
        arrow, colour = "↑ " if score > high else "↓ " if score < low else "", METHOD_COLOURS[method]
        text = f"{arrow}{escape(name)} {format_score(score)}"
        width = max(width, PIXELS_PER_CHARACTER * len(text))
        if not arrow:
            figure.add_hline(y=score, line={"color": colour, "width": 1.2, "dash": "dot"})
        figure.add_annotation(
            x=1,
            y=min(max(score, low), high),
            xref="paper",
            xanchor="left",
            yanchor="bottom" if score == highest else "top",  # so that the names of close lines are apart
            text=text,
            font={"color": colour, "size": 12},
            showarrow=False,
        )
    figure.update_layout(margin={"r": width})


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
    return pad_range(low, high, limits=data.metric_range)


def pad_range(low: float, high: float, *, limits: tuple[float, float]) -> tuple[float, float]:
    """Returns a range with a margin at both ends, which goes up to the limits."""
    pad = 0.06 * (high - low) or 0.05 * abs(low) or 1.0
    return max(low - pad, limits[0]), min(high + pad, limits[1])


def find_bar_range(scores: Sequence[float], ends: Sequence[float], *, limits: tuple[float, float]) -> Interval:
    """Returns the range of an axis that shows all scores, and the ends of intervals that are not far from them."""
    low, high = min(scores), max(scores)
    reach = MAX_BAR_SPANS * (high - low) or math.inf
    return pad_range(max(min([low, *ends]), low - reach), min(max([high, *ends]), high + reach), limits=limits)


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


def add_mark(
    figure: go.Figure, x: Any, y: float | None, colour: str, name: str, *, symbol: str = "circle-open", text: str = ""
) -> None:
    """Adds a large open symbol around a point, with a hover text if one is given."""
    figure.add_scatter(
        x=[x],
        y=[y],
        mode="markers",
        legendgroup=escape(name),
        showlegend=False,
        marker={"color": colour, "symbol": symbol, "size": 16, "line": {"width": 2.2}},
        text=[text],
        hovertemplate="%{text}<extra></extra>" if text else None,
        hoverinfo=None if text else "skip",
        cliponaxis=False,
    )


def add_estimate(
    figure: go.Figure, x: Any, y: Any, interval: Interval | None, colour: str, name: str, *, text: str, along: str = "y"
) -> None:
    """Adds a dot with a hover text, and an interval along one axis as a bar, which need not be around the dot."""
    if interval is not None:
        bar = {"x": [x, x], "y": [y, y]} | {along: list(interval)}
        add_line(figure, bar["x"], bar["y"], colour, name, line={"width": 4}, opacity=0.6)
    figure.add_scatter(
        x=[x],
        y=[y],
        mode="markers",
        legendgroup=escape(name),
        showlegend=False,
        marker={"color": colour, "size": 11},
        text=[escape(text)],
        hovertemplate="%{text}<extra></extra>",
        cliponaxis=False,
    )
