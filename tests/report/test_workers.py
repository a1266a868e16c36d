"""How the machines were used: sums of what the workers said, and nothing made up where they said nothing."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorasweep.record import read_sweep, write_record
from lorasweep.report import render_terminal, write_report
from lorasweep.report.summary import summarize
from lorasweep.report.tables import load_sweep_data
from lorasweep.training import Telemetry

from .conftest import add_workers


@pytest.fixture
def shared(sweep: Path) -> Path:
    """A sweep of 100 seconds that three workers on two machines served."""
    record = read_sweep(sweep)
    record.makespan_s = 100.0
    write_record(record, sweep)
    add_workers(sweep)
    return sweep


def sentences(sweep: Path) -> list[str]:
    return [line for line in summarize(load_sweep_data(sweep)).sentences if "workers" in line]


def test_the_time_of_all_workers_is_split_into_what_it_went_to(shared: Path) -> None:
    use = load_sweep_data(shared).use
    assert use is not None
    assert (use.wall_s, use.idle_s, use.hosts, use.lost) == (300, pytest.approx(60), 2, 1)
    assert use.training_fraction == pytest.approx(0.6)
    assert use.evaluating_fraction == pytest.approx(0.2)
    assert use.idle_fraction == pytest.approx(0.2)
    assert use.tokens_per_s == 18_000


def test_a_sentence_says_how_long_the_workers_waited_for_nothing(shared: Path) -> None:
    assert sentences(shared) == [
        "3 workers on 2 machines worked for 5 min 00 s together, 60 % of it training, 20 % evaluating and 20 % "
        "(1 min 00 s) neither, most of that waiting for other workers; 18 k tokens per second, at most 1 GiB in one "
        "process. 1 of them was lost."
    ]
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(render_terminal(shared))
    assert sentences(shared)[0] in console.export_text()


@pytest.mark.parametrize("count", [0, 1])
def test_what_one_worker_did_is_in_the_files_alone(sweep: Path, count: int) -> None:
    add_workers(sweep, count=count)
    write_report(sweep)
    assert sentences(sweep) == []
    assert 'id="workers"' not in (sweep / "report" / "index.html").read_text()
    raw = json.loads((sweep / "report" / "summary.json").read_text())
    assert (raw["workers"] is None) == (count == 0)
    assert (sweep / "report" / "workers.csv").exists() == (count == 1)


def test_each_worker_has_a_line_in_csv_and_json_and_a_row_on_the_page(shared: Path) -> None:
    write_report(shared)
    with (shared / "report" / "workers.csv").open() as file:
        lines = list(csv.DictReader(file))
    raw = json.loads((shared / "report" / "summary.json").read_text())["workers"]
    page = (shared / "report" / "index.html").read_text()
    for number, (line, row) in enumerate(zip(lines, raw["workers"], strict=True)):
        name = f"node{number}-{100 + number}"
        assert (line["worker"], row["worker"]) == (name, name)
        assert (float(line["waiting_s"]), row["cores_used"]) == (12, 1.5)
        assert re.search(rf'<th scope="row">{name}\s', page)
    assert len(lines) == 3
    assert "lost: it gave no sign of life" in page


def test_a_worker_that_said_nothing_is_not_counted_as_idle(shared: Path) -> None:
    add_workers(shared, count=1, id="node9-1", telemetry={})
    use = load_sweep_data(shared).use
    assert use is not None
    assert len(use.workers) == 4
    assert use.idle_fraction == pytest.approx(0.2)


def test_workers_that_said_nothing_are_only_counted(sweep: Path) -> None:
    add_workers(sweep, telemetry={})
    write_report(sweep)
    assert sentences(sweep) == ["3 workers on 2 machines served the sweep. 1 of them was lost."]


def test_gpus_are_told_by_their_mean_use_and_largest_memory(sweep: Path) -> None:
    gpus = {"gpu0_use_fraction": 0.5, "gpu1_use_fraction": 1.0, "gpu0_peak_memory_bytes": 3.0}
    add_workers(sweep, count=1, telemetry={"wall_s": 1.0, **gpus})
    use = load_sweep_data(sweep).use
    assert use is not None
    assert (use.workers[0].gpu_use_fraction, use.workers[0].gpu_peak_memory_bytes) == (0.75, 3)


def test_a_damaged_workers_file_is_a_sentence(shared: Path) -> None:
    (shared / "workers" / "broken.json").write_text("{")
    data = load_sweep_data(shared)
    assert len(data.workers) == 3
    assert [line for line in data.problems if re.match("A worker's file can't be read: .*broken.json", line)]


def test_hostile_names_of_workers_are_text(shared: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    values: dict[str, Any] = {"host": hostile, "device": hostile, "job": hostile, "reason": hostile}
    add_workers(shared, count=1, id="hostile", **values)
    write_report(shared)
    page = (shared / "report" / "index.html").read_text()
    assert "<img" not in page
    assert "&lt;img" in page


@pytest.mark.parametrize("value", [-1e300, -1.0, 0.0, 1e14, 1e300])
def test_absurd_numbers_of_workers_have_a_page(shared: Path, value: float) -> None:
    absurd = dict.fromkeys([*Telemetry().sample().as_numbers(), "gpu0_use_fraction", "gpu0_peak_memory_bytes"], value)
    add_workers(shared, count=2, telemetry=absurd)
    write_report(shared)
    assert 'id="workers"' in (shared / "report" / "index.html").read_text()


def test_what_the_report_reads_is_what_telemetry_measures() -> None:
    measured = set(Telemetry().sample().as_numbers())
    read = {"wall_s", "training_s", "evaluating_s", "loading_s", "saving_s", "storage_s", "waiting_s"}
    assert read | {"idle_fraction", "trained_tokens", "tokens_per_s", "peak_memory_bytes", "cpu_s"} <= measured
