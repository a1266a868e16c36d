"""Runs a sweep's Slurm jobs, each a node of the sweep's Ray cluster.

submitit writes and submits the batch files, and in a job it unpickles the `RayNode` and calls it. The folder `slurm` of
a sweep has each job's batch file, pickled `RayNode` and output (`JOB_0_log.out` and `.err`).

This module imports neither Ray nor torch, so that the process that waits beside a node needs little memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, environment_variables
from submitit.helpers import clean_env
from submitit.slurm.slurm import SlurmJobEnvironment

from lorasweep.config.sweep import SlurmWorkers
from lorasweep.errors import ConfigError
from lorasweep.sweep.workers.ray_cluster import OBJECT_STORE_BYTES, SOCKETS_FOLDER, is_listening

JOBS_FOLDER = "slurm"
"""Folder in a sweep's folder for the files of the jobs that are nodes of the Ray cluster."""
COMMAND_TIMEOUT_S = 60
MAX_REQUEUES = 1000
"""Number of times that a job may be requeued at its time limit. A job that finds no Ray head ends earlier."""
ADDRESS_FILE = "ray.address"
"""File in a sweep's folder with `HOST:PORT` of its Ray head. The file is empty after the sweep's end."""
TOKEN_FILE = "ray.token"
"""File in a sweep's folder with the secret token for joining the sweep's Ray cluster. Its mode is 0600."""
DEFAULT_HEAD_WAIT_S = 600
"""Seconds that a job waits for a head. A requeued job may begin while the sweep is being resumed."""
MAX_SHUTDOWN_S = 20
"""Seconds that Ray has to end a node. Slurm kills the job after 30 (KillWait)."""


def submit_jobs(config: SlurmWorkers, folder: Path) -> None:
    """Submits jobs that join the Ray cluster of the sweep in a folder. Raises ConfigError if Slurm refuses them."""
    num_cpus, num_gpus = config.processes_per_job * config.cpus, config.processes_per_job * config.gpus
    options = {"partition": config.partition, "gpus_per_node": num_gpus, "setup": list(config.setup)}
    node = RayNode(folder=folder.resolve(), requeue=config.requeue, num_cpus=num_cpus, num_gpus=num_gpus)
    try:
        executor = submitit.SlurmExecutor(folder.resolve() / JOBS_FOLDER, max_num_timeout=MAX_REQUEUES)
        executor.update_parameters(
            job_name=f"lorasweep-{folder.resolve().name}",
            wckey=None,
            time=config.timeout_min,
            signal_delay_s=config.signal_delay_s,
            nodes=1,
            ntasks_per_node=1,
            cpus_per_task=num_cpus,
            srun_args=[f"--cpus-per-task={num_cpus}"],  # srun of Slurm 22.05 to 23.02 ignores sbatch's value
            array_parallelism=sys.maxsize,  # all jobs of an array may run at once
            additional_parameters={"requeue" if config.requeue else "no-requeue": True, **config.extra},
            **{name: value for name, value in options.items() if value},
        )
        # without the variables of the Slurm job in which this process may run, but with those that a user sets
        kept = {k: v for k, v in os.environ.items() if k in ("SLURM_CONF", "SLURM_CLUSTERS") or k.startswith("SBATCH_")}
        with clean_env(), environment_variables(**kept):
            executor.submit_array([node] * config.jobs)
    except (FailedJobError, RuntimeError) as error:
        answer = " ".join(str(error).split())
        raise ConfigError(
            f"Slurm must accept the jobs of `worker=slurm`, but says: {answer} Change a setting of `worker`, such as "
            f"`worker.partition`: `lorasweep sweep --resume {folder} worker.partition=NAME`."
        ) from error


def read_live_jobs(folder: Path) -> dict[str, str] | None:
    """Returns the state of each waiting or running job of a sweep, by job id; None if Slurm does not answer.

    For a waiting job the state includes Slurm's reason: `{"77_0": "running", "77_1": "pending (Priority)"}`.
    """
    answer = _run_command(["squeue", "--noheader", "--array", "--me", "--format=%i|%T|%r"])
    if answer.returncode:
        return None
    ids = _read_job_ids(folder)
    states = {}
    for job, state, reason in (row.split("|") for row in answer.stdout.splitlines()):
        if job.partition("_")[0] in ids:
            is_waiting = state == "PENDING" and reason != "None"
            states[job] = f"{state.lower()} ({reason})" if is_waiting else state.lower()
    return states


def cancel_jobs(folder: Path) -> None:
    if ids := _read_job_ids(folder):
        _run_command(["scancel", "--quiet", *ids])


def _read_job_ids(folder: Path) -> list[str]:
    """Returns the ids of all jobs that were submitted as nodes of a sweep. The jobs of an array share one id."""
    return sorted(path.name.split("_")[0] for path in (folder / JOBS_FOLDER).glob("*_submission.sh"))


def _run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


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
            options = {
                "address": address,
                "node-name": f"slurm-{SlurmJobEnvironment().job_id}",
                "num-cpus": self.num_cpus,
                "num-gpus": self.num_gpus,
                "object-store-memory": OBJECT_STORE_BYTES,
                "temp-dir": folder,
                "include-log-monitor": False,
                "min-worker-port": 0,  # free ports, so that nodes of several sweeps can share a machine
                "max-worker-port": 0,
                "dashboard-agent-listen-port": 0,
            }
            host = address.rpartition(":")[0]
            if host == "127.0.0.1":  # for another head, Ray finds this node's address from its route to the head
                options["node-ip-address"] = host
            arguments = [f"--{name}={value}" for name, value in options.items()]
            # this sweep's token, without settings of other clusters
            removed = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
            environment = {name: value for name, value in os.environ.items() if name not in removed}
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / TOKEN_FILE)}
            # Slurm sends SIGUSR2 to all processes of a job, but only submitit's handler in this process needs it.
            child = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments],
                env=environment | {"RAY_USAGE_STATS_ENABLED": "0"},
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


def _wait_for_head(folder: Path, *, wait_s: float) -> str | None:
    """Returns the address of a head that answers, or None if the sweep is over; exits after `wait_s` seconds."""
    deadline = time.monotonic() + wait_s
    while True:
        path = folder / ADDRESS_FILE
        if (address := path.read_text().strip() if path.is_file() else None) == "":
            return None
        if address is not None and is_listening(address):
            return address
        if time.monotonic() > deadline:
            sys.exit(
                f"lorasweep: a node must find the head of its sweep within {wait_s:g} s, but "
                f"{str(path)!r} names {address!r}. Type `lorasweep sweep --resume {folder}`."
            )
        time.sleep(1)
