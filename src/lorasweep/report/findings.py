"""The sentences below the three answers: scores, other verdicts, effort, fairness, limits, and where to search next.

Scores on test data, if there are any, replace the scores of the search.
"""

from __future__ import annotations

from lorasweep.config.sweep import parse_margin
from lorasweep.report.advice import describe_edges, describe_untried
from lorasweep.report.answers import describe_gain, describe_tests, list_details
from lorasweep.report.choice import find_best_arm, find_value, order_by_score
from lorasweep.report.learning import Learning
from lorasweep.report.sweep_data import ArmData, SweepData, TrialData
from lorasweep.wording import (
    count_decimals,
    count_percent_decimals,
    format_count,
    format_estimate,
    format_metric,
    format_score,
    format_seconds,
    format_settings,
    format_share,
    format_share_estimate,
    join_words,
)

MAX_NAMED_ARMS = 4
"""If there are more subjects than this, only the best of them get a sentence."""
ONE_SEED = (
    "Every score is one seed on validation data, on which the search also picked the winners; "
    "whether the differences are more than chance is not tested yet."
)


def describe_findings(data: SweepData, fairness: list[str], learning: Learning) -> list[str]:
    """Returns the sentences, the most important first. The headline of a failure stands above them."""
    gain, tests = describe_gain(data), describe_tests(data)
    return [
        *_describe_scores(data),
        *([gain] if gain else []),
        *([learning.remedy] if learning.remedy else []),
        *learning.warnings,
        *list_details(data),
        *_describe_effort(data),
        *fairness,
        *([tests, describe_margin(data)] if tests else []),
        *(data.evidence.notes if data.evidence.subjects else [ONE_SEED]),
        *data.record.warnings,
        *describe_untried(data),
        *([] if learning.state == "nothing" else describe_edges(data)),
        *data.record.notes,
    ]


def _describe_scores(data: SweepData) -> list[str]:
    scored = [arm for arm in data.arms if find_value(arm, data) is not None]
    if not scored:
        return ["No trial is complete, so there is no score to compare."]
    # After a confirm stage, the sentences on problems name the arms without a test score.
    others = [
        arm for arm in (scored if data.evidence.subjects else data.arms) if arm.row.method not in ("frozen", "full")
    ]
    named = sorted(others, key=lambda arm: order_by_score(arm, data))[:MAX_NAMED_ARMS]
    rest = len(others) - len(named)
    return [
        _describe_metric(data),
        _describe_ends(data),
        *(_describe_arm(arm, data) for arm in others if arm in named),
        *([f"The other {rest} {'arm is' if rest == 1 else 'arms are'} in the table below."] if rest else []),
    ]


def format_arm_score(arm: ArmData, data: SweepData) -> str:
    """Returns a subject's score: on test data with its interval after a confirm stage, else the best trial's."""
    value = find_value(arm, data)
    if found := data.evidence.subject(arm.name):
        decimals = count_decimals(one.interval for one in data.evidence.subjects)
        return format_estimate(value, found.interval, decimals=decimals)
    return format_score(value, beside=[other.best.value for other in data.arms if other.best])


def _describe_metric(data: SweepData) -> str:
    metric, evidence = format_metric(data.record.metric), data.evidence
    order = "lower" if data.record.direction == "minimize" else "higher"
    if not evidence.subjects:
        return f"Scores are {metric}, {order} is better."
    counts = sorted({len(arm.seeds) for arm in evidence.subjects if arm.name != evidence.base} or {1})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    groups = f" in {evidence.num_groups:,} {data.example_groups}" if data.example_groups else ""
    examples = f" and {evidence.num_examples:,} test examples{groups}" if evidence.num_examples else ""
    return (
        f"Scores are {metric} on test data that no search has seen, {order} is better: means over {seeds} fresh "
        f"{'seed' if counts[-1] == 1 else 'seeds'} with 95 % intervals over seeds{examples}."
    )


def _describe_ends(data: SweepData) -> str:
    """Returns a sentence about the two ends of the scale: the frozen base and full fine-tuning."""
    base, full = (find_best_arm(method, data) for method in ("frozen", "full"))
    ends = [f"the frozen base scores {format_arm_score(base, data)}"] if base else []
    if full:
        ends.append(f"full fine-tuning scores {format_arm_score(full, data)}{_format_settings(full.best)}")
    if base is None or full is None:
        ends.append("no share of full's gain is known, because that needs a score of the frozen base and of `full`")
    elif order_by_score(base, data) <= order_by_score(full, data):
        ends.append("full fine-tuning gained nothing, so no share of its gain is given")
    text = "; ".join(ends)
    return f"{text[0].upper()}{text[1:]}."


def _format_settings(trial: TrialData | None) -> str:
    return f" with {format_settings(trial.params)}" if trial and trial.params else ""


def _describe_arm(arm: ArmData, data: SweepData) -> str:
    if find_value(arm, data) is None:
        so_far = f"; its best so far is {format_score(arm.so_far.value)} ({arm.so_far.state})" if arm.so_far else ""
        return f"`{arm.name}` has no complete trial{so_far}."
    predicted = " (predicted)" if arm.best and arm.best.is_predicted else ""
    sentence = f"`{arm.name}` scores {format_arm_score(arm, data)}{_format_settings(arm.best)}{predicted}"
    share, interval = data.full_gain_share_of_arm(arm)
    if share is not None:
        decimals = count_percent_decimals(data.full_gain_share_of_arm(one)[1] for one in data.arms)
        sentence += f", {format_share_estimate(share, interval, decimals=decimals)} of what full fine-tuning gains"
    if arm.best and arm.best.record:
        trained = format_share(arm.best.record.trainable_fraction)
        count = format_count(arm.best.record.trainable_params)
        sentence += f", training {count} parameters ({trained} of the base)"
    return f"{sentence}."


def _describe_effort(data: SweepData) -> list[str]:
    saved, planned = data.steps_saved_by_pruning, sum(record.steps_planned for record in data.run_records)
    # A paused trial may still do the steps that it has saved so far.
    so_far = " so far" if any(trial.state == "paused" for trial in data.trials) else ""
    saving = (
        f"; pruning saved {saved:,} of {planned:,} planned steps{so_far} ({format_share(saved / planned)})"
        if saved > 0
        else ""
    )
    counts = {"trial": data.trials, "confirm run": data.confirm_runs}
    runs = [f"{len(rows):,} {name}{'' if len(rows) == 1 else 's'}" for name, rows in counts.items() if rows]
    sentences = [
        f"{join_words(runs)} in {format_seconds(data.record.makespan_s)}, "
        f"{format_count(data.tokens_trained)} tokens trained{saving}."
    ]
    if data.record.status != "complete":
        asked, looks = sum(arm.row.trials for arm in data.searches), data.record.looks
        also = f" and a confirm stage of at most {looks[-1]} seeds" if looks else ""
        sentences.append(f"The sweep is {data.record.status}: {asked} trials were asked for{also}.")
    return sentences


def describe_margin(data: SweepData) -> str:
    """Returns a sentence about the smallest difference that matters, or why none is known."""
    setting, margin = data.record.margin, data.evidence.margin
    is_share = parse_margin(setting).is_share_of_gain
    share = f"{setting} of full fine-tuning's gain over the frozen base"
    if margin is None:
        return (
            f"No margin: {share} is not known, because that needs test scores of both and a gain. So nothing can be "
            "shown to be equivalent, and no rank enough. Set `confirm.margin` to a number in the metric's unit."
        )
    meaning = f" ({share})" if is_share else ""
    # the gain is uncertain too, and each test counts the error of both
    moves = " The error of the gain counts in each test." if is_share else ""
    return (
        f"The margin, the smallest difference that matters, is {format_score(margin)} "
        f"{format_metric(data.record.metric)}{meaning}, as stated in the sweep.{moves}"
    )
