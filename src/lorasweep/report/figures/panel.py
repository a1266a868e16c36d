"""What the figures share: the panel around a figure, colours of arms, layout, the range of scores that is shown."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go

from lorasweep.report.tables import Arm, SweepData, Trial
from lorasweep.wording import format_metric, format_score, format_settings, visible

METHOD_COLOURS = {"frozen": "#868e96", "full": "#d9622b", "lora": "#3578c6"}
"""Colours that hold on light and on dark paper."""
OTHER_COLOURS = ("#159588", "#9a63c4", "#b8901f", "#c94f7c", "#5f9e3f", "#2fa3c4", "#a8714a", "#7a7fd0")
REFERENCES = (("frozen", "frozen base", "top right"), ("full", "full fine-tuning", "bottom left"))
"""Methods whose score is drawn as a level line: name, label, and where on the line it stands clear of curves."""
MAX_LARGE_POINTS = 200
"""Points are drawn smaller if there are more than this."""
HEIGHT = 400
"""Height of a figure in pixels."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A section of the page: a figure and what to know about it, or a sentence that says why there is none."""

    key: str
    """Anchor in the page, and name of the file with the data behind the figures."""
    title: str
    text: str
    figures: tuple[go.Figure, ...] = ()
    columns: tuple[str, ...] = ()
    """Of the data behind the figures."""
    rows: tuple[tuple[Any, ...], ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences below the figures."""
    file: str = ""
    """Where the data behind the figures is, where another file has it already."""

    @property
    def data_file(self) -> str:
        """The file beside the page that holds the data behind the figures; empty where there is none."""
        return self.file or (f"{self.key}.csv" if self.rows else "")


def colours_of(data: SweepData) -> dict[str, str]:
    """Returns each arm's colour: by its method, and for a method's second arm and other methods the next free one."""
    colours: dict[str, str] = {}
    free = iter(OTHER_COLOURS * (1 + len(data.arms) // len(OTHER_COLOURS)))
    for arm in data.arms:
        own = METHOD_COLOURS.get(arm.row.method)
        colours[arm.name] = own if own and own not in colours.values() else next(free)
    return colours


def escape(text: object) -> str:
    """Returns text that plotly shows as it is: it would obey some HTML tags in names."""
    return html.escape(visible(str(text)), quote=False)


def link_to(trial: Trial) -> str:
    """Returns the address of a trial's run folder as seen from `report/index.html`."""
    return link_of(trial.run)


def link_of(run: str) -> str:
    """Returns the address of a run's folder, given relative to the sweep's, as seen from `report/index.html`."""
    return f"../{quote(run, errors='replace')}/"


def label_of(trial: Trial) -> str:
    """Returns a point's hover text: arm and number, state if not complete, score and settings."""
    ended = "" if trial.state == "complete" else f" ({trial.state})"
    lines = [f"{trial.arm} {trial.number}{ended}", format_score(trial.value), format_settings(trial.params)]
    return "<br>".join(escape(line) for line in lines)


def build_figure(data: SweepData, *, x_title: str, y_title: str | None = None, **layout: Any) -> go.Figure:
    """Returns an empty figure in the page's style. The page's script adds what depends on light or dark."""
    figure = go.Figure()
    figure.update_layout(
        template=None,
        autosize=True,
        height=HEIGHT,
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


def show_scores(figure: go.Figure, data: SweepData, scores: list[float]) -> str:
    """Sets the y range so that outliers don't flatten the rest, marks base and full; returns what is cut off."""
    limits = score_range(data, scores)
    if limits is None:
        return ""
    figure.update_yaxes(range=limits)
    for method, label, position in REFERENCES:
        score = data.score_of(method)
        if score is not None:
            add_reference(figure, score, label=label, colour=METHOD_COLOURS[method], position=position)
    cut = sum(not limits[0] <= score <= limits[1] for score in scores)
    return f" {cut} {'value lies' if cut == 1 else 'values lie'} outside the range shown." if cut else ""


def add_reference(figure: go.Figure, score: float, *, label: str, colour: str, position: str) -> None:
    """Adds a dotted level line with its name."""
    figure.add_hline(
        y=score,
        line={"color": colour, "width": 1.2, "dash": "dot"},
        annotation={"text": label, "font": {"color": colour, "size": 12}},
        annotation_position=position,
    )


def score_range(data: SweepData, scores: list[float]) -> tuple[float, float] | None:
    """Returns the lowest and highest score to show: from the best to a quarter of the gain beyond the base model.

    Without a base model's score: to the 90 % quantile. None without scores.
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


def marker_of(colour: str, points: int) -> dict[str, Any]:
    """Returns the marker of a trial; smaller and fainter where there are many, so that they don't hide each other."""
    return (
        {"color": colour, "size": 8, "opacity": 0.75}
        if points <= MAX_LARGE_POINTS
        else {"color": colour, "size": 5, "opacity": 0.5}
    )


def complete_trials(arm: Arm) -> list[tuple[Trial, float]]:
    """Returns an arm's complete trials with their scores."""
    return [(trial, trial.value) for trial in arm.trials if trial.is_complete and trial.value is not None]


def add_points(
    figure: go.Figure,
    points: list[tuple[float | None, Trial, float]],
    colour: str,
    name: str,
    *,
    showlegend: bool = False,
) -> None:
    """Adds trials as dots that say what they are and lead to their runs.

    Args:
        figure: Where to add them.
        points: Place on the x axis, trial and score.
        colour: That of their arm.
        name: In the legend.
        showlegend: Whether the legend has them.
    """
    figure.add_scatter(
        x=[x for x, _, _ in points],
        y=[score for _, _, score in points],
        mode="markers",
        name=escape(name),
        legendgroup=escape(name),
        showlegend=showlegend,
        marker=marker_of(colour, len(points)),
        text=[label_of(trial) for _, trial, _ in points],
        customdata=[link_to(trial) for _, trial, _ in points],
        hovertemplate="%{text}<extra></extra>",
    )
