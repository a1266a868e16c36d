"""The page's figures (plotly): test scores by value, score against rate and cost, and what was forgotten.

Each function takes a `SweepData` and returns a `Panel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from lorasweep.config.data import get_sign
from lorasweep.config.run import ALPHA, LR
from lorasweep.record import RetainedRow, Trial
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.panel import (
    METHOD_COLOURS,
    Panel,
    PlotPoint,
    add_line,
    add_markers,
    add_trials,
    build_figure,
    build_label,
    choose_colours,
    escape,
    select_trials,
    set_score_axis,
)
from lorasweep.report.recommend import choose_subject, format_arm_score
from lorasweep.report.sweep_data import SubjectData, SweepData
from lorasweep.wording import format_metric, short_key

MAX_OTHER_ARMS = 6
"""Maximum number of arms without `confirm_each` that are shown beside the values of an arm."""

COSTS = (
    ("trainable_params", 1, "trainable parameters (log scale)"),
    ("peak_memory_bytes", 2**20, "peak memory (MiB)"),
    ("wall_s", 1, "time of the run (s)"),
)
"""For each figure: the field of a run's record, the divisor of its values, and the title of the axis."""


def draw_scores_by_value(data: SweepData) -> Panel:
    """Returns a figure for each arm with `confirm_each`: means with intervals, the band of full, the frozen base.

    If no arm has `confirm_each`, one figure shows all arms.
    """
    evidence = data.evidence
    shown = [arm for arm in data.subjects if not arm.row.is_base and evidence.mean(arm.name)]
    by_arm = {arm.arm: [one for one in shown if one.arm == arm.arm] for arm in shown if arm.subject.key}
    others = [arm for arm in shown if arm.subject.key is None and arm.name != evidence.full]
    keys = dict.fromkeys(short_key(values[0].subject.key or "") for values in by_arm.values())
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


def _draw_scores(values: Sequence[SubjectData], others: Sequence[SubjectData], data: SweepData) -> go.Figure:
    """Returns the figure of the values of one arm's `confirm_each` key, and of arms without one."""
    evidence, colours = data.evidence, choose_colours(data)
    figure = build_figure(data, x_title=" ", y_title=f"{format_metric(data.shown_metric.name)}, test data")
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
    set_score_axis(figure, data.shown_metric.name, [*scores, *band], ends, **levels)
    # with the key's name, a value differs from an arm of the same name
    places = [escape(one.subject.label) for one, _ in rows]
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


def _find_smallest_sufficient(values: Sequence[SubjectData], data: SweepData) -> str | None:
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
        x_title=f"learned: gain of {format_metric(data.shown_metric.name)} on test data",
        y_title=f"forgotten: loss of {format_metric(row.metric)} on {row.name}",
    )
    changes = [change for change in data.retained if change.data == row.name]
    margin = data.record.retain_margin
    figure.add_hrect(y0=-margin, y1=margin, fillcolor=METHOD_COLOURS["frozen"], opacity=0.15, line_width=0)
    for change in changes:
        name, colour = change.subject, colours[change.subject]
        gain = data.evidence.estimate_difference(name, base) if name != base else None
        learned, forgotten = -data.shown_metric.sign * gain.value if gain else 0.0, sign * change.change
        if change.interval:
            ends = [sign * end for end in change.interval]
            add_line(figure, [learned, learned], ends, colour, name, line={"width": 4}, opacity=0.6)
        text = [escape(f"{name}: learned {learned:.4g}, forgotten {forgotten:.4g}")]
        add_markers(figure, [learned], [forgotten], colour, name, text=text, size=11, showlegend=True)
    return figure


def draw_score_by_lr(data: SweepData) -> Panel:
    """Returns score against learning rate: a figure for each arm with `confirm_each`, one for all others."""
    title = "Score against learning rate"
    rates = {
        row.name: {t.numeric_setting(LR) for t in data.list_trials(row.name) if t.is_complete}
        for row in data.record.arms
    }
    searches = [arm for arm, found in rates.items() if len(found) > 1]
    split = [[arm for arm in data.subjects if arm.arm == name] for name in searches]
    groups = [[one for arms in split if len(arms) == 1 for one in arms], *(arms for arms in split if len(arms) > 1)]
    figures = tuple(_draw_rates(group, data) for group in groups if group)
    if not figures:
        return Panel(key="lr", title=title, text="No arm has complete trials at two learning rates.")
    text = (
        "Dots are complete trials, crosses the best value so far of trials that were stopped early. A ring is the "
        "trial whose setting was chosen, a diamond a setting that no trial has, with the score that the search's model "
        "predicts. u = lr · √α is used where α varies under Adam, because the best u is nearly the same at every α."
    )
    return Panel(key="lr", title=title, text=text, figures=figures)


def _draw_rates(arms: Sequence[SubjectData], data: SweepData) -> go.Figure:
    scored = [trial for arm in arms for trial in arm.trials if trial.value is not None]
    has_u = len({trial.setting(ALPHA) for trial in scored}) > 1 and all(trial.follows_rate_law for trial in scored)

    def find_x(trial: Trial) -> float:
        """Returns the learning rate, or the coordinate of the rate law; 0 if it is not known."""
        alpha = trial.numeric_setting(ALPHA) or 0.0 if has_u else 1.0
        return (trial.numeric_setting(LR) or 0.0) * math.sqrt(max(alpha, 0.0))

    figure = build_figure(data, x_title=f"{'u = lr · √α' if has_u else 'learning rate'} (log scale)")
    figure.update_xaxes(type="log", exponentformat="e", dtick=1, minor={"ticks": "outside"})
    colours, scores = choose_colours(data), []
    for arm in arms:
        colour = colours[arm.name]
        points = [(x, t, t.value) for t in arm.trials if t.value is not None and (x := find_x(t)) > 0]
        complete = [point for point in points if point[1].is_complete]
        stopped = [point for point in points if point[1].state == "stopped"]
        scores += [score for _, _, score in (*complete, *stopped)]
        add_trials(figure, complete, colour, arm.name, showlegend=True)
        add_trials(figure, stopped, colour, arm.name, symbol="x-thin-open")
        if arm.best and (x := find_x(arm.best)):
            symbol = "diamond-open" if arm.best.is_predicted else "circle-open"
            text = [build_label(arm.best)]
            score = arm.best.value
            add_markers(figure, [x], [score], colour, arm.name, text=text, symbol=symbol, size=16, line_width=2)
    _set_axis(figure, data, scores)
    return figure


def draw_tradeoff(data: SweepData) -> Panel:
    """Returns score against each cost, over the complete trials of every arm that trains something."""
    title = "Score against cost"
    trials = [trial for trial in data.trials if trial.is_complete and trial.trains and trial.value is not None]
    if not trials:
        return Panel(key="tradeoff", title=title, text="No complete trial that trains something has a readable record.")
    text = (
        "Complete trials against their cost. The stepped line joins the best trials: no trial is both cheaper and "
        "better than a point on it. Click a point to open its run's folder."
    )
    figures = [
        _draw_cost(axis, [(getattr(trial.record, field) / unit, trial, trial.value or 0.0) for trial in trials], data)
        for field, unit, axis in COSTS
    ]
    return Panel(key="tradeoff", title=title, text=text, figures=tuple(figures))


def _draw_cost(axis: str, points: Sequence[PlotPoint], data: SweepData) -> go.Figure:
    figure, colours = build_figure(data, x_title=axis, height=340), choose_colours(data)
    figure.update_xaxes(type="log" if "log" in axis else "linear", exponentformat="SI")
    best: list[tuple[float, float]] = []
    for cost, _, score in sorted(points, key=lambda point: (point[0], data.sign * point[2])):
        if not best or data.sign * score < data.sign * best[-1][1]:
            best.append((cost, score))
    x, y = zip(*best, strict=True)
    add_line(figure, x, y, "#868e96", "best up to this cost", showlegend=True, line={"width": 1.5, "shape": "hv"})
    for arm in data.subjects:
        runs = {trial.run for trial in arm.trials}
        if shown := [point for point in points if point[1].run in runs]:
            add_trials(figure, shown, colours[arm.name], arm.name, showlegend=True)
    _set_axis(figure, data, [score for _, _, score in points])
    return figure


def _set_axis(figure: go.Figure, data: SweepData, scores: Sequence[float]) -> None:
    """Sets the range of the score axis: it shows the better half of the scores, and others that are near."""
    ranked = sorted(scores, key=lambda score: data.sign * score)
    half = 1 + len(ranked) // 2
    full, frozen = data.best_score("full"), data.best_score("frozen")
    set_score_axis(figure, data.record.metric, ranked[:half], ranked[half:], full=full, frozen=frozen)


PANELS = (draw_scores_by_value, draw_score_by_lr, draw_tradeoff)
"""The panels in the order of the page."""


def draw_panels(data: SweepData) -> list[Panel]:
    """Returns all panels, in the order of the page; of a large sweep they show a part of the trials."""
    shown = select_trials(data)
    panels = [draw(shown) for draw in PANELS]
    return [*panels, draw_retained(data)] if data.retained else panels
