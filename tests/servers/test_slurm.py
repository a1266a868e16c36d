"""The cluster that tests use does what a cluster does to its jobs."""

from __future__ import annotations

import pytest

from .daemon import wait_until

JOB = "#!/bin/sh\n#SBATCH --requeue --ntasks=1 --open-mode=append --output={output}\necho begun; srun sleep 300\n"


pytestmark = pytest.mark.xdist_group("slurm")  # one cluster at a time


@pytest.fixture
def submit(slurm, tmp_path):
    def run():
        output = tmp_path / "output.txt"
        (tmp_path / "job.sh").write_text(JOB.format(output=output))
        job = slurm.run("sbatch", "--parsable", str(tmp_path / "job.sh"))
        wait_until(lambda: output.exists() and "begun" in output.read_text(), "the job runs")
        wait_until(lambda: len(slurm.processes(job)) >= 2, "its step runs")
        return job, output

    return run


@pytest.mark.slow
def test_a_requeued_job_begins_again_at_once(slurm, submit):
    job, output = submit()
    slurm.requeue(job)
    wait_until(lambda: output.read_text().count("begun") == 2, "it runs again")


@pytest.mark.slow
def test_the_job_of_a_lost_node_goes_back_into_the_queue(slurm, submit):
    job, _ = submit()
    slurm.lose_node()
    assert not slurm.processes()
    assert slurm.jobs() == {job: "PENDING"}


@pytest.mark.slow
def test_a_job_whose_steps_were_killed_has_no_process(slurm, submit):
    job, _ = submit()
    slurm.kill_steps(job)
    assert not slurm.processes()
