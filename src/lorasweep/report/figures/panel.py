"""The panel around a figure, and the layout, colours, points and lines that the figures share."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go

from lorasweep.report.sweep_data import ArmData, SweepData, TrialData
from lorasweep.wording import format_metric, format_score, format_setting, format_settings

METHOD_COLOURS = {"frozen": "#868e96", "full": "#d9622b", "lora": "#3578c6"}
"""Colours that hold on light and on dark paper."""
OTHER_COLOURS = ("#159588", "#9a63c4", "#b8901f", "#c94f7c", "#5f9e3f", "#2fa3c4", "#a8714a", "#7a7fd0")
REFERENCES = (("frozen", "frozen base", "top right"), ("full", "full fine-tuning", "bottom left"))
"""Methods whose score is drawn as a level line: method, label, and a place for the label that is clear of curves."""
MAX_LARGE_POINTS = 200
"""Points are drawn smaller and fainter if there are more than this, so that they don't hide each other."""
DEFAULT_HEIGHT_PX = 400

ScoredTrial = tuple[TrialData, float]
"""A trial and its score."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A section of the page: figures with a text and notes, or a sentence that says why there is no figure."""

    key: str
    """The anchor in the page, and the name of the CSV file with the data behind the figures."""
    title: str
    text: str
    figures: tuple[go.Figure, ...] = ()
    columns: tuple[str, ...] = ()
    """The columns of the data behind the figures."""
    rows: tuple[tuple[Any, ...], ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences below the figures."""
    file: str = ""
    """The file with the data behind the figures, if another file holds it already."""

    @property
    def data_file(self) -> str:
        """The file beside the page with the data behind the figures; empty if there is none."""
        return self.file or (f"{self.key}.csv" if self.rows else "")


def colours_of(data: SweepData) -> dict[str, str]:
    """Returns each arm's colour: that of its method, or the next free one if it is taken or the method has none."""
    colours: dict[str, str] = {}
    free = iter(OTHER_COLOURS * (1 + len(data.arms) // len(OTHER_COLOURS)))
    for arm in data.arms:
        own = METHOD_COLOURS.get(arm.row.method)
        colours[arm.name] = own if own and own not in colours.values() else next(free)
    return colours


def escape(text: object) -> str:
    """Returns text for plotly, which would interpret some HTML tags in names."""
    return html.escape(str(text), quote=False)


def link_of(run: str) -> str:
    """Returns the link from the page to a run's folder, which is given relative to the sweep's."""
    return f"../{quote(run)}/"


def label_of(trial: TrialData) -> str:
    """Returns a point's hover text: arm and number, state if not complete, score and settings."""
    state = "" if trial.state == "complete" else f" ({trial.state})"
    lines = [f"{trial.arm} {trial.number}{state}", format_score(trial.value), format_settings(trial.params)]
    return "<br>".join(escape(line) for line in lines)


def complete_trials(arm: ArmData) -> list[ScoredTrial]:
    """Returns an arm's complete trials with their scores."""
    return [(trial, trial.value) for trial in arm.trials if trial.is_complete and trial.value is not None]


def build_figure(data: SweepData, *, x_title: str, y_title: str | None = None, **layout: Any) -> go.Figure:
    """Returns an empty figure in the page's style. The page's script adds the colours of the light or dark page.

    Args:
        data: The sweep.
        x_title: The title of the x axis.
        y_title: The title of the y axis. Default: the sweep's metric.
        **layout: Plotly's layout settings.
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


def show_scores(figure: go.Figure, data: SweepData, scores: Sequence[float]) -> str:
    """Sets the range of scores, so that outliers don't flatten the rest, and draws the base's and full's scores.

    Returns a sentence about the scores outside the range, or an empty text.
    """
    limits = score_range(data, scores)
    if limits is None:
        return ""
    figure.update_yaxes(range=limits)
    for method, label, position in REFERENCES:
        score, colour = data.score_of(method), METHOD_COLOURS[method]
        if score is not None:
            figure.add_hline(
                y=score,
                line={"color": colour, "width": 1.2, "dash": "dot"},
                annotation={"text": label, "font": {"color": colour, "size": 12}},
                annotation_position=position,
            )
    cut = sum(not limits[0] <= score <= limits[1] for score in scores)
    return f" {cut} {'value lies' if cut == 1 else 'values lie'} outside the range shown." if cut else ""


def score_range(data: SweepData, scores: Sequence[float]) -> tuple[float, float] | None:
    """Returns the lowest and the highest score to show; None without scores.

    The range goes from the best score to the frozen base's and a quarter of the gain beyond it. Without a frozen base
    it goes to the 90 % quantile.
    """
    if not scores:
        return None
    signed = sorted(data.sign * score for score in scores)
    base, full = data.score_of("frozen"), data.score_of("full")
    best = min(signed[0], data.sign * full if full is not None else signed[0])
    worst = signed[-1]
    if base is not None and data.sign * base > best:
        worst = min(max(worst, data.sign * base), best + 1.25 * (data.sign * base - best))
    elif len(signed) >= 10:
        worst = min(worst, signed[int(0.9 * (len(signed) - 1))])
    pad = 0.06 * (worst - best) or 0.05 * abs(best) or 1.0
    ends = sorted((data.sign * (best - pad), data.sign * (worst + pad)))
    return ends[0], ends[1]


def add_points(
    figure: go.Figure,
    points: Sequence[tuple[float | None, TrialData, float]],
    colour: str,
    name: str,
    *,
    showlegend: bool = False,
    symbol: str = "circle",
) -> None:
    """Adds trials as points with a hover text and a link to their runs.

    Args:
        figure: The figure to add them to.
        points: The x value, trial and score of each point.
        colour: The colour of their arm.
        name: The name in the legend.
        showlegend: Whether the legend has them.
        symbol: Plotly's marker symbol.
    """
    is_large = len(points) <= MAX_LARGE_POINTS
    figure.add_scatter(
        x=[x for x, _, _ in points],
        y=[score for _, _, score in points],
        mode="markers",
        name=escape(name),
        legendgroup=escape(name),
        showlegend=showlegend,
        marker={
            "color": colour,
            "symbol": symbol,
            "size": 8 if is_large else 5,
            "opacity": 0.75 if is_large else 0.5,
        },
        text=[label_of(trial) for _, trial, _ in points],
        customdata=[link_of(trial.run) for _, trial, _ in points],
        hovertemplate="%{text}<extra></extra>",
    )


def add_line(
    figure: go.Figure, x: Sequence[Any], y: Sequence[float | None], colour: str, name: str, **trace: Any
) -> None:
    """Adds a line without hover text, which the legend does not show.

    Args:
        figure: The figure to add it to.
        x: The x values.
        y: The y values; None interrupts the line.
        colour: The colour of the arm.
        name: The legend entry with which the line is hidden and shown.
        **trace: Plotly's settings of a scatter trace, which replace these.
    """
    line = {"color": colour, "width": 2} | trace.pop("line", {})
    settings = {"mode": "lines", "showlegend": False, "hoverinfo": "skip"} | trace
    figure.add_scatter(x=list(x), y=list(y), line=line, name=escape(name), legendgroup=escape(name), **settings)


def add_bars(figure: go.Figure, shares: Sequence[tuple[str, float]], colour: str, name: str, **trace: Any) -> None:
    """Adds horizontal bars of named shares."""
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.add_bar(
        x=[share for _, share in shares],
        y=[escape(key) for key, _ in shares],
        orientation="h",
        name=escape(name),
        marker={"color": colour},
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        **trace,
    )


def add_ring(figure: go.Figure, x: Any, y: float | None, colour: str, name: str, **trace: Any) -> None:
    """Adds a ring around a point."""
    figure.add_scatter(
        x=[x],
        y=[y],
        mode="markers",
        legendgroup=escape(name),
        showlegend=False,
        marker={"color": colour, "symbol": "circle-open", "size": 16, "line": {"width": 2.2}},
        **({"hoverinfo": "skip"} | trace),
    )


def add_heat_map(
    figure: go.Figure, x: Sequence[str], y: Sequence[str], z: Sequence[Sequence[Any]], **trace: Any
) -> None:
    """Adds a heat map over two axes of categories, darker for lower values."""
    colours = {"colorscale": [[0, "#174a86"], [0.5, "#7db0e2"], [1, "#dce9f7"]]}
    figure.add_heatmap(x=list(x), y=list(y), z=z, hoverongaps=False, xgap=3, ygap=3, **(colours | trace))
    figure.update_xaxes(type="category", showgrid=False, categoryorder="array", categoryarray=list(x))
    figure.update_yaxes(type="category", showgrid=False, categoryorder="array", categoryarray=list(y))
