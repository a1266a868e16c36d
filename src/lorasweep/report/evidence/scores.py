"""Scores on test data of the runs of the confirm stage: one number per run and group of test examples."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RunKey = tuple[str, int]
"""Subject and seed of a confirm run."""
UNBOUNDED = (-math.inf, math.inf)
"""The range of a metric without limits."""
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

    values: Mapping[str, Mapping[int, Array]]
    """Per subject and seed, (groups,) the mean score of each group. With `shares`, their mean is the run's score."""
    shares: Array
    """(groups,) The share of each group in the score; they add up to 1."""
    num_examples: int
    """The number of test examples; 0 if no scores of single examples are known. Then there is one group."""
    problems: tuple[str, ...]
    """One sentence for each run whose scores of single examples are not used, or if all examples are in one group."""
    score_range: tuple[float, float] = UNBOUNDED
    """The lowest and the highest possible score."""
    search_errors: Mapping[str, float] = field(default_factory=dict)
    """Per subject, how much better its best setting is expected to be than the confirmed one, by the search's model."""

    @property
    def num_groups(self) -> int:
        """The number of groups of test examples; 0 if no scores of single examples are known."""
        return len(self.shares) if self.num_examples else 0

    def score(self, subject: str, seed: int) -> float:
        """Returns the score of a run."""
        return float(self.values[subject][seed] @ self.shares)


def read_examples(path: Path) -> ExampleScores:
    """Reads a run's scores of single test examples. Raises ValueError if the file does not hold them."""
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
    deterministic: Collection[str] = (),
    is_perplexity: bool = False,
    score_range: tuple[float, float] = UNBOUNDED,
    problems: Sequence[str] = (),
    search_errors: Mapping[str, float] | None = None,
) -> ConfirmScores:
    """Returns the scores of the confirm stage; `problems` are sentences on files that could not be read.

    The scores of examples are used if every run has them and they fit the run's score and each other: a comparison of
    two runs needs both. Perplexity is exp of the examples' mean; its groups get the values of a linear approximation.
    A subject in `deterministic` has one run, because its seed makes no difference. Its score counts for every seed.
    `score_range` has the lowest and the highest possible score. `search_errors` are those of `ConfirmScores`.
    """
    first = next(iter(examples.values()), None)
    mismatches = []
    for (subject, seed), value in values.items() if first else ():
        reason = _find_mismatch(examples.get((subject, seed)), value, first, is_perplexity=is_perplexity)
        if reason:
            mismatches.append(
                f"The scores of single examples are not used, because those of `{subject}`, seed {seed}, do not fit: "
                f"{reason}."
            )
    notes = [*problems, *mismatches[:1]]
    groups: tuple[str, ...] = ()
    if first is not None and not mismatches:
        groups = first.groups
        if len(set(groups)) == 1:
            # One group says nothing about another. Its examples at least say something about the rest of the group.
            groups = first.rows
            notes.append(
                f"All {len(groups)} test examples are in one group, such as one document. Intervals take them as "
                "independent, and hold for this group alone."
            )
    by_subject: dict[str, dict[int, Array]] = {}
    names, owners = np.unique(groups, return_inverse=True)
    shares = np.ones(1)
    if first is not None and groups:
        totals = np.bincount(owners, weights=first.weights, minlength=len(names))
        kept = totals > 0
        shares = totals[kept] / totals.sum()
    for (subject, seed), value in values.items():
        means = np.array([value])
        if groups and first is not None:
            scores = examples[subject, seed].scores
            means = np.bincount(owners, weights=scores * first.weights, minlength=len(names))[kept] / totals[kept]
            if is_perplexity:
                means = value * (1 + means - means @ shares)
        by_subject.setdefault(subject, {})[seed] = means
    for subject in by_subject.keys() & set(deterministic):
        (means,) = list(by_subject[subject].values())[:1]
        by_subject[subject] = {seed: means for runs in list(by_subject.values()) for seed in runs}
    return ConfirmScores(
        values=by_subject,
        shares=shares,
        num_examples=len(groups),
        problems=tuple(notes),
        score_range=score_range,
        search_errors=search_errors or {},
    )


def _find_mismatch(
    found: ExampleScores | None, value: float, first: ExampleScores | None, *, is_perplexity: bool
) -> str | None:
    """Returns why a run's examples can't be used together with those of the first run, or None."""
    if found is None or first is None:
        return "it has none"
    if len(found.rows) < 2:
        return "there are fewer than two"
    mean = math.exp(min(found.mean, 700.0)) if is_perplexity else found.mean
    if not math.isclose(mean, value, rel_tol=RELATIVE_TOLERANCE, abs_tol=RELATIVE_TOLERANCE**2):
        return f"their mean is {mean:.5g}, but the run's score is {value:.5g}"
    if (found.rows, found.groups) != (first.rows, first.groups) or not np.allclose(found.weights, first.weights):
        return "they are not the examples of the first run"
    return None
