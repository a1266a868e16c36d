"""The sentences below the three answers: scores, other verdicts, effort, fairness, limits, and where to search next.

Scores on test data, if there are any, replace the scores of the search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorasweep.config.sweep import parse_margin
from lorasweep.report.advice import Advice
from lorasweep.report.answers import describe_gain, describe_tests, list_details
from lorasweep.report.choice import find_value
from lorasweep.report.fairness import Fairness
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


@dataclass(frozen=True, kw_only=True)
class ArmScore:
    """The score of an arm in the sentences: on test data after a confirm stage, else the best trial's score."""

    value: float
    text: str
    trial: TrialData | None
    """The trial with the arm's settings."""


def describe_findings(
    data: SweepData,
    advice: Advice,
    fairness: Fairness,
    learning: Learning,
) -> list[str]:
    """Returns the sentences, the most important first. The headline of a failure stands above them."""
    is_confirmed = bool(data.evidence.subjects)
    gain, tests = describe_gain(data), describe_tests(data)
    return [
        *_describe_scores(data),
        *([gain] if gain else []),
        *([learning.remedy] if learning.remedy else []),
        *learning.warnings,
        *list_details(data),
        *_describe_effort(data),
        *fairness.sentences,
        *([tests, describe_margin(data)] if tests else []),
        *(data.evidence.notes if is_confirmed else [ONE_SEED]),
        *data.record.warnings,
        *advice.untried,
        *advice.next_searches,
        *data.record.notes,
    ]


def _describe_scores(data: SweepData) -> list[str]:
    scores = {arm.name: score for arm in data.arms if (score := find_score(arm, data))}
    if not scores:
        return ["No trial is complete, so there is no score to compare."]
    # After a confirm stage, the sentences on problems name the arms without a test score.
    others = [
        arm
        for arm in data.arms
        if arm.row.method not in ("frozen", "full") and (arm.name in scores or not data.evidence.subjects)
    ]
    ordered = sorted(others, key=lambda arm: data.sign * scores[arm.name].value if arm.name in scores else math.inf)
    named = {arm.name for arm in ordered[:MAX_NAMED_ARMS]}
    shown = [arm for arm in others if arm.name in named]
    rest = len(others) - len(shown)
    return [
        _describe_metric(data),
        _describe_ends(data),
        *(_describe_arm(arm, scores.get(arm.name), data) for arm in shown),
        *([f"The other {rest} {'arm is' if rest == 1 else 'arms are'} in the table below."] if rest else []),
    ]


def find_score(arm: ArmData, data: SweepData) -> ArmScore | None:
    value = find_value(arm, data)
    if value is None:
        return None
    if found := data.evidence.subject(arm.name):
        decimals = count_decimals(one.interval for one in data.evidence.subjects)
        return ArmScore(value=value, text=format_estimate(value, found.interval, decimals=decimals), trial=arm.best)
    text = format_score(value, beside=[other.best.value for other in data.arms if other.best])
    return ArmScore(value=value, text=text, trial=arm.best)


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


def find_method_score(method: str, data: SweepData) -> ArmScore | None:
    """Returns the best score of the arms of a method; None if none has a score."""
    scores = [score for arm in data.arms if arm.row.method == method and (score := find_score(arm, data))]
    return min(scores, key=lambda score: data.sign * score.value, default=None)


def _describe_ends(data: SweepData) -> str:
    """Returns a sentence about the two ends of the scale: the frozen base and full fine-tuning."""
    base, full = (find_method_score(method, data) for method in ("frozen", "full"))
    ends = [f"the frozen base scores {base.text}"] if base else []
    if full:
        ends.append(f"full fine-tuning scores {full.text}{_format_settings(full.trial)}")
    if base is None or full is None:
        ends.append("no share of full's gain is known, because that needs a score of the frozen base and of `full`")
    elif data.sign * (base.value - full.value) <= 0:
        ends.append("full fine-tuning gained nothing, so no share of its gain is given")
    text = "; ".join(ends)
    return f"{text[0].upper()}{text[1:]}."


def _format_settings(trial: TrialData | None) -> str:
    return f" with {format_settings(trial.params)}" if trial and trial.params else ""


def _describe_arm(arm: ArmData, score: ArmScore | None, data: SweepData) -> str:
    if score is None:
        so_far = f"; its best so far is {format_score(arm.so_far.value)} ({arm.so_far.state})" if arm.so_far else ""
        return f"`{arm.name}` has no complete trial{so_far}."
    predicted = " (predicted)" if score.trial and score.trial.is_predicted else ""
    sentence = f"`{arm.name}` scores {score.text}{_format_settings(score.trial)}{predicted}"
    share, interval = data.full_gain_share_of_arm(arm)
    if share is not None:
        decimals = count_percent_decimals(data.full_gain_share_of_arm(one)[1] for one in data.arms)
        sentence += f", {format_share_estimate(share, interval, decimals=decimals)} of what full fine-tuning gains"
    record = score.trial.record if score.trial else None
    if record:
        trained = format_share(record.trainable_fraction)
        sentence += f", training {format_count(record.trainable_params)} parameters ({trained} of the base)"
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
