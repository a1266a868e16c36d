"""On a real Slurm of one node: workers end at the signal and go on, and a cancelled one does not come back."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lorasweep
from lorasweep.errors import ConfigError
from lorasweep.sweep.slurm import Queue, check_slurm, submit_missing

STAND_IN = '''
import time
from pathlib import Path

from lorasweep.cli import DONE, INTERRUPTED, StopSignal
from lorasweep.sweep.slurm import job_time_left_s


def work(words):
    """A worker that trains a step every 50 ms until there are enough, or it is told to stop."""
    command, sweep = words
    assert command == "worker"
    steps = Path(sweep) / "runs" / "lora-0000" / "steps.jsonl"
    with StopSignal() as stop:
        print("begun", job_time_left_s(), flush=True)
        while True:
            with steps.open("a") as file:
                file.write("{}\\n")
            if (Path(sweep) / "enough").exists():
                return DONE
            if stop():
                return INTERRUPTED
            time.sleep(0.05)
'''
PATIENCE_S = 90.0  # Slurm may signal up to a minute early, and looks for jobs that are over their time now and then


def wait_until(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


@pytest.fixture
def submit(slurm, tmp_path, monkeypatch, workers):
    """Submits stand-ins for workers and returns the ids of their jobs."""
    (tmp_path / "stand_in_worker.py").write_text(STAND_IN)
    (tmp_path / "runs" / "lora-0000").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = Path(lorasweep.__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(source)]))
    stand_in = importlib.import_module("stand_in_worker")
    monkeypatch.delitem(sys.modules, "stand_in_worker")

    def run(num=1, **settings):
        config = workers(num=num, cpus=1, **{"time_min": 1, "signal_s": 5, **settings})
        array = submit_missing(config, tmp_path, name="mini", command=stand_in.work)
        jobs = [array] if num == 1 else [f"{array}_{index}" for index in range(num)]
        wait_until(lambda: output(tmp_path).count("begun") == num, lambda: f"{slurm.jobs()} {output(tmp_path)}")
        return jobs

    return run


def output(sweep, ending="out"):
    return "".join(path.read_text() for path in sorted((sweep / "workers" / "slurm").glob(f"*_log.{ending}")))


@pytest.mark.slow
@pytest.mark.xdist_group("slurm")
def test_workers_whose_time_is_over_are_put_in_line_again_and_go_on(slurm, submit, tmp_path):
    jobs = submit(num=2)
    wait_until(lambda: output(tmp_path, "err").count("is in line again") == 2, lambda: output(tmp_path, "err"))
    wait_until(lambda: list(slurm.jobs().values()) == ["PENDING"] * 2, lambda: f"{slurm.jobs()}")
    (tmp_path / "enough").touch()
    for job in jobs:  # not after Slurm's two minutes
        slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    # a slow start may take a worker's time, which then begins once more
    wait_until(
        lambda: output(tmp_path).count("begun") >= 4 and not slurm.jobs(), lambda: f"{slurm.jobs()} {output(tmp_path)}"
    )
    lefts = [float(line.split()[-1]) for line in output(tmp_path).splitlines() if line.startswith("begun")]
    assert all(0 < left <= 60 for left in lefts)
    for job in jobs:
        assert "JobState=COMPLETED" in slurm.run("scontrol", "show", "job", job)
    queue = Queue(tmp_path)
    wait_until(queue.is_empty, queue.describe)


@pytest.mark.slow
@pytest.mark.xdist_group("slurm")
def test_a_cancelled_worker_stops_cleanly_and_does_not_come_back(slurm, submit, tmp_path):
    (job,) = submit(time_min=5)
    slurm.cancel(job)
    wait_until(lambda: not slurm.jobs(), lambda: f"{slurm.jobs()}")
    assert "JobState=CANCELLED" in slurm.run("scontrol", "show", "job", job)
    assert "in line again" not in output(tmp_path, "err")


@pytest.mark.slow
@pytest.mark.xdist_group("slurm")
def test_a_real_slurm_takes_what_it_has_and_refuses_the_rest(slurm, workers, tmp_path):
    def check(**settings):
        given = workers(**{"cpus": 1, "time_min": 5, **settings})
        return check_slurm(given, tmp_path / "sweep", name="mini", storage="journal")

    assert check() == []
    assert not (tmp_path / "sweep").exists()
    assert slurm.jobs() == {}
    for settings, message in [
        ({"partition": "nope"}, "`worker.partition` must be one of main, but got 'nope'."),
        ({"gpus": 1}, "`worker.gpus <= 0` must hold in partition `main`"),
        ({"cpus": 3}, "`worker.cpus <= 2` must hold in partition `main`"),
        ({"mem_gb": 500}, "`worker.mem_gb <= 8` must hold in partition `main`"),
        ({"nodes": 2}, "`worker.nodes <= 1` must hold in partition `main`"),
        ({"time_min": 100}, "`worker.time_min <= 10` must hold in partition `main`"),
        ({"constraint": "a100"}, "`worker.constraint` must be something that Slurm takes, but got 'a100'"),
        ({"extra": {"reservation": "no"}}, "`worker.extra` must be something that Slurm takes"),
        ({"extra": {"blublu": 2}}, "`worker.extra` must be something that Slurm takes"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check(**settings)
    assert subprocess.run(["squeue", "--noheader"], capture_output=True).stdout == b""
