"""The best learning rate, the range that is as good, its ratio to full fine-tuning's, and its change over rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasweep.report.advice.rates import advise_rates, fit_trends
from lorasweep.report.sweep_data import load_sweep_data

from ..conftest import build_rank_arms, build_sweep, confirm_sweep, edit_json


def test_best_rate_is_that_of_the_best_trial_with_the_rates_that_are_as_good(tmp_path: Path) -> None:
    data = load_sweep_data(confirm_sweep(build_sweep(tmp_path), noise=0.02))
    full = data.arms[2]
    rate = next(rate for rate in advise_rates(data) if rate.arm == "full")
    evidence = data.evidence.arm("full")
    assert full.best
    assert full.best.value
    assert evidence
    assert evidence.std
    # t of 4 degrees of freedom · s · √2: the difference of two runs on one seed each
    limit = full.best.value + 2.7764451 * evidence.std * 2**0.5
    as_good = [trial.params["optim.lr"] for trial in full.trials if trial.value and trial.value <= limit]
    assert rate.lr == full.best.params["optim.lr"]
    assert 1 < len(as_good) < len(full.trials)
    assert (rate.low, rate.high) == (min(as_good), max(as_good))
    assert "within the noise between two seeds" in rate.sentence


def test_ratio_is_to_the_best_rate_of_full_fine_tuning(sweep: Path) -> None:
    lora, full = advise_rates(load_sweep_data(sweep))
    assert lora.ratio_to_full == pytest.approx(lora.lr / full.lr)
    assert full.ratio_to_full is None
    assert "times full fine-tuning's" in lora.sentence


@pytest.mark.parametrize(("scaling", "power", "name"), [("over_rank", 1, "α/r"), ("over_sqrt_rank", 0.5, "α/√r")])
def test_alpha_is_divided_by_the_rank_as_the_method_does(sweep: Path, scaling: str, power: float, name: str) -> None:
    for record in sweep.glob("runs/lora-*/run.json"):
        edit_json(record, lambda raw: raw["config"]["method"].update(scaling=f"alpha_{scaling}"))
    data = load_sweep_data(sweep)
    lora, best = advise_rates(data)[0], data.arms[1].best
    assert best
    assert lora.scale == pytest.approx(best.params["method.alpha"] / best.params["method.rank"] ** power)
    assert f"Its {name} is " in lora.sentence


def test_planted_move_of_the_learning_rate_over_rank_is_found(tmp_path: Path) -> None:
    lrs = {1: 0.04, 4: 0.02, 16: 0.01, 64: 0.005}
    data = load_sweep_data(build_rank_arms(tmp_path, dict.fromkeys(lrs, 1.7), lrs=lrs))
    (trend,) = fit_trends(data, advise_rates(data))
    assert trend.ranks == (1, 4, 16, 64)
    # lr ∝ 1/√r was planted
    assert trend.exponent == pytest.approx(-0.5, abs=0.02)
    assert "rank^-0.5" in trend.sentence


def test_trend_over_equal_rates_is_flat_and_over_two_ranks_has_no_error(tmp_path: Path) -> None:
    data = load_sweep_data(build_rank_arms(tmp_path / "a", {1: 1.7, 4: 1.7, 16: 1.7}))
    (trend,) = fit_trends(data, advise_rates(data))
    assert (trend.exponent, trend.exponent_error) == (0, 0)
    data = load_sweep_data(build_rank_arms(tmp_path / "b", {1: 1.7, 4: 1.7}))
    (trend,) = fit_trends(data, advise_rates(data))
    assert trend.exponent_error is None


def test_rate_at_an_end_of_its_range_is_said(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: raw["arms"][2].update(space={"optim.lr": {"low": 1e-3, "high": 1e-2}}))
    full = advise_rates(load_sweep_data(sweep))[1]
    assert full.is_edge
    assert "at an end of its range" in full.sentence


def test_without_the_base_or_a_confirm_stage_there_is_no_advice(tmp_path: Path) -> None:
    assert advise_rates(load_sweep_data(build_sweep(tmp_path, frozen=0))) == []
