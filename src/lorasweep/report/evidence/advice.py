"""How many seeds would settle open answers, and with which chance.

The chance is computed with the tests themselves on simulated scores. Scores of further seeds are drawn from their
posterior predictive distribution, so the present estimates count as uncertain: an answer that is open because the truth
is at the margin gets a small chance, whatever number of seeds is added.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lorasweep.record import Question
from lorasweep.report.evidence.estimates import Array, ConfirmScores
from lorasweep.report.evidence.evidence import Evidence
from lorasweep.report.evidence.questions import (
    MarginScale,
    compute_level,
    judge_chain,
)
from lorasweep.report.evidence.verdicts import Answer

NUM_DRAWS = 64
"""Number of simulated sweeps behind a chance: its standard error is 6 % or less."""
PROBABLE_CHANCE = 0.8
"""Chance from which a step is called probable. Replays of stored sweeps hold such steps to at least 70 %."""
MIN_CHANCE = 0.3
"""A step with a smaller chance is not advised."""
SEED_NUMBERS = (3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100)
"""Numbers of seeds that are tried."""
MAX_GROUPS = 100
"""Groups of test examples are merged into this number, to draw faster. The variance of a mean over groups stays."""


class Step(NamedTuple):
    """Further seeds, with the chance that they settle a line while no other line that is settled opens again."""

    seeds: int
    """The number of seeds in all."""
    chance: float


def find_step(
    line: Sequence[Question],
    present: Evidence,
    *,
    cost: Callable[[int], float] = float,
    max_cost: float = math.inf,
) -> Step | None:
    """Returns the least number of seeds that probably settles the questions of a line, or else the affordable maximum.

    Args:
        line: The questions that must all be settled.
        present: What is known now.
        cost: The cost of a number of seeds, which is larger for a larger number.
        max_cost: Numbers of seeds that cost more are not tried.

    Returns:
        None if an open answer has fewer than two seeds, or if the affordable seeds have no chance of `MIN_CHANCE`.
    """
    rows = [row for question in line for row in present.find_answer(question.name, question.arm).rows]
    if any(row.num_seeds < 2 for row in rows if not row.is_settled):
        return None
    present = replace(present, scores=_merge_groups(present.scores))
    last, most = max(present.looks_done, default=len(present.seeds)), max(present.looks)
    # a sweep that gave up before its last look keeps the number of seeds that were planned, or gets more
    numbers = [seeds for seeds in sorted({most, *SEED_NUMBERS}) if seeds >= most and seeds > last]
    affordable = [seeds for seeds in numbers if cost(seeds) <= max_cost]
    if not affordable:
        return None
    chance = functools.cache(lambda seeds: compute_chance(line, present, seeds))
    place = len(affordable) - 1
    if chance(affordable[-1]) >= PROBABLE_CHANCE:
        place = bisect.bisect_left(affordable, PROBABLE_CHANCE, hi=place, key=chance)
    step = Step(affordable[place], chance(affordable[place]))
    return step if step.chance >= MIN_CHANCE else None


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


def compute_chance(line: Sequence[Question], present: Evidence, num_seeds: int) -> float:
    """Returns the share of simulated sweeps in which a line is settled and no other settled line opens again."""
    rng = np.random.default_rng(0)
    looks = sorted({*(look for look in present.looks_done if look < num_seeds), num_seeds})
    level = compute_level(present.questions, looks)
    answers = [(one, present.find_answer(one.name, one.arm)) for one in present.questions]
    needed = [(question, found) for question, found in answers if question in line or found.state == "settled"]
    settled = 0
    for _ in range(NUM_DRAWS):
        scores = draw_scores(present, num_seeds, rng=rng)
        settled += all(_is_settled(question, found, scores, present.scale, level=level) for question, found in needed)
    return settled / NUM_DRAWS


def _is_settled(question: Question, now: Answer, scores: ConfirmScores, scale: MarginScale, *, level: float) -> bool:
    verdicts = judge_chain(question, scores, scale, level=level)
    rows = tuple(replace(row, verdict=verdicts[row.subject]) for row in now.rows)
    return replace(now, rows=rows).state == "settled"


def draw_scores(present: Evidence, num_seeds: int, *, rng: np.random.Generator) -> ConfirmScores:
    """Returns the scores of a sweep with more seeds, drawn from their posterior predictive distribution.

    The scores of all subjects on one seed are a draw from a normal distribution. Its mean and covariance are not known:
    with Jeffreys' prior and n seeds, a new seed deviates from the present mean by √(1 + 1/n) · t (Gelman et al.,
    Bayesian Data Analysis, section 3.2), and all new seeds share the part of the mean.
    """
    scores, seeds = present.scores, present.seeds
    num_known = len(seeds)
    drawn_seeds = [*seeds, *range(max(seeds) + 1, max(seeds) + 1 + num_seeds)][:num_seeds]
    scale = math.sqrt((num_known - 1) / rng.chisquare(num_known - 1))
    of_mean = scale * rng.standard_normal(num_known)
    of_seeds = scale * rng.standard_normal((num_seeds, num_known))
    trained = present.list_trained()
    values: dict[str, Mapping[int, Array]] = dict(scores.values)
    for subject, found in scores.values.items():
        if subject in trained:
            known, places = np.array([*found.values()]), [seeds.index(seed) for seed in found]
            mean, count = known.mean(axis=0), len(known)
            weights = of_mean[places] / math.sqrt(count) + of_seeds[:, places]
            new = mean + weights @ (known - mean) / math.sqrt(max(count - 1, 1))
            values[subject] = {**dict(zip(drawn_seeds, new, strict=True)), **found}
    return replace(scores, values=values)
