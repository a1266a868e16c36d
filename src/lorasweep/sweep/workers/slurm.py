"""Checks, submits, describes and cancels the Slurm jobs that join a sweep's Ray cluster.

submitit writes and submits the batch files. The folder `slurm` of a sweep has each job's batch file, pickled `RayNode`
and output (`JOB_0_log.out` and `.err`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, environment_variables
from submitit.helpers import clean_env

from lorasweep.config.slurm import SlurmConfig
from lorasweep.errors import ConfigError, WorkerError
from lorasweep.sweep.workers.slurm_job import RayNode

JOBS_FOLDER = "slurm"
"""Folder in a sweep's folder for the files of the jobs that are nodes of the Ray cluster."""
COMMAND_TIMEOUT_S = 60
MAX_REQUEUES = 1000
"""Number of times that a job may be requeued at its time limit. A job that finds no Ray head ends earlier."""
BUSY_TEXTS = ("busy", "down", "not available now", "drained")
"""Parts of sbatch's answer if a job could start later, but not now."""


def check_slurm(config: SlurmConfig, folder: Path) -> list[str]:
    """Asks Slurm whether it would accept the jobs, and returns warnings. The sweep's folder need not exist yet."""
    with _environment_outside_job():
        answer = _run_command(["sbatch", "--test-only"], given=SlurmJobs(config, folder).format_batch_file(1))
    message = _one_line(answer.stderr)
    if answer.returncode and any(word in message.lower() for word in BUSY_TEXTS):
        return [f"Slurm can't start the jobs now, they will wait: {message}"]
    if answer.returncode:
        raise ConfigError(
            f"Slurm must accept the jobs of `worker=slurm`, but `sbatch --test-only` says {message!r}. Change the "
            "settings of `worker`, such as `worker.partition`, `worker.gpus`, `worker.cpus` or `worker.timeout_min`; "
            "`worker.dry_run=true` shows the batch file."
        )
    return []


def format_batch_file(config: SlurmConfig, folder: Path) -> str:
    """Returns the batch file of the jobs, for `worker.dry_run`."""
    return SlurmJobs(config, folder).format_batch_file(config.jobs)


def submit_missing_jobs(config: SlurmConfig, folder: Path) -> list[str]:
    """Submits jobs that join the sweep's Ray cluster, so that `worker.jobs` jobs wait or run. Returns the new ids."""
    missing = config.jobs - len(read_live_jobs(folder) or ())
    if missing <= 0:
        return []
    node = RayNode(
        folder=folder.resolve(),
        requeue=config.requeue,
        num_cpus=config.processes_per_job * config.cpus,
        num_gpus=config.processes_per_job * config.gpus,
    )
    return SlurmJobs(config, folder).submit_nodes(node, missing)


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


def describe_jobs(folder: Path) -> str:
    """Returns the number of jobs by state: `2 running, 1 pending (Resources)`."""
    states = read_live_jobs(folder)
    if states is None:
        return "Slurm does not answer"
    return ", ".join(f"{count} {state}" for state, count in Counter(states.values()).most_common()) or "none"


def cancel_jobs(folder: Path) -> None:
    if ids := _read_job_ids(folder):
        _run_command(["scancel", "--quiet", *ids])


def _read_job_ids(folder: Path) -> list[str]:
    """Returns the ids of all jobs that were submitted as nodes of a sweep. The jobs of an array share one id."""
    return sorted(path.name.split("_")[0] for path in (folder / JOBS_FOLDER).glob("*_submission.sh"))


class SlurmJobs(submitit.SlurmExecutor):
    """Writes and submits the batch files of a sweep's jobs."""

    def __init__(self, config: SlurmConfig, folder: Path) -> None:
        super().__init__(folder.resolve() / JOBS_FOLDER, max_num_timeout=MAX_REQUEUES)
        cpus = config.processes_per_job * config.cpus
        options = {
            "partition": config.partition,
            "account": config.account,
            "qos": config.qos,
            "constraint": config.constraint,
            "gpus_per_node": config.processes_per_job * config.gpus or None,
            "mem": None if config.mem_gb is None else f"{round(config.mem_gb * 1024)}M",
            "setup": list(config.setup) or None,
        }
        self.update_parameters(
            job_name=f"lorasweep-{folder.resolve().name}",
            wckey=None,
            time=config.timeout_min,
            signal_delay_s=config.signal_delay_s,
            nodes=1,
            ntasks_per_node=1,
            cpus_per_task=cpus,
            srun_args=[f"--cpus-per-task={cpus}"],  # srun of Slurm 22.05 to 23.02 ignores sbatch's value
            array_parallelism=sys.maxsize,  # all jobs of an array may run at once
            additional_parameters={"requeue" if config.requeue else "no-requeue": True, **config.extra},
            **{name: value for name, value in options.items() if value is not None},
        )

    @classmethod
    def affinity(cls) -> int:
        """Tells submitit that Slurm is available, so that `worker.dry_run` also works where Slurm is missing."""
        return 2  # higher than the affinity of submitit's other executors

    def format_batch_file(self, num: int) -> str:
        """Returns the batch file of `num` jobs.

        submitit has no public function that returns a batch file without submitting it, so this calls the method that
        submitit's own executors override.
        """
        if num > 1:  # submitit submits a single job without an array
            self.parameters["map_count"] = num
        return str(self._make_submission_file_text(self._submitit_command_str, ""))

    def submit_nodes(self, node: RayNode, num: int) -> list[str]:
        try:
            with _environment_outside_job():
                jobs: list[submitit.Job[None]] = self.submit_array([node] * num)
                return [str(job.job_id) for job in jobs]
        except FailedJobError as error:
            raise WorkerError(f"Slurm must accept the jobs, but sbatch says: {_one_line(str(error))}") from error


@contextmanager
def _environment_outside_job() -> Iterator[None]:
    """Hides the variables of the Slurm job in which this process may run. Keeps variables that a user sets."""
    kept = {k: v for k, v in os.environ.items() if k in ("SLURM_CONF", "SLURM_CLUSTERS") or k.startswith("SBATCH_")}
    with clean_env(), environment_variables(**kept):
        yield


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _run_command(command: Sequence[str], *, given: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
