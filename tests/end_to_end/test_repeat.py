"""The same sweep again, also when it is killed, is the same sweep to the last bit."""

import random
import signal
from pathlib import Path

import pytest
import yaml
from tests.small_runs import rates

from lorasweep.record import read_run, read_steps, read_sweep

from .conftest import SETTINGS, read_trials, state_of

NUM_KILLS = (1, pytest.param(8, marks=pytest.mark.soak))
MAX_SAVES = 120
"""Files that are flushed before a kill, at most; a sweep flushes several hundred."""
TRIALS = {"frozen": 1, "full": 1, "lora": 4}
CONFIRM_RUNS = {"frozen": 1, "full": 2, "lora": 2}
SWEEP = {
    "name": "repeated",
    "settings": SETTINGS | {"trainer.max_steps": 6, "confirm.seeds": 2, "sampler": "tpe"},
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "full": {"settings": {"method": "full"}},
        "lora": {
            "settings": {"method": "lora", "method.dropout": 0.1},
            "space": {"method.rank": [1, 2, 4], "optim.lr": rates(1e-3, 1e-1)},
            "trials": 4,
        },
    },
}
KILL = """
import itertools, os, pathlib, signal
saves = itertools.count(1)
def dying_fsync(handle):  # before or after a checkpoint, weights, a record or a line of the journal is in place
    if pathlib.Path({folder!r}, "sweep.json").exists() and next(saves) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = dying_fsync
"""
pytestmark = pytest.mark.slow


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


def read_ended(folder):
    """Returns the files of each run whose end the study has been told."""
    record = read_sweep(folder)
    ended = [row.run for row in (*record.trials, *record.confirm) if row.state != "running"]
    files = [folder / run / name for run in ended for name in ("run.json", "steps.jsonl")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.exists()}


@pytest.mark.parametrize("num_kills", NUM_KILLS)
@pytest.mark.parametrize("pack_size", [pytest.param("1", marks=pytest.mark.release), "3"])
def test_a_sweep_that_is_killed_and_resumed_is_the_same_to_the_last_bit(tmp_path, begin, finish, pack_size, num_kills):
    (tmp_path / "repeated.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    words = ["sweep", "repeated.yaml", f"worker.pack_size={pack_size}"]
    finish(*words, "sweep.output=whole")
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert {row.state for row in read_sweep(whole).trials} == {"complete"}
    check_whole(whole)
    drawn, asked, ended, code = random.Random(pack_size), [*words, "sweep.output=killed"], {}, -signal.SIGKILL
    for _ in range(num_kills):
        session = begin(*asked, before=KILL.format(number=drawn.randint(1, MAX_SAVES), folder=str(folder)))
        code = session.wait()
        if code == 0:  # it was over before
            break
        assert code == -signal.SIGKILL, session.output
        now = read_ended(folder) if pack_size == "1" else {}  # a pack trains again from its last commit
        assert {name: now[name] for name in ended} == ended  # no later process changes what had ended
        asked, ended = ["sweep", "--resume", "killed"], now
    if code != 0:
        finish(*asked)
    now = read_ended(folder)
    assert {name: now[name] for name in ended} == ended
    check_whole(folder)
    # proposals, decisions, losses, evaluations, scores and files of weights
    assert state_of(folder) == state_of(whole)
