"""Real processes to be killed, forked from one that has imported everything, and all that a sweep came to."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
from tests.small_runs import SMALL_RUN
from tests.training.runs import logged_rows

import lorasweep
from lorasweep.record import read_run, read_sweep
from lorasweep.sweep.controller.folder import open_storage

TIMEOUT_S = float(os.environ.get("LORASWEEP_TEST_TIMEOUT_S", "1800"))
"""Seconds after which a wait counts as a hang: about 20 times the longest wait on two cores that are free."""
SETTINGS = SMALL_RUN | {"trainer.max_steps": 12, "trainer.eval_every_steps": 3}
SERVER = """
import json, os, signal, sys
from lorasweep.cli import run
import lorasweep.report.write, lorasweep.sweep.workers.train
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if not child:
        os.chdir(asked["folder"])
        output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 70
        try:
            exec(asked["before"])
            code = run(asked["words"])
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
"""


@dataclass
class Session:
    """A command that runs in a process of its own."""

    server: subprocess.Popen[str]
    pid: int
    path: Path
    code: int | None = None
    """Its exit code once it has been waited for."""

    def send(self, number):
        os.kill(self.pid, number)

    def wait(self):
        """Waits for the end and returns the exit code, minus the signal's number where one ended it."""
        if self.code is None:
            self.code = int(_ask(self.server, {"wait": self.pid}))
        return self.code

    def kill(self):
        self.send(signal.SIGKILL)
        self.wait()

    @property
    def output(self):
        return self.path.read_text()

    def wait_for(self, condition):
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)


def _ask(server, question):
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(question) + "\n")
    server.stdin.flush()
    return server.stdout.readline()


@pytest.fixture(scope="session")
def _server(tmp_path_factory):
    environment = os.environ | {
        "PYTHONPATH": str(Path(lorasweep.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("datasets")),
        "COLUMNS": "200",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.wait(TIMEOUT_S)
    process.stdout.close()


@pytest.fixture
def begin(_server, tmp_path):
    """Begins a command in the test's folder; `before` is Python to run in its process first."""
    begun = []

    def start(*words, before="", folder=tmp_path):
        output = tmp_path / f"output-{len(begun)}.txt"
        question = {"words": words, "folder": str(folder), "output": str(output), "before": before}
        begun.append(Session(_server, int(_ask(_server, question)), output))
        return begun[-1]

    yield start
    for session in begun:
        if session.code is None:  # a failed test left it running
            session.kill()


@pytest.fixture
def finish(begin):
    """Runs a command to its end, which must be a good one, and returns what it printed."""

    def run(*words, code=0, **others):
        session = begin(*words, **others)
        assert session.wait() == code, session.output
        return session.output

    return run


def state_of(folder):
    """Every trial by its run's folder: what was proposed, how it ended, each loss and evaluation, and its weights."""
    record = read_sweep(folder)
    listed = [
        (row.run, row.arm, row.number, row.params, row.state, row.search_score, row.reason) for row in record.trials
    ]
    reruns = record.confirm
    listed += [
        (row.run, row.subject, row.setting_number, row.seed, row.state, row.test_scores, row.reason) for row in reruns
    ]
    state = {}
    for run, *rest in listed:
        kept = read_run(folder / run)
        weights = {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / run).rglob("*.safetensors"))
        }
        state[run] = (rest, kept.status, kept.steps_done, kept.best, kept.test, logged_rows(folder / run), weights)
    return state


def read_trials(folder):
    storage = open_storage(folder)
    names = optuna.get_all_study_names(storage)
    return [trial for name in names for trial in optuna.load_study(study_name=name, storage=storage).trials]
