"""Reasons to doubt a sweep's numbers: whether trials learned anything, and whether arms were treated alike.

Learning is judged against an answer that needs no training. For data with labels it is the most frequent label of the
training data, or the mean of its numbers. Its scores are in the run records (`constant_answer` in `RunRecord.data`).
For text it is the frozen base, if the sweep has that arm.

Fairness is judged by the trials that ran; `sweep.definition.confirm` warns about the plan before the first trial.
Confirm runs don't count: they choose nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorasweep.config.data import ScoreMetric
from lorasweep.config.run import ALPHA, LR, RANK
from lorasweep.record import ArmRow, RunRecord, Trial, is_number
from lorasweep.report.sweep_data import SubjectData, SweepData
from lorasweep.wording import format_count, format_metric, format_score, format_setting, join_words

MAX_TOKENS_RATIO = 1.25
"""Maximum ratio of the tokens of two arms' runs that count as treated alike."""
MAX_WIDTH_DIFFERENCE_DECADES = 0.5
"""Two learning-rate ranges with a smaller difference in width count as equally wide. It is a step of a coarse grid
(1, 3, 10)."""
EDGE_FRACTION = 0.05
"""A value is at an end of its range if it is closer to the end than this share of the range."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Whether the trials are better than an answer that needs no training."""

    baseline: str = ""
    """The name of the answer; empty if none has a score."""
    base: str | None = None
    """The subject that is the answer; None for a constant answer."""
    metric: ScoreMetric | None = None
    score: float | None = None
    """The score of the answer on validation data."""
    test_score: float | None = None
    """None if nothing was confirmed."""
    state: Literal["learned", "not shown", "nothing"] | None = None
    """`nothing`: no trial is better. `not shown`: trials are better on validation data, but test data show no arm to be
    better. None if no trial or no such answer has a score."""
    headline: str | None = None
    """The failure in words; None without a failure."""
    remedy: str | None = None
    """Advice if nothing was learned: things to check and to try."""
    warnings: tuple[str, ...] = ()
    """One sentence for each subject that learned nothing, if another one learned something."""
    unlearned: tuple[str, ...] = ()
    """The subjects that are not shown to have learned anything."""

    def is_better(self, trial: Trial) -> bool | None:
        """Returns whether a complete or stopped trial is better than the answer; None if a score is not known."""
        score, has_ended = trial.search_score, trial.state in ("complete", "stopped")
        if self.metric is None or self.score is None or not is_number(score) or not has_ended:
            return None
        # a stopped trial has only a score on the validation examples of evaluations, but it was not better there either
        return trial.state == "complete" and self.metric.sign * (self.score - score) > 0


def judge_learning(data: SweepData) -> Learning:
    """Returns whether the trials are better than an answer that needs no training.

    An arm has learned if test data show it, or if a trial is better and there are no test data of the arm.
    """
    known = _find_baseline(data)
    subjects = [one for one in data.subjects if not one.row.is_base]
    trials = {one.arm: [t for t in data.list_trials(one.arm) if known.is_better(t) is not None] for one in subjects}
    scored = {arm: found for arm, found in trials.items() if found}
    if not scored:
        return Learning()
    is_better = {name: any(map(known.is_better, trials)) for name, trials in scored.items()}
    shown = {one.name: _is_shown_on_test_data(one.name, known, data) for one in subjects}
    shown_arms = {name: {shown[one.name] for one in subjects if one.arm == name} for name in scored}
    learned = {name for name, found in shown_arms.items() if True in found or (is_better[name] and False not in found)}
    if learned:
        failed = [name for name in scored if name not in learned and not is_better[name]]
        warnings = [f"`{name}` learned nothing: {_describe(scored[name], known, data)}." for name in failed]
        unlearned = [one.name for one in data.subjects if shown.get(one.name) is False or one.arm in failed]
        return replace(known, state="learned", warnings=tuple(warnings), unlearned=tuple(unlearned))
    if any(is_better.values()):
        metric = format_metric(data.shown_metric.name)
        headline = (
            f"Nothing is shown to be learned: on test data no method is shown to be better than {known.baseline}, by "
            f"{metric}."
        )
        return replace(known, state="not shown", headline=headline, unlearned=tuple(shown))
    every = [trial for found in scored.values() for trial in found]
    check = "the data" if known.base else "that the labels belong to the texts"
    steps = max((trial.record.steps_done for trial in every if trial.record), default=0)
    verdicts = "" if known.test_score is None else ", and the verdicts below do not compare the methods"
    return replace(
        known,
        state="nothing",
        headline=f"Nothing learned: {_describe(every, known, data)}.",
        remedy=f"No settings are recommended{verdicts}. Check {check}, then try other learning rates and more steps "
        f"than {steps}.",
        unlearned=tuple(shown),
    )


def _find_baseline(data: SweepData) -> Learning:
    """Returns an answer with its scores; without a name if there is none."""
    metric, scores = data.record.search_metric, _read_constant_answer(data.run_records, "validation")
    if is_number(score := scores.get(metric.name)):
        name = "the mean of the training labels" if "pearson" in scores else "the majority class"
        test_score = _read_constant_answer((run.record for run in data.confirm_runs), "test").get(metric.name)
        test_score = test_score if is_number(test_score) else None
        return Learning(baseline=name, metric=metric, score=score, test_score=test_score)
    if (score := data.best_score("frozen")) is None:
        return Learning()
    arm = next(one.name for one in data.subjects if one.row.is_base)
    base, mean = data.evidence.base or arm, data.evidence.mean(data.evidence.base)
    test_score = mean.value if mean else None
    return Learning(baseline="the frozen base", base=base, metric=metric, score=score, test_score=test_score)


def _read_constant_answer(records: Iterable[RunRecord | None], split: str) -> dict[str, Any]:
    """Returns the scores of the constant answer on a split, from the first record that has them."""
    found = (record.data.get(split, {}).get("constant_answer") for record in records if record)
    return next((scores for scores in found if isinstance(scores, dict)), {})


def _is_shown_on_test_data(name: str, known: Learning, data: SweepData) -> bool | None:
    mean, ends = data.evidence.mean(name), None
    if known.base is not None:
        difference = data.evidence.estimate_difference(name, known.base)
        ends = difference.find_interval() if difference and difference.is_testable else None
    elif mean and mean.is_testable and known.test_score is not None and (found := mean.find_interval()):
        ends = found[0] - known.test_score, found[1] - known.test_score
    return None if ends is None else max(data.shown_metric.sign * end for end in ends) < 0


def _describe(trials: Sequence[Trial], known: Learning, data: SweepData) -> str:
    """Returns a clause about trials that learned nothing."""
    count = f"all {len(trials)} trials score" if len(trials) > 1 else "the only trial scores"
    so_far = "" if data.record.status == "complete" else " so far"
    worse = " or worse" if any(trial.search_score != known.score for trial in trials) else ""
    score = "" if known.base else f" ({format_score(known.score)})"  # the table has that of the base
    return f"{count}{so_far} like {known.baseline}{score}{worse}"


def describe_longer_answers(data: SweepData) -> list[str]:
    """Returns a sentence on the lengths of preferred answers; none for other data."""
    for name, records in {"test": [run.record for run in data.confirm_runs], "validation": data.run_records}.items():
        for facts in (record.data.get(name, {}) for record in records if record):
            values = [facts.get(key) for key in ("longer_accuracy", "chosen_tokens", "rejected_tokens")]
            if all(map(is_number, values)):
                return [
                    f"Always choosing the longer answer has preference accuracy {format_score(values[0])} on {name} "
                    f"data: chosen answers have {values[1]:.0f} scored tokens on average, rejected ones "
                    f"{values[2]:.0f}. A method that scores no higher may have learned lengths alone."
                ]
    return []


@dataclass(frozen=True, kw_only=True)
class Fairness:
    """Whether arms were treated alike and their searches found the best, as far as it matters for the comparison."""

    is_fair: bool | None
    """None if fewer than two arms train."""
    faults: tuple[str, ...]
    """Clauses that say why the comparison is not fair."""
    edges: tuple[str, ...]
    """Sentences on best values, but not on rates, that lie at an end of their ranges."""


def judge_fairness(data: SweepData, *, has_learned: bool = True) -> Fairness:
    """Returns whether arms had runs of similar tokens and similar ranges, and whether their searches found the best.

    A search did not find the best if the best learning rate lies at an end of its range, or if the expected regret
    exceeds the margin. So an arm that searches fewer dimensions needs fewer trials.
    """
    compared = [row for row in data.record.arms if not row.is_base and row.name not in data.fixed_arms]
    edges = list_edges(data) if has_learned else []
    faulty = {LR} if len(compared) > 1 else set()
    faults = [clause for key, clause in edges if key in faulty]
    others = tuple(f"{clause[0].upper()}{clause[1:]}." for key, clause in edges if key not in faulty)
    if not faulty:
        return Fairness(is_fair=None, faults=(), edges=others)
    tokens = {row.name: max(map(_estimate_tokens, data.list_trials(row.name)), default=0) for row in compared}
    decades = {row.name: _measure_lr_decades(row) for row in compared}
    for found, unit, show, limit in (
        (tokens, "tokens a run", format_count, MAX_TOKENS_RATIO * min(tokens.values())),
        (decades, "decades of learning rates", "{:.1f}".format, min(decades.values()) + MAX_WIDTH_DIFFERENCE_DECADES),
    ):
        least, most = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
        if found[most] > limit:
            faults.append(f"`{least}` had {show(found[least])} {unit} and `{most}` {show(found[most])}")
    margin = data.search_margin
    regrets = {row.subject: row.regret / margin for row in data.record.settings if margin and row.regret is not None}
    if above := [f"{regret:.2g} margins for `{subject}`" for subject, regret in regrets.items() if regret > 1]:
        better = f"an untried setting is expected to be better by {join_words(above)}"
        faults.append(f"{better}, so the luck of the search may decide")
    return Fairness(is_fair=not faults, faults=tuple(faults), edges=others)


def _estimate_tokens(trial: Trial) -> int:
    """Returns the number of tokens that a trial trained, or would have trained if it had not been stopped."""
    if (record := trial.record) is None or trial.state != "stopped":
        return record.tokens_trained if record else 0
    return record.tokens_trained * record.steps_planned // max(record.steps_done, 1)


def _measure_lr_decades(row: ArmRow) -> float:
    """Returns the width of an arm's range of learning rates; 0 if it is not searched."""
    low, high, _ = find_bounds(row.space.get(LR)) or (1.0, 1.0, False)
    return math.log10(high) - math.log10(low) if low > 0 else 0.0


def list_edges(data: SweepData) -> list[tuple[str, str]]:
    """Returns each key whose best value lies at an end of its range, with a clause that says so.

    A key is left out if all trials with a score lie at that end, because no trial shows that others are worse.
    """
    edges: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in data.subjects:
        for key, value in (one.best.params if one.best else {}).items():
            if key == one.subject.key or (key == ALPHA and one.best and one.best.follows_rate_law):
                continue  # values of `confirm_each` are compared; under the rate law, another α means another rate
            end, trials = _find_end(one, key, one.best), data.list_trials(one.arm)
            if end and any(_find_end(one, key, t) != end for t in trials if t.search_score is not None):
                edges[key, end].append(f"`{one.name}` ({format_setting(value)})")
    better = {"lower": "lower", "upper": "higher"}
    text = "the best `{}` of {} lies at the {} end of its range, so {} values may be better"
    return [(key, text.format(key, join_words(arms), end, better[end])) for (key, end), arms in edges.items()]


def _find_end(one: SubjectData, key: str, trial: Trial | None) -> str | None:
    """Returns `lower` or `upper` if a trial's value lies at that end of the arm's range, else None."""
    space = one.row.space.get(key)
    value, bounds = trial.numeric_setting(key) if trial else None, find_bounds(space)
    if value is None or bounds is None or value == (1 if key == RANK else 0) == bounds[0]:
        return None  # nothing is below rank 1, nor below 0 (a rate of dropout, a weight decay)
    low, high, is_log = bounds
    if is_log and value <= 0:
        return None
    position = math.log(value / low) / math.log(high / low) if is_log else (value - low) / (high - low)
    # In a list of choices only the smallest and the largest are at an end.
    margin = 0.0 if isinstance(space, list) else EDGE_FRACTION
    return "lower" if position <= margin else "upper" if position >= 1 - margin else None


def find_bounds(swept: Any) -> tuple[float, float, bool] | None:
    """Returns the lowest and the highest of a key's choices or of its range, and whether the range is logarithmic.

    Returns None if a value is not a number or if there are no two different numbers.
    """
    is_mapping = isinstance(swept, dict)
    values = [swept.get("low"), swept.get("high")] if is_mapping else swept
    if not isinstance(values, list) or not all(map(is_number, values)) or len(set(values)) < 2:
        return None
    return min(values), max(values), is_mapping and swept.get("log") is True and min(values) > 0
