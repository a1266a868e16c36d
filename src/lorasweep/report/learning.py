"""Judges whether a sweep's trials learned anything: compares them with an answer that needs no training.

For data with labels the answer is the most frequent label of the training data, or the mean of its numbers. Its scores
are in the run records (`constant_answer` in `RunRecord.data`). For text it is the frozen base, if the sweep has that
arm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorasweep.record import RunRecord, Trial
from lorasweep.report.sweep_data import SweepData, finite_number
from lorasweep.wording import format_metric, format_score


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Whether the trials are better than an answer that needs no training."""

    answer: str = ""
    """The name of the answer; empty if none has a score."""
    base: str | None = None
    """The subject that is the answer; None for a constant answer."""
    sign: int = 1
    """1 if lower scores are better, else -1."""
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
        """Returns whether a complete trial is better than the answer; None if one of their scores is not known."""
        return (
            None
            if self.score is None or trial.value is None or not trial.is_complete
            else self.sign * (self.score - trial.value) > 0
        )


def judge_learning(data: SweepData) -> Learning:
    """Returns whether the trials are better than an answer that needs no training.

    An arm has learned if test data show it, or if a trial is better and there are no test data of the arm.
    """
    known = _find_answer(data)
    # only complete trials have a score on all validation examples, as the answer has
    scored = {arm.name: [trial for trial in arm.trials if trial.is_complete] for arm in data.searches}
    subjects = [arm for arm in data.arms if arm.row.method != "frozen"]
    scored = {arm.arm: scored[arm.arm] for arm in subjects if scored[arm.arm]}
    if known.score is None or not scored:
        return Learning()
    is_better = {name: any(map(known.is_better, trials)) for name, trials in scored.items()}
    shown = {arm.name: _is_shown_on_test_data(arm.name, known, data) for arm in subjects}
    shown_arms = {name: {shown[arm.name] for arm in subjects if arm.arm == name} for name in scored}
    learned = {name for name, found in shown_arms.items() if True in found or (is_better[name] and False not in found)}
    if learned:
        failed = [name for name in scored if name not in learned and not is_better[name]]
        warnings = [f"`{name}` learned nothing: {_describe(scored[name], known, data)}." for name in failed]
        unlearned = [arm.name for arm in data.arms if shown.get(arm.name) is False or arm.arm in failed]
        return replace(known, state="learned", warnings=tuple(warnings), unlearned=tuple(unlearned))
    if any(is_better.values()):
        refuted = f"no method is shown to be better than {known.answer} ({format_score(known.test_score)})."
        headline = f"Nothing is shown to be learned: on test data {refuted}"
        return replace(known, state="not shown", headline=headline, unlearned=tuple(shown))
    trials = [trial for found in scored.values() for trial in found]
    check = "the data" if known.base else "that the labels belong to the texts"
    steps = max((trial.record.steps_done for trial in trials if trial.record), default=0)
    verdicts = "" if known.test_score is None else ", and the verdicts below do not compare the methods"
    return replace(
        known,
        state="nothing",
        headline=f"Nothing learned: {_describe(trials, known, data)}.",
        remedy=f"No settings are recommended{verdicts}. Check {check}, then try other learning rates and more steps "
        f"than {steps}.",
        unlearned=tuple(shown),
    )


def _find_answer(data: SweepData) -> Learning:
    """Returns an answer with its scores; without a name if there is none."""
    metric, validation = data.record.metric, _read_entry(data.run_records, "validation")
    scores = validation.get("constant_answer", {})
    if (score := finite_number(scores.get(metric))) is not None:
        name = "the mean of the training labels" if "pearson" in scores else "the majority class"
        test = _read_entry((run.record for run in data.confirm_runs), "test")
        test_score = finite_number(test.get("constant_answer", {}).get(metric))
        return Learning(answer=name, sign=data.sign, score=score, test_score=test_score)
    if (score := data.best_score("frozen")) is None:
        return Learning()
    arm = next(arm.name for arm in data.arms if arm.row.method == "frozen")
    base, mean = data.evidence.base or arm, data.evidence.mean(data.evidence.base)
    test_score = mean.value if mean else None
    return Learning(answer="the frozen base", base=base, sign=data.sign, score=score, test_score=test_score)


def _read_entry(records: Iterable[RunRecord | None], split: str) -> dict[str, Any]:
    """Returns the entry of a split in the first record that has one with the scores of the constant answer."""
    for record in records:
        entry = record.data.get(split) if record else None
        if isinstance(entry, dict) and isinstance(entry.get("constant_answer"), dict):
            return entry
    return {}


def _is_shown_on_test_data(name: str, known: Learning, data: SweepData) -> bool | None:
    mean, ends = data.evidence.mean(name), None
    if known.base is not None:
        difference = data.evidence.estimate_difference(name, known.base)
        ends = difference.find_interval() if difference and difference.is_testable else None
    elif mean and mean.is_testable and known.test_score is not None and (found := mean.find_interval()):
        ends = found[0] - known.test_score, found[1] - known.test_score
    return None if ends is None else max(data.sign * end for end in ends) < 0


def _describe(trials: Sequence[Trial], known: Learning, data: SweepData) -> str:
    """Returns a clause about trials that learned nothing."""
    count = f"all {len(trials)} complete trials score" if len(trials) > 1 else "the only complete trial scores"
    so_far = "" if data.record.status == "complete" else " so far"
    values = [trial.value for trial in trials if trial.value is not None]
    worse = " or worse" if any(value != known.score for value in values) else ""
    best = min(values, key=lambda value: data.sign * value)
    found, own = (format_score(score, beside=[best, known.score]) for score in (best, known.score))
    return (
        f"{count}{so_far} like {known.answer}{worse} (the best {format_metric(data.record.metric)} on validation data "
        f"is {found}, that of {known.answer} {own})"
    )
