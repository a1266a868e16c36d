"""Slurm jobs are checked and submitted as recorded, and what Slurm refuses is one sentence."""

import functools
import os
import sys
from pathlib import Path

import pytest
import yaml
from tests.servers.daemon import wait_until

import lorasweep.sweep.workers.slurm as slurm_file
from lorasweep.config.build import build
from lorasweep.config.compose import packaged_folder
from lorasweep.config.sweep import SlurmWorkers
from lorasweep.errors import ConfigError
from lorasweep.sweep.workers.slurm import ADDRESS_FILE, RayNode, read_live_jobs, submit_jobs
from lorasweep.sweep.workers.train import HOPELESS_REASONS

RECORDED = Path(__file__).parent / "batch.sh"
SMALL = {"gpus": 0, "cpus": 1, "timeout_min": 5}


def make_config(**settings):
    defaults = yaml.safe_load((packaged_folder("conf") / "worker" / "slurm.yaml").read_text())
    return build(SlurmWorkers, {**defaults, **settings}, key="worker")


def portable(text, folder):
    """A batch file with the same paths on every machine."""
    return text.replace(str(folder), "SWEEP").replace(sys.executable, "PYTHON").replace(str(Path.cwd()), "HERE")


@pytest.fixture
def batch_file(tmp_path, monkeypatch):
    """Submits jobs to a Slurm that only numbers them, and returns their batch file."""
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho Submitted batch job 12\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def submit(**settings):
        (tmp_path / "quickstart").mkdir()
        submit_jobs(make_config(**settings), tmp_path / "quickstart")
        return portable((tmp_path / "quickstart" / "slurm" / "12_submission.sh").read_text(), tmp_path)

    return submit


def test_the_batch_file_is_the_recorded_one(batch_file):
    text = batch_file(
        jobs=8,
        partition="gpu",
        processes_per_job=4,
        gpus=1,
        cpus=6,
        setup=["module load cuda"],
        extra={"account": "lab", "mem": "1536M", "reservation": "on tuesday", "exclusive": True, "nice": 5},
    )
    assert text == RECORDED.read_text()


def test_one_job_that_is_not_requeued(batch_file, tmp_path):
    text = batch_file(requeue=False, gpus=0)
    assert "#SBATCH --no-requeue" in text
    assert "gpus" not in text
    assert RayNode(folder=tmp_path, requeue=False, num_cpus=1, num_gpus=0).checkpoint() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": -1}, r"`worker.gpus >= 0`.* got -1"),
        ({"timeout_min": 2}, r"`worker.signal_delay_s < 120`.* got 120"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**settings)


def test_a_machine_without_slurm_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"`worker=slurm`.*srun"):
        submit_jobs(make_config(), tmp_path)
    assert read_live_jobs(tmp_path) is None


@pytest.fixture
def sweep(tmp_path, monkeypatch, slurm):
    """A sweep's folder, while a Slurm of this machine runs."""
    path = [str(Path.cwd() / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    folder = tmp_path / "quickstart"
    folder.mkdir()
    return folder


def test_a_job_with_more_time_than_its_partition_allows_is_known_to_be_hopeless(slurm, sweep):
    submit_jobs(make_config(**{**SMALL, "timeout_min": 11}), sweep)
    wait_until(
        lambda: any(reason in state for reason in HOPELESS_REASONS for state in read_live_jobs(sweep).values()),
        lambda: str(read_live_jobs(sweep)),
        every=0.2,
    )


@pytest.mark.slow
def test_a_job_without_a_head_ends_with_a_sentence(slurm, sweep, monkeypatch):
    (sweep / ADDRESS_FILE).write_text("127.0.0.1:1")
    monkeypatch.setattr(slurm_file, "RayNode", functools.partial(RayNode, head_wait_s=1))
    submit_jobs(make_config(**SMALL), sweep)
    (job,) = slurm.jobs()
    slurm.wait_for_jobs({})
    assert slurm.tell(job)["JobState"] == "FAILED"
    assert "lorasweep sweep --resume" in next(sweep.rglob(f"{job}_0_log.err")).read_text()


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [({"partition": "mian"}, "invalid partition"), ({"extra": {"blu": 2}}, "unrecognized option")],
)
def test_what_slurm_refuses_is_one_sentence(slurm, sweep, settings, refusal):
    with pytest.raises(ConfigError, match=f"(?i)`worker=slurm`.*{refusal}.*`worker.partition`"):
        submit_jobs(make_config(**{**SMALL, **settings}), sweep)
    assert slurm.jobs() == {}
