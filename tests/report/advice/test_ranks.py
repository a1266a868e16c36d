"""The smallest rank that is enough: planted, from the confirm stage or from the search."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasweep.report.advice.ranks import advise_ranks
from lorasweep.report.sweep_data import load_sweep_data

from ..conftest import build_rank_arms, build_sweep, confirm_sweep, edit_json


@pytest.mark.parametrize("examples", [0, 30])
def test_smallest_rank_not_distinguishably_worse_than_the_best_is_named(tmp_path: Path, examples: int) -> None:
    sweep = build_rank_arms(tmp_path, {1: 1.80, 4: 1.70, 16: 1.6615, 64: 1.660}, examples=examples)
    (advice,) = advise_ranks(load_sweep_data(sweep))
    assert (advice.rank, advice.best_rank) == (16, 64)
    assert advice.is_confirmed
    assert advice.difference == pytest.approx(0.0015, abs=0.004)
    assert advice.interval
    assert advice.interval[0] < 0 < advice.interval[1]
    assert advice.minimum_detectable
    assert "Rank 16 is the smallest" in advice.sentence
    assert "of full fine-tuning's gain" in advice.sentence


def test_rank_is_the_best_where_every_lower_one_is_worse(tmp_path: Path) -> None:
    (advice,) = advise_ranks(load_sweep_data(build_rank_arms(tmp_path, {1: 1.9, 4: 1.8, 16: 1.7})))
    assert (advice.rank, advice.best_rank, advice.minimum_detectable) == (16, 16, None)
    assert "search higher ranks too" in advice.sentence


def test_best_rank_in_the_middle_is_needed(tmp_path: Path) -> None:
    (advice,) = advise_ranks(load_sweep_data(build_rank_arms(tmp_path, {1: 1.9, 4: 1.7, 16: 1.8})))
    assert "is needed here" in advice.sentence


def test_lowest_rank_may_be_the_best(tmp_path: Path) -> None:
    (advice,) = advise_ranks(load_sweep_data(build_rank_arms(tmp_path, {1: 1.7, 4: 1.8})))
    assert advice.sentence.startswith("Rank 1 is the lowest")


def test_higher_is_better_when_the_sweep_maximizes(tmp_path: Path) -> None:
    sweep = build_rank_arms(tmp_path, {1: 1.9, 4: 1.7})
    edit_json(sweep / "sweep.json", lambda raw: raw.update(direction="maximize"))
    (advice,) = advise_ranks(load_sweep_data(sweep))
    assert advice.best_rank == 1


def test_rank_swept_inside_one_arm_is_advised_from_the_search(sweep: Path, tmp_path: Path) -> None:
    (searched,) = advise_ranks(load_sweep_data(sweep))
    assert not searched.is_confirmed
    assert searched.arms == ("lora",)
    assert "within 2 % of the gain over the frozen base" in searched.sentence
    assert "one seed each, validation data" in searched.sentence
    confirmed = confirm_sweep(build_sweep(tmp_path / "b"), noise=0.05)
    (advice,) = advise_ranks(load_sweep_data(confirmed))
    assert "the noise between two seeds" in advice.sentence
    # so much noise hides what rank does
    assert advice.rank < advice.best_rank


def test_one_seed_or_one_rank_gives_no_advice(tmp_path: Path) -> None:
    one_seed = build_rank_arms(tmp_path / "a", {1: 1.9, 4: 1.7}, seeds=1)
    one_rank = build_rank_arms(tmp_path / "b", {4: 1.7})
    assert advise_ranks(load_sweep_data(one_seed)) == []
    assert advise_ranks(load_sweep_data(one_rank)) == []
