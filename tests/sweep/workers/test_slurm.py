"""Slurm jobs are checked and submitted as recorded, join a sweep's Ray head, leave it, and join it again."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from tests.servers.daemon import wait_until
from tests.servers.ray_head import LOOPBACK, RayHead

from lorasweep.config.build import build
from lorasweep.config.compose import packaged_folder
from lorasweep.config.slurm import SlurmConfig
from lorasweep.errors import ConfigError, WorkerError
from lorasweep.sweep.workers.slurm import (
    SlurmJobs,
    check_slurm,
    describe_jobs,
    format_batch_file,
    read_live_jobs,
    submit_missing_jobs,
)
from lorasweep.sweep.workers.slurm_job import RayNode, write_address
from lorasweep.sweep.workers.train import HOPELESS_REASONS

RECORDED = Path(__file__).parent / "batch.sh"
SMALL = {"gpus": 0, "cpus": 1, "timeout_min": 5}


def make_config(**settings):
    defaults = yaml.safe_load((packaged_folder("conf") / "worker" / "slurm.yaml").read_text())
    return build(SlurmConfig, {**defaults, **settings}, key="worker")


def portable(text, folder):
    """A batch file with the same paths on every machine."""
    return text.replace(str(folder), "SWEEP").replace(sys.executable, "PYTHON").replace(str(Path.cwd()), "HERE")


def test_the_batch_file_is_the_recorded_one(tmp_path):
    config = make_config(
        jobs=8,
        partition="gpu",
        account="lab",
        qos="high",
        processes_per_job=4,
        gpus=1,
        cpus=6,
        mem_gb=1.5,
        constraint="a100|h100",
        setup=["module load cuda"],
        extra={"reservation": "on tuesday", "exclusive": True, "nice": 5},
    )
    assert portable(format_batch_file(config, tmp_path / "quickstart"), tmp_path) == RECORDED.read_text()


def test_one_job_that_is_not_requeued_has_no_array(tmp_path):
    text = format_batch_file(make_config(requeue=False, gpus=0), tmp_path / "quickstart")
    assert "#SBATCH --no-requeue" in text
    assert "--array" not in text
    assert "gpus" not in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jobs": 0}, r"`worker.jobs >= 1`.* got 0"),
        ({"gpus": -1}, r"`worker.gpus >= 0`.* got -1"),
        ({"pack_size": 0}, r"`worker.pack_size >= 1`.* got 0"),
        ({"mem_gb": 0}, r"`worker.mem_gb > 0`.* got 0"),
        ({"timeout_min": 2}, r"`worker.signal_delay_s < 120`.* got 120"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**settings)


def test_a_machine_without_slurm_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"`worker=slurm`.*No such file .*sbatch"):
        check_slurm(make_config(), tmp_path)


def test_a_slurm_that_does_not_answer_is_refused(tmp_path, monkeypatch, slurm_server):
    (tmp_path / "slurm.conf").write_text("ClusterName=none\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(ConfigError, match="`sbatch --test-only` says"):
        check_slurm(make_config(), tmp_path)
    assert describe_jobs(tmp_path) == "Slurm does not answer"


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"partition": "mian"}, "invalid partition"),
        ({"constraint": "a100"}, "feature"),
        ({"gpus": 1}, "gres"),
        ({"cpus": 3}, "node configuration"),
        ({"mem_gb": 9}, "node configuration"),
        ({"extra": {"blu": 2}}, "unrecognized option"),
    ],
)
def test_jobs_that_slurm_would_never_run_are_refused_with_its_answer(slurm, tmp_path, settings, refusal):
    with pytest.raises(ConfigError, match=f"(?i)`worker=slurm`.*says .*{refusal}.*`worker.partition`"):
        check_slurm(make_config(**{**SMALL, **settings}), tmp_path)
    assert slurm.jobs() == {}


@pytest.fixture
def sweep(tmp_path, monkeypatch, slurm) -> Path:
    """A sweep's folder; Slurm's jobs and Ray's processes listen on 127.0.0.1 alone."""
    path = [str(LOOPBACK), str(Path.cwd() / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "3")
    folder = tmp_path / "quickstart"
    folder.mkdir()
    return folder


@pytest.fixture
def head(sweep) -> Iterator[RayHead]:
    """The head of the sweep's Ray cluster."""
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
def test_jobs_join_the_head_more_are_added_and_a_cancelled_one_harms_no_other(slurm, sweep, head):
    config = make_config(**SMALL)
    assert check_slurm(config, sweep) == []
    (first,) = submit_missing_jobs(config, sweep)
    wait_for_nodes(head, first)
    of_first = processes_of(sweep)
    (second,) = submit_missing_jobs(make_config(**SMALL, jobs=2), sweep)
    wait_for_nodes(head, first, second)
    assert describe_jobs(sweep) == "2 running"
    assert head.run_on(f"slurm-{second}")["SLURM_JOB_ID"] == second
    listening = {connection.laddr.ip for pid in processes_of(sweep) for connection in listeners(pid)}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
    slurm.run("scancel", first)
    wait_for_nodes(head, second)
    slurm.wait_for_jobs({second: "RUNNING"})
    assert read_live_jobs(sweep) == {second: "running"}
    assert head.run_on(f"slurm-{second}")["SLURM_JOB_ID"] == second
    assert of_first
    assert not any(psutil.pid_exists(pid) for pid in of_first)
    assert not any(folder.exists() for folder in of_first.values())
    write_address(sweep, "")
    slurm.wait_for_jobs({})
    assert slurm.tell(second)["JobState"] == "COMPLETED"


def listeners(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return [found for found in psutil.Process(pid).net_connections("inet") if found.status == psutil.CONN_LISTEN]
    return []


@pytest.mark.slow
@pytest.mark.parametrize(("requeue", "after"), [(True, "PENDING"), (False, "FAILED")])
def test_a_job_that_is_told_of_its_end_leaves_and_is_requeued_where_asked(slurm, sweep, head, requeue, after):
    (job,) = submit_missing_jobs(make_config(**SMALL, requeue=requeue), sweep)
    wait_for_nodes(head, job)
    slurm.run("scancel", "--signal=USR2", job)
    wait_for_nodes(head)
    wait_until(lambda: slurm.tell(job)["JobState"] == after, lambda: slurm.tell(job), every=0.2)
    if requeue:
        slurm.hurry(job)
        wait_for_nodes(head, job)


@pytest.mark.slow
def test_a_node_leaves_a_head_that_is_gone_and_joins_the_next_one(slurm, sweep, head):
    (job,) = submit_missing_jobs(make_config(**SMALL), sweep)
    wait_for_nodes(head, job)
    head.kill()
    wait_until(lambda: not processes_of(sweep), "the node has left")
    assert slurm.jobs() == {job: "RUNNING"}
    second = RayHead(sweep)
    try:
        wait_for_nodes(second, job)
        third = RayHead(sweep)  # while the second one still answers
        try:
            wait_for_nodes(third, job)
            assert second.nodes() == []
        finally:
            third.kill()
    finally:
        second.kill()


def test_a_job_with_more_time_than_its_partition_allows_is_known_to_be_hopeless(slurm, sweep):
    (job,) = submit_missing_jobs(make_config(**{**SMALL, "timeout_min": 11}), sweep)
    wait_until(
        lambda: any(reason in read_live_jobs(sweep)[job] for reason in HOPELESS_REASONS),
        lambda: str(read_live_jobs(sweep)),
        every=0.2,
    )


@pytest.mark.slow
def test_a_job_without_a_head_ends_with_a_sentence(slurm, sweep):
    write_address(sweep, "127.0.0.1:1")
    node = RayNode(folder=sweep, requeue=True, num_cpus=1, num_gpus=0, head_wait_s=1)
    (job,) = SlurmJobs(make_config(**SMALL), sweep).submit_nodes(node, 1)
    slurm.wait_for_jobs({})
    assert slurm.tell(job)["JobState"] == "FAILED"
    assert "lorasweep sweep --resume" in errors_of(sweep, job)


def test_what_slurm_refuses_at_submission_is_one_sentence(slurm, sweep):
    with pytest.raises(WorkerError, match="invalid partition"):
        submit_missing_jobs(make_config(**SMALL, partition="none"), sweep)
