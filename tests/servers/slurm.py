"""Slurm on one node with 2 CPUs: munge, slurmctld and slurmd as this user's own processes, with ports of their own."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .daemon import find_free_port, need, start_daemon, wait_until

NODE = "node1"
PARTITION = "main"
STEP = re.compile(r"slurmstepd: \[(?P<job>\d+)\.")
"""The title of the process that Slurm puts beside each step."""
SETTINGS = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
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
    def environment(self) -> dict[str, str]:
        """What makes Slurm's commands, and submitit, speak to this cluster."""
        return {"SLURM_CONF": str(self._settings)}

    def start(self) -> None:
        """Starts it, and returns when the node may be given jobs."""
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
        self.start_node()

    def stop(self) -> None:
        """Ends every process of the cluster and of its jobs."""
        for name in ("slurmd", "slurmctld", "munged"):
            process = self._processes.pop(name, None)
            if process is not None:
                process.terminate()
                process.wait()
        self._kill()

    def run(self, *words: str) -> str:
        """Runs one of Slurm's commands and returns what it printed."""
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def jobs(self) -> dict[str, str]:
        """The state of every job and array task that has not ended, by its id: `RUNNING`, `PENDING`, ..."""
        rows = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(row.split() for row in rows)

    def tell(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: `JobState`, `Restarts`, `Reason`, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, state: str, *, count: int) -> list[str]:
        """Waits until at least so many jobs are in a state, and returns their ids."""
        wait_until(lambda: self._in(state, count), lambda: f"{count} jobs are {state}: {self.jobs()}", every=0.2)
        return self._in(state)

    def wait_for_no_jobs(self) -> None:
        """Waits until nothing runs or waits."""
        wait_until(lambda: not self.jobs(), lambda: f"no jobs: {self.jobs()}", every=0.2)

    def clear(self) -> None:
        """Cancels every job; a node that does not answer for them, or was lost, starts again."""
        self._scancel()
        deadline = time.monotonic() + 5
        while self.jobs() and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.jobs() and self.has_node:
            self.lose_node()
            self._scancel()
        if not self.has_node:
            self.start_node()
        self.wait_for_no_jobs()

    def _scancel(self) -> None:
        if self.jobs():
            self.run("scancel", "--user", getpass.getuser())

    def cancel(self, job: str) -> None:
        """Cancels a job or a task of an array."""
        self.run("scancel", job)

    def requeue(self, job: str) -> None:
        """Puts a job back into the queue and waits until it runs again."""
        self.run("scontrol", "requeue", job)
        self.hurry(job)

    def hurry(self, job: str) -> None:
        """Lets a job that was put back into the queue start at once, not after Slurm's two minutes."""
        wait_until(lambda: self._runs(job), lambda: f"it runs again: {self.tell(job)}, {self.run('sinfo')}", every=0.5)

    def lose_node(self) -> None:
        """Ends the node as a power cut would, daemon and jobs at once, and tells Slurm at once that it is down."""
        daemon = self._processes.pop("slurmd")
        daemon.kill()
        daemon.wait()
        self._kill()
        self.run("scontrol", "update", f"NodeName={NODE}", "State=DOWN", "Reason=lost")

    def start_node(self) -> None:
        """Starts the node, for the first time or after it was lost."""
        self._start("slurmd", "-D", "-N", NODE)
        wait_until(self._is_up, lambda: f"the node may be given jobs: {self.folder}", every=0.1)

    def processes(self, job: str | None = None) -> list[int]:
        """The processes of a job, of its steps and what they started; without a job, of all jobs of this cluster."""
        number = None if job is None else self.tell(job)["JobId"]
        return [pid for pid in _processes() if self._owns(pid, number)]

    def kill_steps(self, job: str) -> None:
        """Kills whatever runs for a job, Slurm's own step processes too."""
        self._kill(job)

    @property
    def has_node(self) -> bool:
        """Whether the node's daemon runs."""
        return "slurmd" in self._processes

    def _kill(self, job: str | None = None) -> None:
        while pids := self.processes(job):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def _owns(self, pid: int, number: str | None) -> bool:
        step = STEP.match(_read(pid, "cmdline"))
        if step is not None:  # its title lies where its environment was
            return _folder(pid) == self.folder and number in (None, step["job"])
        given = dict(row.split("=", 1) for row in _read(pid, "environ").split("\0") if "=" in row)
        if given.get("SLURM_CONF") != str(self._settings) or "SLURM_JOB_ID" not in given:
            return False
        return number in (None, given["SLURM_JOB_ID"])

    def _runs(self, job: str) -> bool:
        told = self.tell(job)
        if told["JobState"] == "PENDING":  # its time to begin is set again when the last of its processes has ended
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        return told["JobState"] == "RUNNING"

    def _start(self, program: str, *words: str) -> None:
        log = self.folder / f"{program}.txt"
        self._processes[program] = start_daemon(
            [program, *words], log=log, environment=self.environment, folder=self.folder
        )

    def _in(self, state: str, count: int = 0) -> list[str]:
        found = [job for job, is_in in self.jobs().items() if is_in == state]
        return found if len(found) >= count else []

    def _is_up(self) -> bool:
        words = ["sinfo", "--noheader", "--format=%T"]
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True)
        return done.stdout.strip() in ("idle", "mixed", "allocated")

    @property
    def _settings(self) -> Path:
        return self.folder / "slurm.conf"


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except OSError:  # gone, or another user's
        return ""


def _folder(pid: int) -> Path | None:
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return None


@pytest.fixture(scope="session")
def slurm_server() -> Iterator[Slurm]:
    """A Slurm cluster of this machine alone."""
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
def slurm(slurm_server: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """A Slurm cluster with no jobs, to which the commands of this process and its children speak."""
    for name, value in slurm_server.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm_server
    slurm_server.clear()
