"""Where the worker's time went: parts that add up, and nothing made up where the record does not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasweep.record import SweepRecord, read_sweep, write_record
from lorasweep.report import write_report
from lorasweep.report.time_breakdown import ACTIVITIES, TimeBreakdown, break_down_time
from lorasweep.training.telemetry import Telemetry

from .conftest import edit_json

MEASURED = {
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


def record_of(telemetry: dict[str, Any], **values: Any) -> SweepRecord:
    common: dict[str, Any] = {"status": "complete", "name": "s", "metric": "loss", "direction": "minimize"}
    return SweepRecord(**common, definition={}, arms=[], telemetry=telemetry, **values)


def use_of(telemetry: dict[str, Any], **values: Any) -> TimeBreakdown:
    use = break_down_time(record_of(telemetry, **values))
    assert use is not None
    return use


def test_activities_add_up_to_the_time_and_leave_out_what_took_none() -> None:
    use = use_of(MEASURED)
    assert {activity.name: activity.seconds for activity in use.activities} == {
        "training": 60,
        "evaluating": 20,
        "loading models and data": 4,
        "proposing and storing trials": 1,
        "other": 15,
    }
    assert sum(activity.fraction for activity in use.activities) == pytest.approx(1)


def test_a_sentence_says_where_the_worker_ran_and_what_it_used() -> None:
    assert use_of(MEASURED, device="cpu", threads=2).sentence == (
        "The worker ran for 1 min 40 s on cpu with 2 threads. Measured: 10 k tokens per second of training; "
        "1.5 processor cores on average; at most 1 GiB of memory."
    )
    assert use_of({"wall_s": 100.0}).sentence == "The worker ran for 1 min 40 s."


def test_a_gpus_memory_is_told() -> None:
    use = use_of({"wall_s": 1.0, "gpu_peak_memory_bytes": 3.0})
    assert use.gpu_peak_memory_bytes == 3
    assert "at most 3 B on a GPU" in use.sentence


@pytest.mark.parametrize("telemetry", [{}, {"wall_s": 0.0}])
def test_a_record_without_the_time_has_no_section(sweep: Path, telemetry: dict[str, Any]) -> None:
    edit_json(sweep / "sweep.json", lambda raw: raw.update(telemetry=telemetry))
    assert write_report(sweep).time is None
    assert 'id="time"' not in (sweep / "report" / "index.html").read_text()


def test_page_and_summary_show_the_parts(sweep: Path) -> None:
    record = read_sweep(sweep)
    record.telemetry = MEASURED
    write_record(record, sweep)
    write_report(sweep)
    page = (sweep / "report" / "index.html").read_text()
    assert '<section id="time">' in page
    assert '<th scope="row">loading models and data</th><td class="num">4.0 s</td>' in page
    assert "width:60.0%" in page
    raw = json.loads((sweep / "report" / "summary.json").read_text())["time"]
    assert raw["activities"][0] == {"name": "training", "seconds": 60, "fraction": 0.6}


def test_what_the_report_reads_is_what_telemetry_measures() -> None:
    assert {*ACTIVITIES, "wall_s", "cpu_s", "trained_tokens", "peak_memory_bytes"} == set(Telemetry().sample())
