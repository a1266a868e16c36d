"""Test scores by arm and seed, and what they would have been on examples drawn again. Comes after `confidence`."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorasweep.report.evidence.confidence import Array

Key = tuple[str, int]
"""Arm and seed."""

DRAWS = 4000
SEED = 1979
"""Of the draws: a report says the same each time it is written."""
MAX_DRAWN = 50_000_000
"""Examples drawn in all; with more than 12,500 examples there are fewer draws."""
MIN_DRAWS = 500
CHUNK = 250
"""Draws made at once, which bounds memory."""
TOLERANCE = 1e-3
"""Relative: a file's rows are decimals, and its sum runs in another order than training's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleScores:
    """One run's scores of single test examples: its metric is Σ score · weight / Σ weight."""

    rows: tuple[str, ...]
    """What tells the examples apart."""
    scores: Array
    weights: Array

    @property
    def mean(self) -> float:
        """The weighted mean."""
        return float(np.average(self.scores, weights=self.weights))


@dataclass(frozen=True, kw_only=True, eq=False)
class ConfirmScores:
    """The confirm stage in numbers."""

    values: Mapping[str, Mapping[int, float]]
    """Per arm and seed, the score on test data of each rerun that has one."""
    chanceless: frozenset[str]
    """Arms in which the seed makes no difference: the frozen base."""
    deviations: Mapping[Key, Array]
    """Per arm and seed, the score on examples drawn again less the score; the same draws for all runs."""
    num_examples: int
    """Examples that were drawn from; 0 where no scores of examples are known."""
    problems: tuple[str, ...]
    """A sentence for each file of examples that was not used."""


def read_examples(path: Path) -> ExampleScores:
    """Reads a run's scores of single test examples.

    Raises:
        ValueError: The file is not as it must be.
        OSError: It can't be read.
    """
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    try:
        scores = np.array([float(line["score"]) for line in lines])
        weights = np.array([float(line["weight"]) for line in lines])
        rows = tuple(line["row"] for line in lines)
    except (KeyError, TypeError) as error:
        raise ValueError("its columns must be `row`, `score` and `weight`") from error
    if not (np.isfinite(scores).all() and np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError("its scores must be finite, and its weights too and not negative")
    if len(set(rows)) < len(rows):
        raise ValueError("no row may appear twice")
    return ExampleScores(rows=rows, scores=scores, weights=weights)


def build_scores(
    values: Mapping[Key, float],
    examples: Mapping[Key, ExampleScores],
    *,
    chanceless: frozenset[str] = frozenset(),
    is_perplexity: bool = False,
    draws: int = DRAWS,
) -> ConfirmScores:
    """Returns the confirm stage in numbers. Files of examples that don't fit the others or the score are left out.

    Args:
        values: Score on test data per arm and seed.
        examples: Scores of single examples per arm and seed, where they are known.
        chanceless: Arms in which the seed makes no difference.
        is_perplexity: Whether the score is exp of the examples' mean.
        draws: Bootstrap draws over examples.
    """
    by_arm: dict[str, dict[int, float]] = {}
    for (arm, seed), value in values.items():
        by_arm.setdefault(arm, {})[seed] = value
    known = {key: found for key, found in examples.items() if key in values}
    problems = {key: _misfit(found, values[key], known, is_perplexity=is_perplexity) for key, found in known.items()}
    usable = {key: found for key, found in known.items() if problems[key] is None}
    return ConfirmScores(
        values=by_arm,
        chanceless=chanceless,
        deviations=draw_deviations(usable, draws=draws, is_perplexity=is_perplexity),
        num_examples=len(next(iter(usable.values())).rows) if usable else 0,
        problems=tuple(
            f"The scores of single examples of `{arm}`, seed {seed}, are not used: {problem}."
            for (arm, seed), problem in problems.items()
            if problem
        ),
    )


def draw_deviations(
    examples: Mapping[Key, ExampleScores], *, draws: int = DRAWS, is_perplexity: bool = False
) -> dict[Key, Array]:
    """Returns per run its mean over examples drawn with replacement less its mean; every run gets the same draws."""
    if not examples:
        return {}
    weights = next(iter(examples.values())).weights
    columns = np.column_stack([*(found.scores * weights for found in examples.values()), weights])
    draws = min(draws, max(MIN_DRAWS, MAX_DRAWN // len(weights)))
    generator = np.random.default_rng(SEED)
    parts = [_draw(columns, min(CHUNK, draws - done), generator) for done in range(0, draws, CHUNK)]
    means = np.concatenate(parts)  # (draws, runs)
    centre = columns[:, :-1].sum(axis=0) / weights.sum()
    deviations = np.exp(means) - np.exp(centre) if is_perplexity else means - centre
    return {key: deviations[:, index] for index, key in enumerate(examples)}


def _draw(columns: Array, draws: int, generator: np.random.Generator) -> Array:
    count = len(columns)
    drawn = [np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(draws)]
    sums = np.array(drawn, dtype=np.float64) @ columns  # (draws, runs + 1)
    totals = np.where(sums[:, -1:] > 0, sums[:, -1:], 1.0)
    return sums[:, :-1] / totals


def _misfit(
    found: ExampleScores, value: float, others: Mapping[Key, ExampleScores], *, is_perplexity: bool
) -> str | None:
    """Returns why a run's examples can't be used together with the others', or None."""
    if len(found.rows) < 2:
        return "there are fewer than two"
    mean = math.exp(min(found.mean, 700.0)) if is_perplexity else found.mean
    if not math.isclose(mean, value, rel_tol=TOLERANCE, abs_tol=TOLERANCE**2):
        return f"they give {mean:.5g} where the run's score is {value:.5g}"
    first = next(iter(others.values()))
    if found.rows != first.rows or not np.allclose(found.weights, first.weights):
        return "they are of other examples than those of the first run"
    return None
