"""Test scores of the confirm stage, and weighted sums of the mean scores of subjects with their errors.

Runs vary over seeds and over groups of test examples. All subjects of a sum are taken on the same seeds and
examples, so differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit

from lorasweep.disk import open_inside
from lorasweep.record import MAX_NUMBER

Array = NDArray[np.float64]
RunKey = tuple[str, int]
"""Subject and seed of a confirm run."""
UNBOUNDED = (-math.inf, math.inf)
"""The range of a metric without limits."""
RELATIVE_TOLERANCE = 1e-3
"""Maximum relative difference between the mean of a run's examples and the run's score; rounding makes them differ."""

CONFIDENCE = 0.95
MAX_DOUBLINGS = 30
Interval = tuple[float, float]
Coefficients = Mapping[str, float]
"""The weight of each subject in a sum."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunExampleScores:
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
    """Per subject and seed, (groups,) the mean score of each group. The run's score is Σ `shares` · mean."""
    shares: Array
    """(groups,) The share of each group in the score; they add up to 1."""
    num_examples: int
    """The number of test examples; 0 if no scores of single examples are known. Then there is one group."""
    problems: tuple[str, ...]
    """Sentences on files that can't be read, scores of examples that are not used, and examples in a single group."""
    score_range: tuple[float, float] = UNBOUNDED
    """The lowest and the highest possible score."""
    search_errors: Mapping[str, float] = field(default_factory=dict)
    """Per subject, how much better its best setting is expected to be than the confirmed one, by the search's model.

    Estimates are then about each subject's best settings, and their error includes that of the search."""

    @property
    def of_settings(self) -> ConfirmScores:
        """The same scores, for estimates that are about the confirmed settings alone."""
        return replace(self, search_errors={})

    @property
    def num_groups(self) -> int:
        """The number of groups of test examples; 0 if no scores of single examples are known."""
        return len(self.shares) if self.num_examples else 0


def read_examples(path: Path) -> RunExampleScores:
    """Reads a run's scores of single test examples. Raises ValueError if the file does not hold them."""
    with open_inside(path.parent, path) as file:
        # without texts, which may be long
        table = pandas.read_csv(file, usecols=["row", "score", "weight", "group"], dtype=str, keep_default_na=False)
    scores, weights = (table[name].astype(float).to_numpy() for name in ("score", "weight"))
    if (np.abs(scores) > MAX_NUMBER).any():
        raise ValueError("its scores must be finite")
    if len(table) and not (0 < float(weights.sum()) < MAX_NUMBER and (weights >= 0).all()):
        raise ValueError("its weights must be finite and not negative, and one must be positive")
    return RunExampleScores(rows=tuple(table["row"]), scores=scores, weights=weights, groups=tuple(table["group"]))


def build_scores(
    values: Mapping[RunKey, float],
    examples: Mapping[RunKey, RunExampleScores],
    *,
    deterministic: Collection[str] = (),
    score_range: tuple[float, float] = UNBOUNDED,
    problems: Sequence[str] = (),
    search_errors: Mapping[str, float] | None = None,
) -> ConfirmScores:
    """Returns the scores of the confirm stage; `problems` are sentences on files that could not be read.

    The scores of examples are used only if every run has them, for the same examples, and their means are the runs'
    scores. A subject in `deterministic` has one run, because its seed makes no difference. Its score counts for every
    seed.
    `score_range` has the lowest and the highest possible score. `search_errors` are those of `ConfirmScores`.
    """
    first = next(iter(examples.values()), None)
    notes = [*problems]
    if first and (mismatch := _find_mismatch(values, examples, first)):
        notes.append(f"Intervals are over seeds alone, because the scores of single examples of {mismatch}.")
        first = None
    groups = first.groups if first else ()
    if first and len(set(groups)) == 1:
        # One group gives no variance over groups. So each example becomes a group.
        groups = first.rows
        notes.append(
            f"All test examples ({len(groups)}) are in one group, such as one document. Intervals take them as "
            "independent, and hold for this group alone."
        )
    by_subject: dict[str, dict[int, Array]] = {}
    weights = first.weights if first else np.ones(0)
    names, owners = np.unique(groups, return_inverse=True)
    totals = np.bincount(owners, weights=weights, minlength=len(names))
    kept = totals > 0
    shares = totals[kept] / totals.sum() if first else np.ones(1)
    for (subject, seed), value in values.items():
        means = np.array([value])
        if first:
            sums = np.bincount(owners, weights=examples[subject, seed].scores * weights, minlength=len(names))
            means = sums[kept] / totals[kept]
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
    values: Mapping[RunKey, float],
    examples: Mapping[RunKey, RunExampleScores],
    first: RunExampleScores,
) -> str | None:
    """Returns the first run whose examples can't be used together with those of the first run, with the reason."""
    for (subject, seed), value in values.items():
        run, found = f"`{subject}`, seed {seed}, do not fit", examples.get((subject, seed))
        if found is None:
            return f"{run}: it has none"
        if len(found.rows) < 2:
            return f"{run}: there are fewer than two"
        if not math.isclose(found.mean, value, rel_tol=RELATIVE_TOLERANCE, abs_tol=RELATIVE_TOLERANCE**2):
            return f"{run}: their mean is {found.mean:.5g}, but the run's score is {value:.5g}"
        if (found.rows, found.groups) != (first.rows, first.groups) or not np.allclose(found.weights, first.weights):
            return f"{run}: they are not the examples of the first run"
    return None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A sum of mean scores, and the parts of its variance.

    Runs with other seeds and other groups of examples would give other scores. The variance is that of two crossed
    random effects (Cameron, Gelbach and Miller 2011, equation 2.8): seeds + groups - interaction. The interaction is
    subtracted once, because both other parts contain it.
    """

    value: float
    seeds: tuple[int, ...]
    """The seeds that all subjects of the sum have."""
    values: tuple[float, ...]
    """The sum for each seed."""
    seeds_variance: float
    """Variance of the mean over seeds; 0 for one seed."""
    groups_variance: float
    """Variance of the mean over groups of examples; 0 if examples are not known."""
    interaction_variance: float
    search_variance: float
    """Variance because the search may have missed the best settings; 0 without `search_errors`."""
    num_groups: int
    bounds: Interval
    """The lowest and the highest possible value of the sum."""

    @property
    def is_testable(self) -> bool:
        """Whether the error over seeds is known."""
        return len(self.seeds) > 1

    @property
    def error(self) -> float:
        """The standard error."""
        total = self.seeds_variance + self.groups_variance - self.interaction_variance
        # the estimate of the interaction may be too large, which would make the total too small or negative
        return math.sqrt(max(total, self.seeds_variance, self.groups_variance) + self.search_variance)

    @property
    def p_positive(self) -> float:
        """The p value of the one-sided test that shows a positive true value; 1 if the error is not known."""
        return self._compute_p_value(self.value)

    @property
    def p_negative(self) -> float:
        """The p value of the one-sided test that shows a negative true value; 1 if the error is not known."""
        return self._compute_p_value(-self.value)

    def _compute_p_value(self, value: float) -> float:
        if not self.is_testable:
            return 1.0
        if self.error == 0:
            return 0.0 if value > 0 else 1.0
        return self._compute_tail(value / self.error)

    def _compute_tail(self, deviation: float) -> float:
        """Returns the probability that the estimate is above its true value by at least `deviation` standard errors.

        It is the mean of the parts' t distributions, weighted by their variances. Satterthwaite's degrees of freedom
        are too many where three seeds have, by chance, nearly equal scores: simulated with 3 seeds and 60 groups, tests
        at a level of 0.35 % then were wrong 3.9 times as often as they may be, and with this mean 0.9 times.
        """
        parts = self._list_parts()
        return sum(variance * float(stdtr(count, -deviation)) for variance, count in parts) / sum(v for v, _ in parts)

    def _list_parts(self) -> list[tuple[float, float]]:
        """Returns the variances above 0 with their degrees of freedom."""
        parts = [
            (self.seeds_variance, len(self.seeds) - 1),
            (self.groups_variance, self.num_groups - 1),
            (self.search_variance, math.inf),
        ]
        return [(variance, count) for variance, count in parts if variance > 0]

    def find_interval(self, confidence: float = CONFIDENCE) -> Interval | None:
        """Returns the two-sided interval, cut at `bounds`; None if nothing is known about the error."""
        if not self.is_testable and not self.groups_variance:
            return None
        if not self.error and self.bounds[0] < self.bounds[1] and self.value in self.bounds:
            return None  # all examples have the best or the worst score, which does not make it certain
        reach = self.error * self._find_deviation((1 - confidence) / 2) if self.error else 0.0
        low, high = np.clip((self.value - reach, self.value + reach), *self.bounds)
        return float(low), float(high)

    def _find_deviation(self, level: float) -> float:
        """Returns the number of standard errors that the estimate's deviation exceeds with probability `level`."""
        ends = [-float(stdtrit(count, level)) for _, count in self._list_parts()]
        if max(ends) == min(ends):
            return ends[0]
        # 1 % wider, because the ends are not exact if a part is nearly 0
        low, high = 0.99 * min(ends), 1.01 * max(ends)
        return float(brentq(lambda deviation: self._compute_tail(deviation) - level, low, high, xtol=1e-9))

    @property
    def std(self) -> float | None:
        """The standard deviation over seeds."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    def project(self, *, num_seeds: int) -> Estimate:
        """Returns the estimate as it would be with another number of seeds, if all values stayed the same."""
        ratio = len(self.seeds) / num_seeds
        both = self.interaction_variance * ratio  # it is averaged over seeds and groups
        return replace(
            self,
            seeds=tuple(range(num_seeds)),
            seeds_variance=self.seeds_variance * ratio,
            groups_variance=max(self.groups_variance - self.interaction_variance, 0.0) + both,
            interaction_variance=both,
        )


def estimate_sum(scores: ConfirmScores, coefficients: Coefficients, *, constant: float = 0.0) -> Estimate | None:
    """Returns constant + Σ coefficient · mean of the subject, over the seeds that all subjects have.

    Returns None if there is no such seed.
    """
    if any(not scores.values.get(subject) for subject in coefficients):
        return None
    seeds = sorted(set.intersection(*(set(scores.values[subject]) for subject in coefficients)))
    if not seeds:
        return None
    sums = np.full((len(seeds), len(scores.shares)), constant)
    used = {subject: coefficient for subject, coefficient in coefficients.items() if coefficient}  # 0 · inf is NaN
    for subject, coefficient in used.items():
        sums += coefficient * np.array([scores.values[subject][seed] for seed in seeds])
    ends = [[coefficient * end for end in scores.score_range] for coefficient in used.values()]
    errors = [c * scores.search_errors.get(subject, 0.0) for subject, c in coefficients.items()]
    shares, (num_seeds, num_groups) = scores.shares, sums.shape
    by_seed, by_group = sums @ shares, sums.mean(axis=0)
    mean = float(by_seed.mean())
    seeds_variance = float(by_seed.var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    groups_variance = interaction = 0.0
    if num_groups > 1:
        # The variance of a ratio of sums over groups that are drawn with their weights (Cochran 1977, section 6.3).
        correction = num_groups / (num_groups - 1)
        groups_variance = correction * float(((shares * (by_group - mean)) ** 2).sum())
        if num_seeds > 1:
            rest = sums - by_group[None] - by_seed[:, None] + mean
            interaction = correction * float(((shares[None] * rest) ** 2).sum()) / (num_seeds * (num_seeds - 1))
    return Estimate(
        value=mean,
        seeds=tuple(seeds),
        values=tuple(map(float, by_seed)),
        seeds_variance=seeds_variance,
        groups_variance=groups_variance,
        interaction_variance=min(interaction, seeds_variance, groups_variance),
        search_variance=sum(error**2 for error in errors),
        num_groups=scores.num_groups,
        bounds=(constant + sum(map(min, ends)), constant + sum(map(max, ends))),
    )


def estimate_means(scores: ConfirmScores) -> dict[str, Estimate]:
    """Returns the mean score of each subject alone, over its seeds and the test examples."""
    return {name: mean for name in scores.values if (mean := estimate_sum(scores.of_settings, {name: 1.0}))}


def estimate_ratio(
    scores: ConfirmScores,
    numerator: Coefficients,
    denominator: Coefficients,
    *,
    confidence: float = CONFIDENCE,
) -> tuple[float, Interval | None] | None:
    """Returns a ratio of two sums with its interval by Fieller's theorem (1954); None if a sum is not known.

    The interval holds each value for which a test of numerator - value · denominator = 0 does not reject. It is None
    if a test of denominator = 0 does not reject: the interval would have no bounds.
    """

    def estimate_difference(factor: float, first: Coefficients, second: Coefficients) -> Estimate | None:
        # With factor 0, the subjects of `second` still restrict the seeds, so that all sums have the same seeds.
        return estimate_sum(scores, subtract(first, second, factor))

    above = estimate_difference(0.0, numerator, denominator)
    below = estimate_difference(0.0, denominator, numerator)
    if above is None or below is None or below.value == 0:
        return None
    ratio, level = above.value / below.value, (1 - confidence) / 2
    if min(below.p_positive, below.p_negative) > level:
        return ratio, None

    def compute_p_minus_level(value: float) -> float:
        found = estimate_difference(value, numerator, denominator)
        return min(found.p_positive, found.p_negative) - level if found else 1.0

    if compute_p_minus_level(ratio) <= 0:  # the sums have no error, and the difference at the ratio is a rounding error
        return ratio, (ratio, ratio)

    def find_end(direction: int) -> float | None:
        """Returns the end of the interval below (-1) or above (1) the ratio, or None if it is not found."""
        width = 0.05
        for _ in range(MAX_DOUBLINGS):
            if compute_p_minus_level(ratio + direction * width) < 0:
                ends = sorted((ratio, ratio + direction * width))
                return float(brentq(compute_p_minus_level, *ends, xtol=1e-9))
            width *= 2
        return None

    low, high = find_end(-1), find_end(1)
    return ratio, None if low is None or high is None else (low, high)


def subtract(numerator: Coefficients, denominator: Coefficients, factor: float) -> dict[str, float]:
    """Returns the coefficients of numerator - factor · denominator."""
    subjects = dict.fromkeys([*numerator, *denominator])
    return {name: numerator.get(name, 0.0) - factor * denominator.get(name, 0.0) for name in subjects}
