"""Submits and cancels the Slurm jobs that join a sweep's Ray cluster.

submitit writes and submits the batch files. The folder `slurm` of a sweep has each job's batch file, pickled `RayNode`
and output (`JOB_0_log.out` and `.err`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, environment_variables
from submitit.helpers import clean_env

from lorasweep.config.sweep import SlurmConfig
from lorasweep.errors import ConfigError
from lorasweep.sweep.workers.slurm_job import RayNode

JOBS_FOLDER = "slurm"
"""Folder in a sweep's folder for the files of the jobs that are nodes of the Ray cluster."""
COMMAND_TIMEOUT_S = 60
MAX_REQUEUES = 1000
"""Number of times that a job may be requeued at its time limit. A job that finds no Ray head ends earlier."""


def submit_jobs(config: SlurmConfig, folder: Path) -> None:
    """Submits `worker.jobs` jobs that join the Ray cluster of the sweep in a folder.

    Raises:
        ConfigError: Slurm is missing, or refuses the jobs.
    """
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
        with _environment_outside_job():
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


@contextmanager
def _environment_outside_job() -> Iterator[None]:
    """Hides the variables of the Slurm job in which this process may run. Keeps variables that a user sets."""
    kept = {k: v for k, v in os.environ.items() if k in ("SLURM_CONF", "SLURM_CLUSTERS") or k.startswith("SBATCH_")}
    with clean_env(), environment_variables(**kept):
        yield


def _run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
