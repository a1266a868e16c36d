"""The tasks of a sweep's Slurm jobs: a node of the sweep's Ray cluster, or the head of the sweep itself.

submitit unpickles a `RayNode` or a `SweepHead` in the job and calls it. This module imports neither Ray nor torch, so
that the process that waits beside a node stays small. DIR/ray.address and DIR/ray.token say how to join the sweep in
DIR.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmJobEnvironment

from lorasweep.disk import write_atomically
from lorasweep.sweep.workers.ray_cluster import OBJECT_STORE_BYTES, SOCKETS_FOLDER, answers

ADDRESS_FILE = "ray.address"
"""In a sweep's folder: `HOST:PORT` of its Ray head. Empty once the sweep is over."""
TOKEN_FILE = "ray.token"
"""In a sweep's folder, with mode 0600: the secret that every process needs to join the sweep's Ray cluster."""
HEAD_VARIABLE = "LORASWEEP_HEAD_JOB"
"""Environment variable of the process that leads a sweep in a Slurm job."""
DEFAULT_HEAD_WAIT_S = 600
"""Seconds for which a job waits for a head, so that a sweep can be resumed while its jobs stay."""
CHECK_INTERVAL_S = 5
"""Seconds between two reads of the address file, which all jobs share."""
MAX_STARTS = 20
"""Times that a job starts its node: once for each head, and again where the node ended by itself."""
MAX_END_S = 20
"""Seconds that a child process gets to end by itself. Slurm gives 30 (KillWait) before it kills the job."""
PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl: the signal that a process gets when its parent ends."""


def write_address(folder: Path, address: str) -> None:
    """Tells the jobs of a sweep the address of its Ray head (`HOST:PORT`), or by "" that the sweep is over."""
    write_atomically(folder / ADDRESS_FILE, address)


def read_address(folder: Path) -> str | None:
    """Returns the address of a sweep's Ray head, "" where the sweep is over, or None before it has a head."""
    try:
        return (folder / ADDRESS_FILE).read_text().strip()
    except FileNotFoundError:
        return None


def leads_in_job() -> bool:
    """Returns whether this process is the head that `SweepHead` started, which must not submit another head."""
    return HEAD_VARIABLE in os.environ


@dataclass(frozen=True, kw_only=True)
class SlurmTask(ABC):
    """A callable that a job runs, and runs again when the job is requeued."""

    folder: Path
    """The sweep's folder."""
    requeue: bool

    @abstractmethod
    def __call__(self) -> None:
        """Called by submitit in the job."""

    def checkpoint(self) -> DelayedSubmission | None:
        """Called by submitit on SIGUSR2, which requeues the job if this returns a task."""
        return DelayedSubmission(self) if self.requeue else None


@dataclass(frozen=True, kw_only=True)
class RayNode(SlurmTask):
    """A node of a sweep's Ray cluster for as long as the sweep has a head."""

    num_cpus: int
    num_gpus: int
    head_wait_s: float = DEFAULT_HEAD_WAIT_S

    def __call__(self) -> None:
        """Runs the node until the sweep is over, or exits with a sentence where there is no head to join."""
        signal.signal(signal.SIGTERM, _exit_on_signal)
        for _ in range(MAX_STARTS):
            if (address := _wait_for_head(self.folder, wait_s=self.head_wait_s)) is None:
                return
            self._join(address)
        sys.exit(f"lorasweep: a node must stay in the Ray cluster at {address}, but it ended {MAX_STARTS} times.")

    def _join(self, address: str) -> None:
        """Runs `ray start` until it ends or the sweep has another head."""
        temporary = tempfile.mkdtemp(prefix="lorasweep-", dir=SOCKETS_FOLDER)
        try:
            with run_child(self._command(address, temporary), environment=_node_environment(self.folder)) as child:
                while read_address(self.folder) == address:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(CHECK_INTERVAL_S)
                        return
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _command(self, address: str, temporary: str) -> list[str]:
        options = {
            "address": address,
            "node-name": f"slurm-{SlurmJobEnvironment().job_id}",
            "num-cpus": self.num_cpus,
            "num-gpus": self.num_gpus,
            "object-store-memory": OBJECT_STORE_BYTES,
            "temp-dir": temporary,
            "include-log-monitor": False,
            "min-worker-port": 0,  # free ports, so that nodes of several sweeps can share a machine
            "max-worker-port": 0,
            "dashboard-agent-listen-port": 0,
        }
        host = address.rpartition(":")[0]
        if host == "127.0.0.1":  # else Ray takes the address by which the head is reached
            options["node-ip-address"] = host
        words = [f"--{name}={value}" for name, value in options.items()]
        return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words]


@dataclass(frozen=True, kw_only=True)
class SweepHead(SlurmTask):
    """The process that leads a sweep, in a job of its own."""

    trusted: tuple[str, ...] = ()
    """Packages that the user trusts by `trust=[PACKAGE]`."""

    def __call__(self) -> None:
        """Runs `lorasweep sweep --resume DIR`, and exits with its exit code."""
        signal.signal(signal.SIGTERM, _exit_on_signal)
        command = [sys.executable, "-m", "lorasweep", "sweep", "--resume", str(self.folder)]
        if self.trusted:
            command.append(f"trust=[{','.join(self.trusted)}]")
        with run_child(command, environment={**os.environ, HEAD_VARIABLE: "1"}) as child:
            if code := child.wait():
                sys.exit(code)


@contextlib.contextmanager
def run_child(command: Sequence[str], *, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a child process inside the block, and ends it and its descendants at the end of the block."""
    child = subprocess.Popen(command, env=environment, preexec_fn=_prepare_child)
    try:
        yield child
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm may send it again, which must not stop this
        _end(child)
        signal.signal(signal.SIGTERM, _exit_on_signal)


def _prepare_child() -> None:
    """Has the child end with this process, and ignore SIGUSR2, which Slurm sends to all processes of a job."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends a child process and the descendants that it leaves behind, and no other process of the machine."""
    if child.poll() is not None:
        return
    descendants = psutil.Process(child.pid).children(recursive=True)
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(MAX_END_S)
    for process in (child, *descendants):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait()


def _exit_on_signal(number: int, frame: object) -> None:
    """Leaves by SystemExit, so that every `finally` runs."""
    sys.exit(128 + number)


def _wait_for_head(folder: Path, *, wait_s: float) -> str | None:
    """Returns the address of a head that answers, or None once the sweep is over; exits where there is none."""
    deadline = time.monotonic() + wait_s
    while (address := read_address(folder)) != "":
        if address is not None and answers(address):
            return address
        if time.monotonic() > deadline:
            sys.exit(
                f"lorasweep: a node must find the head of its sweep within {wait_s:g} s, but "
                f"{str(folder / ADDRESS_FILE)!r} names {address!r}. Type `lorasweep sweep --resume {folder}`."
            )
        time.sleep(1)
    return None


def _node_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of `ray start`: with this sweep's token, and no other cluster's address or token."""
    others = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN_FILE), "RAY_USAGE_STATS_ENABLED": "0"}
    return {name: value for name, value in os.environ.items() if name not in others} | own
