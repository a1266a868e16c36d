"""A sweep on a real Slurm: its workers are submitted, followed, left, stopped, cancelled, put in line, and end it."""

from __future__ import annotations

import functools
import signal

import pytest
import yaml

from lorasweep.cli import DONE, INTERRUPTED
from lorasweep.record import read_sweep, read_workers
from lorasweep.sweep.slurm import read_arrays

MINI = {
    "name": "mini",
    "settings": {
        "data.block_length": 32,
        "data.max_validation_blocks": 4,
        "trainer.batch_size": 2,
        "trainer.precision": "fp32",
        "trainer.device": "cpu",
        "trainer.max_steps": 300,
        "trainer.eval_every_steps": 50,
        "worker": "slurm",
        "worker.num": 2,
        "worker.gpus": 0,
        "worker.cpus": 1,
        "worker.time_min": 5,
        "worker.lease_s": 5,
        "worker.pack_size": 1,
        "confirm.seeds": 0,
    },
    "arms": {"lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2]}, "trials": 2}},
}


@pytest.fixture
def sweep(slurm, tmp_path, begin):
    """Types a command that speaks to the cluster of this test."""
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(MINI))
    before = f"import os; os.environ.update({slurm.environment!r})"
    return functools.partial(begin, "sweep", before=before)


@pytest.mark.slow
@pytest.mark.xdist_group("slurm")
def test_a_sweep_on_slurm_is_left_taken_up_again_and_ends_with_its_report(slurm, sweep, tmp_path):
    folder = tmp_path / "outputs" / "mini"
    first = sweep("mini.yaml")
    first.wait_for(lambda: len(list(folder.glob("runs/*/steps.jsonl"))) == 2)
    first.send(signal.SIGINT)
    assert first.wait() == INTERRUPTED, first.output
    assert list(slurm.jobs().values()) == ["RUNNING", "RUNNING"]
    (array,) = read_arrays(folder)
    assert f"scancel {array.job_id}" in first.output
    slurm.cancel(f"{array.job_id}_1")
    slurm.run("scancel", "--signal=USR2", f"{array.job_id}_0")
    first.wait_for(lambda: slurm.jobs() == {f"{array.job_id}_0": "PENDING"})
    again = sweep("--resume", "outputs/mini")
    again.wait_for(lambda: again.path.exists() and "Slurm job" in again.output)
    slurm.run("scontrol", "update", f"JobId={array.job_id}_0", "StartTime=now")
    assert again.wait() == DONE, again.output
    assert "report: outputs/mini/report/index.html" in again.output
    assert "can't be read" not in again.output
    rows = read_sweep(folder).trials
    assert [(row.arm, row.number, row.state) for row in rows] == [("lora", 0, "complete"), ("lora", 1, "complete")]
    assert [array.num for array in read_arrays(folder)] == [2, 1]
    assert {row.job for row in read_workers(folder)} >= {f"{array.job_id}_0", f"{array.job_id}_1"}
