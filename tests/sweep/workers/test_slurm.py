"""Slurm jobs are checked and submitted as recorded, join a sweep's Ray head, leave it, and join it again."""

import contextlib
import functools
import os
import re
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from tests.servers.daemon import wait_until
from tests.servers.ray_head import LOOPBACK, RayHead

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


def test_one_job_that_is_not_requeued(batch_file):
    text = batch_file(requeue=False, gpus=0)
    assert "#SBATCH --no-requeue" in text
    assert "gpus" not in text


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
    """A sweep's folder; Slurm's jobs and Ray's processes listen on 127.0.0.1 alone."""
    path = [str(LOOPBACK), str(Path.cwd() / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "3")
    folder = tmp_path / "quickstart"
    folder.mkdir()
    return folder


@pytest.fixture
def head(sweep):
    head = RayHead(sweep)
    yield head
    head.kill()


def wait_for_nodes(head, *jobs):
    wanted = sorted(f"slurm-{job}" for job in jobs)
    wait_until(lambda: head.nodes() == wanted, lambda: f"{wanted} joined: {head.nodes()}", every=0.2)


def processes_of(sweep):
    """The processes of Ray in this sweep's jobs, with the temporary folder of their node."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_AUTH_TOKEN_PATH") == str(sweep / "ray.token"):
                folder = re.search(r"/tmp/lorasweep-\w+", " ".join(process.cmdline()))
                if folder is not None and "SLURM_JOB_ID" in process.environ():
                    found[process.pid] = Path(folder.group())
    return found


def errors_of(sweep, job):
    return next(sweep.rglob(f"{job}_0_log.err")).read_text()


@pytest.mark.slow
def test_jobs_join_the_head_and_a_cancelled_one_harms_no_other(slurm, sweep, head):
    first, second = submit(slurm, make_config(**SMALL), sweep), submit(slurm, make_config(**SMALL), sweep)
    wait_for_nodes(head, first, second)
    assert sorted(read_live_jobs(sweep).values()) == ["running", "running"]
    assert head.run_on(f"slurm-{second}")["SLURM_JOB_ID"] == second
    listening = {connection.laddr.ip for pid in processes_of(sweep) for connection in listeners(pid)}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
    slurm.run("scancel", first)
    wait_for_nodes(head, second)
    slurm.wait_for_jobs({second: "RUNNING"})
    assert head.run_on(f"slurm-{second}")["SLURM_JOB_ID"] == second
    head.kill()
    slurm.wait_for_jobs({})
    assert not processes_of(sweep)


def submit(slurm, config, sweep):
    before = set(slurm.jobs())
    submit_jobs(config, sweep)
    (job,) = set(slurm.jobs()) - before
    return job


def listeners(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return [found for found in psutil.Process(pid).net_connections("inet") if found.status == psutil.CONN_LISTEN]
    return []


@pytest.mark.slow
@pytest.mark.parametrize(("requeue", "after"), [(True, "PENDING"), (False, "FAILED")])
def test_a_job_that_is_told_of_its_end_leaves_and_is_requeued_where_asked(slurm, sweep, head, requeue, after):
    job = submit(slurm, make_config(**SMALL, requeue=requeue), sweep)
    wait_for_nodes(head, job)
    slurm.run("scancel", "--signal=USR2", job)
    wait_for_nodes(head)
    wait_until(lambda: slurm.tell(job)["JobState"] == after, lambda: slurm.tell(job), every=0.2)
    if requeue:
        slurm.hurry(job)
        wait_for_nodes(head, job)


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
    job = submit(slurm, make_config(**SMALL), sweep)
    slurm.wait_for_jobs({})
    assert slurm.tell(job)["JobState"] == "FAILED"
    assert "lorasweep sweep --resume" in errors_of(sweep, job)


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [({"partition": "mian"}, "invalid partition"), ({"extra": {"blu": 2}}, "unrecognized option")],
)
def test_what_slurm_refuses_is_one_sentence(slurm, sweep, settings, refusal):
    with pytest.raises(ConfigError, match=f"(?i)`worker=slurm`.*{refusal}.*`worker.partition`"):
        submit_jobs(make_config(**{**SMALL, **settings}), sweep)
    assert slurm.jobs() == {}
