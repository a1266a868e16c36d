"""Killed at random moments, with and without packs: no trial is lost, repeated or begun twice, and none is changed."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from lorasweep.record import read_run, read_steps, read_sweep

KILLS = 10
"""Of each kind: 20 in all."""
LONGEST_S = 2.5
ASKED = {"frozen": 1, "full": 2, "lora": 5}
CONFIRMED = {"frozen": 1, "full": 2, "lora": 2}
SWEEP = {
    "name": "killed",
    "settings": {
        "data.block_length": 32,
        "data.max_validation_blocks": 8,
        "data.max_test_blocks": 8,
        "trainer.batch_size": 2,
        "trainer.eval_batch_size": 8,
        "trainer.max_steps": 24,
        "trainer.eval_every_steps": 4,
        "trainer.precision": "fp32",
        "trainer.device": "cpu",
        "confirm.seeds": 2,
        "pruner": "none",
    },
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "full": {
            "settings": {"method": "full"},
            "space": {"optim.lr": {"low": 1e-4, "high": 1e-3, "log": True}},
            "trials": 2,
        },
        "lora": {
            "settings": {"method": "lora", "method.dropout": 0.1},
            # where training explodes (rates near 0.1) rounding grows, and packs round otherwise
            "space": {"method.rank": [1, 2, 4], "optim.lr": {"low": 1e-3, "high": 1e-2, "log": True}},
            "trials": 5,
        },
    },
}


def state_of(folder: Path) -> dict[str, tuple]:
    """Every trial by its run's folder: what was proposed, how it ended, its losses."""
    record = read_sweep(folder)
    rows = [(row.run, row.arm, row.number, row.params, row.state, row.value) for row in record.trials]
    rows += [(row.run, row.arm, row.trial, row.seed, row.state, row.value) for row in record.confirm]
    return {run: (rest, losses_of(folder / run)) for run, *rest in rows}


def losses_of(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_steps(run) if "loss" in row]


def ended_runs(folder: Path) -> dict[str, bytes]:
    """The files of each run whose end the study has been told, as they are."""
    record = read_sweep(folder)
    ended = [row.run for row in (*record.trials, *record.confirm) if row.state != "running"]
    files = [folder / run / name for run in ended for name in ("run.json", "steps.jsonl")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.exists()}


def check_whole(folder: Path) -> None:
    """The sweep is what was asked for, and every file parses."""
    record = read_sweep(folder)
    assert record.status == "complete"
    for rows, asked in ((record.trials, ASKED), (record.confirm, CONFIRMED)):
        arms = [row.arm for row in rows]
        assert {arm: arms.count(arm) for arm in arms} == asked
        assert len({row.run for row in rows}) == len(rows)
        assert all(row.state == "complete" for row in rows)
    assert {path.name for path in (folder / "runs").iterdir()} == {
        Path(row.run).name for row in (*record.trials, *record.confirm)
    }
    for row in (*record.trials, *record.confirm):
        kept = read_run(folder / row.run)
        assert kept.status == "complete"
        assert [step for step, _ in losses_of(folder / row.run)] == list(range(1, kept.steps_planned + 1))
    told = [json.loads(line) for line in (folder / "journal.log").read_text().splitlines()]
    ends = [line["trial_id"] for line in told if line["op_code"] == 6 and line["state"] in (1, 2, 3)]
    assert len(ends) == len(set(ends)) == sum(ASKED.values()) + sum(CONFIRMED.values())
    for path in folder.rglob("*"):
        assert not path.name.endswith((".tmp", ".ckpt")), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert all(json.loads(line) for line in path.read_text().splitlines())
        elif path.suffix == ".safetensors":
            load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize(("pack_size", "sampler"), [("1", "tpe"), ("3", "random")])
def test_a_sweep_killed_ten_times_is_the_sweep_that_was_not(tmp_path, begin, finish, pack_size, sampler):
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    words = ["sweep", "killed.yaml", f"worker.pack_size={pack_size}", f"sampler={sampler}"]
    finish(*words, "sweep.output=whole")
    check_whole(tmp_path / "whole")
    drawn, kills, sweeps = random.Random(f"{pack_size}/{sampler}"), 0, 0
    while kills < KILLS:
        sweeps += 1
        folder = tmp_path / f"killed-{sweeps}"
        session = begin(*words, f"sweep.output={folder.name}")
        session.wait_for((folder / "sweep.json").exists)
        ended: dict[str, bytes] = {}
        while kills < KILLS:
            time.sleep(drawn.uniform(0, LONGEST_S))
            session.kill()
            if session.code == 0:
                break
            kills += 1
            now = ended_runs(folder)
            assert {name: now[name] for name in ended} == ended  # what had ended was not touched
            ended = now
            session = begin("sweep", "--resume", folder.name)
        if session.code is None:
            assert session.wait() == 0, session.output
        now = ended_runs(folder)
        assert {name: now[name] for name in ended} == ended
        check_whole(folder)
        expected, found = state_of(tmp_path / "whole"), state_of(folder)
        if pack_size == "1":
            assert found == expected  # to the last bit
            continue
        assert set(found) == set(expected)
        for run, ((*_, value), losses) in expected.items():
            assert found[run][0][:-1] == expected[run][0][:-1]
            # fp32 sums in another order in a pack of another size
            assert found[run][0][-1] == pytest.approx(value, rel=1e-4)
            steps, values = zip(*losses, strict=True) if losses else ((), ())
            assert [step for step, _ in found[run][1]] == list(steps)
            assert [loss for _, loss in found[run][1]] == pytest.approx(values, rel=1e-4)
