"""The page's figures (plotly): test scores by value, and score against rate.

`draw_panels` returns all of them as `Panel`s.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from lorasweep.config.run import ALPHA, LR
from lorasweep.record import Trial
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.recommend import choose_subject
from lorasweep.report.sweep_data import SubjectResult, SweepData
from lorasweep.report.text import format_means
from lorasweep.wording import format_metric, format_score, format_settings, short_key

METHOD_COLOURS = {"frozen": "#868e96", "full": "#d9622b", "lora": "#3578c6"}
"""Colours that are readable on a light and on a dark page."""
OTHER_COLOURS = ("#159588", "#9a63c4", "#b8901f", "#c94f7c", "#5f9e3f", "#2fa3c4", "#a8714a", "#7a7fd0")
RAMPS = (("#2fb5c4", "#7d3fc8"), ("#a3ad28", "#1c7a80"))
"""The first and the last colour of an arm with `confirm_each`, for its smallest and its largest value."""
MAX_DISTANCE = 3
"""The axis includes an outlier if its distance from the other scores is at most this multiple of their range."""
REFERENCE_WIDTH_PX = 128
"""Width of the space at the right of a figure, for the name of a method with its score."""
MAX_OTHER_ARMS = 6
"""Maximum number of arms without `confirm_each` that are shown beside the values of an arm."""
LARGE = {"size": 16, "line": {"width": 2}}
"""The style of a mark around a point."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A section of the page: figures with a text, or a sentence that says why there is no figure."""

    key: str
    """The anchor in the page."""
    title: str
    text: str
    figures: tuple[go.Figure, ...] = ()


def draw_panels(data: SweepData) -> list[Panel]:
    """Returns all panels, in the order of the page."""
    return [draw_scores_by_value(data), draw_score_by_lr(data)]


def draw_scores_by_value(data: SweepData) -> Panel:
    """Returns a panel: for each arm with `confirm_each` means with intervals, the band of full, the frozen base.

    If no arm has `confirm_each`, one figure shows all arms.
    """
    evidence = data.evidence
    shown = [one for one in data.subjects if not one.row.is_base and evidence.mean(one.name)]
    by_arm = {row.name: [one for one in shown if one.row is row] for row in data.record.arms if row.key}
    groups = [values for values in by_arm.values() if values]
    others = [one for one in shown if one.subject.key is None and one.name != evidence.scale.full]
    keys = dict.fromkeys(short_key(values[0].subject.key or "") for values in groups)
    title = f"Test score by {' and by '.join(keys)}" if keys else "Test score by arm"
    if not shown:
        text = "Nothing was confirmed: every score is one seed on validation data. `confirm.seeds=[3,6,10]` adds seeds."
        return Panel(key="confirmed", title=title, text=text)
    beside = others if len(others) <= MAX_OTHER_ARMS else []
    figures = [_draw_scores(values, beside, data) for values in groups]
    # if full fine-tuning is alone, it is a point and not only a band
    figures = figures or [_draw_scores([], others or shown, data)]
    dots, full = "Dots are means over seeds on test data, rings single seeds.", f"`{evidence.scale.full}`"
    band = "" if evidence.margin is None else f" The band is the margin around {full}."
    # intervals of differences, because an interval of a mean also has the error that all subjects share (the choice of
    # test examples), which is larger than most differences
    bars = (
        f"Bars are the {100 * evidence.confidence:.3g} % intervals of the difference from {full} on the same seeds and "
        f"examples, added to the mean of {full}.{band} Verdicts also count the chance in the search and the error of "
        "the gain, so their intervals are wider."
    )
    bars = bars if evidence.scale.full else "Bars are the 95 % intervals of the means."
    text = f"{dots} {bars} A diamond marks the smallest value that is enough."
    return Panel(key="confirmed", title=title, text=text, figures=tuple(figures))


def _draw_scores(values: Sequence[SubjectResult], others: Sequence[SubjectResult], data: SweepData) -> go.Figure:
    """Returns the figure of the values of one arm's `confirm_each` key, and of arms without one."""
    evidence, colours = data.evidence, choose_colours(data)
    figure = build_figure(" ", f"{format_metric(data.shown_metric.name)}, test data")
    figure.update_xaxes(type="category", showgrid=False)
    means = [(one, found) for one in (*values, *others) if (found := evidence.mean(one.name))]
    rows = [(one, found, _find_interval(one.name, data)) for one, found in means]
    full, base = evidence.mean(evidence.scale.full), evidence.mean(evidence.scale.base)
    band = [full.value - evidence.margin, full.value + evidence.margin] if full and evidence.margin is not None else []
    if band:
        figure.add_hrect(y0=band[0], y1=band[1], fillcolor=METHOD_COLOURS["full"], opacity=0.15, line_width=0)
    scores = [score for _, found, _ in rows for score in (found.value, *found.values)]
    ends = [end for *_, interval in rows for end in interval or ()]
    levels = {"full": full.value if full else None, "frozen": base.value if base else None}
    set_score_axis(figure, [*scores, *band, *ends], [], **levels)
    is_asked = bool(values) and bool(evidence.find_answer("smallest", values[0].arm).rows)
    enough = choose_subject(data, values[0].arm) if is_asked else None
    shown = format_means({name: (mean.value, mean.find_interval()) for name, mean in evidence.means.items()})
    for one, found, interval in rows:
        colour, place = colours[one.name], escape(one.subject.label)  # `rank 4` differs from an arm named `4`
        text = escape(f"{one.name}: {shown[one.name]}")
        add_point(figure, place, found.value, colour, one.name, text=text, marker={"size": 11}, interval=interval)
        seeds = [(place, run, data.record.find_run_score(run)) for run in one.confirm_runs if run.is_complete]
        add_trials(figure, seeds, colour, one.name, marker={"symbol": "circle-open"})
        if enough and enough.is_settled and enough.subject is one:
            marker = LARGE | {"symbol": "diamond-open"}
            add_point(figure, place, found.value, colour, one.name, text=text, marker=marker)
    return figure


def _find_interval(name: str, data: SweepData) -> Interval | None:
    """Returns full's mean plus the interval of the difference from full; without full the interval of the mean."""
    scale = data.evidence.scale
    full = data.evidence.mean(scale.full)
    if full is None or name == scale.full:
        return data.evidence.means[name].find_interval()
    difference = data.evidence.estimate_difference(name, scale.full)
    interval = difference.find_interval(data.evidence.confidence) if difference else None
    low, high = data.evidence.scores.score_range
    return interval and (max(full.value + interval[0], low), min(full.value + interval[1], high))


def draw_score_by_lr(data: SweepData) -> Panel:
    """Returns a panel of scores against rates: a figure for each arm with `confirm_each`, one for all others."""
    title = "Score against learning rate"
    groups: dict[str, list[SubjectResult]] = {}
    for row in data.record.arms:
        if len({trial.numeric_setting(LR) for trial in data.list_trials(row.name) if trial.is_complete}) > 1:
            groups.setdefault(row.name if row.key else "", []).extend(one for one in data.subjects if one.row is row)
    figures = tuple(_draw_rates(groups[name], data) for name in sorted(groups, key=bool))
    if not figures:
        return Panel(key="lr", title=title, text="No arm has complete trials at two learning rates.")
    text = (
        "Dots are complete trials, crosses the best value so far of trials that were stopped early, triangles at an "
        "edge trials whose score lies outside. A ring is the trial whose setting was chosen, a diamond a setting that "
        "no trial has, with the score that the search's model predicts. u = lr · √α is used where α varies under Adam, "
        "because the best u is nearly the same at every α."
    )
    return Panel(key="lr", title=title, text=text, figures=figures)


def _draw_rates(subjects: Sequence[SubjectResult], data: SweepData) -> go.Figure:
    scored = [trial for one in subjects for trial in one.trials if trial.search_score is not None]
    alphas = {trial.numeric_setting(ALPHA) for trial in scored}
    has_u = len(alphas) > 1 and all(trial.follows_rate_law for trial in scored)

    def find_x(get_number: Callable[[str], float | None]) -> float:
        """Returns the learning rate, or the coordinate of the rate law; 0 if it is not known."""
        alpha = get_number(ALPHA) or 0.0 if has_u else 1.0
        return (get_number(LR) or 0.0) * math.sqrt(max(alpha, 0.0))

    x_title = f"{'u = lr · √α' if has_u else 'learning rate'} (log scale)"
    figure = build_figure(x_title, format_metric(data.record.search_metric.name))
    figure.update_xaxes(type="log", exponentformat="e", dtick="D2")  # ticks at 1, 2 and 5
    colours, scores, drawn = choose_colours(data), [], []
    for one in subjects:
        colour = colours[one.name]
        known = [(trial, score) for trial in one.trials if (score := trial.search_score) is not None]
        points = [(x, trial, score) for trial, score in known if (x := find_x(trial.numeric_setting)) > 0]
        complete = [point for point in points if point[1].is_complete]
        stopped = [point for point in points if point[1].state == "stopped"]
        scores += [score for _, _, score in (*complete, *stopped)]
        drawn.append((one, [*complete, *stopped]))
        add_trials(figure, complete, colour, one.name, showlegend=True)
        add_trials(figure, stopped, colour, one.name, marker={"symbol": "x-thin-open"})
        if (best := one.best) and (x := find_x(best.get_number)):
            marker = LARGE | {"symbol": "diamond-open" if best.is_predicted else "circle-open"}
            name = f"{one.name}, predicted" if best.is_predicted else f"{one.arm} {best.trial}"
            text = describe_point(name, best.score, best.params)
            add_point(figure, x, best.score, colour, one.name, text=text, marker=marker)
    ranked = sorted(scores, key=lambda score: data.record.search_metric.sign * score)
    half = 1 + len(ranked) // 2  # the better half is always shown
    full, frozen = data.best_score("full"), data.best_score("frozen")
    set_score_axis(figure, ranked[:half], ranked[half:], full=full, frozen=frozen)
    for one, points in drawn if scores else ():
        _draw_outside(figure, points, colours[one.name], one.name)
    return figure


def _draw_outside(figure: go.Figure, points: Sequence[tuple[float, Trial, float]], colour: str, name: str) -> None:
    """Draws a triangle at the edge of a figure for each trial whose score lies outside of the axis."""
    low, high = figure.layout.yaxis.range
    for edge, symbol, found in (
        (low, "triangle-down", [point for point in points if point[2] < low]),
        (high, "triangle-up", [point for point in points if point[2] > high]),
    ):
        if found:
            add_trials(figure, found, colour, name, marker={"symbol": symbol, "size": 10}, edge=edge)


def choose_colours(data: SweepData) -> dict[str, str]:
    """Returns the colour of each arm, and of each value of a `confirm_each` key.

    An arm has its method's colour, or a free one if there is none or another arm has it. Values are shades of a ramp.
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
    flatten the rest.
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
    ranked = sorted(known, key=known.__getitem__)
    for method, score in known.items():
        # so that the names of two close lines do not overlap: the higher is above its line, the other below
        colour, side = METHOD_COLOURS[method], "bottom" if method == ranked[-1] else "top"
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
    """Adds runs as points (x, run, score), with their settings as hover text and links to their folders.

    `trace` may have an `edge`, at which all are drawn instead of at their scores.
    """
    edge: float | None = trace.pop("edge", None)
    trace["marker"] = {"opacity": 0.75} | trace.get("marker", {})
    _add_markers(
        figure,
        colour,
        name,
        x=[x for x, _, _ in points],
        y=[score if edge is None else edge for _, _, score in points],
        text=[describe_point(_name_run(trial), score, trial.params) for _, trial, score in points],
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
