"""The evidence of a whole sweep: every arm, shares of full's gain, and what can't be said."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from lorasweep.report.evidence import compare_arms
from lorasweep.report.evidence.scores import ConfirmScores, build_scores

from .conftest import plant

METHODS = [("base", "frozen"), ("a", "lora"), ("full", "full"), ("full-2", "full")]
BASE = frozenset({"base"})


def planted(**settings: int) -> ConfirmScores:
    return plant({"base": 2.0, "a": 1.2, "full": 1.0, "full-2": 1.1}, deterministic=BASE, **settings)  # type: ignore[arg-type]


def test_share_of_full_gain_is_that_of_the_best_full_arm() -> None:
    evidence = compare_arms(planted(examples=40), METHODS, sign=1)
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
    arm = compare_arms(scores, METHODS, sign=1).arm("a")
    assert arm
    assert arm.values == tuple(scores.values["a"].values())
    assert arm.mean == pytest.approx(sum(arm.values) / 5)
    assert arm.interval == arm.seed_interval
    assert arm.interval
    assert arm.interval[0] < arm.mean < arm.interval[1]


def test_examples_widen_the_interval_but_not_that_over_seeds() -> None:
    arm = compare_arms(planted(examples=40), METHODS, sign=1).arm("a")
    assert arm
    assert arm.interval
    assert arm.seed_interval
    assert arm.interval[1] - arm.interval[0] > arm.seed_interval[1] - arm.seed_interval[0]


def test_share_is_unknown_without_an_end_of_the_scale_or_without_a_gain() -> None:
    no_base = compare_arms(plant({"a": 1.2, "full": 1.0}), METHODS, sign=1)
    no_gain = compare_arms(plant({"base": 1.0, "a": 1.2, "full": 1.5}, deterministic=BASE), METHODS, sign=1)
    assert [arm.share_of_full_gain for arm in (*no_base.arms, *no_gain.arms)] == [None] * 5


def test_one_seed_is_said_and_has_no_verdict() -> None:
    evidence = compare_arms(plant({"a": 1.2, "full": 1.0}, seeds=1), METHODS, sign=1)
    assert evidence.num_compared == 0
    assert any("no verdict on `a`, `full`" in note for note in evidence.notes)


def test_no_examples_is_said() -> None:
    notes = compare_arms(planted(), METHODS, sign=1).notes
    assert any("intervals are over seeds alone" in note for note in notes)


def test_no_confirm_stage_is_no_evidence_and_no_note() -> None:
    evidence = compare_arms(build_scores({}, {}), METHODS, sign=1)
    assert (evidence.arms, evidence.pairs, evidence.notes) == ((), (), ())


def test_evidence_is_the_same_every_time_and_is_json() -> None:
    texts = [json.dumps(asdict(compare_arms(planted(examples=30), METHODS, sign=1)), allow_nan=False) for _ in "ab"]
    assert texts[0] == texts[1]


def test_pair_is_seen_from_the_arm_that_is_named_first() -> None:
    evidence = compare_arms(planted(), METHODS, sign=1)
    first, second = evidence.pair("full", "a"), evidence.pair("a", "full")
    assert first
    assert second
    assert (first.verdict, second.verdict) == ("better", "worse")
    assert evidence.pair("a", "gone") is None
