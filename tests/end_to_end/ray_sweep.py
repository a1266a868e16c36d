"""A small sweep in a process of its own with workers on Ray, and what must be true of it in the end."""

import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from tests.small_runs import rates

import lorasweep
from lorasweep.record import read_run, read_steps, read_sweep

from .conftest import SETTINGS, TIMEOUT_S, read_trials

SPACE = {"optim.lr": rates(1e-4, 1e-2)}
STEPS = {"trainer.max_steps": 24, "trainer.eval_every_steps": 4}
SWEEP = {
    "name": "on_ray",
    "settings": SETTINGS | STEPS | {"sampler": "qmc", "confirm.seeds": 1},
    "arms": {
        "full": {"settings": {"method": "full"}, "space": SPACE, "trials": 2},
        "lora": {
            "settings": {"method": "lora", "method.dropout": 0.1},
            "space": {"method.rank": [1, 2, 4], **SPACE},
            "trials": 4,
        },
    },
}


class RaySweep:
    """`lorasweep sweep` in a process of its own, and the processes that it started."""

    def __init__(self, *words, folder, environment=None):
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
        path = [str(Path(lorasweep.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self.output.open("w") as written:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lorasweep", "sweep", *words],
                cwd=folder,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
                | (environment or {}),
                stdout=written,
                stderr=subprocess.STDOUT,
            )

    def find(self, name):
        """Returns the processes below this one whose title begins with a name."""
        return find_processes(name, below=self.process.pid)

    def wait(self, *, code=0):
        """Waits for the end, which must be this one, and returns what was printed."""
        assert self.process.wait(TIMEOUT_S) == code, self.output.read_text()
        return self.output.read_text()


@pytest.fixture
def start(tmp_path):
    """Begins a sweep of the file on Ray."""
    (tmp_path / "on_ray.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    begun = []

    def begin(*words, environment=None):
        words = words if words[0] in ("--resume", "on_ray.yaml") else ("on_ray.yaml", "worker=ray", *words)
        begun.append(RaySweep(*words, folder=tmp_path, environment=environment))
        return begun[-1]

    yield begin
    for sweep in begun:
        if sweep.process.poll() is None:  # a failed test left it running
            for process in [*psutil.Process(sweep.process.pid).children(recursive=True), sweep.process]:
                with suppress(psutil.Error):
                    process.kill()
            sweep.process.wait()


def find_processes(name, *, below):
    """Returns the processes below one whose title begins with a name."""
    found = []
    for process in psutil.Process(below).children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(name) or process.name() == name:
                found.append(process)
    return found


def wait_for(condition, sweep):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, sweep.output.read_text()
        assert sweep.process.poll() is None, sweep.output.read_text()
        time.sleep(0.05)


def count_evaluations(folder):
    """Returns how many evaluations of trials are on disk."""
    return sum(path.read_text().count('"validation"') for path in folder.glob("runs/*/steps.jsonl"))


def check_whole(folder, *, steps=24):
    """Every trial is there, complete, once, with the values that were sampled for it, each step trained in order."""
    record = read_sweep(folder)
    assert record.status == "complete"
    assert Counter((row.arm, row.state) for row in record.trials) == {("full", "complete"): 2, ("lora", "complete"): 4}
    assert Counter((row.arm, row.state) for row in record.confirm) == {("full", "complete"): 1, ("lora", "complete"): 1}
    assert len(read_trials(folder)) == 6 + 2
    for row in [*record.trials, *record.confirm]:
        run = read_run(folder / row.run)
        assert (run.status, run.steps_done) == ("complete", steps)
        assert [step["step"] for step in read_steps(folder / row.run) if "loss" in step] == list(range(1, steps + 1))
        if hasattr(row, "params"):
            assert run.config["optim"]["lr"] == row.params["optim.lr"]
    for arm in ("full", "lora"):
        best = min((row for row in record.trials if row.arm == arm), key=lambda row: row.search_score)
        assert {row.trial for row in record.settings if row.arm == arm} == {best.number}


def check_listens_here_only(processes):
    """Processes listen on 127.0.0.1 and on no other address."""
    addresses = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found = process.net_connections("tcp")
            addresses |= {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}
    assert addresses
    assert {ip.removeprefix("::ffff:") for ip in addresses} == {"127.0.0.1"}
