"""Judges whether a sweep's trials learned anything: compares them with an answer that needs no training.

For data with labels the answer is the most frequent label of the training data, or the mean of its numbers. Its scores
are in the run records (`constant_answer` in `RunRecord.data`). For text it is the frozen base, if the sweep has that
arm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.special import ndtr

from lorasweep.config.run import LR
from lorasweep.record import RunRecord, Trial
from lorasweep.report.sweep_data import SweepData, finite_number
from lorasweep.wording import format_metric, format_score, format_setting

CORRELATIONS = {
    "accuracy": "matthews",
    "f1": "matthews",
    "matthews": "matthews",
    "pearson": "pearson",
    "spearman": "spearman",
}
"""For each metric, the correlation of predictions and labels that is 0 on average if the predictions know nothing."""
LUCK_LEVEL = 0.05
"""Significance level: the chance that guesses count as learned, over all evaluations of a sweep."""

Rating = Literal["not better", "luck", "better", "beyond luck"]
"""Result of comparing a trial's best score with the answer's score. `better` is used for a metric without a test
against luck."""


@dataclass(frozen=True, kw_only=True)
class UntrainedAnswer:
    """An answer that needs no training, with its scores in the sweep's metric."""

    name: str
    metric: str
    sign: int
    """1 if lower scores are better, else -1."""
    arm: str | None = None
    """The arm that is the frozen base; None for a constant answer."""
    score: float
    """On validation data."""
    test_score: float | None
    """None if nothing was confirmed."""
    num_examples: float | None = None
    """The number of validation examples; None for the frozen base."""

    def measure_gain(self, trial: Trial) -> float:
        """Returns how much better the best score of a trial is than the answer; 0 without a score."""
        return 0.0 if trial.value is None else self.sign * (self.score - trial.value)

    def find_chance(self, trial: Trial) -> float | None:
        """Returns `chance_of_correlation` of a trial's best evaluation; None if the record has no correlation."""
        metric = CORRELATIONS.get(self.metric)
        correlation = finite_number(trial.record.best.get(metric)) if metric and trial.record else None
        if correlation is None or self.num_examples is None:
            return None
        return chance_of_correlation(correlation, num_examples=self.num_examples)

    def rate_trial(self, trial: Trial, *, level: float) -> Rating:
        """Returns the rating of a trial; `level` is the chance below which a correlation does not count as luck."""
        if self.measure_gain(trial) <= 0:
            return "not better"
        chance = self.find_chance(trial)
        if chance is None:
            return "better"
        return "beyond luck" if chance < level else "luck"

    def describe_best(self, trials: Sequence[Trial]) -> str:
        """Returns a clause with the best score of trials and the answer's."""
        best = min((trial.value for trial in trials if trial.value is not None), key=lambda score: self.sign * score)
        found, own = (format_score(score, beside=[best, self.score]) for score in (best, self.score))
        return f"the best {format_metric(self.metric)} on validation data is {found}, that of {self.name} {own}"


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Whether the trials are better than an answer that needs no training."""

    state: Literal["learned", "not shown", "nothing"] | None = None
    """`nothing`: no trial is better. `not shown`: no arm is shown to be better on test data, or without test data no
    trial is better by more than luck explains. None if no trial or no such answer has a score."""
    answer: UntrainedAnswer | None = None
    headline: str | None = None
    """The failure in words; None without a failure."""
    remedy: str | None = None
    """Advice if nothing was learned: things to check and to try."""
    warnings: tuple[str, ...] = ()
    """One sentence for each subject that learned nothing, if another one learned something."""
    unlearned: tuple[str, ...] = ()
    """The subjects that are not shown to have learned anything."""

    def is_better(self, trial: Trial) -> bool | None:
        """Returns whether a trial's best score is better than the answer's; None if one of them is not known."""
        return None if self.answer is None or trial.value is None else self.answer.measure_gain(trial) > 0


def judge_learning(data: SweepData) -> Learning:
    """Returns whether the trials are better than an answer that needs no training.

    An arm has learned if test data show it, or if a trial is better by more than luck. For a metric without a test
    against luck a better trial is enough, unless test data don't show the arm to be better.
    """
    answer = _find_answer(data)
    arms = [arm for arm in data.searches if arm.row.method != "frozen"]
    scored = {arm.name: [trial for trial in arm.trials if trial.value is not None] for arm in arms}
    scored = {name: trials for name, trials in scored.items() if trials}
    if answer is None or not scored:
        return Learning()
    trials = [trial for found in scored.values() for trial in found]
    num_evaluations = sum(max(len(trial.curve), 1) for trial in trials)
    level = LUCK_LEVEL / num_evaluations  # Bonferroni's correction: each evaluation may be the best one by luck
    ratings = {name: {answer.rate_trial(trial, level=level) for trial in found} for name, found in scored.items()}
    subjects = [arm for arm in data.arms if arm.row.method != "frozen"]
    shown = {arm.name: _is_shown_on_test_data(arm.name, answer, data) for arm in subjects}
    shown_arms = {name: {shown[arm.name] for arm in subjects if arm.arm == name} for name in scored}
    learned = {
        name
        for name, found in ratings.items()
        if True in shown_arms[name] or "beyond luck" in found or ("better" in found and False not in shown_arms[name])
    }
    known = set().union(*shown_arms.values()) - {None}
    refuted = f"no method is shown to be better than {answer.name} ({format_score(answer.test_score)})."
    if learned:
        failed = [name for name, found in ratings.items() if name not in learned and "better" not in found]
        warnings = [f"`{name}` learned nothing: {_describe(scored[name], answer, data)}." for name in failed]
        warnings += [f"On test data {refuted}"] if known == {False} else []
        unlearned = [arm.name for arm in data.arms if shown.get(arm.name) is False or arm.arm in failed]
        return Learning(state="learned", answer=answer, warnings=tuple(warnings), unlearned=tuple(unlearned))
    if all(found == {"not better"} for found in ratings.values()):
        headline, remedy = _describe_nothing(trials, answer, data, level=level)
        return Learning(state="nothing", answer=answer, headline=headline, remedy=remedy, unlearned=tuple(shown))
    if known == {False}:
        reason = f"on test data {refuted}"
    else:  # every better trial is rated as luck, so the number of examples is known
        reason = (
            f"{answer.describe_best(trials)}. With {answer.num_examples:,} examples, the best of "
            f"{num_evaluations:,} evaluations can be that good by luck."
        )
    headline = f"Nothing is shown to be learned: {reason}"
    return Learning(state="not shown", answer=answer, headline=headline, unlearned=tuple(shown))


def _find_answer(data: SweepData) -> UntrainedAnswer | None:
    metric, validation = data.record.metric, _read_entry(data.run_records, "validation")
    scores = validation.get("constant_answer", {})
    if (score := finite_number(scores.get(metric))) is not None:
        names = {"pearson": "the mean of the training labels", "matthews": "the majority class"}
        test = _read_entry((run.record for run in data.confirm_runs), "test")
        return UntrainedAnswer(
            name=next((names[key] for key in names if key in scores), "the most frequent labels"),
            metric=metric,
            sign=data.sign,
            score=score,
            test_score=finite_number(test.get("constant_answer", {}).get(metric)),
            num_examples=finite_number(validation.get("examples")),
        )
    if (score := data.best_score("frozen")) is None:
        return None
    arm = next(arm.name for arm in data.arms if arm.row.method == "frozen")
    base = data.evidence.subject(data.evidence.base)
    return UntrainedAnswer(
        name="the frozen base",
        metric=metric,
        sign=data.sign,
        arm=data.evidence.base or arm,
        score=score,
        test_score=base.mean if base else None,
    )


def _read_entry(records: Iterable[RunRecord | None], split: str) -> dict[str, Any]:
    """Returns the entry of a split in the first record that has one with the scores of the constant answer."""
    for record in records:
        entry = record.data.get(split) if record else None
        if isinstance(entry, dict) and isinstance(entry.get("constant_answer"), dict):
            return entry
    return {}


def _is_shown_on_test_data(name: str, answer: UntrainedAnswer, data: SweepData) -> bool | None:
    if answer.arm is not None:
        found = data.evidence.estimate_difference(name, answer.arm)
        interval = found.find_interval() if found and found.is_testable else None
        return None if interval is None else max(data.sign * end for end in interval) < 0
    subject = data.evidence.subject(name)
    if subject is None or subject.interval is None or answer.test_score is None or len(subject.seeds) < 2:
        return None
    return max(data.sign * (end - answer.test_score) for end in subject.interval) < 0


def chance_of_correlation(correlation: float, *, num_examples: float) -> float:
    """Returns the probability that predictions correlate at least as much with labels that are independent of them.

    The variance of a permuted correlation is 1 / (n - 1), and smaller for Matthews' of more than two classes.
    """
    return float(ndtr(-correlation * max(num_examples - 1, 0) ** 0.5))


def _describe(trials: Sequence[Trial], answer: UntrainedAnswer, data: SweepData) -> str:
    """Returns a clause about trials that learned nothing."""
    count = f"all {len(trials)} trials score" if len(trials) > 1 else "the only trial scores"
    so_far = "" if data.record.status == "complete" else " so far"
    worse = " or worse" if any(answer.measure_gain(trial) < 0 for trial in trials) else ""
    return f"{count}{so_far} like {answer.name}{worse} ({answer.describe_best(trials)})"


def _describe_nothing(
    trials: Sequence[Trial], answer: UntrainedAnswer, data: SweepData, *, level: float
) -> tuple[str, str]:
    """Returns headline and remedy of a sweep in which no trial is better than the answer."""
    chances = [answer.find_chance(trial) for trial in trials]
    if any(chance is not None and chance < level for chance in chances):
        return (
            f"No trial is better than {answer.name} ({answer.describe_best(trials)}).",
            "No settings are recommended. Predictions do depend on the labels: `data.metric=matthews` counts rare "
            "labels as much as frequent ones.",
        )
    check = "the data" if answer.arm else "that the labels belong to the texts"
    steps = max((trial.record.steps_done for trial in trials if trial.record), default=0)
    rates = sorted({lr for trial in trials if (lr := trial.numeric_setting(LR)) is not None})
    tried = " to ".join(dict.fromkeys(format_setting(lr) for lr in (*rates[:1], *rates[-1:])))
    further = [*([f"other learning rates (tried: {tried})"] if tried else []), f"more steps than {steps}"]
    verdicts = "" if answer.test_score is None else ", and the verdicts below do not compare the methods"
    return (
        f"Nothing learned: {_describe(trials, answer, data)}.",
        f"No settings are recommended{verdicts}. Check {check}, then try {' and '.join(further)}.",
    )
