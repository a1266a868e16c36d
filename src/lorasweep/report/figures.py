"""The page's figures (plotly): test scores by value, and score against rate.

Each function takes a `SweepData` and returns a `Panel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from lorasweep.config.run import ALPHA, LR
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.panel import (
    METHOD_COLOURS,
    Panel,
    add_point,
    add_trials,
    build_figure,
    choose_colours,
    describe_point,
    escape,
    set_score_axis,
)
from lorasweep.report.recommend import choose_subject
from lorasweep.report.sweep_data import SubjectResult, SweepData
from lorasweep.report.text import format_means
from lorasweep.wording import format_metric, short_key

MAX_OTHER_ARMS = 6
"""Maximum number of arms without `confirm_each` that are shown beside the values of an arm."""
LARGE = {"size": 16, "line": {"width": 2}}
"""A mark around a point."""


def draw_panels(data: SweepData) -> list[Panel]:
    """Returns all panels, in the order of the page."""
    return [draw_scores_by_value(data), draw_score_by_lr(data)]


def draw_scores_by_value(data: SweepData) -> Panel:
    """Returns a figure for each arm with `confirm_each`: means with intervals, the band of full, the frozen base.

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
        text = "Nothing was confirmed: every score is one seed on validation data. `confirm.seeds=[3,6,10]` adds this."
        return Panel(key="confirmed", title=title, text=text)
    beside = others if len(others) <= MAX_OTHER_ARMS else []
    figures = [_draw_scores(values, beside, data) for values in groups]
    # if full fine-tuning is alone, it is a point and not only a band
    figures = figures or [_draw_scores([], others or shown, data)]
    dots, full = "Dots are means over seeds on test data, rings single seeds.", f"`{evidence.scale.full}`"
    # intervals of differences, because an interval of a mean also has the error that all subjects share (the choice of
    # test examples), which is larger than most differences
    bars = (
        f"Bars are the {100 * evidence.confidence:.3g} % intervals of the difference from {full} on the same seeds and "
        f"examples, added to the mean of {full}. The band is the margin around {full}. Verdicts also count the "
        "chance in the search and the error of the gain, so their intervals are wider."
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
    set_score_axis(figure, [*scores, *band], ends, **levels)
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
    return interval and (full.value + interval[0], full.value + interval[1])


def draw_score_by_lr(data: SweepData) -> Panel:
    """Returns score against learning rate: a figure for each arm with `confirm_each`, one for all others."""
    title = "Score against learning rate"
    groups: dict[str, list[SubjectResult]] = {}
    for row in data.record.arms:
        if len({trial.numeric_setting(LR) for trial in data.list_trials(row.name) if trial.is_complete}) > 1:
            groups.setdefault(row.name if row.key else "", []).extend(one for one in data.subjects if one.row is row)
    figures = tuple(_draw_rates(groups[name], data) for name in sorted(groups, key=bool))
    if not figures:
        return Panel(key="lr", title=title, text="No arm has complete trials at two learning rates.")
    text = (
        "Dots are complete trials, crosses the best value so far of trials that were stopped early. A ring is the "
        "trial whose setting was chosen, a diamond a setting that no trial has, with the score that the search's model "
        "predicts. u = lr · √α is used where α varies under Adam, because the best u is nearly the same at every α."
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
    figure.update_xaxes(type="log", exponentformat="e", dtick=1, minor={"ticks": "outside"})
    colours, scores = choose_colours(data), []
    for one in subjects:
        colour = colours[one.name]
        known = [(trial, score) for trial in one.trials if (score := trial.search_score) is not None]
        points = [(x, trial, score) for trial, score in known if (x := find_x(trial.numeric_setting)) > 0]
        complete = [point for point in points if point[1].is_complete]
        stopped = [point for point in points if point[1].state == "stopped"]
        scores += [score for _, _, score in (*complete, *stopped)]
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
    return figure
