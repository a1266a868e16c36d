"""Workers on a real Ray on 127.0.0.1: whatever process is killed, nothing is lost and the total stays."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import tests.servers
import yaml
from tests.servers.daemon import wait_until

import lorasweep
from lorasweep.config.compose import packaged_folder
from lorasweep.record import read_run, read_steps, read_sweep

from .conftest import TIMEOUT_S, state_of
from .ray_sweep import SWEEP, RaySweep, check_whole, count_evaluations, wait_for
from .ray_sweep import start as start

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
KILLS = int(os.environ.get("LORASWEEP_TEST_KILLS", "3"))
"""How often a worker and the controller are killed; a head is killed a third as often, because a sweep starts anew."""
STEPS = 8 * KILLS
"""Optimizer steps of a trial whose processes are killed."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one worker in the sweep's own process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "on_ray.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    RaySweep(
        "on_ray.yaml", "worker.pack_size=1", "sweep.output=out", f"trainer.max_steps={STEPS}", folder=folder
    ).wait()
    return state_of(folder / "out")


def test_two_workers_find_what_one_finds_and_all_of_ray_ends_with_the_sweep(start, tmp_path, alone):
    sweep = start("worker.num=2", "worker.pack_size=1", "sweep.output=out", f"trainer.max_steps={STEPS}")
    wait_for(lambda: len(sweep.find("ray::WorkerActor")) == 2, sweep)
    started = psutil.Process(sweep.process.pid).children(recursive=True)
    listening = [c.laddr.ip for p in started for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    sweep.wait()
    check_whole(tmp_path / "out", steps=STEPS)
    assert state_of(tmp_path / "out") == alone
    _, left = psutil.wait_procs(started, timeout=10)
    assert left == []
    assert not list((tmp_path / "out").glob("pack-*.json"))


@pytest.mark.parametrize("victim", ["ray::WorkerActor", "ray::ControllerActor"])
def test_processes_killed_at_random_moments_lose_nothing(start, tmp_path, alone, victim):
    chance = random.Random(victim)
    sweep = start("worker.num=2", "worker.pack_size=1", "sweep.output=out", f"trainer.max_steps={STEPS}")
    folder, killed, seen = tmp_path / "out", 0, 0
    while sweep.process.poll() is None and killed < KILLS:
        found = sweep.find(victim)
        if not found or count_evaluations(folder) <= seen:
            time.sleep(0.05)
            continue
        time.sleep(chance.uniform(0, 3))
        with suppress(psutil.NoSuchProcess):
            chance.choice(found).kill()
            killed += 1
            seen = count_evaluations(folder)
    sweep.wait()
    assert killed
    print(f"{killed} killed")
    check_whole(folder, steps=STEPS)
    # a trial that was continued repeats the steps after its checkpoint to the same bits
    assert {run: state[:6] for run, state in state_of(folder).items()} == {r: s[:6] for r, s in alone.items()}


@pytest.mark.parametrize("victim", ["raylet", "gcs_server", "driver"])
def test_a_sweep_whose_head_died_is_resumed(start, tmp_path, victim):
    chance, folder = random.Random(victim), tmp_path / "out"
    sweep = start("worker.num=2", "sweep.output=out")
    for _ in range(KILLS // 3):
        before = count_evaluations(folder)
        wait_for(lambda before=before: count_evaluations(folder) > before, sweep)
        time.sleep(chance.uniform(0, 1))
        started = psutil.Process(sweep.process.pid).children(recursive=True)
        (sweep.process if victim == "driver" else sweep.find(victim)[0]).kill()
        sweep.process.wait(TIMEOUT_S)
        wait_until(lambda started=started: not names_of(started) - RAYS_AGENTS, lambda started=started: str(started))
        sweep = start("--resume", "out")
    sweep.wait()
    check_whole(folder)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_worker_of_two_processes_trains_each_trial_on_both(start, tmp_path, strategy):
    words = ("trainer.devices=2", f"trainer.strategy={strategy}", "sweep.output=out", "confirm.seeds=0")
    sweep, folder = start("worker.num=1", *words, "sweep.trials=2"), tmp_path / "out"
    wait_for(lambda: count_evaluations(folder), sweep)
    assert len(sweep.find("ray::WorkerActor")) == 2
    sweep.find("ray::WorkerActor")[-1].kill()  # one of the two: the other ends too, and both begin again
    sweep.wait()
    record = read_sweep(folder)
    assert [row.state for row in record.trials] == ["complete"] * 4
    for row in record.trials:
        run = read_run(folder / row.run)
        assert (run.status, run.steps_done, run.platform["processes"]) == ("complete", 24, 2)
        assert [step["step"] for step in read_steps(folder / row.run) if "loss" in step] == list(range(1, 25))


RAYS_AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
"""They hold nothing, and try for a minute or two to tell a head that it is gone."""


def names_of(processes):
    """The names of those that have not ended."""
    names = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                names.add(process.name())
    return names


def test_an_interrupted_sweep_says_how_to_resume_and_goes_on_without_ray(start, tmp_path):
    sweep = start("worker.num=2", "sweep.output=out")
    wait_for(lambda: count_evaluations(tmp_path / "out"), sweep)
    sweep.process.send_signal(signal.SIGINT)
    assert "lorasweep sweep --resume out" in sweep.wait(code=130)
    assert read_sweep(tmp_path / "out").status == "interrupted"
    start("--resume", "out", "worker=local").wait()
    check_whole(tmp_path / "out")


def test_a_full_disk_ends_the_sweep_with_a_sentence_and_it_goes_on_when_there_is_room(start, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        printed = start("worker.num=2", "sweep.output=disk/sweep").wait(code=1)
        assert "No space left on device" in printed.splitlines()[-1]
        assert "lorasweep sweep --resume /" in printed.splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        start("--resume", "disk/sweep").wait()
        check_whole(disk / "sweep")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_two_sweeps_on_one_machine_do_not_meet(start, tmp_path):
    both = [start("worker.num=1", f"sweep.output={name}", f"sweep.seed={name[-1]}") for name in ("out1", "out2")]
    for sweep in both:
        sweep.wait()
    for name in ("out1", "out2"):
        check_whole(tmp_path / name)


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
        """Ends all nodes."""
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


def test_nodes_that_join_get_workers_and_nodes_that_leave_are_no_error(start, tmp_path, nodes):
    cluster, folder = nodes(1), tmp_path / "out"
    sweep = start(f"worker.address={cluster.address}", "sweep.output=out", environment=cluster.environment)
    wait_for(lambda: count_evaluations(folder), sweep)
    cluster.tell("add")
    wait_for(lambda: len({row.run for row in read_sweep(folder).trials if row.state == "running"}) > 1, sweep)
    cluster.tell("remove")
    sweep.wait()
    check_whole(folder)


def test_a_worker_with_other_code_is_refused_and_the_others_go_on(start, tmp_path, nodes):
    other = tmp_path / "other"
    shutil.copytree(Path(lorasweep.__file__).parent, other / "lorasweep", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(packaged_folder("conf"), other / "lorasweep" / "conf", dirs_exist_ok=True)
    with (other / "lorasweep" / "errors.py").open("a") as file:
        file.write("# changed\n")
    cluster = nodes(1)
    sweep = start(f"worker.address={cluster.address}", "sweep.output=out", environment=cluster.environment)
    wait_for(lambda: count_evaluations(tmp_path / "out"), sweep)
    cluster.tell(f"add {other}")
    assert "every node must have the same code and packages, but node " in sweep.wait()
    check_whole(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("worker.cpus=999",), "one worker must fit on the cluster with 999 processor cores"),
        (("worker.gpus=9",), "and 9 GPUs"),
        (("worker.address=127.0.0.1:1",), "`worker.address` must be a Ray cluster that runs"),
    ],
)
def test_a_cluster_that_can_hold_no_worker_is_refused_at_once(start, words, sentence):
    printed = start(*words, "sweep.output=out", "confirm.seeds=0").wait(code=2)
    assert sentence in printed
    assert "Traceback" not in printed
