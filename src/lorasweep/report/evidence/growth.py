"""How the share of full fine-tuning's gain that a subject keeps changes with the amount of training data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorasweep.report.evidence.estimates import CONFIDENCE, ConfirmScores, Interval, estimate_sum
from lorasweep.report.evidence.evidence import Evidence


@dataclass(frozen=True, kw_only=True)
class Slope:
    """The change of a share for each doubling of the training data."""

    value: float
    interval: Interval | None
    """The intervals of all subjects together have 95 % confidence."""

    @property
    def is_settled(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def estimate_slopes(sweeps: Sequence[Evidence], examples: Sequence[float], *, sign: int) -> dict[str, Slope]:
    """Returns the slope of each subject, from one sweep for each amount of training data.

    It is that of the least-squares line through the shares R_i at x_i = log2(examples): Σ w_i R_i with
    w_i = (x_i - mean x) / Σ (x - mean x)². A share is a ratio, R = (base - subject) / (base - full). So the error is
    that of the sum that is linear in the scores at the estimates (the delta method; Cochran 1977, section 6.3):
    Σ w_i (base_i - subject_i - R_i (base_i - full_i)) / gain_i. All sweeps have the same seeds and test examples, so
    the variance of this one sum, with seeds and groups as crossed effects (`Estimate`), contains the covariance of the
    sweeps. The errors of their searches are independent. `sign` is 1 if lower scores are better, else -1.

    A subject is missing if a sweep lacks it, does not show a gain of full fine-tuning, or has other seeds. All are
    missing if the test examples differ.
    """
    if (scores := _join_scores(sweeps)) is None:
        return {}
    places = np.log2(examples)
    weights = (places - places.mean()) / ((places - places.mean()) ** 2).sum()
    common = set.intersection(*({name for name, (_, ends) in one.shares.items() if ends} for one in sweeps))
    slopes: dict[str, Slope] = {}
    for subject in [name for name in sweeps[0].shares if name in common]:
        names = [tuple(f"{n}/{name}" for name in (one.base, one.full, subject)) for n, one in enumerate(sweeps)]
        unused = {name: 0.0 for of_sweep in names for name in of_sweep}  # they restrict the seeds
        value, coefficients = 0.0, defaultdict[str, float](float)
        for (base, full, own), weight in zip(names, map(float, weights), strict=True):
            gain = estimate_sum(scores, unused | {base: sign, full: -sign})
            kept = estimate_sum(scores, unused | {base: sign, own: -sign})
            if gain is None or kept is None or gain.value <= 0:  # no seed is common
                return {}
            share, factor = kept.value / gain.value, sign * weight / gain.value
            value += weight * share
            coefficients[base] += factor * (1 - share)
            coefficients[full] += factor * share
            coefficients[own] -= factor
        found = estimate_sum(scores, coefficients, constant=value)
        if found and found.is_testable:
            slopes[subject] = Slope(value=value, interval=found.find_interval(1 - (1 - CONFIDENCE) / len(common)))
    return slopes


def _join_scores(sweeps: Sequence[Evidence]) -> ConfirmScores | None:
    """Returns the scores of all sweeps as those of one, whose subjects are named `NUMBER/SUBJECT`.

    None if one has no scores, or if the groups of test examples differ.
    """
    found = [one.scores for one in sweeps]
    scores = [one for one in found if one is not None]
    if len(scores) < len(sweeps) or len({(one.num_examples, one.shares.tobytes()) for one in scores}) > 1:
        return None
    values = {f"{n}/{name}": runs for n, one in enumerate(scores) for name, runs in one.values.items()}
    errors = {f"{n}/{name}": error for n, one in enumerate(scores) for name, error in one.search_errors.items()}
    return replace(scores[0], values=values, search_errors=errors)
