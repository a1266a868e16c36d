"""Slurm on one node with 2 CPUs: munge, slurmctld and slurmd as this user's own processes, on ports of 127.0.0.1."""

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from .daemon import find_free_port, need, start_daemon, wait_until

LOOPBACK = Path(__file__).parent / "ray_loopback"
"""For PYTHONPATH of every process that starts a part of Ray: it listens on 127.0.0.1 alone."""
NODE = "node1"
PARTITION = "main"
STEP_TITLE = "slurmstepd: ["
"""How the title begins of the process that Slurm puts beside each step."""
SETTINGS = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
SlurmdTimeout=6
BatchStartTimeout=1
ReturnToService=2
KillWait=5
JobRequeue=1
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000
PartitionName={partition} Nodes=ALL Default=YES MaxTime=10 State=UP
"""


@dataclass
class Slurm:
    """A cluster of this machine alone."""

    folder: Path
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self):
        """Makes Slurm's commands, and submitit, speak to this cluster."""
        return {"SLURM_CONF": str(self._settings)}

    def start(self):
        """Starts it, and returns when the node takes jobs."""
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._settings.write_text(
            SETTINGS.format(
                host=socket.gethostname().partition(".")[0],
                controller_port=find_free_port(),
                node_port=find_free_port(),
                user=getpass.getuser(),
                folder=self.folder,
                node=NODE,
                partition=PARTITION,
            )
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        own = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in own.items()]
        self._start("munged", "--foreground", "--force", f"--log-file={self.folder}/munge.txt", *options)
        wait_until((self.folder / "munge.socket").exists, f"munge answers: {self.folder}")
        self._start("slurmctld", "-D", "-i")
        self._start("slurmd", "-D", "-N", NODE)
        self.wait_for_node("idle")

    def stop(self):
        for name in ("slurmd", "slurmctld", "munged"):
            process = self._processes.pop(name, None)
            if process is not None:
                process.terminate()
                process.wait()
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.01)

    def run(self, *words):
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def jobs(self):
        """The state of every job and array task that has not ended, by its id: `RUNNING`, `PENDING`, ..."""
        rows = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(row.split() for row in rows)

    def tell(self, job):
        """What Slurm knows of a job: `JobState`, `Restarts`, `Reason`, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_jobs(self, states):
        """Waits until exactly these jobs are left, in these states."""
        wait_until(lambda: self.jobs() == states, lambda: f"{states}: {self.jobs()}", every=0.2)

    def wait_for_node(self, *states):
        """Waits until the node is in one of these states (`idle`, `draining`, ...)."""
        told = ["sinfo", "--noheader", "--format=%T"]
        env = os.environ | self.environment
        wait_until(
            lambda: subprocess.run(told, env=env, capture_output=True, text=True).stdout.strip() in states,
            lambda: f"the node is {states}: {self.folder}",
            every=0.1,
        )

    def hurry(self, job):
        """Lets a job that was requeued start at once, not after Slurm's two minutes, and waits until it runs."""
        wait_until(lambda: self._runs(job), lambda: f"it runs again: {self.tell(job)}, {self.run('sinfo')}", every=0.5)

    def clear(self):
        """Cancels every job, and lets the node take jobs again."""
        self.run("scancel", "--quiet", "--user", getpass.getuser())
        self.wait_for_jobs({})
        if self.run("sinfo", "--noheader", "--format=%T") != "idle":
            self.run("scontrol", "update", f"NodeName={NODE}", "State=RESUME")
            self.wait_for_node("idle")

    def processes(self):
        """The processes of this cluster's jobs, of their steps, and those that they started."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process):
        try:
            if " ".join(process.cmdline()).startswith(STEP_TITLE):  # the title lies where its environment was
                return process.cwd() == str(self.folder)
            given = process.environ()
        except psutil.Error:  # gone, or another user's
            return False
        return given.get("SLURM_CONF") == str(self._settings) and "SLURM_JOB_ID" in given

    def _runs(self, job):
        told = self.tell(job)
        if told["JobState"] == "PENDING":  # its time to begin is set again when the last of its processes has ended
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        return told["JobState"] == "RUNNING"

    def _start(self, program, *words):
        log = self.folder / f"{program}.txt"
        self._processes[program] = start_daemon(
            [program, *words], log=log, environment=self.environment, folder=self.folder
        )

    @property
    def _settings(self):
        return self.folder / "slurm.conf"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks every test that starts Slurm."""
    for item in items:
        if "slurm_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def slurm_server():
    need(["munged", "slurmctld", "slurmd", "sbatch"], packages="slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture
def slurm(slurm_server, monkeypatch):
    """A Slurm cluster with no jobs, to which the commands of this process and its children speak."""
    for name, value in slurm_server.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm_server
    slurm_server.clear()
