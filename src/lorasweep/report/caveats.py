"""Reasons to doubt a sweep's numbers: whether trials learned anything, and whether searches found the best settings.

Learning is judged against an answer that needs no training. For data with labels it is the most frequent label of the
training data, or the mean of its numbers. Its scores are in the run records (`constant_answer` in `RunRecord.data`).
For text it is the frozen base, if the sweep has that arm.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorasweep.config.data import ScoreMetric
from lorasweep.config.run import ALPHA, RANK
from lorasweep.record import RunRecord, Trial, is_number
from lorasweep.report.sweep_data import SubjectResult, SweepData

EDGE_FRACTION = 0.05
"""A value is at an end of its range if it is closer to the end than this share of the range."""


Baseline = Literal["the majority class", "the mean of the training labels", "the frozen base"]


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Whether the trials are better than an answer that needs no training."""

    baseline: Baseline | None = None
    """The answer; None if none has a score."""
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
    failed: tuple[str, ...] = ()
    """The arms of which no trial is better, if another arm has learned something."""
    unlearned: tuple[str, ...] = ()
    """The subjects that are not shown to have learned anything."""

    @property
    def has_failed(self) -> bool:
        """Whether nothing is shown to be learned. Then nothing is recommended."""
        return self.state in ("nothing", "not shown")

    def is_better(self, trial: Trial) -> bool | None:
        """Returns whether a complete or stopped trial is better than the answer; None if a score is not known."""
        score, has_ended = trial.search_score, trial.state in ("complete", "stopped")
        if self.metric is None or self.score is None or not is_number(score) or not has_ended:
            return None
        # a stopped trial has only a score on the validation examples of evaluations, but it was not better there either
        return trial.state == "complete" and self.metric.is_better(score, self.score)


def judge_learning(data: SweepData) -> Learning:
    """Returns whether the trials are better than an answer that needs no training.

    An arm has learned if test data show it, or if a trial is better and there are no test data of the arm.
    """
    known = _find_baseline(data)
    subjects = [one for one in data.subjects if not one.row.is_base]
    trials = {one.arm: [t for t in data.list_trials(one.arm) if known.is_better(t) is not None] for one in subjects}
    scored = {arm: found for arm, found in trials.items() if found}
    is_searching = sum(trial.state != "running" for trial in data.trials) < sum(arm.trials for arm in data.record.arms)
    is_any_complete = any(trial.state == "complete" for found in scored.values() for trial in found)
    if not scored or (is_searching and not is_any_complete):  # trials that stop early end first
        return Learning()
    is_better = {name: any(map(known.is_better, trials)) for name, trials in scored.items()}
    shown = {one.name: _is_shown_on_test_data(one.name, known, data) for one in subjects}
    shown_arms = {name: {shown[one.name] for one in subjects if one.arm == name} for name in scored}
    learned = {name for name, found in shown_arms.items() if True in found or (is_better[name] and False not in found)}
    if not learned:
        return replace(known, state="not shown" if any(is_better.values()) else "nothing", unlearned=tuple(shown))
    failed = tuple(name for name in scored if name not in learned and not is_better[name])
    unlearned = [one.name for one in data.subjects if shown.get(one.name) is False or one.arm in failed]
    return replace(known, state="learned", failed=failed, unlearned=tuple(unlearned))


def _find_baseline(data: SweepData) -> Learning:
    """Returns an answer with its scores; without a name if there is none."""
    metric, scores = data.record.search_metric, _read_constant_answer(data.run_records, "validation")
    if is_number(score := scores.get(metric.name)):
        name: Baseline = "the mean of the training labels" if "pearson" in scores else "the majority class"
        test_score = _read_constant_answer((run.record for run in data.confirm_runs), "test").get(metric.name)
        test_score = test_score if is_number(test_score) else None
        return Learning(baseline=name, metric=metric, score=score, test_score=test_score)
    if (score := data.best_score("frozen")) is None:
        return Learning()
    arm = next(one.name for one in data.subjects if one.row.is_base)
    base, mean = data.evidence.scale.base or arm, data.evidence.mean(data.evidence.scale.base)
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


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A reason why the confirmed settings may not be the best."""

    name: Literal["regret", "lower end", "upper end"]
    """`regret`: an untried setting is expected to be better, by the values in margins. `end`: the best value of a key
    lies at that end of its range."""
    values: dict[str, Any]
    """By subject."""
    key: str = ""


def list_faults(data: SweepData) -> list[Fault]:
    """Returns the best values at ends of their ranges, and the expected regrets above one margin.

    Nothing is found before the sweep is complete, because its first trials say little.
    """
    if data.record.status != "complete":
        return []
    margin = data.search_margin
    regrets = {row.subject: row.regret / margin for row in data.record.settings if margin and row.regret is not None}
    above = {subject: regret for subject, regret in regrets.items() if regret > 1}
    return [*list_edges(data), *([Fault(name="regret", values=above)] if above else [])]


def list_edges(data: SweepData) -> list[Fault]:
    """Returns each key whose best value lies at an end of its range.

    A key is left out if all trials with a score lie at that end, because no trial shows that others are worse.
    """
    edges: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for one in data.subjects:
        for key, value in (one.best.params if one.best else {}).items():
            if key == one.subject.key or (key == ALPHA and one.best and one.best.follows_rate_law):
                continue  # values of `confirm_each` are compared; under the rate law, another α means another rate
            end, trials = _find_end(one, key, value), data.list_trials(one.arm)
            if end and any(_find_end(one, key, t.setting(key)) != end for t in trials if t.search_score is not None):
                edges[key, end][one.name] = value
    return [
        Fault(name="lower end" if end == "lower" else "upper end", values=values, key=key)
        for (key, end), values in edges.items()
    ]


def _find_end(one: SubjectResult, key: str, value: Any) -> str | None:
    """Returns `lower` or `upper` if a value lies at that end of the arm's range, else None."""
    space = one.row.space.get(key)
    bounds = find_bounds(space)
    if not is_number(value) or bounds is None or value == (1 if key == RANK else 0) == bounds[0]:
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
