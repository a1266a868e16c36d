"""Test scores by arm and seed, and the scores that the runs would have on resampled groups of test examples."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]
RunKey = tuple[str, int]
"""Arm and seed of a confirm run."""
UNBOUNDED = (-math.inf, math.inf)
"""The range of a metric without limits."""

DEFAULT_DRAWS = 4000
BOOTSTRAP_SEED = 1979
"""The seed of the bootstrap is fixed, so that a report shows the same numbers each time it is written."""
MAX_DRAWN_GROUPS = 50_000_000
"""The bootstrap draws at most this many groups in all: with more than 12,500 groups it makes fewer draws."""
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
    groups: tuple[str, ...]
    """The group of each example. Examples of one group depend on each other."""

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
    """Per arm and seed, (draws,) the score on resampled groups less the score. All runs share the draws."""
    num_examples: int
    """The number of test examples; 0 if no scores of single examples are known."""
    num_groups: int
    """The number of groups of test examples; `num_examples` if each example is a group."""
    problems: tuple[str, ...]
    """One sentence for each run whose scores of single examples are not used, or if all examples are in one group."""
    score_range: tuple[float, float] = UNBOUNDED
    """The lowest and the highest possible score."""


def read_examples(path: Path) -> ExampleScores:
    """Reads a run's scores of single test examples.

    Raises:
        ValueError: The file does not hold such scores.
        OSError: The file can't be read.
    """
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        found = ExampleScores(
            rows=tuple(str(line["row"]) for line in lines),
            scores=np.array([float(line["score"]) for line in lines]),
            weights=np.array([float(line["weight"]) for line in lines]),
            groups=tuple(str(line["group"]) for line in lines),
        )
    except (KeyError, TypeError, csv.Error) as error:
        raise ValueError("its columns must be `row`, `score`, `weight` and `group`") from error
    if lines and not (0 < float(found.weights.sum()) < math.inf and (found.weights >= 0).all()):
        raise ValueError("its weights must be finite and not negative, and one must be positive")
    return found


def build_scores(
    values: Mapping[RunKey, float],
    examples: Mapping[RunKey, ExampleScores],
    *,
    deterministic: frozenset[str] = frozenset(),
    is_perplexity: bool = False,
    score_range: tuple[float, float] = UNBOUNDED,
    draws: int = DEFAULT_DRAWS,
) -> ConfirmScores:
    """Returns the scores of the confirm stage. Examples that don't fit the run's score or the first run are skipped.

    `deterministic` are the arms in which the seed makes no difference. Perplexity is exp of the examples' mean.
    `score_range` has the lowest and the highest possible score.
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
    used = next(iter(usable.values()), None)
    if used is not None and len(set(used.groups)) == 1:
        # One group says nothing about another. Its examples at least say something about the rest of the group.
        problems.append(
            f"All {len(used.rows)} test examples are in one group, such as one document. Intervals take them as "
            "independent, and hold for this group alone."
        )
        usable = {key: replace(found, groups=found.rows) for key, found in usable.items()}
        used = replace(used, groups=used.rows)
    return ConfirmScores(
        values=by_arm,
        deterministic=deterministic,
        deviations=draw_deviations(usable, draws=draws, is_perplexity=is_perplexity),
        num_examples=len(used.rows) if used else 0,
        num_groups=len(set(used.groups)) if used else 0,
        problems=tuple(problems),
        score_range=score_range,
    )


def draw_deviations(
    examples: Mapping[RunKey, ExampleScores], *, draws: int = DEFAULT_DRAWS, is_perplexity: bool = False
) -> dict[RunKey, Array]:
    """Returns per run (draws,) its mean over groups drawn with replacement, less its mean.

    All examples of a drawn group come together (cluster bootstrap, Davison and Hinkley 1997, section 3.8).
    """
    if not examples:
        return {}
    first = next(iter(examples.values()))
    names, group_of_example = np.unique(first.groups, return_inverse=True)
    columns = np.column_stack([*(found.scores * first.weights for found in examples.values()), first.weights])
    sums = np.zeros((len(names), columns.shape[1]))
    np.add.at(sums, group_of_example, columns)
    draws = min(draws, max(MIN_DRAWS, MAX_DRAWN_GROUPS // len(names)))
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    chunks = [_draw_means(sums, min(DRAWS_PER_CHUNK, draws - done), rng) for done in range(0, draws, DRAWS_PER_CHUNK)]
    means = np.concatenate(chunks)  # (draws, runs)
    centre = sums[:, :-1].sum(axis=0) / sums[:, -1].sum()
    deviations = (means - centre) * stretch_factor(len(names))
    if is_perplexity:
        deviations = np.exp(centre + deviations) - np.exp(centre)
    return {key: deviations[:, index] for index, key in enumerate(examples)}


def stretch_factor(num_groups: int) -> float:
    """Returns the factor that makes the deviations of a bootstrap over few groups wide enough.

    The variance of a resampled mean is too small by 1 - 1/G, and its percentiles are those of a normal distribution
    instead of a t distribution with G - 1 degrees of freedom (Hesterberg 2015, section 5.3).
    """
    return math.sqrt(num_groups / (num_groups - 1)) * float(stdtrit(num_groups - 1, 0.975) / stdtrit(math.inf, 0.975))


def _draw_means(columns: Array, draws: int, rng: np.random.Generator) -> Array:
    """Returns (draws, runs) weighted means of resampled rows of `columns` (groups, runs + 1); the last is weights."""
    count = len(columns)
    # How often each group was drawn: one matrix product then sums all runs over the same groups.
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
    if (found.rows, found.groups) != (first.rows, first.groups) or not np.allclose(found.weights, first.weights):
        return "they are not the examples of the first run"
    return None
