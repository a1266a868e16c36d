"""The sentences at the top of a report: scores, effort, fairness, limits, and where to search next.

Scores on test data, if there are any, replace the scores of the search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorasweep.config.sweep import parse_margin, warn_of_few_seeds
from lorasweep.report.advice import Advice
from lorasweep.report.evidence.verdicts import LEVEL, PairComparison
from lorasweep.report.fairness import Fairness
from lorasweep.report.learning import Learning
from lorasweep.report.sweep_data import ArmData, SweepData, TrialData
from lorasweep.wording import (
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
"""If there are more arms than this, only the best of them get a sentence."""
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
    is_confirmed = bool(data.evidence.arms)
    # the evidence says the same with the names of the arms
    said = warn_of_few_seeds(len(data.record.confirm_seeds)) if data.evidence.warnings else []
    return [
        *_describe_scores(data, advice),
        *([learning.remedy] if learning.remedy else []),
        *learning.warnings,
        *data.evidence.warnings,
        *_describe_harness(data),
        *(rank.sentence for rank in advice.ranks),
        *([advice.dimension.sentence] if advice.dimension else []),
        *_describe_effort(data),
        *fairness.sentences,
        *(_describe_limits(data) if is_confirmed else [ONE_SEED]),
        *(warning for warning in data.record.warnings if warning not in said),
        *advice.untried,
        *advice.next_searches,
        *data.record.notes,
    ]


def describe_pair(
    pair: PairComparison, *, groups: str | None, first: str | None = None, second: str | None = None
) -> str:
    """Returns the verdict on a pair in words, without the full stop; `first` and `second` replace the arms' names.

    `groups` is the name of the groups of test examples (`SweepData.example_groups`).
    """
    left, right = first or f"`{pair.first}`", second or f"`{pair.second}`"
    if pair.verdict == "not tested":
        return f"{left} and {right} were not tested: {pair.reason}"
    if pair.verdict in ("better", "worse"):
        # The size without its sign. An interval across 0 has no such size: its ends would be swapped.
        is_across_zero = pair.interval is None or pair.interval[0] < 0 < pair.interval[1]
        low, high = sorted(map(abs, pair.interval or (0.0, 0.0)))
        size = format_estimate(abs(pair.difference or 0.0), None if is_across_zero else (low, high))
        return f"{left} is {pair.verdict} than {right} by {size}"
    difference = format_estimate(pair.difference, pair.interval)
    if pair.verdict == "equivalent":
        return f"{left} and {right} are equivalent: they differ by {difference}, which is less than the margin"
    assert pair.settled_by is not None
    is_alone = pair.p_value is not None and pair.p_value < LEVEL
    alone = ", an interval that excludes 0, but not after the correction for the number of pairs" if is_alone else ""
    return (
        f"{left} and {right} differ by {difference}{alone}, which is inconclusive; "
        f"{pair.settled_by.describe(groups=groups)} would probably settle it"
    )


def _describe_scores(data: SweepData, advice: Advice) -> list[str]:
    scores = {arm.name: score for arm in data.arms if (score := find_score(arm, data))}
    if not scores:
        return ["No trial is complete, so there is no score to compare."]
    # After a confirm stage, the sentences on problems name the arms without a test score.
    others = [
        arm
        for arm in data.arms
        if arm.row.method not in ("frozen", "full") and (arm.name in scores or not data.evidence.arms)
    ]
    ordered = sorted(others, key=lambda arm: data.sign * scores[arm.name].value if arm.name in scores else math.inf)
    named = {arm.name for arm in ordered[:MAX_NAMED_ARMS]} | {name for rank in advice.ranks for name in rank.arms}
    shown = [arm for arm in others if arm.name in named]
    rest = len(others) - len(shown)
    return [
        _describe_metric(data),
        _describe_ends(data),
        *(_describe_arm(arm, scores.get(arm.name), data) for arm in shown),
        *([f"The other {rest} {'arm is' if rest == 1 else 'arms are'} in the table below."] if rest else []),
    ]


def _describe_harness(data: SweepData) -> list[str]:
    """Returns a sentence with the scores by lm-evaluation-harness; empty without them."""
    parts = []
    for name, row in data.harness_scores.items():
        scores = [
            f"{format_score(score, beside=row)} for `{arm.name}`"
            for arm, score in zip(data.arms, row, strict=True)
            if score is not None
        ]
        parts.append(f"{name} is {join_words(scores)}")
    if not parts:
        return []
    return [
        f"By lm-evaluation-harness, as means over the confirm runs, {'; '.join(parts)}. The verdicts are on "
        f"{format_metric(data.record.metric)} alone."
    ]


def find_score(arm: ArmData, data: SweepData) -> ArmScore | None:
    if data.evidence.arms:
        found = data.evidence.arm(arm.name)
        if found is None:
            return None
        return ArmScore(value=found.mean, text=format_estimate(found.mean, found.interval), trial=arm.best)
    if arm.best is None or arm.best.value is None:
        return None
    text = format_score(arm.best.value, beside=[other.best.value for other in data.arms if other.best])
    return ArmScore(value=arm.best.value, text=text, trial=arm.best)


def _describe_metric(data: SweepData) -> str:
    metric, evidence = format_metric(data.record.metric), data.evidence
    order = "lower" if data.record.direction == "minimize" else "higher"
    if not evidence.arms:
        return f"Scores are {metric}, {order} is better."
    counts = sorted({len(arm.seeds) for arm in evidence.arms if arm.name != evidence.base} or {1})
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
        return f"`{arm.name}` has no complete trial."
    sentence = f"`{arm.name}` scores {score.text}{_format_settings(score.trial)}"
    share, interval = data.full_gain_share_of_arm(arm)
    if share is not None:
        sentence += f", {format_share_estimate(share, interval)} of what full fine-tuning gains"
    record = score.trial.record if score.trial else None
    if record:
        trained = format_share(record.trainable_fraction)
        sentence += f", training {format_count(record.trainable_params)} parameters ({trained} of the base)"
    sentence += "."
    pair = data.evidence.pair(arm.name, data.evidence.full)
    if pair:
        verdict = describe_pair(pair, first="it", second="full fine-tuning", groups=data.example_groups)
        sentence += f" {verdict[0].upper()}{verdict[1:]}."
    return sentence


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
        asked, seeds = sum(arm.row.trials for arm in data.arms), len(data.record.confirm_seeds)
        also = f" and {seeds} confirm runs of each arm's winner" if seeds else ""
        sentences.append(f"The sweep is {data.record.status}: {asked} trials were asked for{also}.")
    return sentences


def _describe_limits(data: SweepData) -> list[str]:
    count = data.evidence.num_compared
    corrected = f", corrected for {count} comparisons (Holm)" if count > 1 else ""
    level = f"Verdicts are at the 5 % level{corrected}; an interval is for one number alone."
    return [*([level, describe_margin(data)] if count else []), *data.evidence.notes]


def describe_margin(data: SweepData) -> str:
    """Returns a sentence about the smallest difference that matters, or why none is known."""
    setting, margin = data.record.margin, data.evidence.margin
    is_share = parse_margin(setting).is_share_of_gain
    share = f"{setting} of full fine-tuning's gain over the frozen base"
    if margin is None:
        return (
            f"No margin: {share} is not known, because that needs test scores of both and a gain, so no arms can be "
            "shown to be equivalent, and no rank enough. Set `confirm.margin` to a number in the metric's unit."
        )
    meaning = f" ({share})" if is_share else ""
    # the gain is uncertain too: where it is high, a larger difference is within the margin
    moves = " The test compares the difference with this share of the gain in each redrawn sample." if is_share else ""
    return (
        f"Arms are equivalent if they differ by less than the margin, {format_score(margin)} "
        f"{format_metric(data.record.metric)}{meaning}, which was stated before the sweep.{moves}"
    )
