"""Best values at the end of their range, unless trials that are as good lie elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasweep.report.advice.edges import describe_edges
from lorasweep.report.sweep_data import load_sweep_data

from ..conftest import build_sweep, confirm_sweep, edit_json


def sweep_rank_alone(raw: dict[str, Any], scores: dict[int, float]) -> None:
    raw["arms"][1]["space"] = {"method.rank": sorted(scores)}
    mine = [trial for trial in raw["trials"] if trial["arm"] == "lora" and trial["state"] == "complete"]
    for trial, (rank, score) in zip(mine, scores.items(), strict=False):
        trial.update(params={"method.rank": rank}, value=score)
    for trial in mine[len(scores) :]:
        trial.update(state="pruned")


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
    assert sentence.startswith("The best `optim.lr` of `lora` and `full` lies at the upper end of its range")


def test_edge_within_the_noise_of_seeds_is_no_advice(tmp_path: Path) -> None:
    for folder, difference, said in ((tmp_path / "near", 0.001, 0), (tmp_path / "far", 0.2, 1)):
        sweep = confirm_sweep(build_sweep(folder), noise=0.01)
        scores = {4: 1.5 + difference, 16: 1.5}
        edit_json(sweep / "sweep.json", lambda raw, scores=scores: sweep_rank_alone(raw, scores))
        sentences = [text for text in describe_edges(load_sweep_data(sweep)) if "method.rank" in text]
        assert len(sentences) == said


def rank_sentences(sweep: Path) -> list[str]:
    return [text for text in describe_edges(load_sweep_data(sweep)) if "method.rank" in text]


def test_an_end_that_is_alone_is_no_advice(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: sweep_rank_alone(raw, {16: 1.5}))
    edit_json(sweep / "sweep.json", lambda raw: raw["arms"][1].update(space={"method.rank": [4, 16]}))
    assert rank_sentences(sweep) == []


@pytest.mark.parametrize("state", ["paused", "failed"])
def test_an_end_where_no_trial_is_complete_is_no_advice(sweep: Path, state: str) -> None:
    def stop_the_best(raw: dict[str, Any]) -> None:
        sweep_rank_alone(raw, {4: 1.6, 8: 1.5, 32: 1.4})
        best = next(trial for trial in raw["trials"] if trial["params"].get("method.rank") == 32)
        assert best["state"] == "complete"
        best["state"] = state

    edit_json(sweep / "sweep.json", stop_the_best)
    assert rank_sentences(sweep) == []


def test_a_stopped_trial_away_from_the_end_does_not_support_the_end(sweep: Path) -> None:
    def keep_the_end_alone(raw: dict[str, Any]) -> None:
        sweep_rank_alone(raw, {4: 1.6, 32: 1.4})
        next(trial for trial in raw["trials"] if trial["params"].get("method.rank") == 4)["state"] = "paused"

    edit_json(sweep / "sweep.json", keep_the_end_alone)
    assert rank_sentences(sweep) == []


def test_a_list_of_choices_is_a_range_whatever_its_order(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: sweep_rank_alone(raw, {4: 1.6, 8: 1.5, 32: 1.4}))
    (said,) = rank_sentences(sweep)
    assert "`method.rank` of `lora`, 32, lies at the upper end" in said
    edit_json(sweep / "sweep.json", lambda raw: raw["arms"][1].update(space={"method.rank": [32, 4, 8]}))
    assert rank_sentences(sweep) == [said]
