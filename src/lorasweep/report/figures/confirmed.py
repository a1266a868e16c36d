"""The figures of the confirm stage: test scores by value of an arm's `confirm_each` key, and what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from lorasweep.config.data import get_sign
from lorasweep.record import RetainedRow
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.figures.panel import (
    METHOD_COLOURS,
    Panel,
    add_line,
    add_markers,
    add_trials,
    build_figure,
    choose_colours,
    escape,
    set_score_axis,
)
from lorasweep.report.recommend import choose_subject, format_arm_score
from lorasweep.report.sweep_data import ArmData, SweepData
from lorasweep.wording import format_metric, format_setting, short_key

MAX_OTHER_ARMS = 6
"""Maximum number of arms without `confirm_each` that are shown beside the values of an arm."""


def draw_scores_by_value(data: SweepData) -> Panel:
    """Returns a figure for each arm with `confirm_each`: means with intervals, the band of full, the frozen base.

    If no arm has `confirm_each`, one figure shows all arms.
    """
    evidence = data.evidence
    shown = [arm for arm in data.arms if arm.row.method != "frozen" and evidence.mean(arm.name)]
    by_arm = {arm.arm: [one for one in shown if one.arm == arm.arm] for arm in shown if arm.key}
    others = [arm for arm in shown if arm.key is None and arm.name != evidence.full]
    keys = dict.fromkeys(short_key(values[0].key or "") for values in by_arm.values())
    title = f"Test score by {' and by '.join(keys)}" if keys else "Test score by arm"
    if not shown:
        text = "Nothing was confirmed: every score is one seed on validation data. `confirm.seeds=auto` adds the stage."
        return Panel(key="confirmed", title=title, text=text)
    beside = others if len(others) <= MAX_OTHER_ARMS else []
    figures = [_draw_scores(values, beside, data) for values in by_arm.values()]
    # if full fine-tuning is alone, it is a point and not only a band
    figures = figures or [_draw_scores([], others or shown, data)]
    return Panel(key="confirmed", title=title, text=_describe_marks(data), figures=tuple(figures))


def _describe_marks(data: SweepData) -> str:
    evidence = data.evidence
    dots, full = "Dots are means over seeds on test data, rings single seeds.", f"`{evidence.full}`"
    end = "A diamond marks the smallest value that is enough."
    if not evidence.full:
        return f"{dots} Bars are the 95 % intervals of the means. {end}"
    # intervals of differences, because an interval of a mean also has the error that all subjects share (the choice of
    # test examples), which is larger than most differences
    bars = (
        f"Bars are the {100 * evidence.confidence:.3g} % intervals of the difference from {full} on the same seeds "
        f"and examples, added to the mean of {full}; intervals of single means are in the table. A bar uses only "
        f"the seeds that {full} has too. The band is the margin around {full}."
    )
    return f"{dots} {bars} {end}"


def _draw_scores(values: Sequence[ArmData], others: Sequence[ArmData], data: SweepData) -> go.Figure:
    """Returns the figure of the values of one arm's `confirm_each` key, and of arms without one."""
    evidence, colours = data.evidence, choose_colours(data)
    figure = build_figure(data, x_title=" ", y_title=f"{format_metric(data.record.metric)}, test data")
    figure.update_xaxes(type="category", showgrid=False)
    rows = [(arm, found) for arm in (*values, *others) if (found := evidence.mean(arm.name))]
    full, base = evidence.mean(evidence.full), evidence.mean(evidence.base)
    band = [full.value - evidence.margin, full.value + evidence.margin] if full and evidence.margin is not None else []
    if band:
        figure.add_hrect(y0=band[0], y1=band[1], fillcolor=METHOD_COLOURS["full"], opacity=0.15, line_width=0)
    intervals = {arm.name: _find_interval(arm.name, data) for arm, _ in rows}
    scores = [score for _, found in rows for score in (found.value, *found.values)]
    ends = [end for interval in intervals.values() for end in interval or ()]
    levels = {"full": full.value if full else None, "frozen": base.value if base else None}
    set_score_axis(figure, data, [*scores, *band], ends, **levels)
    # with the key's name, a value differs from an arm of the same name
    places = [
        escape(f"{short_key(arm.key)} {format_setting(arm.row.settings[arm.key])}" if arm.key else arm.name)
        for arm, _ in rows
    ]
    if values:
        means = [found.value for _, found in rows[: len(values)]]
        add_line(figure, places[: len(values)], means, METHOD_COLOURS["frozen"], "means", line={"width": 1})
    enough = _find_smallest_sufficient(values, data)
    for place, (arm, found) in zip(places, rows, strict=True):
        colour = colours[arm.name]
        if interval := intervals[arm.name]:
            add_line(figure, [place, place], interval, colour, arm.name, line={"width": 4}, opacity=0.6)
        text = escape(f"{arm.name}: {format_arm_score(arm, data)}")
        add_markers(figure, [place], [found.value], colour, arm.name, text=[text], size=11)
        seeds = [(place, run, run.value) for run in arm.confirm_runs if run.is_complete and run.value is not None]
        add_trials(figure, seeds, colour, arm.name, symbol="circle-open")
        if arm.name == enough:
            add_markers(figure, [place], [found.value], colour, arm.name, symbol="diamond-open", size=16, line_width=2)
    return figure


def _find_smallest_sufficient(values: Sequence[ArmData], data: SweepData) -> str | None:
    """Returns the subject that is the smallest sufficient value; None if that is not settled."""
    if not values or not data.evidence.list_answers("smallest", arm=values[0].arm):
        return None
    chosen = choose_subject(data, values[0].arm)
    return chosen.arm.name if chosen and chosen.is_settled else None


def _find_interval(name: str, data: SweepData) -> Interval | None:
    """Returns full's mean plus the interval of the difference from full; without full the interval of the mean."""
    full = data.evidence.mean(data.evidence.full)
    if full is None or name == data.evidence.full:
        return data.evidence.means[name].find_interval()
    difference = data.evidence.estimate_difference(name, data.evidence.full)
    interval = difference.find_interval(data.evidence.confidence) if difference else None
    return interval and (full.value + interval[0], full.value + interval[1])


def draw_retained(data: SweepData) -> Panel:
    """Returns a figure for each retained data set: the gain of each subject on test data, and its loss on this data."""
    text = (
        "Each dot is a subject: to the right it learned more than the frozen base, upwards it forgot more. Bars are "
        f"the {100 * data.evidence.confidence:.3g} % intervals of what was forgotten, on the same seeds and examples. "
        "The band is the margin."
    )
    figures = tuple(_draw_data_set(row, data) for row in data.record.retained)
    return Panel(key="retained", title="Learned and forgotten", text=text, figures=figures)


def _draw_data_set(row: RetainedRow, data: SweepData) -> go.Figure:
    base, colours, sign = data.evidence.base, choose_colours(data), get_sign(row.direction)
    figure = build_figure(
        data,
        x_title=f"learned: gain of {format_metric(data.record.metric)} on test data",
        y_title=f"forgotten: loss of {format_metric(row.metric)} on {row.name}",
    )
    changes = [change for change in data.retained if change.data == row.name]
    margin = data.record.retain_margin
    figure.add_hrect(y0=-margin, y1=margin, fillcolor=METHOD_COLOURS["frozen"], opacity=0.15, line_width=0)
    for change in changes:
        name, colour = change.subject, colours[change.subject]
        gain = data.evidence.estimate_difference(name, base) if name != base else None
        learned, forgotten = -data.sign * gain.value if gain else 0.0, sign * change.change
        if change.interval:
            ends = [sign * end for end in change.interval]
            add_line(figure, [learned, learned], ends, colour, name, line={"width": 4}, opacity=0.6)
        text = [escape(f"{name}: learned {learned:.4g}, forgotten {forgotten:.4g}")]
        add_markers(figure, [learned], [forgotten], colour, name, text=text, size=11, showlegend=True)
    return figure
