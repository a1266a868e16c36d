"""The sentences below the three answers: scores, effort, fairness, tests, limits, and where to search next.

Scores on test data, if there are any, replace the scores of the search.
"""

from __future__ import annotations

from lorasweep.config.sweep import parse_margin
from lorasweep.report.choice import find_best_arm, find_score, get_score_sort_key
from lorasweep.report.sweep_data import SweepData
from lorasweep.wording import (
    format_count,
    format_metric,
    format_score,
    format_seconds,
    format_share,
    format_share_estimate,
    join_words,
)

ONE_SEED = (
    "Every score is one seed on validation data, on which the search also picked the winners; "
    "whether the differences are more than chance is not tested yet."
)


def describe_findings(data: SweepData, fairness: list[str]) -> list[str]:
    """Returns the sentences, the most important first. Warnings and the headline of a failure stand above them."""
    return [
        *_describe_scores(data),
        *_describe_gain(data),
        *_describe_effort(data),
        *fairness,
        *([_describe_tests(data), _describe_margin(data)] if data.evidence.answers else []),
        *(data.evidence.notes if data.evidence.subjects else [ONE_SEED]),
        *data.record.warnings,
        *data.record.notes,
    ]


def _describe_scores(data: SweepData) -> list[str]:
    if all(find_score(arm, data) is None for arm in data.arms):
        return ["No trial is complete, so there is no score to compare."]
    base, full = (find_best_arm(method, data) for method in ("frozen", "full"))
    if base is None or full is None:
        gain = ["No share of full's gain is known, because that needs a score of the frozen base and of `full`."]
    elif get_score_sort_key(base, data) <= get_score_sort_key(full, data):
        gain = ["Full fine-tuning gained nothing, so no share of its gain is given."]
    else:
        gain = []
    return [_describe_metric(data), *gain]


def _describe_metric(data: SweepData) -> str:
    metric, evidence = format_metric(data.record.metric), data.evidence
    order = "lower" if data.record.direction == "minimize" else "higher"
    if not evidence.subjects:
        return f"Scores are {metric}, {order} is better."
    counts = sorted({len(arm.seeds) for arm in evidence.subjects if arm.name != evidence.base} or {1})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    groups = f" in {evidence.num_groups:,} groups" if evidence.num_groups != evidence.num_examples else ""
    examples = f" and {evidence.num_examples:,} test examples{groups}" if evidence.num_examples else ""
    return (
        f"Scores are {metric} on test data that no search has seen, {order} is better: means over {seeds} fresh "
        f"{'seed' if counts[-1] == 1 else 'seeds'} with 95 % intervals over seeds{examples}."
    )


def _describe_tests(data: SweepData) -> str:
    """Returns a sentence on the planned looks, the seeds and the level of the answers."""
    record, evidence = data.record, data.evidence
    used = max((len(subject.seeds) for subject in evidence.subjects), default=0)
    count, looks = len(record.questions), join_words([str(look) for look in record.looks])
    planned = f"at {len(record.looks)} planned looks" if len(record.looks) > 1 else "once"
    return (
        f"The {'question is' if count == 1 else f'{count} questions are'} stated in the sweep and tested {planned} "
        f"({looks} seeds; {used} were used). The chance of any false verdict is at most 5 % over all questions and "
        f"looks, so the intervals beside verdicts have {100 * evidence.confidence:.3g} % confidence."
    )


def _describe_gain(data: SweepData) -> list[str]:
    """Returns a sentence on full fine-tuning's gain as a share of the frozen base's score; none without both."""
    found, base = data.evidence.relative_gain, data.find_arm(data.evidence.base)
    if found is None or base is None or (base.best and base.best.record and base.best.record.base.get("head")):
        return []  # a base with a new head gives a constant answer, so the gain says nothing about what the base knows
    verb = "lowers" if data.sign > 0 else "raises"
    return [
        f"Full fine-tuning {verb} the frozen base's {format_metric(data.record.metric)} by "
        f"{format_share_estimate(*found)}: the smaller this share, the nearer is the data to what the base knows."
    ]


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


def _describe_margin(data: SweepData) -> str:
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
