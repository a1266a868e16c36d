"""The evidence of one sweep: the test scores of its subjects, and the answers to its questions."""

from __future__ import annotations

from dataclasses import dataclass

from lorasweep.record import QuestionName, SweepRecord
from lorasweep.report.evidence.confirm import answer_sweep, build_scale
from lorasweep.report.evidence.estimates import Estimate, Interval, estimate_ratio, estimate_sum
from lorasweep.report.evidence.questions import Answer, Scale, compute_level
from lorasweep.report.evidence.scores import ConfirmScores

Ratio = tuple[float, Interval | None]
"""A ratio of two sums of scores with its interval."""


@dataclass(frozen=True, kw_only=True)
class SubjectEvidence:
    """The results of one subject's confirm runs on test data."""

    name: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    """The score of each seed."""
    mean: float
    std: float | None
    """The standard deviation over seeds; None for one seed."""
    interval: Interval | None
    """The 95 % interval of the mean alone, over seeds and test examples."""
    share_of_full_gain: float | None
    """(base - subject) / (base - full) on test data; None if full fine-tuning gained nothing."""
    share_interval: Interval | None
    """The interval of the share at the level of the tests."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The results of the confirm stage; without subjects if there was none."""

    subjects: tuple[SubjectEvidence, ...] = ()
    answers: tuple[Answer, ...] = ()
    num_examples: int = 0
    """The number of test examples; 0 if no scores of single examples are known."""
    num_groups: int = 0
    """The number of groups of test examples, such as documents."""
    base: str | None = None
    """The subject that is the frozen base."""
    full: str | None = None
    """The best subject of full fine-tuning."""
    gain: float | None = None
    """Full fine-tuning's gain over the frozen base; None if it is not known or not positive."""
    relative_gain: Ratio | None = None
    """Full fine-tuning's gain as a share of the base's score, with its 95 % interval."""
    margin: float | None = None
    """The margin in the metric's unit; None if it is a share of full's gain that is not known."""
    confidence: float = 0.95
    """The confidence of the intervals that the answers use; all answers together have 95 %."""
    notes: tuple[str, ...] = ()
    """One sentence for each limit of the numbers."""
    scores: ConfirmScores | None = None

    def subject(self, name: str | None) -> SubjectEvidence | None:
        return next((subject for subject in self.subjects if subject.name == name), None)

    def list_answers(self, name: QuestionName, *, arm: str | None = None) -> tuple[Answer, ...]:
        """Returns the answers to the questions of a kind, perhaps of one arm only, smallest value first."""
        return tuple(answer for answer in self.answers if answer.name == name and arm in (None, answer.arm))

    def answer(self, name: QuestionName, subject: str) -> Answer | None:
        return next((one for one in self.answers if (one.name, one.subject) == (name, subject)), None)

    def estimate_difference(self, first: str, second: str | None) -> Estimate | None:
        """Returns first less second on the same seeds and examples, for numbers that answer no question."""
        if self.scores is None or second is None:
            return None
        return estimate_sum(self.scores, {first: 1.0, second: -1.0})


def build_evidence(record: SweepRecord, scores: ConfirmScores, *, groups: str | None) -> Evidence:
    """Returns the evidence of a sweep; `groups` is the name of the groups of its test examples, such as `documents`."""
    scale = build_scale(record, scores)
    level = compute_level(record.questions, record.looks) if record.looks else 0.025
    names = [row.subject for row in record.settings if scores.values.get(row.subject)]
    has_ends = scale.base is not None and scale.full is not None
    estimate = estimate_sum(scores, scale.gain) if has_ends else None
    gain = estimate.value if estimate and estimate.value > 0 else None
    margin = None if scale.margin.is_share_of_gain and gain is None else scale.margin.value
    return Evidence(
        subjects=tuple(found for name in names if (found := _describe(name, scores, scale, level=level))),
        answers=tuple(answer_sweep(record, scores, groups=groups)),
        num_examples=scores.num_examples,
        num_groups=scores.num_groups,
        base=scale.base,
        full=scale.full,
        gain=gain,
        relative_gain=_estimate_relative_gain(scores, scale) if gain else None,
        margin=margin * gain if margin and gain and scale.margin.is_share_of_gain else margin,
        confidence=1 - 2 * level,
        notes=(*_describe_limits(scores, names), *scores.problems),
        scores=scores,
    )


def _describe(name: str, scores: ConfirmScores, scale: Scale, *, level: float) -> SubjectEvidence | None:
    found = estimate_sum(scores, {name: 1.0})
    if found is None:
        return None
    share, interval = _estimate_share(name, scores, scale, level=level)
    return SubjectEvidence(
        name=name,
        seeds=found.seeds,
        values=found.values,
        mean=found.value,
        std=found.std,
        interval=found.find_interval(),
        share_of_full_gain=share,
        share_interval=interval,
    )


def _estimate_relative_gain(scores: ConfirmScores, scale: Scale) -> Ratio | None:
    assert scale.base is not None
    base = estimate_sum(scores, {scale.base: 1.0})
    return estimate_ratio(scores, scale.gain, {scale.base: 1.0}) if base and base.value > 0 else None


def _estimate_share(
    name: str, scores: ConfirmScores, scale: Scale, *, level: float
) -> tuple[float | None, Interval | None]:
    """Returns a subject's share of full fine-tuning's gain with its interval; None if there is no such gain."""
    base, full = scale.base, scale.full
    if base is None or full is None:
        return None, None
    gain = estimate_sum(scores, scale.gain)
    if gain is None or gain.value <= 0:
        return None, None
    if name in (base, full):  # 0 and 1 by definition, without error
        return float(name == full), None
    kept, whole = {base: 1.0, name: -1.0}, {base: 1.0, full: -1.0}
    return estimate_ratio(scores, kept, whole, confidence=1 - 2 * level, of_best=True) or (None, None)


def _describe_limits(scores: ConfirmScores, names: list[str]) -> list[str]:
    if names and not scores.num_examples:
        return ["Single test examples have no scores here, so intervals are over seeds alone, on this test data."]
    return []
