"""The same sweep again is the same sweep, to the last bit, and `lorasweep reproduce` says so, or what differs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

import lorasweep
from lorasweep.record import read_run, read_sweep
from lorasweep.runs.comparison import compare_sweeps

from .conftest import (
    HALVED_CONFIRM_RUNS,
    HALVED_SWEEP,
    HALVED_TRIALS,
    TIMEOUT_S,
    promoted_trials,
    state_of,
    steps_of,
)

NUM_RUNS = sum(sum(runs.values()) for runs in (HALVED_TRIALS, HALVED_CONFIRM_RUNS))
DELAYS = """
import os, random, time
import lorasweep.sweep.controller.stages as stages
from lorasweep.sweep.workers.worker import Worker
from lorasweep.training.run_log import RunLog
clock = random.Random(os.urandom(8))
def delayed(function, most_s):
    def call(*arguments, **named):
        time.sleep(clock.uniform(0, most_s))
        found = function(*arguments, **named)
        time.sleep(clock.uniform(0, most_s))
        return found
    return call
stages.propose = delayed(stages.propose, 0.1)
RunLog.write_evaluation = delayed(RunLog.write_evaluation, 0.05)
Worker.report = delayed(Worker.report, 0.05)
os.fsync = delayed(os.fsync, 0.003)
"""
OTHER_THREADS = "import torch; torch.set_num_threads(2)"
pytestmark = pytest.mark.slow


def sweep_in_a_fresh_process(file: Path, folder: Path, *words: str, threads: int = 1, **environment: str) -> Path:
    """Runs a sweep as a person does; nothing of this process or of its children is in it."""
    done = subprocess.run(
        [sys.executable, "-m", "lorasweep", "sweep", str(file), f"sweep.output={folder}", *words],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))},
            "PYTHONPATH": str(Path(lorasweep.__file__).parents[1]),
            "OMP_NUM_THREADS": str(threads),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The sweep's file."""
    path = tmp_path_factory.mktemp("repeat") / "repeated.yaml"
    path.write_text(yaml.safe_dump(HALVED_SWEEP, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def once(file):
    """What becomes of the sweep with so many slots; each is run once."""

    @cache
    def run(pack_size):
        folder = sweep_in_a_fresh_process(file, file.parent / f"pack-{pack_size}", f"worker.pack_size={pack_size}")
        assert {row.state for row in read_sweep(folder).trials} == {"complete", "pruned"}
        assert promoted_trials(folder) > 0
        return folder

    return run


def check_same(first: Path, second: Path, *, trials: int = NUM_RUNS) -> None:
    """Two sweeps have the same proposals, decisions, losses, evaluations, scores and files of weights."""
    assert state_of(second) == state_of(first)
    assert compare_sweeps(first, second).describe().startswith(f"identical: all {trials} runs, ")


def test_two_sweeps_of_one_file_and_seed_are_identical(tmp_path, file, once, finish):
    finish("sweep", str(file), "worker.pack_size=1", "sweep.output=again")
    check_same(once("1"), tmp_path / "again")


def test_a_sweep_of_another_seed_is_another_sweep(tmp_path, file, once, finish):
    finish("sweep", str(file), "worker.pack_size=1", "sweep.seed=1", "trainer.max_steps=3", "sweep.output=other")
    found = compare_sweeps(once("1"), tmp_path / "other").describe()
    assert found.startswith("different: sweep: `confirm_seeds` was ")
    params = [[row.params for row in read_sweep(folder).trials] for folder in (once("1"), tmp_path / "other")]
    assert params[0] != params[1]


def test_a_sweep_with_delays_in_proposals_evaluations_and_saving_is_identical(tmp_path, file, once, finish):
    finish("sweep", str(file), "worker.pack_size=3", "sweep.output=delayed", before=DELAYS)
    check_same(once("3"), tmp_path / "delayed")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two threads need two processors")
def test_a_sweep_whose_threads_wait_otherwise_is_identical(tmp_path, file):
    # enough in a step for threads to share
    sizes = ("trainer.batch_size=8", "data.block_length=64", "trainer.max_steps=6")
    words = ("worker.pack_size=3", "sweep.trials=3", "confirm.seeds=1", *sizes)
    sleeping = sweep_in_a_fresh_process(file, tmp_path / "sleeping", *words, threads=2, OMP_WAIT_POLICY="PASSIVE")
    waiting = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "10000"}  # spinning for good takes forever beside others
    spinning = sweep_in_a_fresh_process(file, tmp_path / "spinning", *words, threads=2, **waiting)
    check_same(sleeping, spinning, trials=1 + 2 * 3 + 3)
    for folder, policy in ((sleeping, "PASSIVE"), (spinning, "ACTIVE")):
        record = read_sweep(folder)
        assert record.threads == 2
        assert read_run(folder / record.trials[0].run).environment["OMP_WAIT_POLICY"] == policy


def test_a_sweep_that_was_killed_in_the_middle_is_reproduced_by_one_that_was_not(tmp_path, file, once, begin, finish):
    folder = tmp_path / "killed"
    session = begin("sweep", str(file), "worker.pack_size=3", "sweep.output=killed")
    session.wait_for((folder / "sweep.json").exists)
    session.wait_for(lambda: len(read_sweep(folder).trials) >= 4)
    session.kill()
    assert session.code == -signal.SIGKILL
    assert "must be complete" in finish("reproduce", "killed", code=2)
    assert not (tmp_path / "outputs").exists()
    finish("sweep", "--resume", "killed")
    check_same(once("3"), folder)
    said = finish("reproduce", "killed", before=OTHER_THREADS)  # it takes as many as the sweep had
    assert said.splitlines()[-1] == (
        f"identical: all {NUM_RUNS} runs, their decisions, losses and scores: outputs/reproduce/killed"
    )
    check_same(folder, tmp_path / "outputs" / "reproduce" / "killed")


def change_loss(folder: Path) -> str:
    """Changes the last digits of a loss in the middle, and says what is to be found."""
    path = folder / "runs" / "lora-0001" / "steps.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = next(row for row in rows if row["step"] == 3 and "loss" in row)
    true, row["loss"] = row["loss"], row["loss"] * (1 + 2**-52)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"trial lora-1, step 3: `loss` was {row['loss']!r} and is {true!r}"


def test_a_sweep_that_is_not_what_was_recorded_is_told_with_the_first_trial_step_and_key(tmp_path, once, finish):
    shutil.copytree(once("3"), tmp_path / "changed")
    expected = change_loss(tmp_path / "changed")
    said = finish("reproduce", "changed", "--output", "again", code=1)
    assert said.splitlines()[-1] == f"different: {expected}: again"
    check_same(once("3"), tmp_path / "again")


def test_a_stopped_sweep_is_not_reproduced(tmp_path, file, begin, finish):
    session = begin("sweep", str(file), "sweep.output=stopped", "trainer.max_steps=300")
    session.wait_for(lambda: any(tmp_path.glob("stopped/runs/*/steps.jsonl")))
    session.send(signal.SIGTERM)
    assert session.wait() == 130, session.output
    assert "'stopped' is interrupted" in finish("reproduce", "stopped", code=2)


def test_a_trial_that_was_paused_and_went_on_ends_as_one_that_was_never_paused(tmp_path, file, finish):
    words = ["sweep", str(file), "worker.pack_size=1", "sampler=qmc", "confirm.seeds=0"]  # it proposes the same
    finish(*words, "sweep.output=halved")
    finish(*words, "sweep.output=all", "pruner=none")
    halved, whole = tmp_path / "halved", tmp_path / "all"
    assert promoted_trials(halved) > 0
    trials = {row.run: row for row in read_sweep(whole).trials}
    kept, expected = state_of(halved), state_of(whole)
    for row in read_sweep(halved).trials:
        assert row.params == trials[row.run].params
        if row.state == "complete":
            assert kept[row.run] == expected[row.run]
        else:
            steps = steps_of(halved / row.run)
            assert steps == steps_of(whole / row.run)[: len(steps)]
