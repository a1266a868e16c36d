"""Figures of the confirm stage: test scores by value of an arm's `confirm_each` key, and the tested quantities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import plotly.graph_objects as go

from lorasweep.record import QuestionName
from lorasweep.report.choice import choose_subject
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.evidence.evidence import SubjectEvidence
from lorasweep.report.evidence.questions import Answer
from lorasweep.report.figures.panel import (
    METHOD_COLOURS,
    Panel,
    add_estimate,
    add_line,
    add_markers,
    add_references,
    add_trials,
    build_figure,
    choose_colours,
    escape,
    find_bar_range,
)
from lorasweep.report.sweep_data import ArmData, SweepData
from lorasweep.wording import format_estimate, format_metric, format_setting, format_share_estimate, short_key

MAX_OTHER_ARMS = 6
"""Maximum number of arms without `confirm_each` that are shown beside the values of an arm."""
MAX_EMPTY_SPANS = 3
"""The frozen base is inside the axis if its distance is at most this multiple of the range of all other scores."""
ROW_HEIGHT_PX = 34


@dataclass(frozen=True, kw_only=True)
class ScoreChart:
    """The subjects of one figure, all of which have test scores, and the range of its axis of scores."""

    values: tuple[ArmData, ...]
    """The values of one arm's `confirm_each` key, numbers ascending; empty if no arm has one."""
    others: tuple[ArmData, ...]
    """Arms without `confirm_each`."""
    smallest_sufficient: str | None
    """The subject that is the smallest sufficient value; None if that is not settled."""
    score_range: Interval


def draw_scores_by_value(data: SweepData) -> Panel:
    """Returns a figure for each arm with `confirm_each`: means with intervals, the band of full, the frozen base.

    If no arm has `confirm_each`, one figure shows all arms.
    """
    charts, evidence = list_score_charts(data), data.evidence
    keys = dict.fromkeys(short_key(chart.values[0].key or "") for chart in charts if chart.values)
    title = f"Test score by {' and by '.join(keys)}" if keys else "Test score by arm"
    if not charts:
        text = "Nothing was confirmed: every score is one seed on validation data. `confirm.seeds=auto` adds the stage."
        return Panel(key="confirmed", title=title, text=text)
    full = f"`{evidence.full}`"
    sentences = ["Dots are means over seeds on test data, rings single seeds."]
    if evidence.full:
        # the error that all subjects share, mostly that of the choice of test examples, would hide every difference
        sentences.append(
            f"Bars are the {100 * evidence.confidence:.3g} % intervals of the difference from {full} on the same seeds "
            f"and examples, added to the mean of {full}; intervals of single means are in the table."
        )
        sentences += [f"The band is the margin around {full}."] if evidence.margin is not None else []
        if len({one.seeds for one in evidence.subjects if one.name != evidence.base}) > 1:
            sentences.append(f"A bar counts only the seeds in common with {full}, so its dot may not be in its middle.")
    else:
        sentences.append("Bars are the 95 % intervals of the means.")
    if any(chart.smallest_sufficient for chart in charts):
        sentences.append("A diamond marks the smallest value that is enough.")
    figures = tuple(_draw_chart(chart, data) for chart in charts)
    return Panel(key="confirmed", title=title, text=" ".join(sentences), figures=figures)


def list_score_charts(data: SweepData) -> list[ScoreChart]:
    """Returns the charts of a sweep; none if nothing that trains has test scores."""
    shown = [arm for arm in data.arms if arm.row.method != "frozen" and data.evidence.subject(arm.name)]
    by_arm = {arm.arm: [one for one in shown if one.arm == arm.arm] for arm in shown if arm.key}
    others = [arm for arm in shown if arm.key is None and arm.name != data.evidence.full]
    if not by_arm:  # if full fine-tuning is alone, it is a point and not only a band
        return [_build_chart([], others or shown, data)] if shown else []
    few = others if len(others) <= MAX_OTHER_ARMS else []
    return [_build_chart(values, few, data) for values in by_arm.values()]


def find_interval(found: SubjectEvidence, data: SweepData) -> Interval | None:
    """Returns full's mean plus the interval of the difference from full; without full the interval of the mean."""
    full = data.evidence.subject(data.evidence.full)
    if full is None or found is full:
        return found.interval
    difference = data.evidence.estimate_difference(found.name, full.name)
    interval = difference.find_interval(data.evidence.confidence) if difference else None
    return interval and (full.mean + interval[0], full.mean + interval[1])


def find_band(data: SweepData) -> Interval | None:
    """Returns full's mean minus and plus the margin; None if either is not known."""
    full, margin = data.evidence.subject(data.evidence.full), data.evidence.margin
    return (full.mean - margin, full.mean + margin) if full and margin is not None else None


def _build_chart(values: list[ArmData], others: list[ArmData], data: SweepData) -> ScoreChart:
    evidence = data.evidence
    found = [one for arm in [*values, *others] if (one := evidence.subject(arm.name))]
    scores = [score for one in found for score in (one.mean, *one.values)]
    if full := evidence.subject(evidence.full):
        scores += [full.mean, *(find_band(data) or ())]
    if base := evidence.subject(evidence.base):
        distance = max(min(scores) - base.mean, base.mean - max(scores))
        scores += [base.mean] if distance <= MAX_EMPTY_SPANS * (max(scores) - min(scores)) else []
    ends = [end for one in found if one is not full for end in find_interval(one, data) or ()]
    chosen = (
        choose_subject(data, values[0].arm) if values and evidence.list_answers("smallest", arm=values[0].arm) else None
    )
    return ScoreChart(
        values=tuple(values),
        others=tuple(others),
        smallest_sufficient=chosen.arm.name if chosen and chosen.is_settled else None,
        score_range=find_bar_range(scores, ends, limits=data.metric_range),
    )


def _draw_chart(chart: ScoreChart, data: SweepData) -> go.Figure:
    key = short_key(chart.values[0].key or "") if chart.values else ""
    figure = build_figure(data, x_title=" ", y_title=f"{format_metric(data.record.metric)}, test data")
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(range=chart.score_range)
    evidence, band = data.evidence, find_band(data)
    found = {"full": evidence.subject(evidence.full), "frozen": evidence.subject(evidence.base)}
    add_references(figure, {method: (one.name, one.mean) for method, one in found.items() if one})
    if band:
        figure.add_hrect(y0=band[0], y1=band[1], fillcolor=METHOD_COLOURS["full"], opacity=0.15, line_width=0)
    # with the key's name, a value differs from an arm of the same name
    places = {arm.name: f"{key} {format_setting(arm.row.settings[arm.key])}" for arm in chart.values if arm.key}
    places = {name: escape(place) for name, place in (places | {arm.name: arm.name for arm in chart.others}).items()}
    means = {name: one.mean for name in places if (one := evidence.subject(name))}
    rows = [places[arm.name] for arm in chart.values]
    if chart.values:
        line = {"width": 1}
        add_line(figure, rows, [means[arm.name] for arm in chart.values], METHOD_COLOURS["frozen"], "means", line=line)
    colours = choose_colours(data)
    for arm in (*chart.values, *chart.others):
        x, colour, one = places[arm.name], colours[arm.name], evidence.subject(arm.name)
        assert one is not None
        text = f"{arm.name}: {format_estimate(one.mean, one.interval)}"
        add_estimate(figure, x, one.mean, find_interval(one, data), colour, arm.name, text=text)
        seeds = [(x, run, run.value) for run in arm.confirm_runs if run.is_complete and run.value is not None]
        add_trials(figure, seeds, colour, arm.name, symbol="circle-open")
        if arm.name == chart.smallest_sufficient:
            add_markers(figure, [x], [one.mean], colour, arm.name, symbol="diamond-open", size=16, line_width=2)
    return figure


def draw_tested_quantities(data: SweepData) -> Panel:
    """Returns a figure for each kind of question: the tested quantities with their intervals, and the margin."""
    title, figures = "Tested quantities", []
    for name in get_args(QuestionName):
        answers = [answer for answer in data.evidence.list_answers(name) if answer.value is not None]
        figures += [_draw_answers(answers, data)] if answers else []
    if not figures:
        return Panel(key="tested", title=title, text="No question of the sweep has test scores.")
    text = (
        "The verdicts rest on these quantities: each subject beside its reference, on the same seeds and examples, "
        f"with the {100 * data.evidence.confidence:.3g} % interval of the test. The line is equality, the band the "
        "margin. Of several larger values, the one that is worst for the subject is shown. A dot without a bar has too "
        "few seeds for an interval, or an interval without an end."
    )
    return Panel(key="tested", title=title, text=text, figures=tuple(figures))


def _draw_answers(answers: Sequence[Answer], data: SweepData) -> go.Figure:
    # A share of full's gain is 1 at equality. For another reference than full, the page shows the share minus 1.
    is_share, is_full = answers[0].is_share, answers[0].name == "as_good_as_full"
    equal, shift = (1.0, 0.0) if is_share and is_full else (0.0, 1.0 if is_share else 0.0)
    unit = "share of full's gain" if is_share else format_metric(data.record.metric)
    if not is_share:
        unit += f", {'lower' if data.sign > 0 else 'higher'} is better"
    x_title = unit if is_share and is_full else f"difference ({unit})"
    figure = build_figure(data, x_title=x_title, y_title=" ", height=90 + ROW_HEIGHT_PX * max(len(answers), 2))
    figure.update_xaxes(tickformat="~%" if is_share else None, exponentformat="none", nticks=6)
    figure.update_yaxes(type="category")
    margin, colour = data.margin_share if is_share else data.evidence.margin, METHOD_COLOURS["full"]
    scores: list[float] = [equal]
    ends: list[float] = []
    if margin is not None:
        scores += [equal - margin, equal + margin]
        figure.add_vrect(x0=equal - margin, x1=equal + margin, fillcolor=colour, opacity=0.15, line_width=0)
    figure.add_vline(x=equal, line={"color": colour, "width": 1.2, "dash": "dot"})
    colours, form = choose_colours(data), format_share_estimate if is_share else format_estimate
    for answer in reversed(answers):  # plotly draws the first row at the bottom
        value = (answer.value or 0.0) - shift
        interval = answer.interval and (answer.interval[0] - shift, answer.interval[1] - shift)
        text = f"{answer.subject} beside {answer.reference}: {form(value, interval)}, {answer.verdict}"
        row, subject = escape(f"{answer.subject}: {answer.verdict}"), answer.subject
        add_estimate(figure, value, row, interval, colours[subject], subject, text=text, along="x")
        scores.append(value)
        ends += interval or ()
    low, high = data.metric_range
    limits = (-math.inf, math.inf) if is_share else (low - high, high - low)
    figure.update_xaxes(range=find_bar_range(scores, ends, limits=limits))
    return figure
