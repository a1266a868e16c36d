"""Whole sweeps of the embedded model, as a person runs them: from a file to a report, through Ctrl-C and kill."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lorasweep
from lorasweep.cli import run
from lorasweep.record import read_run, read_steps, read_sweep

MINI = {
    "name": "mini",
    "settings": {
        "data.block_length": 32,
        "data.max_validation_blocks": 8,
        "data.max_test_blocks": 8,
        "trainer.batch_size": 2,
        "trainer.eval_batch_size": 8,
        "trainer.max_steps": 8,
        "trainer.eval_every_steps": 2,
        "trainer.precision": "fp32",
        "trainer.device": "cpu",
        "confirm.seeds": 0,
    },
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "full": {
            "settings": {"method": "full"},
            "space": {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
            "trials": 3,
        },
        "lora": {
            "settings": {"method": "lora"},
            "space": {"method.rank": [1, 2, 4], "optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
            "trials": 6,
        },
    },
}
ASKED = {"frozen": 1, "full": 3, "lora": 6}
TIMEOUT_S = 240.0  # for a machine that does much else


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the sweep's file in it, made the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(MINI, sort_keys=False))
    return tmp_path


def trials_of(folder):
    found = {}
    for row in read_sweep(folder).trials:
        found[row.arm] = found.get(row.arm, 0) + 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pack_size", ["auto", "1", "3"])
def test_a_sweep_ends_with_its_trials_and_its_report(here, pack_size):
    assert run(["sweep", "mini.yaml", f"worker.pack_size={pack_size}"]) == 0
    folder = here / "outputs" / "mini"
    record = read_sweep(folder)
    assert record.status == "complete"
    assert trials_of(folder) == ASKED
    for row in record.trials:
        kept = read_run(folder / row.run)
        assert (kept.arm, kept.trial, kept.status, kept.score) == (row.arm, row.number, row.state, row.value)
        assert row.state in ("complete", "pruned")
        steps = [step["step"] for step in read_steps(folder / row.run) if "loss" in step]
        assert steps == list(range(1, kept.steps_done + 1))
        (swept,) = {path.parent for path in (folder / row.run).rglob("events.out.tfevents.*")} & {folder / row.run}
        assert EventAccumulator(str(swept)).Reload().Tags()["scalars"]
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert set(summary) >= {
        "sweep",
        "metric",
        "direction",
        "makespan_s",
        "tokens_trained",
        "steps_saved_by_pruning",
        "base",
        "arms",
    }
    assert summary["base"]["score"] == next(row.value for row in record.trials if row.arm == "frozen")
    for arm in summary["arms"]:
        assert sum(arm["trials"].values()) == ASKED[arm["name"]]
        best = min(row.value for row in record.trials if row.arm == arm["name"] and row.state == "complete")
        assert arm["best"]["score"] == best
        assert read_run(folder / arm["best"]["run"]).score == best
    page = (folder / "report" / "index.html").read_text()
    assert "mini" in page
    assert len((folder / "report" / "trials.csv").read_text().splitlines()) == 1 + sum(ASKED.values())


@pytest.mark.slow
def test_packed_trials_train_as_trials_alone(here):
    """Without a model-based sampler and pruner, both propose the same trials; fp32 sums in another order in a pack."""
    # where training explodes (rates near 0.1) a rounding of 1e-7 grows to 1e-1 in 8 steps, packed or not
    common = ["sampler=random", "pruner=none", "arms.lora.optim.lr=tag(log,interval(1e-3,2e-2))"]
    for size in ("1", "3"):
        assert run(["sweep", "mini.yaml", *common, f"worker.pack_size={size}", f"sweep.output=packed-{size}"]) == 0
    alone, packed = (
        {(row.arm, row.number): row for row in read_sweep(here / f"packed-{size}").trials} for size in ("1", "3")
    )
    assert set(alone) == set(packed)
    for key, row in alone.items():
        assert packed[key].params == row.params
        assert packed[key].value == pytest.approx(row.value, rel=1e-5)  # 2e-7 as measured


def start(folder, *words):
    """Starts the command line in a process of its own."""
    source = str(Path(lorasweep.__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-c", "from lorasweep.cli import main; main()", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process):
    """Waits until something is on disk, as long as the process runs."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_finished_trials(folder, number):
    def condition():
        if not (folder / "sweep.json").exists():
            return False
        return sum(row.state not in ("running", "paused") for row in read_sweep(folder).trials) >= number

    return condition


@pytest.mark.slow
@pytest.mark.parametrize("pack_size", ["1", "2"])
def test_ctrl_c_stops_a_sweep_which_says_how_to_resume_it_and_does(here, pack_size):
    words = [
        "sweep",
        "mini.yaml",
        f"worker.pack_size={pack_size}",
        "trainer.max_steps=40",
        "trainer.eval_every_steps=10",
    ]
    process = start(here, *words)
    folder = here / "outputs" / "mini"
    try:
        wait_for(has_finished_trials(folder, 2), process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    stopped = read_sweep(folder)
    assert stopped.status == "interrupted"
    done = [row for row in stopped.trials if row.state not in ("running", "paused")]
    assert f"stopped with {len(done)} of 10 trials done. To resume type:" in errors
    command = errors.strip().splitlines()[-1].split()
    assert command == ["lorasweep", "sweep", "--resume", "outputs/mini"]
    assert run(command[1:]) == 0
    record = read_sweep(folder)
    assert record.status == "complete"
    assert trials_of(folder) == ASKED
    kept = {(row.arm, row.number): row for row in record.trials}
    assert [kept[row.arm, row.number] for row in done] == done
    for row in record.trials:
        steps = [step["step"] for step in read_steps(folder / row.run) if "loss" in step]
        assert steps == list(range(1, len(steps) + 1))


CONFIRMED = {"frozen": 1, "full": 2, "lora": 2}


def check_confirmed(folder):
    """Each arm has exactly its seeds, each scored as its run's record and its rows on test data say."""
    record = read_sweep(folder)
    arms = [row.arm for row in record.confirm]
    assert {arm: arms.count(arm) for arm in arms} == CONFIRMED
    assert len({(row.arm, row.seed) for row in record.confirm}) == sum(CONFIRMED.values())
    for row in record.confirm:
        kept = read_run(folder / row.run)
        assert (row.state, kept.status) == ("complete", "complete")
        assert (kept.arm, kept.trial, kept.config["seed"]) == (row.arm, row.trial, row.seed)
        winner = read_run(folder / f"runs/{row.arm}-{row.trial:04d}")
        assert (kept.config["method"], kept.config["optim"]) == (winner.config["method"], winner.config["optim"])
        assert row.value == kept.test["bits_per_byte"]
        with (folder / row.run / "test_scores.csv").open() as file:
            rows = [{name: float(value) for name, value in line.items()} for line in csv.DictReader(file)]
        mean = sum(r["score"] * r["weight"] for r in rows) / sum(r["weight"] for r in rows)
        assert mean == pytest.approx(row.value, rel=1e-9)  # sums of float64 in another order
        assert len(rows) == 8
    for row in record.trials:
        assert read_run(folder / row.run).test == {}
        assert not (folder / row.run / "test_scores.csv").exists()
    return record


@pytest.mark.slow
@pytest.mark.parametrize("pack_size", ["1", "3"])
def test_the_best_of_each_arm_is_confirmed_on_fresh_seeds_and_test_data(here, pack_size):
    assert run(["sweep", "mini.yaml", f"worker.pack_size={pack_size}", "pruner=none", "confirm.seeds=2"]) == 0
    record = check_confirmed(here / "outputs" / "mini")
    seeds = {arm: [row.seed for row in record.confirm if row.arm == arm] for arm in CONFIRMED}
    assert seeds["full"] == seeds["lora"] == record.confirm_seeds
    packed = [read_run(here / "outputs" / "mini" / row.run).pack for row in record.confirm if row.arm == "lora"]
    assert all(packed) == (pack_size != "1")


@pytest.mark.slow
@pytest.mark.parametrize("pack_size", ["1", "3"])
def test_a_sweep_killed_while_it_confirms_ends_with_the_same_scores(here, pack_size):
    words = [
        "sweep",
        "mini.yaml",
        f"worker.pack_size={pack_size}",
        "pruner=none",
        "sampler=random",
        "trainer.max_steps=24",
        "trainer.eval_every_steps=4",
        "confirm.seeds=2",
    ]
    process = start(here, *words)
    folder = here / "outputs" / "mini"

    def has_begun_to_confirm():
        return (folder / "sweep.json").exists() and len(read_sweep(folder).confirm) >= 2

    try:
        wait_for(has_begun_to_confirm, process)
    finally:
        process.kill()
        process.communicate()
    killed = read_sweep(folder)
    assert killed.status == "running"  # so in the middle of the stage, however far behind the record is
    assert run(["sweep", "--resume", "outputs/mini"]) == 0
    assert check_confirmed(folder).trials == killed.trials
    assert run([*words, "sweep.output=whole"]) == 0
    rows = [[(r.arm, r.trial, r.seed, r.run, r.value) for r in read_sweep(f).confirm] for f in (folder, here / "whole")]
    assert rows[0] == rows[1]  # to the last bit, in packs too
