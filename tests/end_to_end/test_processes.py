"""A sweep on Ray whose trials are each trained by two processes, one of which runs out of memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from lorasweep.record import read_run, read_sweep

from .ray_sweep import thorough

pytestmark = [pytest.mark.slow, pytest.mark.cluster, thorough]

CONTENT = {
    "name": "processes",
    "settings": {
        "data.block_length": 32,
        "data.max_validation_blocks": 4,
        "data.max_test_blocks": 4,
        "trainer.max_steps": 4,
        "trainer.eval_every_steps": 2,
        "trainer.batch_size": 4,
        "trainer.precision": "fp32",
        "trainer.devices": 2,
        "trainer.strategy": "fsdp",
        "worker": "ray",
        "worker.num": 1,
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
BREAK = """
import os
from pathlib import Path
import lorasweep.data.tasks as tasks_file
import torch
true = tasks_file.compute_token_losses

def too_large(logits, targets):
    losses = true(logits, targets)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if rank == 1 and torch.is_grad_enabled() and len(losses) > 1:
        raise torch.OutOfMemoryError("out of memory on one rank")
    return losses

tasks_file.compute_token_losses = too_large
"""


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "processes.yaml").write_text(yaml.safe_dump(CONTENT))
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def sweep(folder, environment):
    command = [sys.executable, "-m", "lorasweep", "sweep", "processes.yaml", "sweep.output=out"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    record = read_sweep(folder / "out")
    assert record.status == "complete"
    assert [row.state for row in [*record.trials, *record.confirm]] == ["complete"] * 3
    return [read_run(folder / "out" / row.run) for row in record.trials]


def test_a_rank_that_runs_out_of_memory_halves_the_micro_batches(tmp_path, environment):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(BREAK)
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "code"), environment.get("PYTHONPATH", "")])
    runs = sweep(tmp_path, environment)
    assert [run.batching["too_large"] for run in runs] == [[1], [1]]
    assert {(run.platform["processes"], run.platform["strategy"]) for run in runs} == {(2, "fsdp")}
