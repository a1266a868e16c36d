"""What `summary.json` and the sentences say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasweep.report import write_report
from lorasweep.report.summary import ACTIVITIES, Summary, summarize
from lorasweep.training.telemetry import Telemetry

from .conftest import BASE_SCORE, edit_json


def test_occupancy_of_packs_is_in_the_summary(sweep: Path) -> None:
    def pack(raw: dict[str, Any]) -> None:
        for trial in raw["trials"]:
            if trial["arm"] == "lora":
                trial.update(values={"50": 1.5}, slot_steps=50 / 0.37)

    assert all(arm["occupancy"] is None for arm in summarize(sweep).as_json()["arms"])
    edit_json(sweep / "sweep.json", pack)
    raw = summarize(sweep).as_json()
    assert raw["occupancy"] == {"search": pytest.approx(0.37)}
    assert [arm["occupancy"] for arm in raw["arms"]] == [None, pytest.approx(0.37), None]


def shares_of(summary: Summary) -> list[float | None]:
    return [arm["share_of_full_gain"] for arm in summary.as_json()["arms"]]


def test_share_of_full_gain_is_nothing_at_the_base_and_one_at_full(sweep: Path) -> None:
    summary = summarize(sweep)
    frozen, lora, full = shares_of(summary)
    scores = [arm["best"]["score"] for arm in summary.as_json()["arms"]]
    assert (frozen, full) == (0, 1)
    assert lora == pytest.approx((BASE_SCORE - scores[1]) / (BASE_SCORE - scores[2]))


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


TELEMETRY = {
    "wall_s": 100.0,
    "training_s": 60.0,
    "evaluating_s": 20.0,
    "loading_s": 4.0,
    "storage_s": 1.0,
    "saving_s": 0.0,
    "trained_tokens": 600_000.0,
    "peak_memory_bytes": 2.0**30,
    "cpu_s": 150.0,
}


def test_activities_add_up_to_the_time_and_skip_those_that_took_none(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: raw.update(telemetry=TELEMETRY, device="cpu", threads=2))
    time = write_report(sweep).time
    assert time
    assert time["seconds"] == {
        "training": 60,
        "evaluating": 20,
        "loading models and data": 4,
        "proposing and storing trials": 1,
        "other": 15,
    }
    for part in ("1 min 40 s on cpu with 2 threads", "10 k tokens per second", "1.5 processor cores", "1 GiB"):
        assert part in time["sentence"]
    page = (sweep / "report" / "index.html").read_text()
    assert '<th scope="row">loading models and data</th><td class="num">4.0 s</td>' in page
    assert "width:60.0%" in page


def test_what_the_report_reads_is_what_telemetry_measures() -> None:
    assert {*ACTIVITIES, "wall_s", "cpu_s", "trained_tokens", "peak_memory_bytes"} == set(Telemetry().sample())
