"""Learning rates: the planted best is found, with how flat it is, against full fine-tuning and over rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasweep.report.advice.rates import advise_rates, find_trends, fit_arm, sentences_of
from lorasweep.report.tables import load_sweep_data

from ..conftest import build_rank_arms, build_sweep, confirm_sweep, edit_json


def test_fit_finds_the_planted_best_learning_rate(sweep: Path) -> None:
    data = load_sweep_data(sweep)
    full = data.arms[2]
    fit = fit_arm(full, data)
    assert fit
    # the builder's parabola has its lowest point, 1.662, at 1.1e-3 and curvature 0.12 per decade squared
    assert fit.lr == pytest.approx(1.1e-3, rel=1e-3)
    assert fit.curvature == pytest.approx(0.12, rel=1e-3)
    assert fit.lowest == pytest.approx(1.662, abs=1e-4)


def test_flat_range_is_where_the_parabola_stays_within_the_noise(tmp_path: Path) -> None:
    data = load_sweep_data(confirm_sweep(build_sweep(tmp_path), noise=0.002))
    rate = next(rate for rate in advise_rates(data) if rate.arm == "full")
    spread = next(arm.spread for arm in data.evidence.arms if arm.name == "full")
    assert spread
    width = 2.7764451 * spread * 2**0.5
    reach = 10 ** ((width / 0.12) ** 0.5)
    assert rate.tolerance == "the noise between two seeds"
    assert rate.high == pytest.approx(max(1.1e-3 * reach, rate.lr), rel=0.01)
    assert rate.low == pytest.approx(min(1.1e-3 / reach, rate.lr), rel=0.01)


def test_ratio_to_full_is_between_the_ends_of_both_ranges(sweep: Path) -> None:
    lora, full = advise_rates(load_sweep_data(sweep))
    assert lora.ratio_to_full == pytest.approx(lora.lr / full.lr)
    assert lora.ratio_interval
    assert lora.ratio_interval[0] < lora.ratio_to_full < lora.ratio_interval[1]
    assert (full.ratio_to_full, full.ratio_interval) == (None, None)
    assert "times full fine-tuning's (between" in sentences_of([lora], [])[0]


def test_alpha_over_rank_is_that_of_the_best_trial_and_of_trials_as_good(sweep: Path) -> None:
    data = load_sweep_data(sweep)
    lora, best = advise_rates(data)[0], data.arms[1].best
    assert best
    assert (lora.scaling, lora.scale) == ("alpha_over_rank", best.params["method.alpha"] / best.params["method.rank"])
    assert "Its α/r is " in sentences_of([lora], [])[0]


def test_alpha_of_rslora_is_said_over_the_root_of_the_rank(sweep: Path) -> None:
    for record in sweep.glob("runs/lora-*/run.json"):
        edit_json(record, lambda raw: raw["config"]["method"].update(scaling="alpha_over_sqrt_rank"))
    data = load_sweep_data(sweep)
    lora, best = advise_rates(data)[0], data.arms[1].best
    assert best
    assert lora.scale == pytest.approx(best.params["method.alpha"] / best.params["method.rank"] ** 0.5)
    assert "Its α/√r is " in sentences_of([lora], [])[0]


def test_fit_needs_five_rates_and_a_lowest_point_among_them(sweep: Path) -> None:
    def keep(raw: dict[str, Any], count: int, top: float) -> None:
        mine = [trial for trial in raw["trials"] if trial["arm"] == "full"]
        for index, trial in enumerate(mine):
            trial.update(state="complete" if index < count else "failed", params={"optim.lr": 10 ** (-4 + 0.3 * index)})
            trial.update(value=1.7 - top * index)

    for count, top in ((4, 0.0), (6, 0.01)):
        edit_json(sweep / "sweep.json", lambda raw, count=count, top=top: keep(raw, count, top))
        data = load_sweep_data(sweep)
        assert fit_arm(data.arms[2], data) is None


def test_arm_that_searched_other_keys_has_no_fit(sweep: Path) -> None:
    data = load_sweep_data(sweep)
    assert fit_arm(data.arms[1], data) is None


def test_planted_move_of_the_learning_rate_over_rank_is_found(tmp_path: Path) -> None:
    lrs = {1: 0.04, 4: 0.02, 16: 0.01, 64: 0.005}
    data = load_sweep_data(build_rank_arms(tmp_path, dict.fromkeys(lrs, 1.7), lrs=lrs))
    (trend,) = find_trends(data, advise_rates(data))
    assert trend.ranks == (1, 4, 16, 64)
    # lr ∝ 1/√r was planted
    assert trend.exponent == pytest.approx(-0.5, abs=0.02)
    (sentence,) = sentences_of([], [trend])
    assert sentence.startswith("Over rank the best learning rate moves like rank^-0.5")
    assert "at rank 1, " in sentence
    assert " and " in sentence


def test_two_ranks_have_a_slope_without_an_error(tmp_path: Path) -> None:
    data = load_sweep_data(build_rank_arms(tmp_path, {1: 1.7, 4: 1.7}))
    (trend,) = find_trends(data, advise_rates(data))
    assert trend.exponent_error is None


def test_edge_is_said(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: raw["arms"][2].update(space={"optim.lr": {"low": 1e-3, "high": 1e-2}}))
    full = advise_rates(load_sweep_data(sweep))[1]
    assert full.is_edge
    assert "it lies at an end of its range" in sentences_of([full], [])[0]


def test_without_the_base_or_a_confirm_stage_nothing_tells_the_noise(tmp_path: Path) -> None:
    assert advise_rates(load_sweep_data(build_sweep(tmp_path, frozen=0))) == []


def test_settings_that_no_run_can_have_are_passed_over(tmp_path: Path) -> None:
    sweep = build_rank_arms(tmp_path, {1: 1.7, 4: 1.6, 16: 1.5})

    def spoil(raw: dict[str, Any]) -> None:
        raw["arms"][-1]["settings"]["method.rank"] = -16
        for trial in raw["trials"]:
            if trial["arm"] == "lora-rank4":
                trial["params"]["optim.lr"] = -1

    edit_json(sweep / "sweep.json", spoil)
    data = load_sweep_data(sweep)
    rates = advise_rates(data)
    assert "lora-rank4" not in {rate.arm for rate in rates}
    assert find_trends(data, rates) == []
