"""`worker=slurm` on a real Slurm: jobs that are cancelled, requeued and drained lose no trial."""

import os
from pathlib import Path

import psutil
import pytest
from tests.servers.slurm import LOOPBACK, NODE

import lorasweep
from lorasweep.record import read_sweep

from .ray_sweep import check_listens_here_only, check_whole, count_evaluations, wait_for
from .ray_sweep import start as start

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
ON_SLURM = (
    "worker=slurm",
    "worker.head_ip=127.0.0.1",
    "worker.gpus=0",
    "worker.cpus=1",
    "worker.timeout_min=5",
    "worker.pack_size=1",
    "sweep.output=out",
)


@pytest.fixture
def on_loopback(monkeypatch, slurm):
    """Slurm's jobs and Ray's processes listen on 127.0.0.1 alone, and import this code."""
    path = [str(LOOPBACK), str(Path(lorasweep.__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    return slurm


@pytest.mark.smoke
def test_jobs_may_be_cancelled_drained_and_requeued(start, tmp_path, on_loopback):
    slurm, folder = on_loopback, tmp_path / "out"
    sweep = start("on_ray.yaml", *ON_SLURM, "worker.jobs=2", "trainer.max_steps=240", "trainer.eval_every_steps=20")
    wait_for(lambda: count_evaluations(folder), sweep)
    check_listens_here_only(psutil.Process(sweep.process.pid).children(recursive=True))
    wait_for(lambda: len({row.run for row in read_sweep(folder).trials if row.state == "running"}) == 2, sweep)
    check_listens_here_only(slurm.processes())
    first, second = slurm.jobs()
    slurm.run("scancel", "--signal=USR2", first)  # told of its end, it leaves; its trial goes on in the other job
    slurm.wait_for_jobs({first: "PENDING", second: "RUNNING"})
    slurm.run("scancel", first)
    slurm.wait_for_jobs({second: "RUNNING"})
    slurm.run("scontrol", "update", f"NodeName={NODE}", "State=DRAIN", "Reason=test")
    slurm.run("scontrol", "requeue", second)  # no job is left until the node is back
    slurm.wait_for_node("drained")
    slurm.wait_for_jobs({second: "PENDING"})
    assert sweep.process.poll() is None
    slurm.run("scontrol", "update", f"NodeName={NODE}", "State=RESUME")
    slurm.hurry(second)
    sweep.wait()
    check_whole(folder, steps=240)
    slurm.wait_for_jobs({})


def test_a_sweep_without_jobs_says_so_and_submits_others_when_it_is_resumed(start, tmp_path, on_loopback):
    slurm, folder = on_loopback, tmp_path / "out"
    sweep = start("on_ray.yaml", *ON_SLURM)
    wait_for(lambda: count_evaluations(folder), sweep)
    slurm.clear()
    assert "Slurm jobs" in sweep.wait(code=1)
    start("--resume", "out").wait()
    slurm.wait_for_jobs({})
    check_whole(folder)
