"""What `summary.json` and the sentences say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasweep.report.summary import Summary, summarize

from .conftest import edit_json


def shares_of(summary: Summary) -> list[float | None]:
    return [arm["share_of_full_gain"] for arm in summary.as_json()["arms"]]


def test_share_of_full_gain_is_mirrored_when_maximizing(sweep: Path) -> None:
    def negate(raw: dict[str, Any]) -> None:
        raw["direction"] = "maximize"
        for trial in raw["trials"]:
            trial["value"] = None if trial["value"] is None else -trial["value"]

    before = shares_of(summarize(sweep))
    edit_json(sweep / "sweep.json", negate)
    assert shares_of(summarize(sweep)) == pytest.approx(before)


def test_paused_trials_count_like_pruned_ones_and_are_named(sweep: Path) -> None:
    def pause(raw: dict[str, Any]) -> None:
        for trial in raw["trials"]:
            trial["state"] = "paused" if trial["state"] == "pruned" else trial["state"]

    before = summarize(sweep)
    edit_json(sweep / "sweep.json", pause)
    summary = summarize(sweep)
    lora = summary.as_json()["arms"][1]
    assert (lora["trials"]["paused"], lora["trials"]["pruned"]) == (6, 0)
    assert lora["best"] == before.as_json()["arms"][1]["best"]
    assert summary.data.steps_saved_by_pruning == before.data.steps_saved_by_pruning
    assert any("pruning saved 600 of 3,600 planned steps so far (17 %)" in text for text in summary.sentences)
