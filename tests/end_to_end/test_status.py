"""Two real workers on one sweep: what is said of them while they run, and what the report makes of it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import lorasweep
from lorasweep.cli import run
from lorasweep.errors import RecordError
from lorasweep.record import read_sweep, read_workers
from lorasweep.sweep import read_status

SWEEP = {
    "name": "shared",
    "settings": {
        "data.block_length": 32,
        "data.max_validation_blocks": 4,
        "data.max_test_blocks": 4,
        "trainer.batch_size": 2,
        "trainer.max_steps": 20,
        "trainer.eval_every_steps": 10,
        "trainer.precision": "fp32",
        "trainer.device": "cpu",
        "pruner": "none",
        "worker.num": 2,
        "worker.pack_size": 1,
        "confirm.seeds": 0,
    },
    "arms": {
        "lora": {
            "settings": {"method": "lora", "method.rank": 2},
            "space": {"optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
            "trials": 6,
        },
    },
}


def status_of(folder):
    try:
        return read_status(folder)
    except RecordError:
        return None


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two processors")
def test_two_workers_are_seen_while_they_run_and_told_of_in_the_report(tmp_path, capsys):
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump(SWEEP))
    folder = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(lorasweep.__file__).parents[1])}
    output = (tmp_path / "output").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "lorasweep", "sweep", str(tmp_path / "shared.yaml"), f"sweep.output={folder}"],
        env=environment,
        cwd=tmp_path,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    most, running = 0, set()
    try:
        while process.poll() is None:
            if (status := status_of(folder)) is not None:
                most = max(most, len(status.live))
                running |= {run for worker in status.live for run in worker.row.running}
            time.sleep(0.05)
    finally:
        process.kill()
        output.close()
    said = (tmp_path / "output").read_text()
    assert process.returncode == 0, said
    assert most == 2
    assert len(running) >= 2
    assert "2 workers" in said

    rows = read_workers(folder)
    assert sum(row.done for row in rows) == len(read_sweep(folder).trials) == 6
    for row in (row for row in rows if row.done):
        numbers = row.telemetry
        parts = [numbers[f"{name}_s"] for name in ("loading", "training", "evaluating", "saving", "storage", "waiting")]
        assert 0 < sum(parts) <= numbers["wall_s"] + 0.01
        assert min(numbers[name] for name in ("training_s", "evaluating_s", "storage_s", "trained_tokens")) > 0
        assert numbers["peak_memory_bytes"] >= numbers["memory_bytes"] > 2**20

    assert run(["status", str(folder), "--follow"]) == 0
    shown = capsys.readouterr().out
    assert "shared: bits_per_byte (minimize), complete" in shown
    assert "6/6" in shown
    with (folder / "report" / "workers.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["worker"] for line in lines} == {row.id for row in rows}
    assert 'id="workers"' in (folder / "report" / "index.html").read_text()
