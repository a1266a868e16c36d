"""The batch file is the recorded one, and what `text` returns is what sbatch is given."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lorasweep.errors import WorkerError
from lorasweep.sweep.slurm import Batch, SlurmTask

RECORDED = Path(__file__).parent / "batch.sh"
RECORDED_RANKS = Path(__file__).parent / "batch_of_ranks.sh"


def portable(text, sweep):
    """A batch file with the same paths on every machine."""
    return text.replace(str(sweep), "SWEEP").replace(sys.executable, "PYTHON").replace(str(Path.cwd()), "HERE")


def test_the_batch_file_is_the_recorded_one(tmp_path, workers):
    settings = {
        "num": 8,
        "partition": "gpu",
        "account": "lab",
        "qos": "high",
        "gpus": 1,
        "cpus": 6,
        "mem_gb": 1.5,
        "constraint": "a100|h100",
        "setup": ["module load cuda"],
        "extra": {"reservation": "on tuesday", "exclusive": True, "nice": 5},
    }
    text = Batch(workers(**settings), tmp_path, name="quickstart").text()
    assert portable(text, tmp_path) == RECORDED.read_text()


def test_the_batch_file_of_workers_with_several_ranks_in_a_container_is_the_recorded_one(tmp_path, workers):
    settings = {"nodes": 2, "tasks_per_node": 4, "gpus": 4, "container": "registry#lorasweep:1", "mem_gb": 64}
    text = Batch(workers(**settings), tmp_path, name="wide").text()
    assert portable(text, tmp_path) == RECORDED_RANKS.read_text()


@pytest.mark.parametrize("num", [1, 3])
def test_what_is_shown_is_what_is_submitted(tmp_path, fake_slurm, workers, num):
    fake_slurm.says("sbatch", "Submitted batch job 77\n", body=f'cp "$1" {tmp_path}/given.sh')
    batch = Batch(workers(num=num), tmp_path / "sweep", name="quickstart")
    shown = batch.text()
    task = SlurmTask(sweep=tmp_path / "sweep", command=len)
    assert batch.submit_tasks(task) == "77"
    assert (tmp_path / "given.sh").read_text() == shown
    assert sum(call.startswith("sbatch") for call in fake_slurm.calls) == 1
    assert len(list((tmp_path / "sweep" / "workers" / "slurm").glob("77*_submitted.pkl"))) == num


def test_a_job_that_submits_hands_on_its_cluster_and_nothing_else(tmp_path, fake_slurm, workers, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/etc/other/slurm.conf")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "32")
    fake_slurm.says("sbatch", "Submitted batch job 77\n", body=f"env > {tmp_path}/environment")
    Batch(workers(), tmp_path / "sweep", name="quickstart").submit_tasks(SlurmTask(sweep=tmp_path, command=len))
    given = (tmp_path / "environment").read_text()
    assert "SLURM_CONF=/etc/other/slurm.conf" in given
    assert "SLURM_CPUS_PER_TASK" not in given
    assert os.environ["SLURM_CPUS_PER_TASK"] == "32"


def test_fewer_workers_than_asked_for_are_a_shorter_array(tmp_path, workers):
    assert "--array=0-1%2" in Batch(workers(num=8), tmp_path, name="quickstart", num=2).text()


def test_what_slurm_refuses_is_one_sentence(tmp_path, fake_slurm, workers):
    refusal = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy\n"
    fake_slurm.says("sbatch", error=refusal, code=1)
    with pytest.raises(WorkerError, match="Slurm must take the workers, but sbatch says: Job violates accounting/QOS"):
        Batch(workers(), tmp_path, name="quickstart").submit_tasks(SlurmTask(sweep=tmp_path, command=len))
