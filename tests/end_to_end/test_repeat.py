"""The same sweep again, also when it is slowed down or killed, is the same sweep to the last bit."""

import os
import random
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

import lorasweep
from lorasweep.record import read_run, read_steps, read_sweep
from lorasweep.runs.reproduce import compare_sweeps

from .conftest import TIMEOUT_S, read_trials, state_of

KILLS = int(os.environ.get("LORASWEEP_TEST_KILLS", "2"))
"""How often a sweep is killed, for each size of packs."""
MAX_SAVES = 150
"""Files that are flushed before a kill, at most; a sweep flushes several hundred."""
TRIALS = {"frozen": 1, "full": 2, "lora": 6}
CONFIRM_RUNS = {"frozen": 1, "full": 2, "lora": 2}
NUM_RUNS = sum(TRIALS.values()) + sum(CONFIRM_RUNS.values())
KILL = """
import itertools, os, pathlib, signal
saves = itertools.count(1)
def dying_fsync(handle):  # before or after a checkpoint, weights, a record or a line of the journal is in place
    if pathlib.Path({folder!r}, "sweep.json").exists() and next(saves) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = dying_fsync
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(tmp_path_factory, stopping_sweep):
    path = tmp_path_factory.mktemp("repeat") / "repeated.yaml"
    path.write_text(yaml.safe_dump(stopping_sweep, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def once(file):
    """The folder of the sweep that nobody disturbs, for a size of packs; each is run once, as a person does."""

    @cache
    def run(pack_size):
        folder = file.parent / f"pack-{pack_size}"
        words = ["sweep", str(file), f"sweep.output={folder}", f"worker.pack_size={pack_size}"]
        done = subprocess.run(
            [sys.executable, "-m", "lorasweep", *words],
            env=os.environ | {"PYTHONPATH": str(Path(lorasweep.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert {row.state for row in read_sweep(folder).trials} == {"complete"}
        check_whole(folder)
        return folder

    return run


def check_whole(folder):
    """The sweep is what was asked for, each trial was told once, and nothing is left over."""
    record = read_sweep(folder)
    assert record.status == "complete"
    for listed, asked in ((record.trials, TRIALS), (record.confirm, CONFIRM_RUNS)):
        arms = [row.arm for row in listed]
        assert {arm: arms.count(arm) for arm in arms} == asked
    rows = [*record.trials, *record.confirm]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == sorted(Path(row.run).name for row in rows)
    for row in rows:
        kept = read_run(folder / row.run)
        assert kept.status == row.state
        assert (kept.steps_done == kept.steps_planned) == (row.state == "complete")
        steps = [step["step"] for step in read_steps(folder / row.run) if "loss" in step]
        assert steps == list(range(1, kept.steps_done + 1))
    trials = read_trials(folder)
    assert len(trials) == len(rows)
    assert all(trial.state.is_finished() for trial in trials)
    assert [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".ckpt"))] == []


def check_same(first, second):
    """Two sweeps have the same proposals, decisions, losses, evaluations, scores and files of weights."""
    assert state_of(second) == state_of(first)
    assert compare_sweeps(first, second).description.startswith(f"identical: all {NUM_RUNS} runs, ")


def test_two_sweeps_of_one_file_and_seed_are_identical(tmp_path, file, once, finish):
    finish("sweep", str(file), "worker.pack_size=1", "sweep.output=again")
    check_same(once("1"), tmp_path / "again")


def read_ended(folder):
    """Returns the files of each run whose end the study has been told."""
    record = read_sweep(folder)
    ended = [row.run for row in (*record.trials, *record.confirm) if row.state != "running"]
    files = [folder / run / name for run in ended for name in ("run.json", "steps.jsonl")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.exists()}


@pytest.mark.parametrize("pack_size", ["1", "3"])
def test_a_killed_sweep_is_resumed_to_the_last_bit(tmp_path, file, once, begin, finish, pack_size):
    expected, folder = once(pack_size), tmp_path / "killed"
    drawn, words = random.Random(pack_size), ["sweep", str(file), f"worker.pack_size={pack_size}"]
    asked, ended, code = [*words, "sweep.output=killed"], {}, -signal.SIGKILL
    for _ in range(KILLS):
        session = begin(*asked, before=KILL.format(number=drawn.randint(1, MAX_SAVES), folder=str(folder)))
        code = session.wait()
        if code == 0:  # it was over before
            break
        assert code == -signal.SIGKILL, session.output
        now = read_ended(folder)
        assert {name: now[name] for name in ended} == ended  # no later process changes what had ended
        asked, ended = ["sweep", "--resume", "killed"], now
    if code != 0:
        finish(*asked)
    now = read_ended(folder)
    assert {name: now[name] for name in ended} == ended
    check_whole(folder)
    check_same(expected, folder)
