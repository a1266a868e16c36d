"""Advice on planted sweeps: the smallest sufficient rank, d90, best learning rates, and values at ends of ranges."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lorasweep.report.advice import Advice, RankAdvice, advise, describe_edges
from lorasweep.report.evidence.verdicts import ArmEvidence, Evidence
from lorasweep.report.figures.trials import draw_score_by_lr, draw_score_by_rank
from lorasweep.report.summary import summarize
from lorasweep.report.sweep_data import SweepData, load_sweep_data

from .conftest import BASE_SCORE, build_rank_arms, build_sweep, confirm_winners, edit_json


def advise_folder(sweep: Path) -> Advice:
    return advise(load_sweep_data(sweep))


def advise_rank(sweep: Path) -> RankAdvice:
    (advice,) = advise_folder(sweep).ranks
    return advice


@pytest.mark.parametrize(
    ("scores", "rank", "best_rank", "sentence"),
    [
        ({1: 1.80, 4: 1.70, 16: 1.6615, 64: 1.660}, 16, 64, "Rank 16 is enough"),
        ({1: 1.9, 4: 1.7, 16: 1.8}, 4, 4, "Rank 4 is enough: it has the best score"),
        ({1: 1.7, 4: 1.8}, 1, 1, "Rank 1 is enough"),
    ],
)
def test_smallest_rank_within_the_margin_of_the_others_is_named(
    tmp_path: Path, scores: dict[int, float], rank: int, best_rank: int, sentence: str
) -> None:
    advice = advise_rank(build_rank_arms(tmp_path, scores, examples=30))
    assert (advice.rank, advice.best_rank) == (rank, best_rank)
    assert set(advice.arms) == {f"lora-rank{rank}", f"lora-rank{best_rank}"}
    assert sentence in advice.sentence


def test_ranks_that_are_left_and_what_would_settle_them_are_said(tmp_path: Path) -> None:
    advice = advise_rank(build_rank_arms(tmp_path, {1: 1.9, 4: 1.701, 16: 1.7}, seeds=3, noise=0.02))
    assert advice.rank is None
    assert "not settled: ranks 4 and 16 are left" in advice.sentence
    assert "would probably settle it" in advice.sentence


def test_without_a_known_margin_no_rank_is_advised(tmp_path: Path) -> None:
    sweep = build_rank_arms(tmp_path, {1: 1.9, 4: 1.7})
    edit_json(sweep / "sweep.json", lambda raw: raw.update(direction="maximize"))  # full gains nothing
    assert advise_folder(sweep).ranks == ()


def test_higher_is_better_when_the_sweep_maximizes(tmp_path: Path) -> None:
    sweep = build_rank_arms(tmp_path, {1: 1.9, 4: 1.7})
    edit_json(sweep / "sweep.json", lambda raw: raw.update(direction="maximize", margin=0.01))
    edit_json(
        sweep / "sweep.json", lambda raw: raw["trials"][0].update(value=1.0)
    )  # the frozen base, else nothing is learned
    confirm_winners(sweep)
    assert advise_rank(sweep).best_rank == 1


def test_one_seed_or_one_rank_gives_no_advice_on_rank(tmp_path: Path) -> None:
    assert advise_rank(build_rank_arms(tmp_path / "a", {1: 1.9, 4: 1.7}, seeds=1)).rank is None
    assert advise_folder(build_rank_arms(tmp_path / "b", {4: 1.7})).ranks == ()


def test_best_rate_is_that_of_the_best_trial_and_an_end_of_its_range_is_said(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: raw["arms"][2].update(space={"optim.lr": {"low": 1e-3, "high": 1e-2}}))
    data = load_sweep_data(sweep)
    lora, full = advise(data).rates
    best = data.arms[1].best
    assert best
    assert (lora.arm, lora.lr, lora.is_edge) == ("lora", best.params["optim.lr"], False)
    assert full.is_edge
    assert "end of its range" in full.sentence


def sweep_dimensions(folder: Path, shares: Mapping[int, float], *, maximize: bool = False, **arms: int) -> SweepData:
    """Returns a sweep with an arm per dimension that keeps that share of full's gain, and five worse trials in each."""
    build_sweep(folder, **arms)
    full = 1.7 if arms else min(t.value for t in load_sweep_data(folder).trials if t.arm == "full" and t.value)

    def add(raw: dict[str, Any]) -> None:
        for dim, share in shares.items():
            arm = {**raw["arms"][-1], "name": f"dim_{dim}", "method": "intrinsic", "settings": {"method.dim": dim}}
            raw["arms"].append(arm)
            for number, kept in enumerate((*[share - 0.3] * 5, share)):
                value = BASE_SCORE - kept * (BASE_SCORE - full)
                row = {**raw["trials"][-1], "arm": arm["name"], "number": number, "value": value, "state": "complete"}
                raw["trials"].append({**row, "params": {"method.dim": dim}})
        if maximize:
            raw["direction"] = "maximize"
            for trial in raw["trials"]:
                trial["value"] = None if trial["value"] is None else -trial["value"]

    edit_json(folder / "sweep.json", add)
    return load_sweep_data(folder)


def confirm(data: SweepData, shares: Mapping[int, float]) -> SweepData:
    """Returns the same sweep with those shares on test data."""
    common: dict[str, Any] = {"seeds": (1, 2), "values": (1.8, 1.8), "mean": 1.8, "std": 0.0, "interval": None}
    common |= {"seed_interval": None, "uses_examples": False}
    arms = [
        ArmEvidence(name=f"dim_{dim}", share_of_full_gain=share, share_interval=(share - 0.04, share + 0.05), **common)
        for dim, share in shares.items()
    ]
    return dataclasses.replace(data, evidence=Evidence(arms=tuple(arms)))


@pytest.mark.parametrize("maximize", [False, True])
def test_d90_is_the_smallest_dimension_that_keeps_90_percent_of_the_gain(tmp_path: Path, maximize: bool) -> None:
    data = sweep_dimensions(tmp_path, {512: 0.93, 8: 0.4, 64: 0.89, 2048: 0.99}, maximize=maximize)
    found = advise(data).dimension
    assert found
    assert found.d90 == 512
    assert found.sentence.startswith("d90 = 512: dimension 512 keeps 93 %")
    assert "8, 64, 512, 2048" in found.sentence
    assert summarize(tmp_path).as_json()["d90"] == 512
    assert found.sentence in summarize(tmp_path).sentences


def test_no_dimension_that_keeps_enough_is_said(tmp_path: Path) -> None:
    found = advise(sweep_dimensions(tmp_path, {8: 0.4, 64: 0.7})).dimension
    assert found
    assert found.d90 is None
    assert found.sentence.startswith("d90 is above 64: the best dimension 64 keeps 70 %")


@pytest.mark.parametrize(("shares", "d90", "where"), [({8: 0.7, 64: 0.91}, 64, "test data"), ({64: 0.91}, 8, "search")])
def test_test_data_counts_if_every_dimension_was_confirmed(
    tmp_path: Path, shares: dict[int, float], d90: int, where: str
) -> None:
    found = advise(confirm(sweep_dimensions(tmp_path, {8: 0.92, 64: 0.95}), shares)).dimension
    assert found
    assert found.d90 == d90
    assert where in found.sentence


@pytest.mark.parametrize("missing", ["full", "frozen"])
def test_without_an_end_of_the_comparison_there_is_no_d90(tmp_path: Path, missing: str) -> None:
    assert advise(sweep_dimensions(tmp_path, {8: 0.9}, **{missing: 0})).dimension is None


def test_trials_that_did_not_end_do_not_count_for_d90(tmp_path: Path) -> None:
    data = sweep_dimensions(tmp_path, {8: 0.95})
    edit_json(tmp_path / "sweep.json", lambda raw: raw["trials"][-1].update(state="pruned"))
    found = advise(load_sweep_data(data.folder)).dimension
    assert found
    assert "8 keeps 65 %" in found.sentence


@pytest.mark.parametrize(
    ("space", "value", "end"),
    [
        ([1, 4, 16], 16, "upper"),
        ([16, 1, 4], 16, "upper"),
        ([1, 4, 16], 4, None),
        ([2, 4, 16], 2, "lower"),
        ([1, 4, 16], 1, None),  # no rank is lower than 1
        ([8], 8, None),
        (["a", "b"], "b", None),
        ({"low": 1, "high": 64}, 63, "upper"),
        ({"low": 1e-4, "high": 1e-2, "log": True}, 1.1e-4, "lower"),
        ({"low": 1e-4, "high": 1e-2, "log": True}, 1e-3, None),
        ({"low": 1e-4, "high": 1e-2, "log": True}, -1.0, None),
    ],
)
def test_best_value_at_the_end_of_its_range_is_said_if_a_complete_trial_lies_elsewhere(
    sweep: Path, space: object, value: object, end: str | None
) -> None:
    def sweep_one_rank(raw: dict[str, Any]) -> None:
        raw["arms"][1]["space"] = {"method.rank": space}
        for trial in raw["trials"]:
            trial["params"] = {"method.rank": value} if trial["arm"] == "lora" else {}
        raw["trials"][2].update(value=3.0, params={"method.rank": 8 if isinstance(value, int) else 2e-3})

    edit_json(sweep / "sweep.json", sweep_one_rank)
    said = describe_edges(load_sweep_data(sweep))
    assert len(said) == (1 if end else 0)
    assert all("`method.rank` of `lora`" in text and f"{end} end" in text for text in said)
    edit_json(sweep / "sweep.json", lambda raw: raw["trials"][2].update(state="paused"))
    assert describe_edges(load_sweep_data(sweep)) == []


def test_arms_with_the_same_edge_share_a_sentence(sweep: Path) -> None:
    def widen(raw: dict[str, Any]) -> None:
        for arm, best in ((1, 3e-2), (2, 5e-3)):
            raw["arms"][arm]["space"] = {"optim.lr": {"low": 1e-4, "high": best, "log": True}}
            mine = [trial for trial in raw["trials"] if trial["arm"] == raw["arms"][arm]["name"]]
            for trial in mine:
                trial.update(params={"optim.lr": best})
            mine[-2].update(params={"optim.lr": 1e-3}, value=3.0, state="complete")

    edit_json(sweep / "sweep.json", widen)
    (sentence,) = describe_edges(load_sweep_data(sweep))
    assert "`optim.lr` of `lora` (0.03) and `full` (0.005) lies at the upper end" in sentence


def keep_rank(raw: dict[str, Any], rank: int) -> None:
    """Lets the lora arm choose between that rank and eight times it, and gives all its trials that rank."""
    raw["arms"][1]["space"]["method.rank"] = [rank, 8 * rank]
    for trial in raw["trials"]:
        trial["params"] |= {"method.rank": rank} if trial["arm"] == "lora" else {}


def test_choice_without_a_complete_trial_is_named_and_the_other_is_not_the_best(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: keep_rank(raw, 2))
    summary = summarize(sweep)
    untried = "Nothing is known about `method.rank` 16: no complete trial of `lora` has it."
    assert summary.advice.untried == (untried,)
    assert untried in summary.sentences
    assert not any("best `method.rank`" in text for text in summary.sentences)
    lora = next(one for one in summary.recommended if one.arm == "lora")
    assert lora.sentences[0].endswith("No complete trial has rank 16.")
    assert draw_score_by_rank(summary.data).figures == ()  # the chart has the same trials, of one rank

    def stop_early(raw: dict[str, Any]) -> None:
        pruned = next(trial for trial in raw["trials"] if trial["state"] == "pruned")
        pruned["params"]["method.rank"] = 16

    edit_json(sweep / "sweep.json", stop_early)
    assert summarize(sweep).advice.untried == (untried,)


def test_arms_without_the_same_choice_share_a_sentence(sweep: Path) -> None:
    def add_arm(raw: dict[str, Any]) -> None:
        keep_rank(raw, 2)
        raw["arms"].append({**raw["arms"][1], "name": "more"})
        raw["trials"] += [{**trial, "arm": "more"} for trial in raw["trials"] if trial["arm"] == "lora"]

    edit_json(sweep / "sweep.json", add_arm)
    (sentence,) = advise_folder(sweep).untried
    assert "no complete trial of `lora` and `more` has it" in sentence


def test_one_learning_rate_is_not_the_best(sweep: Path) -> None:
    def keep_rate(raw: dict[str, Any]) -> None:
        for trial in raw["trials"]:
            trial["params"] |= {"optim.lr": 1e-3} if trial["arm"] == "full" else {}

    edit_json(sweep / "sweep.json", keep_rate)
    data = load_sweep_data(sweep)
    assert [rate.arm for rate in advise(data).rates] == ["lora"]
    assert "full" not in {trace.name for trace in draw_score_by_lr(data).figures[0].data}


def test_best_rate_at_an_end_needs_a_trial_elsewhere(sweep: Path) -> None:
    def narrow(raw: dict[str, Any]) -> None:
        raw["arms"][2]["space"] = {"optim.lr": {"low": 1e-4, "high": 1.0}}
        for number, trial in enumerate(trial for trial in raw["trials"] if trial["arm"] == "full"):
            trial["params"] = {"optim.lr": 1e-4 * (1 + number)}  # all of them in the lowest 5 % of the range

    edit_json(sweep / "sweep.json", narrow)
    full = next(rate for rate in advise_folder(sweep).rates if rate.arm == "full")
    assert not full.is_edge


def test_smallest_dimension_that_was_tried_is_an_upper_bound_of_d90(tmp_path: Path) -> None:
    found = advise(sweep_dimensions(tmp_path, {8: 0.95, 64: 0.99})).dimension
    assert found
    assert found.d90 == 8
    assert found.sentence.startswith("d90 is at most 8: dimension 8 keeps 95 %")


def test_lowest_rank_is_not_called_better_than_lower_ones(tmp_path: Path) -> None:
    assert "no lower rank is compared" in advise_rank(build_rank_arms(tmp_path, {1: 1.7, 4: 1.8})).sentence
