"""Workers on a real Ray on 127.0.0.1: whatever process is killed, nothing is lost and the total stays."""

import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import tests.servers
import yaml
from tests.servers.daemon import wait_until

import lorasweep
from lorasweep.config.compose import packaged_folder
from lorasweep.errors import ConfigError
from lorasweep.record import read_run, read_steps, read_sweep
from lorasweep.sweep.workers.ray_cluster import join_cluster

from .conftest import TIMEOUT_S, state_of
from .ray_sweep import (
    SWEEP,
    RaySweep,
    check_listens_here_only,
    check_whole,
    count_evaluations,
    find_processes,
    wait_for,
)
from .ray_sweep import start as start

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
STEPS = 48
"""Optimizer steps of a trial whose processes are killed."""
EVALUATIONS = "trainer.eval_every_steps=8"
NUM_KILLS = (pytest.param(1, marks=pytest.mark.smoke), pytest.param(4, marks=pytest.mark.soak))
"""How often a worker is killed."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one worker in the sweep's own process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "on_ray.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    RaySweep(
        "on_ray.yaml",
        "worker.pack_size=1",
        "sweep.output=out",
        f"trainer.max_steps={STEPS}",
        EVALUATIONS,
        folder=folder,
    ).wait()
    return state_of(folder / "out")


@pytest.mark.parametrize("num_kills", NUM_KILLS)
def test_workers_that_are_killed_lose_nothing_and_all_of_ray_ends_with_the_sweep(start, tmp_path, alone, num_kills):
    sweep = start("worker.num=2", "worker.pack_size=1", "sweep.output=out", f"trainer.max_steps={STEPS}", EVALUATIONS)
    wait_for(lambda: len(sweep.find("ray::WorkerActor")) == 2, sweep)
    check_listens_here_only(psutil.Process(sweep.process.pid).children(recursive=True))
    chance, folder, seen = random.Random(0), tmp_path / "out", 0
    kills = 0
    while sweep.process.poll() is None and kills < num_kills:
        found = sweep.find("ray::WorkerActor")
        if not found or count_evaluations(folder) <= seen:
            time.sleep(0.05)
            continue
        time.sleep(chance.uniform(0, 3))
        with suppress(psutil.NoSuchProcess):
            chance.choice(found).kill()
            kills += 1
            seen = count_evaluations(folder)
    started = psutil.Process(sweep.process.pid).children(recursive=True) if sweep.process.poll() is None else []
    sweep.wait()
    assert kills  # the sweep may be over before the last
    check_whole(folder, steps=STEPS)
    # a trial that was continued repeats the steps after its checkpoint to the same bits
    for run, state in state_of(folder).items():
        assert state[:6] == alone[run][:6], run
    _, left = psutil.wait_procs(started, timeout=TIMEOUT_S)
    assert left == []
    assert not (folder / "packs").exists()


@pytest.mark.parametrize("victim", ["gcs_server", "ray::ControllerActor"])
def test_a_sweep_whose_head_or_controller_died_is_resumed(start, tmp_path, victim):
    folder, steps = tmp_path / "out", 200  # so many that the sweep is not over before the kill
    sweep = start("worker.num=2", "sweep.output=out", f"trainer.max_steps={steps}", "trainer.eval_every_steps=20")
    wait_for(lambda: count_evaluations(folder), sweep)
    kill_head(sweep, victim)
    said = sweep.wait(code=1)
    if victim != "gcs_server":  # without it, Ray ends the process in 15 s, with a sentence of its own
        assert re.search(r"`lorasweep sweep --resume (\S*/)?out`", said)
    start("--resume", "out").wait()
    check_whole(folder, steps=steps)


def test_a_worker_of_two_processes_trains_packs_and_trials_on_both(start, tmp_path):
    words = ("worker.num=1", "sweep.output=out", "confirm.seeds=0", "trainer.max_steps=12", "sweep.trials=2")
    sweep, folder = start(*words, "trainer.devices=2", "trainer.strategy=fsdp"), tmp_path / "out"
    wait_for(lambda: count_evaluations(folder), sweep)
    assert len(sweep.find("ray::WorkerActor")) == 2
    sweep.find("ray::WorkerActor")[-1].kill()  # one of the two: the other ends too, and both begin again
    sweep.wait()
    record = read_sweep(folder)
    assert [row.state for row in record.trials] == ["complete"] * 3  # full fine-tuning searches one key: half of two
    for row in record.trials:
        run = read_run(folder / row.run)
        assert (run.status, run.steps_done, run.platform["processes"]) == ("complete", 12, 2)
        assert (run.pack is None) == (row.arm == "full")
        assert [step["step"] for step in read_steps(folder / row.run) if "loss" in step] == list(range(1, 13))


def kill_head(sweep, victim):
    """Kills a process of the sweep's head, and waits until all of the sweep has ended."""
    started = psutil.Process(sweep.process.pid).children(recursive=True)
    (sweep.process if victim == "driver" else sweep.find(victim)[0]).kill()
    sweep.process.wait(TIMEOUT_S)
    # After SIGKILL nobody ends Ray's agents. They hold nothing, and look for the head for a minute or two.
    left = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"} if victim == "driver" else set()
    wait_until(lambda: not names_of(started) - left, lambda: str(started), seconds=TIMEOUT_S)


def names_of(processes):
    names = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                names.add(process.name())
    return names


def test_of_two_sweeps_at_once_one_resumes_without_ray_and_one_after_its_driver_was_killed(start, tmp_path):
    first, second = (
        start("worker.num=1", f"sweep.output={name}", f"sweep.seed={name[-1]}", "trainer.max_steps=12")
        for name in ("o1", "o2")
    )
    # each as soon as it has an evaluation, because it may be over before the other one has begun to train
    wait_for(lambda: count_evaluations(tmp_path / "o1"), first)
    first.process.send_signal(signal.SIGINT)
    wait_for(lambda: count_evaluations(tmp_path / "o2"), second)
    kill_head(second, "driver")
    assert "lorasweep sweep --resume o1" in first.wait(code=130)
    assert read_sweep(tmp_path / "o1").status == "interrupted"
    second = start("--resume", "o2")
    start("--resume", "o1", "worker=local").wait()
    second.wait()
    check_whole(tmp_path / "o1", steps=12)
    check_whole(tmp_path / "o2", steps=12)


class Nodes:
    """A cluster of this machine's, with nodes that come and go."""

    def __init__(self, cores, environment):
        self.environment = environment
        self.process = subprocess.Popen(
            [sys.executable, str(Path(tests.servers.__file__).parent / "ray_nodes.py"), str(cores)],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = self.process.stdout.readline().strip()

    def tell(self, words):
        """Adds or removes a node, and waits until that is done."""
        self.process.stdin.write(f"{words}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().strip() == words.split()[0]

    def close(self):
        self.process.stdin.close()
        self.process.wait(TIMEOUT_S)
        self.process.stdout.close()


@pytest.fixture
def nodes():
    """Starts a cluster whose first node has so many cores."""
    begun = []

    def begin(cores):
        environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "PYTHONPATH": str(Path(lorasweep.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        }
        begun.append(Nodes(cores, environment))
        return begun[-1]

    yield begin
    for cluster in begun:
        cluster.close()


@contextmanager
def suspend_workers(pid):
    """Suspends the workers below a process (SIGSTOP) during the block."""
    workers = find_processes("ray::WorkerActor", below=pid)
    assert workers
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            worker.resume()


def test_nodes_join_and_leave_and_one_with_other_code_is_refused(start, tmp_path, nodes):
    folder, other = tmp_path / "out", tmp_path / "other"
    package = other / "lorasweep"
    shutil.copytree(Path(lorasweep.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(packaged_folder("conf"), package / "conf", dirs_exist_ok=True)
    with (other / "lorasweep" / "errors.py").open("a") as file:
        file.write("# changed\n")
    cluster = nodes(1)
    words = (f"worker.address={cluster.address}", "worker.pack_size=1", "trainer.max_steps=48")
    sweep = start(*words, "sweep.output=out", environment=cluster.environment)
    wait_for(lambda: count_evaluations(folder), sweep)
    with suspend_workers(cluster.process.pid):  # so that the sweep is not over before the nodes join
        before = count_evaluations(folder)
        cluster.tell(f"add {other}")
        wait_for(lambda: "must have the same code and packages" in str(read_sweep(folder).warnings), sweep)
        cluster.tell("remove")
        cluster.tell("add")
        wait_for(lambda: count_evaluations(folder) > before, sweep)  # by the worker on the new node
        cluster.tell("remove")
    assert "every node must have the same code and packages, but node " in sweep.wait()
    check_whole(folder, steps=48)


def test_a_cluster_that_can_hold_no_worker_is_refused_at_once(start, tmp_path):
    printed = start("worker.cpus=999", "worker.gpus=9", "sweep.output=out", "confirm.seeds=0").wait(code=2)
    assert "`worker.cpus`" in printed
    assert "Traceback" not in printed
    with pytest.raises(ConfigError, match=r"`worker.address`"), join_cluster("127.0.0.1:1"):
        pass
