"""The evidence of a whole sweep: its arms, shares of full's gain, and verdicts corrected for their number."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from lorasweep.config.sweep import Margin
from lorasweep.report.evidence.scores import ConfirmScores, build_scores
from lorasweep.report.evidence.verdicts import adjust_holm, compare_arms, compare_pairs

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
    assert found["a", "same"].verdict == "inconclusive"
    lower = "better" if sign == 1 else "worse"
    assert (found["a", "b"].verdict, found["same", "b"].verdict) == (lower, lower)
    assert all(pair.uses_examples == bool(examples) for pair in found.values())


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
    moved = type(scores)(
        values=values, deterministic=frozenset(), deviations={}, num_examples=0, num_groups=0, problems=()
    )
    (pair,) = compare_pairs(moved, ["a", "b"], sign=1)
    assert (pair.verdict, pair.difference) == ("not tested", None)
    assert "no seed in common" in (pair.reason or "")


def test_arms_without_scores_are_in_no_pair() -> None:
    assert compare_pairs(plant({"a": 1.0}), ["a", "gone"], sign=1) == ()


def test_pair_seen_from_its_second_arm_is_turned_round() -> None:
    (pair,) = compare_pairs(plant({"a": 1.0, "b": 1.3}), ["a", "b"], sign=1)
    turned = pair.seen_from("b")
    assert (turned.first, turned.second, turned.verdict) == ("b", "a", "worse")
    assert turned.difference == -(pair.difference or 0)
    assert turned.interval
    assert turned.interval[0] < turned.difference < turned.interval[1]
    assert turned.seen_from("a") == pair
    assert pair.seen_from("a") is pair


METHODS = [("base", "frozen"), ("a", "lora"), ("full", "full"), ("full-2", "full")]
MARGIN = Margin(value=0.05, is_share_of_gain=True)
BASE = frozenset({"base"})


def planted(**settings: int) -> ConfirmScores:
    return plant({"base": 2.0, "a": 1.2, "full": 1.0, "full-2": 1.1}, deterministic=BASE, **settings)  # type: ignore[arg-type]


def test_share_of_full_gain_is_that_of_the_best_full_arm() -> None:
    evidence = compare_arms(planted(examples=40), METHODS, sign=1, margin=MARGIN)
    shares = {arm.name: arm.share_of_full_gain for arm in evidence.arms}
    assert (evidence.base, evidence.full) == ("base", "full")
    assert (shares["base"], shares["full"]) == (0.0, 1.0)
    assert shares["a"] == pytest.approx(0.8, abs=0.03)
    arm = evidence.arm("a")
    assert arm
    assert arm.share_interval
    assert arm.share_interval[0] < 0.8 < arm.share_interval[1]


def test_mean_interval_and_seeds_are_those_of_the_arm() -> None:
    scores = planted()
    arm = compare_arms(scores, METHODS, sign=1, margin=MARGIN).arm("a")
    assert arm
    assert arm.values == tuple(scores.values["a"].values())
    assert arm.mean == pytest.approx(sum(arm.values) / 5)
    assert arm.interval == arm.seed_interval
    assert arm.interval
    assert arm.interval[0] < arm.mean < arm.interval[1]


def test_examples_widen_the_interval_but_not_that_over_seeds() -> None:
    arm = compare_arms(planted(examples=40), METHODS, sign=1, margin=MARGIN).arm("a")
    assert arm
    assert arm.interval
    assert arm.seed_interval
    assert arm.interval[1] - arm.interval[0] > arm.seed_interval[1] - arm.seed_interval[0]


def test_share_is_unknown_without_an_end_of_the_scale_or_without_a_gain() -> None:
    no_base = compare_arms(plant({"a": 1.2, "full": 1.0}), METHODS, sign=1, margin=MARGIN)
    no_gain = compare_arms(
        plant({"base": 1.0, "a": 1.2, "full": 1.5}, deterministic=BASE), METHODS, sign=1, margin=MARGIN
    )
    assert [arm.share_of_full_gain for arm in (*no_base.arms, *no_gain.arms)] == [None] * 5


def test_one_seed_is_said_and_has_no_verdict() -> None:
    evidence = compare_arms(plant({"a": 1.2, "full": 1.0}, seeds=1), METHODS, sign=1, margin=MARGIN)
    assert evidence.num_compared == 0
    assert any("no verdict on `a` and `full`" in warning for warning in evidence.warnings)


@pytest.mark.parametrize(("seeds", "is_warned"), [(2, True), (3, False)])
def test_two_seeds_are_warned_of_and_three_are_not(seeds: int, is_warned: bool) -> None:
    scores = plant({"base": 2.0, "a": 1.2, "full": 1.0}, deterministic=BASE, seeds=seeds)
    warnings = compare_arms(scores, METHODS, sign=1, margin=MARGIN).warnings
    assert len(warnings) == is_warned
    assert all("`a` and `full` reaches 12.7 standard errors" in warning for warning in warnings)
    assert all("with 3 seeds 4.3" in warning for warning in warnings)


def test_no_examples_is_said() -> None:
    notes = compare_arms(planted(), METHODS, sign=1, margin=MARGIN).notes
    assert any("intervals are over seeds alone" in note for note in notes)


def test_no_confirm_stage_is_no_evidence_and_no_note() -> None:
    evidence = compare_arms(build_scores({}, {}), METHODS, sign=1, margin=MARGIN)
    assert (evidence.arms, evidence.pairs, evidence.notes, evidence.warnings) == ((), (), (), ())


def test_evidence_is_the_same_every_time_and_is_json() -> None:
    texts = [
        json.dumps(asdict(compare_arms(planted(examples=30), METHODS, sign=1, margin=MARGIN)), allow_nan=False)
        for _ in "ab"
    ]
    assert texts[0] == texts[1]


def test_pair_is_seen_from_the_arm_that_is_named_first() -> None:
    evidence = compare_arms(planted(), METHODS, sign=1, margin=MARGIN)
    first, second = evidence.pair("full", "a"), evidence.pair("a", "full")
    assert first
    assert second
    assert (first.verdict, second.verdict) == ("better", "worse")
    assert evidence.pair("a", "gone") is None
