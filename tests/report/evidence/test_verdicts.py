"""Verdicts on planted differences, and the correction for their number."""

from __future__ import annotations

import numpy as np
import pytest

from lorasweep.report.evidence.estimates import estimate_sum
from lorasweep.report.evidence.verdicts import adjust_holm, compare_pairs

from .conftest import plant


def test_holm_equals_the_example_by_hand() -> None:
    # four tests: 0.01 · 4, then 0.02 · 3, 0.03 · 2 (the running maximum of both is 0.06), 0.04 · 1 below it
    assert adjust_holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert adjust_holm([0.6, 0.5]) == [1.0, 1.0]
    assert adjust_holm([]) == []


def test_holm_rejects_what_its_definition_rejects() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        p_values = rng.uniform(0, 0.1, 6).tolist()
        rejected = set()
        for step, index in enumerate(sorted(range(6), key=p_values.__getitem__)):
            if p_values[index] >= 0.05 / (6 - step):
                break
            rejected.add(index)
        assert {index for index, p in enumerate(adjust_holm(p_values)) if p < 0.05} == rejected


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("examples", [0, 50])
def test_planted_differences_are_found_and_equal_arms_are_not_told_apart(sign: int, examples: int) -> None:
    scores = plant({"a": 1.0, "same": 1.0, "b": 1.3}, examples=examples, rng=np.random.default_rng(3))
    found = {(pair.first, pair.second): pair for pair in compare_pairs(scores, ["a", "same", "b"], sign=sign)}
    assert found["a", "same"].verdict == "not distinguishable"
    lower = "better" if sign == 1 else "worse"
    assert (found["a", "b"].verdict, found["same", "b"].verdict) == (lower, lower)
    assert all(pair.uses_examples == bool(examples) for pair in found.values())
    assert found["a", "b"].minimum_detectable is None


def test_a_difference_of_the_minimum_detectable_size_is_seen_in_80_of_100_cases() -> None:
    rng, sizes, seen = np.random.default_rng(4), [], []
    for _ in range(300):
        found = estimate_sum(plant({"a": 1.0, "b": 1.0}, rng=rng), {"a": 1.0, "b": -1.0})
        sizes.append(found.distribution.minimum_detectable(0.05) if found and found.distribution else np.nan)
    # five seeds know a spread to within a factor of two; the mean square over many is the true one
    size = float(np.sqrt(np.mean(np.square(sizes))))
    for _ in range(300):
        (pair,) = compare_pairs(plant({"a": 1.0, "b": 1.0 + size}, rng=rng), ["a", "b"], sign=1)
        seen.append(pair.verdict == "better")
    # the standard error is 2.3 %
    assert np.mean(seen) == pytest.approx(0.8, abs=0.06)


def test_of_equal_arms_hardly_one_family_in_twenty_has_a_false_verdict() -> None:
    rng, false = np.random.default_rng(9), []
    for _ in range(300):
        pairs = compare_pairs(plant(dict.fromkeys("abcd", 1.0), rng=rng), list("abcd"), sign=1)
        false.append(any(pair.verdict in ("better", "worse") for pair in pairs))
    # Holm keeps it at or below 5 %; the standard error is 1.3 %
    assert np.mean(false) <= 0.08


def test_one_common_seed_is_not_tested_and_says_why() -> None:
    (pair,) = compare_pairs(plant({"a": 1.0, "b": 2.0}, seeds=1, examples=30), ["a", "b"], sign=1)
    assert (pair.verdict, pair.p_value, pair.adjusted_p_value) == ("not tested", None, None)
    assert pair.difference == pytest.approx(-1.0, abs=0.1)
    assert "one seed in common" in (pair.reason or "")


def test_no_common_seed_is_not_tested_and_says_why() -> None:
    scores = plant({"a": 1.0, "b": 2.0})
    values = {"a": scores.values["a"], "b": {seed + 10: value for seed, value in scores.values["b"].items()}}
    moved = type(scores)(values=values, deterministic=frozenset(), deviations={}, num_examples=0, problems=())
    (pair,) = compare_pairs(moved, ["a", "b"], sign=1)
    assert (pair.verdict, pair.difference) == ("not tested", None)
    assert "no seed in common" in (pair.reason or "")


def test_arms_without_scores_are_in_no_pair() -> None:
    assert compare_pairs(plant({"a": 1.0}), ["a", "gone"], sign=1) == ()


def test_what_could_be_seen_shrinks_with_more_seeds_and_grows_with_more_comparisons() -> None:
    def smallest(arms: int, seeds: int) -> float:
        names = list("abcdef")[:arms]
        pairs = compare_pairs(plant(dict.fromkeys(names, 1.0), seeds=seeds), names, sign=1)
        return float(np.median([pair.minimum_detectable or np.nan for pair in pairs]))

    assert smallest(2, 20) < smallest(2, 5) < smallest(6, 5)


def test_pair_seen_from_its_second_arm_is_turned_round() -> None:
    (pair,) = compare_pairs(plant({"a": 1.0, "b": 1.3}), ["a", "b"], sign=1)
    turned = pair.seen_from("b")
    assert (turned.first, turned.second, turned.verdict) == ("b", "a", "worse")
    assert turned.difference == -(pair.difference or 0)
    assert turned.interval
    assert turned.interval[0] < turned.difference < turned.interval[1]
    assert turned.seen_from("a") == pair
    assert pair.seen_from("a") is pair
