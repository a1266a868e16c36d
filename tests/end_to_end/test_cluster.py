"""Workers in Slurm's jobs on PostgreSQL, disturbed in the middle: the same sweep as by one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from tests.servers.postgres import PASSWORD

import lorasweep
from lorasweep.record import read_run, read_steps, read_sweep, read_workers
from lorasweep.sweep import check_definition, create_sweep, read_definition
from lorasweep.sweep.slurm import read_arrays
from lorasweep.training import Benches

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]

TRIALS = {"frozen": 1, "full": 9, "lora": 30}
"""40 in all."""
ENDED_BEFORE = 6
"""Trials that have ended when something happens."""
SWEEP = {
    "name": "cluster",
    "settings": {
        "data.block_length": 32,
        "data.max_validation_blocks": 4,
        "data.max_test_blocks": 4,
        "trainer.batch_size": 2,
        "trainer.eval_batch_size": 4,
        "trainer.max_steps": 6,
        "trainer.eval_every_steps": 2,
        "trainer.precision": "fp32",
        "trainer.device": "cpu",
        "sampler": "random",
        "pruner": "none",
        "confirm.seeds": 0,
        "worker.pack_size": 1,
        "worker.lease_s": 10,
    },
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "full": {
            "settings": {"method": "full"},
            "space": {"optim.lr": {"low": 1e-4, "high": 1e-3, "log": True}},
            "trials": TRIALS["full"],
        },
        "lora": {
            "settings": {"method": "lora", "method.dropout": 0.1},
            "space": {"method.rank": [1, 2, 4], "optim.lr": {"low": 1e-3, "high": 1e-2, "log": True}},
            "trials": TRIALS["lora"],
        },
    },
}
ON_SLURM = ["worker=slurm", "worker.num=2", "worker.gpus=0", "worker.cpus=1", "worker.time_min=9", "storage=postgresql"]
ON_SLURM += ["worker.pack_size=1", "worker.lease_s=10"]
ENVIRONMENT = {"PYTHONPATH": str(Path(lorasweep.__file__).parent.parent), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def write_sweep(folder: Path) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    return path


def begin_sweep(folder: Path, *words: str) -> Path:
    """Makes a sweep that no worker serves yet."""
    definition = read_definition(write_sweep(folder), list(words))
    configs = check_definition(definition, Benches())
    create_sweep(definition, folder / "sweep", configs=configs, metric="bits_per_byte").close()
    return folder / "sweep"


def results_of(folder: Path) -> dict[tuple[str, int], tuple]:
    """What was proposed, how it ended and every loss, by arm and number; all rows, so that one too many is seen."""
    rows = read_sweep(folder).trials
    assert Counter(row.arm for row in rows) == TRIALS
    assert len({row.run for row in rows}) == len(rows)
    found = {}
    for row in rows:
        kept = read_run(folder / row.run)
        losses = [(step["step"], step["loss"]) for step in read_steps(folder / row.run) if "loss" in step]
        assert kept.status == "complete"
        assert [step for step, _ in losses] == list(range(1, kept.steps_planned + 1))
        found[row.arm, row.number] = (row.params, row.state, row.value, losses)
    return found


def told_of(folder: Path) -> list[tuple]:
    """What the study was told of each trial."""
    return sorted((row.arm, row.number, row.state, row.value) for row in read_sweep(folder).trials)


def report_of(folder: Path) -> list[tuple]:
    """What the report says of each arm, without times and memory."""
    subprocess.run(
        [sys.executable, "-m", "lorasweep", "compare", str(folder)],
        env=os.environ | ENVIRONMENT,
        check=True,
        capture_output=True,
    )
    summary = json.loads((folder / "report" / "summary.json").read_text())
    keys = ("name", "best", "trials", "trainable_params", "adapter_bytes", "share_of_full_gain")
    return [tuple(arm[key] for key in keys) for arm in summary["arms"]]


def count_ended(folder: Path) -> int:
    return sum(row.state != "running" for row in read_sweep(folder).trials)


def logs_of(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in (folder / "workers").glob("*.log"))


def check_same(folder: Path, undisturbed: Path) -> None:
    """Exactly the trials asked for, none lost, none twice, with the results of the sweep that was left alone."""
    assert results_of(folder) == results_of(undisturbed)
    assert report_of(folder) == report_of(undisturbed)
    assert {path.name for path in (folder / "runs").iterdir()} == {
        path.name for path in (undisturbed / "runs").iterdir()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The sweep by one worker, in a journal."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_sweep(folder)
    words = [sys.executable, "-m", "lorasweep", "sweep", "cluster.yaml", "sweep.output=sweep"]
    done = subprocess.run(words, cwd=folder, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "sweep"


@dataclass(frozen=True)
class Cluster:
    """A sweep on PostgreSQL that two of Slurm's jobs serve and a process follows, some of its trials behind it."""

    folder: Path
    follower: Any
    """Its process."""
    jobs: list[str]
    before: str
    """Python that makes a process know the database and Slurm."""

    def end(self) -> None:
        """Waits until the sweep is complete; whoever follows it shows its report."""
        assert self.follower.wait() == 0, self.follower.output + logs_of(self.folder)
        assert "report: " in self.follower.output


@pytest.fixture
def cluster(tmp_path, begin, postgres, slurm):
    write_sweep(tmp_path)
    before = f"os.environ.update({slurm.environment!r}, LORASWEEP_STORAGE_URL={postgres.url!r})"
    follower = begin("sweep", "cluster.yaml", "sweep.output=sweep", *ON_SLURM, before=before)
    folder = tmp_path / "sweep"
    follower.wait_for(lambda: len(read_workers(folder)) == 2)
    follower.wait_for(lambda: count_ended(folder) >= ENDED_BEFORE)
    assert read_sweep(folder).status == "running"
    (array,) = read_arrays(folder)
    return Cluster(folder, follower, [f"{array.job_id}_{index}" for index in range(2)], before)


def check_database(postgres) -> None:
    """Every trial was told once, and there is none that the record doesn't know of."""
    assert postgres.query("SELECT state, count(*) FROM trials GROUP BY state") == [
        ["COMPLETE", str(sum(TRIALS.values()))]
    ]


def test_two_workers_that_slurm_started_are_one_and_no_file_has_the_password(cluster, postgres, undisturbed):
    cluster.end()
    check_same(cluster.folder, undisturbed)
    check_database(postgres)
    workers = read_workers(cluster.folder)
    assert [worker.status for worker in workers] == ["ended", "ended"]
    assert all(worker.done for worker in workers)
    assert sum(worker.done for worker in workers) == sum(TRIALS.values())
    files = [path for path in cluster.folder.rglob("*") if path.is_file()]
    for secret in (PASSWORD, quote(PASSWORD, safe="")):
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_one_worker_is_cancelled(cluster, postgres, slurm, undisturbed):
    slurm.cancel(cluster.jobs[0])
    cluster.end()
    check_same(cluster.folder, undisturbed)
    check_database(postgres)


def test_one_worker_is_requeued_and_comes_back(cluster, postgres, slurm, undisturbed):
    slurm.requeue(cluster.jobs[0])
    cluster.end()
    check_same(cluster.folder, undisturbed)
    check_database(postgres)


def test_the_steps_of_one_worker_are_killed(cluster, postgres, slurm, undisturbed):
    slurm.kill_steps(cluster.jobs[0])
    cluster.end()
    check_same(cluster.folder, undisturbed)
    check_database(postgres)


def test_the_node_is_lost_and_a_worker_joins_by_hand(cluster, postgres, slurm, undisturbed, begin):
    slurm.lose_node()
    worker = begin("worker", "sweep", before=cluster.before)
    assert worker.wait() == 0, worker.output
    cluster.end()
    check_same(cluster.folder, undisturbed)
    check_database(postgres)


def test_the_database_crashes_and_starts_again(cluster, postgres, undisturbed):
    postgres.server.stop(immediately=True)
    time.sleep(2)
    postgres.server.start()
    cluster.end()
    check_same(cluster.folder, undisturbed)
    check_database(postgres)
    assert [worker.status for worker in read_workers(cluster.folder)] == ["ended", "ended"]


def test_a_third_worker_joins_by_hand(cluster, postgres, undisturbed, begin):
    worker = begin("worker", "sweep", before=cluster.before)
    assert worker.wait() == 0, worker.output
    cluster.end()
    check_same(cluster.folder, undisturbed)
    check_database(postgres)
    assert len(read_workers(cluster.folder)) == 3


def test_one_of_two_workers_on_a_journal_is_killed(tmp_path, begin, undisturbed):
    folder = begin_sweep(tmp_path)
    first, second = begin("worker", str(folder)), begin("worker", str(folder))
    first.wait_for(lambda: count_ended(folder) >= ENDED_BEFORE)
    first.kill()
    assert second.wait() == 0, second.output
    check_same(folder, undisturbed)


def test_a_worker_that_was_stopped_for_longer_than_its_lease_notices_that_it_is_lost(tmp_path, begin, undisturbed):
    folder = begin_sweep(tmp_path, "worker.lease_s=3")
    first, second = begin("worker", str(folder)), begin("worker", str(folder))

    def runs_one() -> bool:
        rows = [row for row in read_workers(folder) if row.pid == first.pid]
        return bool(rows and rows[0].running and rows[0].done >= 2)

    first.wait_for(runs_one)
    first.send(signal.SIGSTOP)
    assert second.wait() == 0, second.output
    first.send(signal.SIGCONT)
    assert first.wait() == 1, first.output
    assert "others go on with its trials" in first.output or "was taken over by" in first.output
    assert told_of(folder) == told_of(undisturbed)
    states = {row.pid: row.status for row in read_workers(folder)}
    assert states == {first.pid: "lost", second.pid: "ended"}
