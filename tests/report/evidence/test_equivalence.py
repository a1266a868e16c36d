"""Equivalence is two one-sided tests against the margin, and a projection says what would settle the rest."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from lorasweep.config.sweep import Margin
from lorasweep.report.evidence.equivalence import FurtherEvidence, estimate_slack, measure_margin
from lorasweep.report.evidence.scores import ConfirmScores, build_scores
from lorasweep.report.evidence.verdicts import PairComparison, compare_arms

from .conftest import plant

METHODS = [("base", "frozen"), ("full", "full"), ("a", "lora"), ("b", "lora")]
SHARE = Margin(value=0.05, is_share_of_gain=True)


def plant_arms(a: float, b: float, *, noise: float = 0.01, **settings: int) -> ConfirmScores:
    means = {"base": 2.0, "full": 1.0, "a": a, "b": b}
    return plant(means, seed_spread=noise, deterministic=frozenset({"base"}), **settings)  # type: ignore[arg-type]


def compare(scores: ConfirmScores, margin: Margin = SHARE, *, sign: int = 1) -> PairComparison:
    pair = compare_arms(scores, METHODS, sign=sign, margin=margin).pair("a", "b")
    assert pair
    return pair


@pytest.mark.parametrize("sign", [1, -1])
def test_absolute_margin_is_schuirmanns_test(sign: int) -> None:
    scores, margin = plant_arms(1.1, 1.1), 0.012
    differences = np.array(list(scores.values["a"].values())) - np.array(list(scores.values["b"].values()))
    expected = max(
        stats.ttest_1samp(differences, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(differences, margin, alternative="less").pvalue,
    )
    found = compare(scores, Margin(value=margin, is_share_of_gain=False), sign=sign)
    assert found.equivalence_p_value == pytest.approx(expected, rel=1e-9)


def test_relative_margin_counts_the_error_of_the_gain() -> None:
    scores = plant_arms(1.1, 1.1)
    values = {arm: np.array(list(scores.values[arm].values())) for arm in ("full", "a", "b")}
    slack = 0.05 * (2.0 - values["full"]) - (values["a"] - values["b"])
    measured = measure_margin(scores, SHARE, base="base", full="full", sign=1)
    assert measured
    assert measured.value == pytest.approx(0.05 * (2 - values["full"].mean()))
    found = estimate_slack(scores, "a", "b", measured, sign=1)
    assert found
    assert found.values == pytest.approx(tuple(slack))


def test_coefficients_add_up_if_full_is_in_the_pair() -> None:
    scores = plant_arms(1.02, 1.1)
    measured = measure_margin(scores, SHARE, base="base", full="full", sign=1)
    assert measured
    found = estimate_slack(scores, "a", "full", measured, sign=1)
    a, full = (np.array(list(scores.values[arm].values())) for arm in ("a", "full"))
    assert found
    assert found.values == pytest.approx(tuple(0.05 * (2 - full) - (a - full)))


@pytest.mark.parametrize(
    ("a", "b", "noise", "verdict"),
    [
        (1.1, 1.1, 0.005, "equivalent"),
        (1.1, 1.11, 0.0005, "equivalent"),  # a known sign, but the difference does not matter
        (1.1, 1.3, 0.01, "better"),
        (1.3, 1.1, 0.01, "worse"),
        (1.1, 1.1, 0.1, "inconclusive"),
    ],
)
def test_verdict_is_one_of_four(a: float, b: float, noise: float, verdict: str) -> None:
    found = compare(plant_arms(a, b, noise=noise))
    assert found.verdict == verdict
    assert (found.settled_by is not None) == (verdict == "inconclusive")
    assert found.seen_from("b").verdict == {"better": "worse", "worse": "better"}.get(verdict, verdict)


def test_arms_at_the_margin_are_called_equivalent_in_at_most_5_of_100_cases() -> None:
    rng, wrong = np.random.default_rng(4), []
    for _ in range(300):
        scores = plant({"base": 2.0, "full": 1.0, "a": 1.05, "b": 1.0}, deterministic=frozenset({"base"}), rng=rng)
        wrong.append(compare(scores).verdict == "equivalent")
    # the standard error is 1.3 %
    assert np.mean(wrong) <= 0.05 + 2 * 0.013


@pytest.mark.parametrize(("base", "full"), [(None, "full"), ("base", None), ("full", "base")])
def test_a_share_of_an_unknown_or_negative_gain_is_no_margin(base: str | None, full: str | None) -> None:
    assert measure_margin(plant_arms(1.1, 1.1), SHARE, base=base, full=full, sign=1) is None


def test_without_a_known_margin_nothing_is_equivalent() -> None:
    scores = plant_arms(1.1, 1.1, noise=1e-4)
    found = compare(dataclasses.replace(scores, values={arm: scores.values[arm] for arm in "ab"}))
    assert (found.verdict, found.equivalence_p_value) == ("inconclusive", None)


def plant_difference(noise: float) -> ConfirmScores:
    """Returns 4 seeds of two arms whose difference has mean 0 and exactly that standard deviation."""
    differences = noise * (3 / 4) ** 0.5 * np.array([1, -1, 1, -1])
    values = {(arm, seed): share * differences[seed] for arm, share in (("a", 1.0), ("b", 0.0)) for seed in range(4)}
    return build_scores(values, {})


def test_projected_seeds_would_settle_80_of_100_sweeps() -> None:
    margin = 0.03
    found = compare(plant_difference(0.03), Margin(value=margin, is_share_of_gain=False))
    assert found.settled_by
    needed = 4 + (found.settled_by.more_seeds or 0)
    rng = np.random.default_rng(5)

    def settle(seeds: int) -> float:
        differences = rng.normal(0, 0.03, (4000, seeds))
        error = differences.std(axis=1, ddof=1) / seeds**0.5
        reach = np.abs(differences.mean(axis=1)) + stats.t.ppf(0.95, seeds - 1) * error
        return float((reach < margin).mean())

    # the standard error is 0.6 %
    assert settle(needed - 1) < 0.82
    assert settle(needed) > 0.78


def test_more_test_examples_are_asked_for_if_they_alone_are_too_few() -> None:
    scores = plant_arms(1.1, 1.1, noise=0.001, examples=20)
    wide = {key: deviations * (30 if key[0] == "a" else 1) for key, deviations in scores.deviations.items()}
    found = compare(dataclasses.replace(scores, deviations=wide))
    assert (found.verdict, found.settled_by) == ("inconclusive", FurtherEvidence(kind="test examples"))


def test_a_hopeless_pair_says_so() -> None:
    found = compare(plant_difference(0.03), Margin(value=1e-4, is_share_of_gain=False))
    assert found.settled_by == FurtherEvidence(kind="too many seeds")
