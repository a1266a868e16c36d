"""A sweep whose trials are each trained by two processes, launched by torchrun: one of them tells the controller."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from lorasweep.record import read_run, read_sweep

pytestmark = pytest.mark.slow

CONTENT = {
    "name": "ranks",
    "settings": {
        "data.block_length": 32,
        "data.max_validation_blocks": 4,
        "data.max_test_blocks": 4,
        "trainer.max_steps": 4,
        "trainer.eval_every_steps": 2,
        "trainer.batch_size": 4,
        "trainer.precision": "fp32",
        "trainer.devices": 2,
        "sampler": "random",
        "pruner": "none",
        "confirm.seeds": 1,
    },
    "arms": {
        "lora": {
            "settings": {"method": "lora"},
            "space": {"optim.lr": {"low": 1e-3, "high": 1e-2, "log": True}},
            "trials": 2,
        }
    },
}


def run(folder, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "lorasweep", *words], cwd=folder, env=os.environ, capture_output=True, text=True, timeout=400
    )


def test_two_processes_train_each_trial_and_one_tells(tmp_path):
    (tmp_path / "ranks.yaml").write_text(yaml.safe_dump(CONTENT))
    ended = run(tmp_path, "sweep", "ranks.yaml", "sweep.output=out")
    assert ended.returncode == 0, ended.stderr[-2000:]
    record = read_sweep(tmp_path / "out")
    assert record.status == "complete"
    assert [row.state for row in [*record.trials, *record.confirm]] == ["complete"] * 3
    assert {read_run(tmp_path / "out" / row.run).steps_done for row in record.trials} == {4}


def test_a_process_alone_is_told_how_to_launch_two(tmp_path):
    (tmp_path / "ranks.yaml").write_text(yaml.safe_dump(CONTENT))
    ended = subprocess.run(
        [sys.executable, "-m", "lorasweep", "sweep", "ranks.yaml", "sweep.output=out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 2
    assert "`trainer.devices` must be the number of processes that were launched" in ended.stderr
    assert "torchrun --nproc-per-node 2 -m lorasweep" in ended.stderr
    assert not (tmp_path / "out").exists()
