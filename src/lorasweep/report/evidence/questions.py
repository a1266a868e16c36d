"""The questions that a sweep states before it starts, and their answers.

- `as_good_as_full`: is a subject as good as full fine-tuning? One for each subject, from the largest value down.
- `smallest`: which value of an arm's `confirm_each` key is enough? One for each value, from the second largest down: a
  value is sufficient if no larger value is better by more than the margin.
- `pair`: how do two arms compare? One for each of `confirm.pairs`; without `full`, by default each arm and the first.

A subject is what the confirm stage trains on several seeds: an arm, or one value of its `confirm_each` key.

Tests of one question on the values of one arm are a chain. Going down from the largest value, a value is shown to be
good enough only if all larger values were; going up from the smallest, a value is shown to be worse only if all smaller
ones were. Each direction has the level of one test, however many values there are (fixed sequence, Maurer et al. 1995).
All chains share the level of 5 % (Bonferroni): the chance that a sweep gives any false verdict is at most that.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import norm

from lorasweep.config.data import ScoreMetric
from lorasweep.config.sweep import Margin
from lorasweep.record import Question
from lorasweep.report.evidence.estimates import (
    Coefficients,
    ConfirmScores,
    Estimate,
    Interval,
    estimate_ratio,
    estimate_sum,
    subtract,
)
from lorasweep.report.evidence.verdicts import (
    NEGATIVE_VERDICTS,
    POSITIVE_VERDICTS,
    AnswerRow,
    Blocker,
    Verdict,
)

GRID_POINTS = 801
LOWEST_SCORE = -8.0
"""Standard normal scores below this have no weight."""

FAMILY_LEVEL = 0.05
"""Maximum chance that a sweep gives any false verdict."""


@functools.cache
def compute_look_level(looks: tuple[int, ...], *, level: float) -> float:
    """Returns the one-sided level of each look, so that all looks together have the level.

    To test after each further seed would raise the chance of a false verdict from 2.5 to 7.4 % with 3 to 10 seeds. The
    boundary is Pocock's (1977, Biometrika 64), for statistics whose increments are independent and whose information is
    the number of seeds. An error that is the same at all looks, such as that of the test examples, makes them more
    alike, so the whole level is then lower.

    Args:
        looks: Numbers of seeds at the looks, ascending.
        level: The one-sided level of all looks together.
    """
    if len(looks) == 1:
        return level
    boundary = brentq(lambda bound: _compute_crossing(looks, bound) - level, 0.0, 8.0, xtol=1e-6)
    return float(norm.sf(boundary))


def _compute_crossing(looks: Sequence[int], boundary: float) -> float:
    """Returns the probability that a standard normal score exceeds the boundary at any look.

    Integrates the density of paths below the boundary from look to look (Armitage, McPherson and Rowe 1969).
    """
    times = np.array(looks) / looks[-1]
    crossed = float(norm.sf(boundary))
    limit = boundary * times[0] ** 0.5
    nodes = np.linspace(LOWEST_SCORE * times[0] ** 0.5, limit, GRID_POINTS)
    density = norm.pdf(nodes, scale=times[0] ** 0.5)
    for earlier, later in itertools.pairwise(times):
        spread, limit = (later - earlier) ** 0.5, boundary * later**0.5
        crossed += float(np.trapezoid(density * norm.sf(limit, loc=nodes, scale=spread), nodes))
        further = np.linspace(LOWEST_SCORE * later**0.5, limit, GRID_POINTS)
        steps = norm.pdf(further[:, None], loc=nodes[None], scale=spread)
        density, nodes = np.trapezoid(density[None] * steps, nodes, axis=1), further
    return crossed


@dataclass(frozen=True, kw_only=True)
class MarginScale:
    """The margin, and the two subjects whose difference is the gain. Shares of the gain are computed here alone."""

    metric: ScoreMetric
    margin: Margin
    base: str | None = None
    """The frozen base."""
    full: str | None = None
    """The best subject of full fine-tuning."""
    best: str | None = None
    """The best subject of all, whose gain counts if there is no full fine-tuning."""

    @property
    def sign(self) -> int:
        """1 if lower scores are better, else -1."""
        return self.metric.sign

    @property
    def leader(self) -> str | None:
        """The subject whose gain over the base counts: that of full fine-tuning, or else the best one."""
        return self.full or self.best

    @property
    def gain_name(self) -> str:
        return "full's gain" if self.full or not self.best else "the best gain"

    @property
    def has_gain(self) -> bool:
        return self.base is not None and self.leader is not None

    @property
    def is_known(self) -> bool:
        """Whether differences can be compared with the margin."""
        return not self.margin.is_share_of_gain or self.has_gain

    @property
    def is_share(self) -> bool:
        """Whether differences are compared as shares of the gain."""
        return self.margin.is_share_of_gain and self.has_gain

    @property
    def gain(self) -> Coefficients:
        """The coefficients of the leader's gain over the frozen base."""
        assert self.base is not None
        assert self.leader is not None
        return {self.base: float(self.sign), self.leader: -float(self.sign)}

    def find_gain(self, scores: ConfirmScores, *, level: float) -> float | None:
        """Returns the leader's gain; None if it is not known, or if several seeds do not show that there is any.

        Then shares of it mean nothing.
        """
        found = estimate_sum(scores, self.gain) if self.has_gain else None
        is_shown = found is not None and found.value > 0 and (not found.is_testable or found.p_positive <= level)
        return found.value if found and is_shown else None

    def find_margin(self, gain: float | None) -> float | None:
        """Returns the margin in the metric's unit; None if it is a share of a gain that is not known."""
        if not self.margin.is_share_of_gain:
            return self.margin.value
        return self.margin.value * gain if gain else None

    def estimate_advantage(
        self, scores: ConfirmScores, subject: str, reference: str, *, margins: float
    ) -> Estimate | None:
        """Returns by how much a subject is better than a reference, plus this number of margins."""
        better = subtract({reference: float(self.sign)}, {subject: float(self.sign)}, 1.0)
        if self.is_share:  # also for no margin, so that all estimates are over the same seeds
            return estimate_sum(scores, subtract(better, self.gain, -margins * self.margin.value))
        return estimate_sum(scores, better, constant=margins * self.margin.value)

    def measure_difference(
        self, scores: ConfirmScores, subject: str, reference: str, *, confidence: float
    ) -> tuple[float | None, Interval | None]:
        """Returns `subject - reference` in the metric's unit, with its interval."""
        found = estimate_sum(scores, subtract({subject: 1.0}, {reference: 1.0}, 1.0))
        return (found.value, found.find_interval(confidence)) if found else (None, None)

    def measure_share(
        self, scores: ConfirmScores, subject: str, reference: str | None, *, confidence: float
    ) -> tuple[float | None, Interval | None]:
        """Returns 1 + advantage over the reference / gain as one ratio, with its interval; unknown without a gain."""
        if not self.has_gain or reference is None:
            return None, None
        better = {reference: float(self.sign), subject: -float(self.sign)}
        kept = subtract(better, self.gain, -1.0)
        ratio = estimate_ratio(scores, kept, self.gain, confidence=confidence)
        return ratio or (None, None)


def compute_level(questions: Sequence[Question], looks: Sequence[int]) -> float:
    """Returns the one-sided level of each test: chains share the family's level, and looks share a chain's level."""
    return compute_look_level(tuple(looks), level=FAMILY_LEVEL / 2 / max(len(questions), 1))


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """A subject compared with one reference: estimates of its advantage."""

    reference: str
    advantage: Estimate
    """Positive if the subject is better."""
    plus_margin: Estimate | None
    """The advantage plus the margin: positive if the subject is not worse by more. None without a margin."""
    minus_margin: Estimate | None
    """The advantage minus the margin: positive if the subject is better by more."""

    def project(self, *, num_seeds: int) -> _Comparison:
        """Returns the comparison with more seeds, if all values stayed the same."""
        project = functools.partial(Estimate.project, num_seeds=num_seeds)
        return _Comparison(
            reference=self.reference,
            advantage=project(self.advantage),
            plus_margin=self.plus_margin and project(self.plus_margin),
            minus_margin=self.minus_margin and project(self.minus_margin),
        )


def _list_references(question: Question) -> dict[str, list[str]]:
    """Returns the subjects that each subject of a question is compared with: for `smallest`, all larger values."""
    if question.reference is None:
        return {name: question.subjects[place:] for place, name in enumerate(question.subjects[:-1], start=1)}
    return {name: [question.reference] for name in question.subjects}


def answer_questions(
    questions: Sequence[Question], scores: ConfirmScores, scale: MarginScale, *, looks: Sequence[int], hope: float = 1.0
) -> list[AnswerRow]:
    """Returns a row on each subject of each question, at planned looks with these numbers of seeds.

    `hope` is a number of standard errors: an open row `may_settle` if estimates that are better by this would settle
    it at the last look. By default only a hopeless question is given up.
    """
    level = compute_level(questions, looks)
    return [
        answer
        for question in questions
        for answer in _answer_chain(question, scores, scale, level=level, max_seeds=max(looks), hope=hope)
    ]


def _answer_chain(
    question: Question, scores: ConfirmScores, scale: MarginScale, *, level: float, max_seeds: int, hope: float
) -> list[AnswerRow]:
    references, judge = _list_references(question), _choose_test(question)
    is_gain_shown = scale.find_gain(scores, level=level) is not None
    if question.reference is None:
        # values of one arm share a search, so an error of it moves them together
        scores = scores.of_settings
    compared: dict[str, list[_Comparison]] = {}
    alone: dict[str, Verdict] = {}
    """The verdict that each subject would have without the others."""
    for subject, names in references.items():
        found = [compare_pair(subject, name, scores, scale) for name in names]
        compared[subject] = [pair for pair in found if pair]
        alone[subject] = judge(compared[subject], level=level) if all(found) else "open"
    answers = []
    for subject, verdict in _apply_order(alone).items():
        worst = _find_worst(compared[subject], verdict)
        shown_reference = worst.reference if worst else references[subject][-1]
        pair, confidence = (scores, subject, shown_reference), 1 - 2 * level
        value, interval = share = scale.measure_share(*pair, confidence=confidence) if scale.is_share else (None, None)
        # one seed shows no interval of anything
        is_shown = is_gain_shown and (interval is not None or worst is None or not worst.advantage.is_testable)
        if not (is_share := scale.is_share and is_shown):
            value, interval = scale.measure_difference(*pair, confidence=confidence)
        answer = AnswerRow(
            name=question.name,
            arm=question.arm,
            key=question.key,
            subject=subject,
            reference=shown_reference,
            compared_with=tuple(references[subject]),
            verdict=verdict,
            value=value,
            interval=interval,
            is_share=is_share,
            num_seeds=len(worst.advantage.seeds) if worst else 0,
        )
        if answer.is_settled:
            answers.append(answer)
        elif alone[subject] != "open":
            answers.append(replace(answer, blocker="another value"))
        else:
            known = compared[subject] if len(compared[subject]) == len(references[subject]) else []
            # the boundary is nearer by the hoped number of standard errors
            hoped = functools.partial(judge, level=float(ndtr(ndtri(level) + hope)))
            has_gain = not scale.is_share or share[1] is not None
            answers.append(_explain_open(answer, known, judge=hoped, has_gain=has_gain, max_seeds=max_seeds))
    return answers


def compare_pair(subject: str, reference: str, scores: ConfirmScores, scale: MarginScale) -> _Comparison | None:
    """Returns a comparison on the seeds that all its subjects have; None if one has no scores."""
    estimate = functools.partial(scale.estimate_advantage, scores, subject, reference)
    if (advantage := estimate(margins=0.0)) is None:
        return None
    plus_margin, minus_margin = (estimate(margins=1.0), estimate(margins=-1.0)) if scale.is_known else (None, None)
    return _Comparison(reference=reference, advantage=advantage, plus_margin=plus_margin, minus_margin=minus_margin)


def _explain_open(
    answer: AnswerRow,
    found: Sequence[_Comparison],
    *,
    judge: Callable[..., Verdict],
    has_gain: bool,
    max_seeds: int,
) -> AnswerRow:
    """Returns an open answer with its reason, and whether the seeds of later looks may settle it.

    Assumes that more seeds leave the estimates as they are, and only make their errors smaller.
    """
    if not found:
        return replace(answer, blocker="no scores")
    if any(pair.plus_margin is None for pair in found):
        return replace(answer, blocker="no margin")
    numbers = [len(pair.advantage.seeds) for pair in found]
    if min(numbers) < 2:
        return replace(answer, blocker="one seed", may_settle=True)
    worst = max((pair.advantage for pair in found), key=lambda estimate: estimate.error)
    projected = [pair.project(num_seeds=max_seeds) for pair in found]
    may_settle = max(numbers) < max_seeds and judge(projected) != "open"
    return replace(answer, blocker=find_largest_part(worst) if has_gain else "no gain", may_settle=may_settle)


def find_largest_part(estimate: Estimate) -> Blocker:
    """Returns the part of the evidence with the largest error."""
    parts: dict[Blocker, float] = {
        "few seeds": estimate.seeds_variance,
        "few examples": estimate.groups_variance,
        "few trials": estimate.search_variance,
    }
    return max(parts, key=parts.__getitem__)


def _choose_test(question: Question) -> Callable[..., Verdict]:
    return _judge_sufficiency if question.reference is None else judge_difference


def judge_difference(found: Sequence[_Comparison], *, level: float) -> Verdict:
    (pair,) = found
    is_not_worse = pair.plus_margin is not None and pair.plus_margin.p_positive < level
    is_not_better = pair.minus_margin is not None and pair.minus_margin.p_negative < level
    # Equivalence goes first: a difference below the margin does not matter, even if its sign is known.
    if is_not_worse and is_not_better:
        return "equivalent"
    if pair.advantage.p_positive < level:
        return "better"
    if is_not_worse:
        return "not worse"
    return "worse" if pair.advantage.p_negative < level else "open"


def _judge_sufficiency(found: Sequence[_Comparison], *, level: float) -> Verdict:
    """A value is sufficient if it passes the test against each larger value, and insufficient if one refutes it.

    One of several refutations is enough, so each gets an equal share of the level.
    """
    known = [pair.plus_margin for pair in found if pair.plus_margin is not None]
    if len(known) < len(found):
        return "open"
    if all(estimate.p_positive < level for estimate in known):
        return "sufficient"
    return "insufficient" if min(estimate.p_negative for estimate in known) < level / len(known) else "open"


def _find_worst(found: Sequence[_Comparison], verdict: Verdict) -> _Comparison | None:
    """Returns the comparison that is shown beside a verdict: the one that refutes the subject, or the lowest value."""

    def rank(pair: _Comparison) -> float:
        refuting = pair.plus_margin if verdict == "insufficient" else None
        return refuting.p_negative if refuting else pair.advantage.value

    return min(found, key=rank, default=None)


def _apply_order(alone: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """Returns the verdicts that the fixed sequence allows, from those of each subject alone, smallest value first."""
    subjects = list(alone)
    allowed: dict[str, Verdict] = dict.fromkeys(subjects, "open")
    for order, kinds in ((subjects[::-1], POSITIVE_VERDICTS), (subjects, NEGATIVE_VERDICTS)):
        for subject in order:
            if alone[subject] not in kinds:
                break
            allowed[subject] = alone[subject]
    return allowed
