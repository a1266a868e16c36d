"""Test scores by arm and seed, and the scores that the runs would have on resampled test examples."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RunKey = tuple[str, int]
"""Arm and seed of a rerun."""

DEFAULT_DRAWS = 4000
BOOTSTRAP_SEED = 1979
"""The seed of the bootstrap is fixed, so that a report shows the same numbers each time it is written."""
MAX_DRAWN_EXAMPLES = 50_000_000
"""The bootstrap draws at most this many examples in all: with more than 12,500 examples it makes fewer draws."""
MIN_DRAWS = 500
DRAWS_PER_CHUNK = 250
"""The bootstrap makes this many draws at once, which bounds its memory."""
RELATIVE_TOLERANCE = 1e-3
"""The mean of the examples may differ from the run's score by this: decimals and the order of the sum round it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleScores:
    """The scores of single test examples of one run. The run's metric is Σ score · weight / Σ weight."""

    rows: tuple[str, ...]
    """The identifier of each example."""
    scores: Array
    """(examples,)"""
    weights: Array
    """(examples,)"""

    @property
    def mean(self) -> float:
        return float(np.average(self.scores, weights=self.weights))


@dataclass(frozen=True, kw_only=True, eq=False)
class ConfirmScores:
    """The scores of the confirm stage."""

    values: Mapping[str, Mapping[int, float]]
    """Per arm and seed, the score on test data."""
    deterministic: frozenset[str]
    """The arms in which the seed makes no difference: the frozen base."""
    deviations: Mapping[RunKey, Array]
    """Per arm and seed, (draws,) the score on resampled examples less the score. All runs share the draws."""
    num_examples: int
    """The number of test examples; 0 if no scores of single examples are known."""
    problems: tuple[str, ...]
    """One sentence for each run whose scores of single examples are not used."""


def read_examples(path: Path) -> ExampleScores:
    """Reads a run's scores of single test examples.

    Raises:
        ValueError: The file does not hold such scores.
        OSError: The file can't be read.
    """
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    try:
        return ExampleScores(
            rows=tuple(line["row"] for line in lines),
            scores=np.array([float(line["score"]) for line in lines]),
            weights=np.array([float(line["weight"]) for line in lines]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError("its columns must be `row`, `score` and `weight`") from error


def build_scores(
    values: Mapping[RunKey, float],
    examples: Mapping[RunKey, ExampleScores],
    *,
    deterministic: frozenset[str] = frozenset(),
    is_perplexity: bool = False,
    draws: int = DEFAULT_DRAWS,
) -> ConfirmScores:
    """Returns the scores of the confirm stage. Examples that don't fit the run's score or the first run are skipped.

    `deterministic` are the arms in which the seed makes no difference. Perplexity is exp of the examples' mean.
    """
    by_arm: dict[str, dict[int, float]] = {}
    for (arm, seed), value in values.items():
        by_arm.setdefault(arm, {})[seed] = value
    known = {key: found for key, found in examples.items() if key in values}
    first = next(iter(known.values()), None)
    usable, problems = {}, []
    for (arm, seed), found in known.items():
        problem = _find_mismatch(found, values[arm, seed], first or found, is_perplexity=is_perplexity)
        if problem:
            problems.append(f"The scores of single examples of `{arm}`, seed {seed}, are not used: {problem}.")
        else:
            usable[arm, seed] = found
    return ConfirmScores(
        values=by_arm,
        deterministic=deterministic,
        deviations=draw_deviations(usable, draws=draws, is_perplexity=is_perplexity),
        num_examples=len(next(iter(usable.values())).rows) if usable else 0,
        problems=tuple(problems),
    )


def draw_deviations(
    examples: Mapping[RunKey, ExampleScores], *, draws: int = DEFAULT_DRAWS, is_perplexity: bool = False
) -> dict[RunKey, Array]:
    """Returns per run (draws,) its mean over examples drawn with replacement, less its mean."""
    if not examples:
        return {}
    weights = next(iter(examples.values())).weights
    columns = np.column_stack([*(found.scores * weights for found in examples.values()), weights])
    draws = min(draws, max(MIN_DRAWS, MAX_DRAWN_EXAMPLES // len(weights)))
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    chunks = [
        _draw_means(columns, min(DRAWS_PER_CHUNK, draws - done), rng) for done in range(0, draws, DRAWS_PER_CHUNK)
    ]
    means = np.concatenate(chunks)  # (draws, runs)
    centre = columns[:, :-1].sum(axis=0) / weights.sum()
    deviations = np.exp(means) - np.exp(centre) if is_perplexity else means - centre
    return {key: deviations[:, index] for index, key in enumerate(examples)}


def _draw_means(columns: Array, draws: int, rng: np.random.Generator) -> Array:
    """Returns (draws, runs) weighted means of resampled rows of `columns` (examples, runs + 1); the last is weights."""
    count = len(columns)
    # How often each example was drawn: one matrix product then sums all runs over the same examples.
    counts = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(draws)]
    sums = np.array(counts, dtype=np.float64) @ columns
    totals = np.where(sums[:, -1:] > 0, sums[:, -1:], 1.0)
    return sums[:, :-1] / totals


def _find_mismatch(found: ExampleScores, value: float, first: ExampleScores, *, is_perplexity: bool) -> str | None:
    """Returns why a run's examples can't be used together with those of the first run, or None."""
    if len(found.rows) < 2:
        return "there are fewer than two"
    mean = math.exp(min(found.mean, 700.0)) if is_perplexity else found.mean
    if not math.isclose(mean, value, rel_tol=RELATIVE_TOLERANCE, abs_tol=RELATIVE_TOLERANCE**2):
        return f"their mean is {mean:.5g}, but the run's score is {value:.5g}"
    if found.rows != first.rows or not np.allclose(found.weights, first.weights):
        return "they are not the examples of the first run"
    return None
