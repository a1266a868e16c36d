"""The sentences at the top of a report: the results, the effort, and where to search next.

Comes after `confirmed`, `fairness` and `advice`, before `summary`. Results on test data, where there are any, replace
those of the search.
"""

from __future__ import annotations

import math

from lorasweep.report.advice import Advice
from lorasweep.report.confirmed import MAX_ARMS, describe_confirmed, describe_limits
from lorasweep.report.dimension import describe_d90
from lorasweep.report.fairness import Fairness
from lorasweep.report.tables import Arm, SweepData, Trial
from lorasweep.wording import (
    format_count,
    format_metric,
    format_ratio,
    format_score,
    format_seconds,
    format_settings,
    format_share,
)

ONE_SEED = (
    "Every score is one seed on validation data, on which the search also picked the winners; "
    "whether the differences are more than chance is not tested yet."
)


def write_headline(data: SweepData, advice: Advice, fairness: Fairness) -> list[str]:
    """Returns the sentences, the most important first."""
    confirmed = describe_confirmed(data, prominent={name for rank in advice.ranks for name in rank.arms})
    found = [*confirmed, *advice.rank_sentences] if confirmed else [*_comparison(data)]
    caveat = describe_limits(data.evidence) if confirmed else [ONE_SEED]
    return [
        *found,
        *describe_d90(data),
        *_effort(data),
        *fairness.sentences,
        *caveat,
        *map(str, data.record.warnings),
        *advice.next_sentences,
        *map(str, data.record.notes),
    ]


def _comparison(data: SweepData) -> list[str]:
    metric = format_metric(data.record.metric)
    order = "lower" if data.record.direction == "minimize" else "higher"
    if not any(arm.best for arm in data.arms):
        return ["No trial is complete, so there is no score to compare."]
    others = [arm for arm in data.arms if arm.row.method not in ("frozen", "full")]
    shown = sorted(
        others, key=lambda arm: data.sign * arm.best.value if arm.best and arm.best.value is not None else math.inf
    )
    rest = len(others) - MAX_ARMS
    sentences = [_arm_sentence(arm, data) for arm in others if arm in shown[:MAX_ARMS]]
    sentences += [f"The other {rest} {'arm is' if rest == 1 else 'arms are'} in the table below."] if rest > 0 else []
    return [f"Scores are {metric}, {order} is better. {_ends(data)}", *sentences]


def _ends(data: SweepData) -> str:
    base, full = data.score_of("frozen"), data.score_of("full")
    if base is None and full is None:
        return "There is no score of the frozen base or of full fine-tuning, so no share of a gain is given."
    if full is None:
        return f"The frozen base scores {_score(base, data)}; without full fine-tuning no share of its gain is given."
    if base is None:
        return f"Full fine-tuning scores {_score(full, data)}; without the frozen base no share of its gain is given."
    best = data.best_arm("full")
    settings = f" with {format_settings(best.best.params)}" if best and best.best else ""
    ends = f"The frozen base scores {_score(base, data)} and full fine-tuning {_score(full, data)}{settings}"
    return f"{ends}." if data.share_of_full_gain(full) else f"{ends}: it gained nothing, so no share is given."


def _score(value: float | None, data: SweepData) -> str:
    return format_score(value, beside=[arm.best.value for arm in data.arms if arm.best])


def _arm_sentence(arm: Arm, data: SweepData) -> str:
    if arm.best is None:
        return f"`{arm.name}` has no complete trial."
    reached = f"`{arm.name}` reaches {_score(arm.best.value, data)} with {format_settings(arm.best.params)}"
    share = data.share_of_full_gain(arm.best.value)
    gain = f", {format_share(share)} of what full fine-tuning gains" if share is not None else ""
    return f"{reached}{gain}{_cost(arm.best)}.{_lr_ratio(arm.best, data)}"


def _lr_ratio(trial: Trial, data: SweepData) -> str:
    full = data.best_arm("full")
    lr = trial.params.get("optim.lr")
    full_lr = full.best.params.get("optim.lr") if full and full.best else None
    if not (isinstance(lr, float) and isinstance(full_lr, float) and full_lr > 0):
        return ""
    return f" Its best learning rate is {format_ratio(lr / full_lr)} times full fine-tuning's."


def _cost(trial: Trial) -> str:
    if trial.record is None:
        return ""
    share = format_share(trial.record.trainable_fraction)
    return f", training {format_count(trial.record.trainable_params)} parameters ({share} of the base)"


def _effort(data: SweepData) -> list[str]:
    reruns = f" and {len(data.reruns)} reruns" if data.reruns else ""
    time = format_seconds(data.record.makespan_s)
    tokens = format_count(data.tokens_trained)
    sentences = [f"{len(data.trials):,} trials{reruns} in {time}, {tokens} tokens trained{_saving(data)}."]
    if data.record.status != "complete":
        asked = sum(arm.row.trials for arm in data.arms)
        sentences.append(f"The sweep is {data.record.status}: {asked} trials were asked for{_reruns_asked(data)}.")
    return sentences


def _reruns_asked(data: SweepData) -> str:
    seeds = len(data.record.confirm_seeds)
    return f" and {seeds} reruns of each arm's winner" if seeds else ""


def _saving(data: SweepData) -> str:
    saved, planned = data.steps_saved_by_pruning, sum(record.steps_planned for record in data.run_records)
    if saved <= 0:
        return ""
    # a paused trial may still do the steps that it has saved
    so_far = " so far" if any(trial.state == "paused" for trial in data.trials) else ""
    return f"; pruning saved {saved:,} of {planned:,} planned steps{so_far} ({format_share(saved / planned)})"
