"""Which further evidence would settle open answers, and with which chance.

The chance is computed with the tests themselves on simulated scores. Scores of further seeds are drawn from their
posterior predictive distribution, so the present estimates count as uncertain: an answer that is open because the truth
is at the margin gets a small chance, whatever number of seeds is added.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from lorasweep.record import Question
from lorasweep.report.evidence.estimates import Array, ConfirmScores
from lorasweep.report.evidence.questions import (
    MarginScale,
    compute_level,
    judge_chain,
    list_subjects_to_train,
)
from lorasweep.report.evidence.verdicts import Answer, ChainOutcome

NUM_DRAWS = 64
"""Number of simulated sweeps behind a chance: its standard error is 6 % or less."""
PROBABLE_CHANCE = 0.8
"""Chance from which a step is called probable. Replays of stored sweeps hold such steps to at least 70 %."""
MIN_CHANCE = 0.3
"""A step with a smaller chance is not advised."""
SEED_NUMBERS = (3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100)
"""Numbers of seeds that are tried."""
TEST_FACTORS = (1.5, 2.0, 3.0, 4.0)
"""Factors on the number of test examples that are tried."""
TRIAL_FACTOR = 2
"""Factor on the number of trials that is tried."""
MAX_GROUPS = 100
"""Groups of test examples are merged into this number, to draw faster. The variance of a mean over groups stays."""
REGRET_RATIO = 0.34
"""Expected regret after twice the trials, over that before: the mean in replays (`benchmarks/bench_advice.py`)."""
REGRET_CHANCES = {1.25: 0.96, 1.5: 0.92, 2.0: 0.79, 3.0: 0.58, 5.0: 0.28}
"""The share of replays in which twice the trials made the expected regret smaller by at least this factor."""


def find_regret_chance(factor: float) -> float:
    """Returns the chance that twice the trials make the expected regret smaller by a factor, at least."""
    return next((chance for limit, chance in REGRET_CHANCES.items() if factor <= limit), 0.0)


class Extension(NamedTuple):
    """A larger sweep."""

    seeds: int
    """The number of seeds in all."""
    trials: int = 1
    """Factor on the number of trials of the arms in question. Settings may change, so the confirm stage runs again."""
    examples: float = 1.0
    """Factor on the number of test examples. Another factor than 1 needs a new sweep."""

    @property
    def is_repeated(self) -> bool:
        """Whether the confirm stage runs again from its first seed."""
        return self.trials > 1 or self.examples != 1


class Step(NamedTuple):
    """An extension with its chance to settle a line, while no other line that is settled opens again."""

    extension: Extension
    chance: float

    @property
    def is_probable(self) -> bool:
        return self.chance >= PROBABLE_CHANCE


@dataclass(frozen=True, kw_only=True, eq=False)
class CurrentEvidence:
    """The questions of a sweep, with the scores and the answers before a step."""

    questions: Sequence[Question]
    """All questions of the sweep."""
    answers: Sequence[Answer]
    scores: ConfirmScores
    scale: MarginScale
    looks: Sequence[int]
    """The numbers of seeds of all planned looks."""
    looks_done: Sequence[int]

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for found in self.scores.values.values() for seed in found})

    def list_trained(self) -> set[str]:
        """Returns the subjects that get further seeds."""
        return list_subjects_to_train([answer for answer in self.answers if not answer.is_settled])

    def find_outcome(self, question: Question) -> ChainOutcome:
        answers = tuple(answer for answer in self.answers if answer.answers(question))
        return ChainOutcome(arm=question.arm, answers=answers)


def find_step(
    line: Sequence[Question],
    present: CurrentEvidence,
    *,
    has_space: bool = False,
    max_examples: float = 1.0,
    cost: Callable[[Extension], float] = lambda extension: float(extension.seeds),
    max_cost: float = math.inf,
) -> Step | None:
    """Returns the cheapest step that probably settles the questions of a line, or else the one with the best chance.

    Args:
        line: The questions that must all be settled.
        present: What is known now.
        has_space: Whether the arms in question search anything, so that they can get more trials.
        max_examples: The largest factor on the number of test examples.
        cost: The cost of an extension, which is larger for a larger one of its kind.
        max_cost: Steps that cost more are not tried.

    Returns:
        None if an open answer has fewer than two seeds, or if no cheap enough step has a chance of `MIN_CHANCE`.
    """
    outcomes = map(present.find_outcome, line)
    if any(one.num_seeds < 2 for outcome in outcomes for one in outcome.answers if not one.is_settled):
        return None
    present = replace(present, scores=_merge_groups(present.scores))
    last, most = max(present.looks_done, default=len(present.seeds)), max(present.looks)
    # a sweep that gave up before its last look keeps the number of seeds that were planned, or gets more
    kinds = [[Extension(seeds) for seeds in sorted({most, *SEED_NUMBERS}) if seeds >= most and seeds > last]]
    if has_space and any(present.scores.search_errors.values()):
        kinds.append([Extension(seeds, trials=TRIAL_FACTOR) for seeds in (most, 2 * most)])
    if present.scores.num_groups > 1:
        kinds.append([Extension(most, examples=times) for times in TEST_FACTORS if times <= max_examples])
    chance = functools.cache(lambda extension: compute_chance(line, present, extension))
    affordable = [[extension for extension in kind if cost(extension) <= max_cost] for kind in kinds]
    steps = [_find_smallest(kind, chance) for kind in affordable if kind]
    return min(
        (step for step in steps if step.chance >= MIN_CHANCE),
        key=lambda step: (not step.is_probable, cost(step.extension) if step.is_probable else -step.chance),
        default=None,
    )


def _find_smallest(extensions: Sequence[Extension], chance: Callable[[Extension], float]) -> Step:
    """Returns the smallest of ascending extensions that is probable, or the last one."""
    last = Step(extensions[-1], chance(extensions[-1]))
    if not last.is_probable:
        return last
    place = bisect.bisect_left(extensions, PROBABLE_CHANCE, hi=len(extensions) - 1, key=chance)
    return Step(extensions[place], chance(extensions[place]))


def _merge_groups(scores: ConfirmScores) -> ConfirmScores:
    """Returns the same scores with at most `MAX_GROUPS` groups: the n-th, the n + 100th, ... become one."""
    if len(scores.shares) <= MAX_GROUPS:
        return scores
    owners = np.arange(len(scores.shares)) % MAX_GROUPS
    shares: Array = np.bincount(owners, weights=scores.shares).astype(np.float64)
    values = {
        name: {seed: np.bincount(owners, weights=scores.shares * row) / shares for seed, row in found.items()}
        for name, found in scores.values.items()
    }
    return replace(scores, values=values, shares=shares)


def compute_chance(line: Sequence[Question], present: CurrentEvidence, extension: Extension) -> float:
    """Returns the share of simulated sweeps in which a line is settled and no other settled line opens again."""
    rng = np.random.default_rng(0)
    looks = present.looks if extension.is_repeated else present.looks_done
    looks = sorted({*(look for look in looks if look < extension.seeds), extension.seeds})
    level = compute_level(present.questions, looks)
    outcomes = [(question, present.find_outcome(question)) for question in present.questions]
    needed = [(question, found) for question, found in outcomes if question in line or found.state == "settled"]
    settled = 0
    for _ in range(NUM_DRAWS):
        scores = draw_scores(present, extension, rng=rng)
        settled += all(_is_settled(question, found, scores, present.scale, level=level) for question, found in needed)
    return settled / NUM_DRAWS


def _is_settled(
    question: Question, now: ChainOutcome, scores: ConfirmScores, scale: MarginScale, *, level: float
) -> bool:
    verdicts = judge_chain(question, scores, scale, level=level)
    answers = tuple(replace(answer, verdict=verdicts[answer.subject]) for answer in now.answers)
    return replace(now, answers=answers).state == "settled"


def draw_scores(present: CurrentEvidence, extension: Extension, *, rng: np.random.Generator) -> ConfirmScores:
    """Returns the scores of an extended sweep, drawn from their posterior predictive distribution.

    The scores of all subjects on one seed are a draw from a normal distribution. Its mean and covariance are not known:
    with Jeffreys' prior and n seeds, a new seed deviates from the present mean by √(1 + 1/n) · t (Gelman et al.,
    Bayesian Data Analysis, section 3.2), and all new seeds share the part of the mean. A new draw of test examples is
    Bayesian bootstrap (Rubin 1981). More trials improve settings by an exponential draw with the mean that is expected.
    """
    scores, seeds = present.scores, present.seeds
    num_known = len(seeds)
    drawn_seeds = [*seeds, *range(max(seeds) + 1, max(seeds) + 1 + extension.seeds)][: extension.seeds]
    scale = math.sqrt((num_known - 1) / rng.chisquare(num_known - 1))
    of_mean = scale * rng.standard_normal(num_known)
    of_seeds = scale * rng.standard_normal((extension.seeds, num_known))
    trained = set(scores.values) if extension.is_repeated else present.list_trained()
    values: dict[str, Mapping[int, Array]] = {}
    for subject, found in scores.values.items():
        kept = {} if extension.is_repeated else dict(found)
        if subject in trained:
            known, places = np.array([*found.values()]), [seeds.index(seed) for seed in found]
            mean, count = known.mean(axis=0), len(known)
            weights = of_mean[places] / math.sqrt(count) + of_seeds[:, places]
            new = mean + weights @ (known - mean) / math.sqrt(max(count - 1, 1))
            kept = {**dict(zip(drawn_seeds, new, strict=True)), **kept}
        values[subject] = kept
    shares, errors = scores.shares, scores.search_errors
    if extension.examples != 1:
        chances = rng.dirichlet(np.ones(len(shares)))
        drawn = rng.choice(len(shares), size=round(extension.examples * len(shares)), p=chances)
        shares = shares[drawn] / shares[drawn].sum()
        values = {name: {seed: row[drawn] for seed, row in found.items()} for name, found in values.items()}
    if extension.trials > 1:
        ratio = REGRET_RATIO ** math.log2(extension.trials)
        luck = {True: rng.exponential(), False: rng.exponential()}  # values of an arm share its search
        for name, found in values.items():
            better = present.scale.sign * (1 - ratio) * errors.get(name, 0.0) * luck[name == present.scale.full]
            values[name] = {seed: row - better for seed, row in found.items()}
        errors = {name: ratio * error for name, error in errors.items()}
    return replace(scores, values=values, shares=shares, search_errors=errors)
