"""Workers that are at the storage all the time: each trial is told once, over few connections."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.servers.daemon import need

import lorasweep

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_workers.py"


def measure(*words):
    """The benchmark's row."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *words],
        env=os.environ | {"PYTHONPATH": str(Path(lorasweep.__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    head, row = done.stdout.splitlines()[-2:]
    # medians stand before the 99th percentile in brackets
    return dict(zip(head.replace(" ms", "").split(), [word for word in row.split() if word[0] != "("], strict=True))


@pytest.mark.slow
def test_eight_workers_on_a_database_tell_each_trial_once():
    need(["initdb", "postgres", "psql"], packages="postgresql")
    row = measure("--storage", "postgresql", "--workers", "8", "--trials", "40")
    assert row["workers"] == "8"
    assert row["wrong"] == "0"
    assert int(row["connected"]) <= 3 * 8


@pytest.mark.slow
def test_eight_workers_on_a_journal_tell_each_trial_once():
    row = measure("--storage", "journal", "--workers", "8", "--trials", "100")
    assert row["wrong"] == "0"
