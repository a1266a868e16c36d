"""Judges whether a sweep's trials learned anything: compares them with an answer that needs no training.

For data with labels the answer is the most frequent label of the training data, or the mean of its numbers. Its scores
are in the run records (`constant_answer` in `RunRecord.data`). For text it is the frozen base, if the sweep has that
arm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorasweep.config.run import LR
from lorasweep.record import RunRecord, Trial
from lorasweep.report.sweep_data import SweepData, finite_number
from lorasweep.wording import format_metric, format_score, format_setting


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

    def measure_gain(self, trial: Trial) -> float:
        """Returns how much better the best score of a trial is than the answer; 0 without a score."""
        return 0.0 if trial.value is None else self.sign * (self.score - trial.value)

    def describe_best(self, trials: Sequence[Trial]) -> str:
        """Returns a clause with the best score of trials and the answer's."""
        best = min((trial.value for trial in trials if trial.value is not None), key=lambda score: self.sign * score)
        found, own = (format_score(score, beside=[best, self.score]) for score in (best, self.score))
        return f"the best {format_metric(self.metric)} on validation data is {found}, that of {self.name} {own}"


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Whether the trials are better than an answer that needs no training."""

    state: Literal["learned", "not shown", "nothing"] | None = None
    """`nothing`: no trial is better. `not shown`: trials are better on validation data, but test data show no arm to be
    better. None if no trial or no such answer has a score."""
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

    An arm has learned if test data show it, or if a trial is better and there are no test data of the arm.
    """
    answer = _find_answer(data)
    arms = [arm for arm in data.searches if arm.row.method != "frozen"]
    scored = {arm.name: [trial for trial in arm.trials if trial.value is not None] for arm in arms}
    scored = {name: trials for name, trials in scored.items() if trials}
    if answer is None or not scored:
        return Learning()
    is_better = {name: any(answer.measure_gain(trial) > 0 for trial in found) for name, found in scored.items()}
    subjects = [arm for arm in data.arms if arm.row.method != "frozen"]
    shown = {arm.name: _is_shown_on_test_data(arm.name, answer, data) for arm in subjects}
    shown_arms = {name: {shown[arm.name] for arm in subjects if arm.arm == name} for name in scored}
    learned = {name for name, found in shown_arms.items() if True in found or (is_better[name] and False not in found)}
    refuted = f"no method is shown to be better than {answer.name} ({format_score(answer.test_score)})."
    if learned:
        failed = [name for name in scored if name not in learned and not is_better[name]]
        warnings = [f"`{name}` learned nothing: {_describe(scored[name], answer, data)}." for name in failed]
        unlearned = [arm.name for arm in data.arms if shown.get(arm.name) is False or arm.arm in failed]
        return Learning(state="learned", answer=answer, warnings=tuple(warnings), unlearned=tuple(unlearned))
    if not any(is_better.values()):
        trials = [trial for found in scored.values() for trial in found]
        headline, remedy = _describe_nothing(trials, answer, data)
        return Learning(state="nothing", answer=answer, headline=headline, remedy=remedy, unlearned=tuple(shown))
    headline = f"Nothing is shown to be learned: on test data {refuted}"
    return Learning(state="not shown", answer=answer, headline=headline, unlearned=tuple(shown))


def _find_answer(data: SweepData) -> UntrainedAnswer | None:
    metric, validation = data.record.metric, _read_entry(data.run_records, "validation")
    scores = validation.get("constant_answer", {})
    if (score := finite_number(scores.get(metric))) is not None:
        test = _read_entry((run.record for run in data.confirm_runs), "test")
        return UntrainedAnswer(
            name="the mean of the training labels" if "pearson" in scores else "the majority class",
            metric=metric,
            sign=data.sign,
            score=score,
            test_score=finite_number(test.get("constant_answer", {}).get(metric)),
        )
    if (score := data.best_score("frozen")) is None:
        return None
    arm = next(arm.name for arm in data.arms if arm.row.method == "frozen")
    base = data.evidence.mean(data.evidence.base)
    return UntrainedAnswer(
        name="the frozen base",
        metric=metric,
        sign=data.sign,
        arm=data.evidence.base or arm,
        score=score,
        test_score=base.value if base else None,
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
    mean = data.evidence.mean(name)
    interval = mean.find_interval() if mean and mean.is_testable else None
    if interval is None or answer.test_score is None:
        return None
    return max(data.sign * (end - answer.test_score) for end in interval) < 0


def _describe(trials: Sequence[Trial], answer: UntrainedAnswer, data: SweepData) -> str:
    """Returns a clause about trials that learned nothing."""
    count = f"all {len(trials)} trials score" if len(trials) > 1 else "the only trial scores"
    so_far = "" if data.record.status == "complete" else " so far"
    worse = " or worse" if any(answer.measure_gain(trial) < 0 for trial in trials) else ""
    return f"{count}{so_far} like {answer.name}{worse} ({answer.describe_best(trials)})"


def _describe_nothing(trials: Sequence[Trial], answer: UntrainedAnswer, data: SweepData) -> tuple[str, str]:
    """Returns headline and remedy of a sweep in which no trial is better than the answer."""
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
