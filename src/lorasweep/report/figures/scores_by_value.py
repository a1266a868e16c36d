"""The main figure: test score over the values of an arm's `confirm_each` key, beside full fine-tuning and the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from lorasweep.config.ranges import is_number
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.evidence.evidence import SubjectEvidence
from lorasweep.report.figures.panel import (
    METHOD_COLOURS,
    Panel,
    add_estimate,
    add_line,
    add_mark,
    add_points,
    add_references,
    build_figure,
    choose_colours,
    escape,
    find_bar_range,
)
from lorasweep.report.sweep_data import ArmData, SweepData
from lorasweep.wording import format_estimate, format_metric, format_setting, short_key

MAX_OTHER_ARMS = 6
"""Arms without `confirm_each` stand beside an arm's values unless there are more of them than this."""
OTHER_ARMS_FACTOR = 4
"""On a logarithmic axis, each further arm stands at this multiple of the place before it."""
MAX_EMPTY_SPANS = 3
"""The frozen base is inside the axis if its distance is at most this multiple of the range of all other scores."""


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
            f"and examples, set at the mean of {full}; intervals of single means are in the table."
        )
        sentences += [f"The band is the margin around {full}."] if evidence.margin is not None else []
        if len({one.seeds for one in evidence.subjects if one.name != evidence.base}) > 1:
            sentences.append(f"A bar stands where the seeds in common with {full} put it, so its dot may lie aside.")
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


def find_smallest_sufficient(arm: str, data: SweepData) -> str | None:
    """Returns the subject that is the smallest sufficient value of an arm's key; None if that is not settled."""
    chain = data.evidence.list_answers("smallest", arm=arm)
    first = next((place for place, answer in enumerate(chain) if answer.verdict == "sufficient"), len(chain))
    if not chain or (first > 0 and chain[first - 1].verdict != "insufficient"):
        return None
    # if no smaller value is, the largest value is sufficient: nothing is better
    return chain[first].subject if first < len(chain) else chain[-1].compared_with[-1]


def find_interval(found: SubjectEvidence, data: SweepData) -> Interval | None:
    """Returns full's mean plus the interval of the difference from full; without full the interval of the mean."""
    full = data.evidence.subject(data.evidence.full)
    if full is None or found is full:
        return found.interval
    difference = data.evidence.estimate_difference(found.name, full.name)
    interval = difference.find_interval(data.evidence.confidence) if difference else None
    return interval and (full.mean + interval[0], full.mean + interval[1])


def find_band(data: SweepData) -> Interval | None:
    """Returns full's mean less and plus the margin; None if either is not known."""
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
    return ScoreChart(
        values=tuple(values),
        others=tuple(others),
        smallest_sufficient=find_smallest_sufficient(values[0].arm, data) if values else None,
        score_range=find_bar_range(scores, ends, limits=data.metric_range),
    )


def _draw_chart(chart: ScoreChart, data: SweepData) -> go.Figure:
    key = chart.values[0].key if chart.values else None
    title = short_key(key) if key else "arm"
    y_title = f"{format_metric(data.record.metric)}, test data"
    places, ticks, is_log = _place_subjects(chart)
    figure = build_figure(data, x_title=f"{title}{' (log scale)' if is_log else ''}", y_title=y_title)
    if is_log:
        figure.update_xaxes(type="log", tickvals=list(places.values()), ticktext=ticks)
    else:
        figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(range=chart.score_range)
    evidence, band = data.evidence, find_band(data)
    found = {"full": evidence.subject(evidence.full), "frozen": evidence.subject(evidence.base)}
    add_references(figure, {method: (one.name, one.mean) for method, one in found.items() if one})
    if band:
        figure.add_hrect(y0=band[0], y1=band[1], fillcolor=METHOD_COLOURS["full"], opacity=0.15, line_width=0)
    colours, means = choose_colours(data), []
    for arm in (*chart.values, *chart.others):
        x, colour, one = places[arm.name], colours[arm.name], evidence.subject(arm.name)
        assert one is not None
        means.append(one.mean)
        points = [(x, run, run.value) for run in arm.confirm_runs if run.is_complete and run.value is not None]
        text = f"{arm.name}: {format_estimate(one.mean, one.interval)}"
        add_estimate(figure, x, one.mean, find_interval(one, data), colour, arm.name, text=text)
        add_points(figure, points, colour, arm.name, marker={"symbol": "circle-open"})
        if arm.name == chart.smallest_sufficient:
            add_mark(figure, x, one.mean, colour, arm.name, symbol="diamond-open")
    if is_log:
        x, line = [places[arm.name] for arm in chart.values], {"width": 1}
        add_line(figure, x, means[: len(x)], METHOD_COLOURS["frozen"], "means", line=line)
    return figure


def _place_subjects(chart: ScoreChart) -> tuple[dict[str, Any], list[str], bool]:
    """Returns each subject's place on the x axis, its tick, and whether the axis is logarithmic.

    An axis of positive numbers is logarithmic, and other arms stand to the right of them. Else places are categories.
    """
    values = [arm.row.settings[arm.key] for arm in chart.values if arm.key]
    names = [escape(arm.name) for arm in chart.others]
    ticks = [*map(format_setting, values), *names]
    is_log = bool(values) and all(is_number(value) and value > 0 for value in values)
    if is_log:
        places = [*values, *(max(values) * OTHER_ARMS_FACTOR**place for place, _ in enumerate(names, start=1))]
    else:  # the key's name makes a value differ from an arm of the same name
        places = [escape(f"{short_key(chart.values[0].key or '')} {format_setting(value)}") for value in values] + names
    subjects = [arm.name for arm in (*chart.values, *chart.others)]
    return dict(zip(subjects, places, strict=True)), ticks, is_log
