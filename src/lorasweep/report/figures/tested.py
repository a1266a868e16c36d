"""Figures of the questions: the tested quantity of each subject with its interval, beside the margin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from lorasweep.record import QuestionName
from lorasweep.report.evidence.questions import Answer
from lorasweep.report.figures.panel import (
    METHOD_COLOURS,
    Panel,
    add_estimate,
    build_figure,
    choose_colours,
    escape,
    find_bar_range,
)
from lorasweep.report.sweep_data import SweepData
from lorasweep.wording import format_estimate, format_metric, format_share_estimate

ROW_HEIGHT_PX = 34
QUESTIONS: dict[QuestionName, str] = {
    "as_good_as_full": "full",
    "smallest": "a larger value",
    "pair": "the other arm",
}
"""The kinds of questions in the order of their figures, and what a subject is compared with."""


def draw_tested(data: SweepData) -> Panel:
    """Returns a figure for each kind of question: what was tested, with the interval of the test and the margin."""
    title, figures = "Tested quantities", []
    for name, reference in QUESTIONS.items():
        answers = [answer for answer in data.evidence.list_answers(name) if answer.value is not None]
        if answers:
            figures.append(_draw_answers(answers, reference, data))
    if not figures:
        return Panel(key="tested", title=title, text="No question of the sweep has test scores.")
    text = (
        "What the verdicts rest on: each subject beside its reference, on the same seeds and examples, with the "
        f"{100 * data.evidence.confidence:.3g} % interval of the test. The line is equality, the band the margin. Of "
        "several larger values, the one that is worst for the subject is shown. A dot without a bar has too few seeds "
        "for an interval, or an interval without an end."
    )
    return Panel(key="tested", title=title, text=text, figures=tuple(figures))


def _draw_answers(answers: Sequence[Answer], reference: str, data: SweepData) -> go.Figure:
    # A share of full's gain is 1 at equality. Beside another reference, the page shows it less 1.
    is_share, is_full = answers[0].is_share, answers[0].name == "as_good_as_full"
    equal, shift = (1.0, 0.0) if is_share and is_full else (0.0, 1.0 if is_share else 0.0)
    unit = "share of full's gain" if is_share else format_metric(data.record.metric)
    if not is_share:
        unit += f", {'lower' if data.sign > 0 else 'higher'} is better"
    x_title = unit if is_share and is_full else f"difference from {reference} ({unit})"
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
