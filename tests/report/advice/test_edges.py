"""Best values at the end of their range, unless trials that are as good lie elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasweep.report.advice.edges import describe_edges
from lorasweep.report.tables import load_sweep_data

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
