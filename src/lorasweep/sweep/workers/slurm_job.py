"""The task of a sweep's Slurm job: a node of the sweep's Ray cluster.

submitit unpickles the task in the job and calls it. This module imports neither Ray nor torch, so that the process that
waits beside a node needs little memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmJobEnvironment

from lorasweep.disk import write_atomically
from lorasweep.sweep.workers.ray_cluster import OBJECT_STORE_BYTES, SOCKETS_FOLDER, is_listening

ADDRESS_FILE = "ray.address"
"""File in a sweep's folder with `HOST:PORT` of its Ray head. The file is empty after the sweep's end."""
TOKEN_FILE = "ray.token"
"""File in a sweep's folder with the secret token for joining the sweep's Ray cluster. Its mode is 0600."""
DEFAULT_HEAD_WAIT_S = 600
"""Seconds that a job waits for a head. A requeued job may begin while the sweep is being resumed."""
MAX_SHUTDOWN_S = 20
"""Seconds that Ray has to end a node. Slurm kills the job after 30 (KillWait)."""


def write_address(folder: Path, address: str) -> None:
    """Writes the address of a sweep's Ray head (`HOST:PORT`) for its jobs; "" tells them that the sweep is over."""
    write_atomically(folder / ADDRESS_FILE, address)


def read_address(folder: Path) -> str | None:
    """Returns the address of a sweep's Ray head, "" if the sweep is over, or None if it never had a head."""
    try:
        return (folder / ADDRESS_FILE).read_text().strip()
    except FileNotFoundError:
        return None


@dataclass(frozen=True, kw_only=True)
class RayNode:
    """A node of a sweep's Ray cluster, for as long as the head lives. Runs again after the job is requeued."""

    folder: Path
    requeue: bool
    num_cpus: int
    num_gpus: int
    head_wait_s: float = DEFAULT_HEAD_WAIT_S

    def __call__(self) -> None:
        """Runs `ray start` until the head ends or Slurm ends the job. Exits with a message if the sweep has no head."""
        if (address := _wait_for_head(self.folder, wait_s=self.head_wait_s)) is None:
            return
        with tempfile.TemporaryDirectory(prefix="lorasweep-", dir=SOCKETS_FOLDER, ignore_cleanup_errors=True) as folder:
            # Slurm sends SIGUSR2 to all processes of a job, but only submitit's handler in this process needs it.
            child = subprocess.Popen(
                self._command(address, folder),
                env=_node_environment(self.folder),
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
            try:
                child.wait()
            finally:
                child.terminate()  # Ray then takes the node out of the cluster
                child.wait(MAX_SHUTDOWN_S)

    def checkpoint(self) -> DelayedSubmission | None:
        """Returns the task for a requeued job; None: submitit does not requeue. submitit calls this on SIGUSR2."""
        return DelayedSubmission(self) if self.requeue else None

    def _command(self, address: str, temp_dir: str) -> list[str]:
        options = {
            "address": address,
            "node-name": f"slurm-{SlurmJobEnvironment().job_id}",
            "num-cpus": self.num_cpus,
            "num-gpus": self.num_gpus,
            "object-store-memory": OBJECT_STORE_BYTES,
            "temp-dir": temp_dir,
            "include-log-monitor": False,
            "min-worker-port": 0,  # free ports, so that nodes of several sweeps can share a machine
            "max-worker-port": 0,
            "dashboard-agent-listen-port": 0,
        }
        host = address.rpartition(":")[0]
        if host == "127.0.0.1":  # for another head, Ray finds this node's address from its route to the head
            options["node-ip-address"] = host
        arguments = [f"--{name}={value}" for name, value in options.items()]
        return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]


def _wait_for_head(folder: Path, *, wait_s: float) -> str | None:
    """Returns the address of a head that answers, or None if the sweep is over; exits after `wait_s` seconds."""
    deadline = time.monotonic() + wait_s
    while (address := read_address(folder)) != "":
        if address is not None and is_listening(address):
            return address
        if time.monotonic() > deadline:
            sys.exit(
                f"lorasweep: a node must find the head of its sweep within {wait_s:g} s, but "
                f"{str(folder / ADDRESS_FILE)!r} names {address!r}. Type `lorasweep sweep --resume {folder}`."
            )
        time.sleep(1)
    return None


def _node_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of `ray start`, with this sweep's token and without settings of other clusters."""
    removed = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    added = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN_FILE), "RAY_USAGE_STATS_ENABLED": "0"}
    return {name: value for name, value in os.environ.items() if name not in removed} | added
