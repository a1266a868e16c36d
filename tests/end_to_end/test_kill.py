"""Killed at random moments, alone and in packs: the sweep that comes out is the one that was not killed, to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from lorasweep.record import read_run, read_steps, read_sweep
from lorasweep.runs.comparison import compare_sweeps

from .conftest import (
    HALVED_CONFIRM_RUNS,
    HALVED_SWEEP,
    HALVED_TRIALS,
    journal_of,
    promoted_trials,
    state_of,
)

REPEATS = int(os.environ.get("LORASWEEP_TEST_KILLS", "2"))
PLACES = {"anywhere": REPEATS, "proposing": REPEATS, "writing a trial": REPEATS, "saving": REPEATS}
"""Where a process is killed, and how often: 8 times by default, for each pack size."""
MAX_S = 2.0
KILL = """
import itertools, os, pathlib, signal
calls = itertools.count(1)
def is_last_call():  # of a sweep that is there, so that it can be resumed
    return pathlib.Path({folder!r}, "sweep.json").exists() and next(calls) == {number}
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""
BEFORE = {
    # nothing is written of the trial yet
    "proposing": """
import optuna
ask = optuna.Study.ask
def dying_ask(*arguments, **named):
    found = ask(*arguments, **named)
    if is_last_call():
        die()
    return found
optuna.Study.ask = dying_ask
""",
    # the line of a new trial is cut anywhere, as between two of its parameters
    "writing a trial": """
from optuna.storages import JournalStorage
create = JournalStorage.create_new_trial
def dying_create(*arguments, **named):
    journal = {folder!r} + "/journal.log"
    before = os.path.getsize(journal)
    found = create(*arguments, **named)
    if is_last_call():
        os.truncate(journal, before + int({share} * (os.path.getsize(journal) - before)))
        die()
    return found
JournalStorage.create_new_trial = dying_create
""",
    # before or after a checkpoint, weights, a record or a line of the journal is in place
    "saving": """
fsync = os.fsync
def dying_fsync(handle):
    fsync(handle)
    if is_last_call():
        die()
os.fsync = dying_fsync
""",
}
MAX_CALLS = {"proposing": 3, "writing a trial": 3, "saving": 60}
pytestmark = pytest.mark.slow


def ended_runs(folder: Path) -> dict[str, bytes]:
    """The files of each run whose end the study has been told, as they are."""
    record = read_sweep(folder)
    rows = [*record.trials, *record.confirm]
    ended = [row.run for row in rows if row.state not in ("running", "paused")]
    files = [folder / run / name for run in ended for name in ("run.json", "steps.jsonl")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.exists()}


def check_whole(folder: Path) -> None:
    """The sweep is what was asked for, and every file parses."""
    record = read_sweep(folder)
    assert record.status == "complete"
    rows = [*record.trials, *record.confirm]
    for listed, asked in ((record.trials, HALVED_TRIALS), (record.confirm, HALVED_CONFIRM_RUNS)):
        arms = [row.arm for row in listed]
        assert {arm: arms.count(arm) for arm in arms} == asked
    assert {row.state for row in record.trials} == {"complete", "pruned"}
    assert {row.state for row in record.confirm} == {"complete"}
    assert sorted(path.name for path in (folder / "runs").iterdir()) == sorted(Path(row.run).name for row in rows)
    for row in rows:
        kept = read_run(folder / row.run)
        assert kept.status == row.state
        assert (kept.steps_done == kept.steps_planned) == (row.state == "complete")
        steps = [step["step"] for step in read_steps(folder / row.run) if "loss" in step]
        assert steps == list(range(1, kept.steps_done + 1))
    trials = journal_of(folder)
    assert len(trials) == sum(HALVED_TRIALS.values()) + sum(HALVED_CONFIRM_RUNS.values())
    assert all(trial.state.is_finished() for trial in trials)
    assert sorted(len(trial.params) for trial in trials) == sorted(
        [0, *[1] * HALVED_TRIALS["full"], *[2] * HALVED_TRIALS["lora"], *[2] * sum(HALVED_CONFIRM_RUNS.values())]
    )
    told = [json.loads(line) for line in (folder / "journal.log").read_text().splitlines()]
    ends = [line["trial_id"] for line in told if line["op_code"] == 6 and line["state"] in (1, 2, 3)]
    assert len(ends) == len(set(ends)) == len(trials)
    for path in folder.rglob("*"):
        assert not path.name.endswith((".tmp", ".ckpt")), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert all(json.loads(line) for line in path.read_text().splitlines())
        elif path.suffix == ".safetensors":
            load_file(path)


@pytest.mark.parametrize("pack_size", ["1", "3"])
def test_a_sweep_killed_at_many_moments_is_the_sweep_that_was_not_to_the_last_bit(tmp_path, begin, finish, pack_size):
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(HALVED_SWEEP, sort_keys=False))
    words = ["sweep", "killed.yaml", f"worker.pack_size={pack_size}"]
    whole = tmp_path / "whole"
    finish(*words, "sweep.output=whole")
    check_whole(whole)
    assert promoted_trials(whole) > 0
    expected = state_of(whole)
    drawn = random.Random(pack_size)
    places = [place for place, count in PLACES.items() for _ in range(count)]
    drawn.shuffle(places)
    sweeps = 0
    while places:
        sweeps += 1
        folder = tmp_path / f"killed-{sweeps}"
        asked = [*words, f"sweep.output={folder.name}"]
        ended: dict[str, bytes] = {}
        while places:
            place = places[-1]
            if place == "anywhere":
                session = begin(*asked)
                session.wait_for((folder / "sweep.json").exists)
                time.sleep(drawn.uniform(0, MAX_S))
                session.kill()
            else:
                number, share = drawn.randint(1, MAX_CALLS[place]), drawn.random()
                code = (KILL + BEFORE[place]).format(number=number, share=share, folder=str(folder))
                session = begin(*asked, before=code)
                session.wait()
            if session.code == 0:  # it came to the end before
                break
            assert session.code == -signal.SIGKILL, session.output
            places.pop()
            now = ended_runs(folder)
            assert {name: now[name] for name in ended} == ended  # what had ended was not touched
            ended = now
            asked = ["sweep", "--resume", folder.name]
        finish(*asked) if session.code != 0 else None
        now = ended_runs(folder)
        assert {name: now[name] for name in ended} == ended
        check_whole(folder)
        assert compare_sweeps(whole, folder).describe().startswith("identical: ")
        assert state_of(folder) == expected
