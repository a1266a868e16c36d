"""Slurm jobs that join a sweep's Ray cluster: checked before anything is queued, submitted, described and cancelled.

submitit writes the batch files and submits them. DIR/slurm has the batch file of each job, its pickled `RayNode` and
its output (`JOB_0_log.out` and `.err`); DIR/slurm/head has the same for a job that leads the sweep (`SweepHead`).
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, environment_variables
from submitit.helpers import clean_env
from submitit.slurm.slurm import _make_sbatch_string

from lorasweep.config.slurm import SlurmConfig
from lorasweep.config.trust import trusted_packages
from lorasweep.disk import network_file_system
from lorasweep.errors import ConfigError, WorkerError
from lorasweep.sweep.workers.slurm_job import RayNode, SweepHead
from lorasweep.wording import nearest

JOBS_FOLDER = "slurm"
HEAD_FOLDER = "slurm/head"
"""Folders in a sweep's folder for the files of the jobs that are nodes, and of the job that leads the sweep."""
COMMANDS = ("sbatch", "srun", "sinfo", "squeue", "scancel")
COMMAND_TIMEOUT_S = 60
MAX_REQUEUES = 1000
"""Times that a job is requeued when its time is over. Without a head to join it ends by itself."""
HEAD_CPUS = 1
HEAD_MEM_GB = 4
"""Memory of the job that leads a sweep: its studies, and the libraries that they need."""
CONTAINER_PYTHON = "python3"
KEYS = {
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "feature": "constraint",
    "gres": "gpus",
    "time limit": "timeout_min",
    "reservation": "extra",
    "node name": "extra",
    "option": "extra",
}
"""A word in a refusal by sbatch, and the key of `worker` that it is about."""
UNFIT = "node configuration"
"""Words in the refusal of a job that no machine can hold."""
BUSY = ("busy", "down", "not available now", "drained")
"""Words in the refusal of a job that can start later."""


def check_slurm(config: SlurmConfig, folder: Path) -> list[str]:
    """Checks that Slurm would take the jobs; returns sentences of warning.

    Args:
        config: The settings of the jobs.
        folder: The sweep's folder, which need not exist yet.

    Raises:
        ConfigError: Slurm is not here, has no such partition, or refuses the batch file.
    """
    for command in COMMANDS:
        if shutil.which(command) is None:
            raise ConfigError(
                f"`worker=slurm` must be typed on a machine with Slurm, but `{command}` is not found. "
                "Log in to the cluster, or leave `worker` out for a process on this machine."
            )
    answer = _run(["sinfo", "--noheader", "--Node", "--format=%P|%n|%l"])
    if answer.returncode:
        raise ConfigError(f"Slurm must answer, but `sinfo` says: {_last_line(answer.stderr)}.")
    # one row for each pair of partition and machine: partition, with `*` if it is the default; host; time limit
    rows = [tuple(word.strip() for word in row.split("|")) for row in answer.stdout.splitlines()]
    limits_min = {partition: _parse_minutes(limit) for partition, _, limit in rows}
    _check_partition("partition", config, limits_min)
    warnings = _test(config, SlurmJobs(config, folder))
    if config.head == "job":
        _check_partition("head_partition", config, limits_min)
        _test(config, _head_job(config, folder))
    is_only_host = {host for _, host, _ in rows} <= {socket.gethostname(), socket.gethostname().partition(".")[0]}
    if not is_only_host and network_file_system(folder) is None:
        warnings.append(
            f"The sweep's folder {str(folder)!r} seems to be on a disk of this machine alone: jobs elsewhere would not "
            "see it. Set `sweep.output` to a folder that all machines share."
        )
    return warnings


def batch_text(config: SlurmConfig, folder: Path) -> str:
    """Returns the batch file of the jobs, for `worker.dry_run`."""
    return SlurmJobs(config, folder).text(config.jobs)


def submit_missing_jobs(config: SlurmConfig, folder: Path) -> list[str]:
    """Submits jobs that join the sweep's Ray cluster, so that `worker.jobs` of them wait or run; returns their ids.

    Raises:
        WorkerError: Slurm refuses them.
    """
    missing = config.jobs - len(read_live_jobs(folder) or ())
    if missing <= 0:
        return []
    node = RayNode(
        folder=folder.resolve(),
        requeue=config.requeue,
        num_cpus=config.processes_per_job * config.cpus,
        num_gpus=config.processes_per_job * config.gpus,
    )
    return SlurmJobs(config, folder).submit_tasks(node, missing)


def submit_head(config: SlurmConfig, folder: Path) -> str:
    """Submits a job that runs `lorasweep sweep --resume FOLDER`, and returns its id.

    Raises:
        WorkerError: Slurm refuses it.
    """
    head = SweepHead(folder=folder.resolve(), requeue=config.requeue, trusted=trusted_packages())
    return _head_job(config, folder).submit_tasks(head, 1)[0]


def read_live_jobs(folder: Path) -> dict[str, str] | None:
    """Returns the state of each job of a sweep that waits, runs or ends now, by its id.

    States are Slurm's, with the reason why a job waits: `{"77_0": "running", "77_1": "pending (Priority)"}`. Returns
    None where Slurm does not answer.
    """
    answer = _run(["squeue", "--noheader", "--array", "--me", "--format=%i|%T|%r"])
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
    """Returns how many jobs of a sweep are in which state: `2 running, 1 pending (Resources)`."""
    states = read_live_jobs(folder)
    if states is None:
        return "Slurm does not answer"
    return ", ".join(f"{count} {state}" for state, count in Counter(states.values()).most_common()) or "none"


def cancel_jobs(folder: Path) -> None:
    """Cancels the jobs of a sweep; those that have ended are left alone."""
    if ids := _read_job_ids(folder):
        _run(["scancel", "--quiet", *ids])


def _read_job_ids(folder: Path) -> list[str]:
    """Returns the id of every job ever submitted as a sweep's node; an array has one id for all of its jobs."""
    return sorted(path.name.split("_")[0] for path in (folder / JOBS_FOLDER).glob("*_submission.sh"))


class SlurmJobs(submitit.SlurmExecutor):
    """Writes and submits the batch files of a sweep's jobs."""

    def __init__(self, config: SlurmConfig, folder: Path, *, files: str = JOBS_FOLDER, **changes: Any) -> None:
        """Takes the settings.

        Args:
            config: The settings of the jobs.
            folder: The sweep's folder.
            files: Where batch files and output go, below that folder.
            changes: Parameters of submitit that replace those of `config`; None leaves one out.
        """
        python = CONTAINER_PYTHON if config.container else shlex.quote(sys.executable)
        super().__init__(folder.resolve() / files, max_num_timeout=MAX_REQUEUES, python=python)
        found = _parameters(config, folder.resolve()) | changes
        self.update_parameters(wckey=None, **{key: value for key, value in found.items() if value is not None})

    @classmethod
    def affinity(cls) -> int:
        """Tells submitit that Slurm is here: `worker.dry_run` works without it, and `check_slurm` looks for it."""
        return 2

    def text(self, num: int) -> str:
        """Returns the batch file of a number of jobs."""
        array: dict[str, Any] = {"map_count": num} if num > 1 else {}  # submitit makes no array of a single job
        return _make_sbatch_string(self._submitit_command_str, self.folder, **self.parameters, **array)

    def submit_tasks(self, task: RayNode | SweepHead, num: int) -> list[str]:
        """Submits jobs that each run the task, and returns their ids.

        Raises:
            WorkerError: Slurm refuses them.
        """
        try:
            with _login_environment():
                jobs: list[submitit.Job[None]] = self.submit_array([task] * num)
                return [str(job.job_id) for job in jobs]
        except FailedJobError as error:
            raise WorkerError(f"Slurm must take the jobs, but sbatch says: {_last_line(str(error))}.") from error


def _head_job(config: SlurmConfig, folder: Path) -> SlurmJobs:
    return SlurmJobs(
        config,
        folder,
        files=HEAD_FOLDER,
        job_name=f"lorasweep-{folder.resolve().name}-head",
        partition=config.head_partition or config.partition,
        constraint=None,
        gpus_per_node=None,
        cpus_per_task=HEAD_CPUS,
        srun_args=_srun_options(config, folder.resolve(), cpus=HEAD_CPUS),
        mem=f"{HEAD_MEM_GB}G",
    )


@contextmanager
def _login_environment() -> Iterator[None]:
    """Hides the variables of a Slurm job that this process may run in, except those that a user sets."""
    kept = {k: v for k, v in os.environ.items() if k in ("SLURM_CONF", "SLURM_CLUSTERS") or k.startswith("SBATCH_")}
    with clean_env(), environment_variables(**kept):
        yield


def _parameters(config: SlurmConfig, folder: Path) -> dict[str, Any]:
    """Returns the settings by submitit's names; None leaves a parameter out."""
    cpus = config.processes_per_job * config.cpus
    return {
        "job_name": f"lorasweep-{folder.name}",
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "time": config.timeout_min,
        "signal_delay_s": config.signal_delay_s,
        "nodes": 1,
        "ntasks_per_node": 1,
        "gpus_per_node": config.processes_per_job * config.gpus or None,
        "cpus_per_task": cpus,
        "mem": None if config.mem_gb is None else f"{round(config.mem_gb * 1024)}M",
        "array_parallelism": sys.maxsize,  # all of them may run at once
        "setup": list(config.setup) or None,
        "srun_args": _srun_options(config, folder, cpus=cpus),
        "additional_parameters": {"requeue" if config.requeue else "no-requeue": True, **config.extra},
    }


def _srun_options(config: SlurmConfig, folder: Path, *, cpus: int) -> list[str]:
    options = [f"--cpus-per-task={cpus}"]  # Slurm 22.05 to 23.02 do not take it over from sbatch
    if config.container is not None:
        here = Path.cwd()
        mounts = ",".join(f"{path}:{path}" for path in dict.fromkeys((str(here), str(folder))))
        options += [
            f"--container-image={config.container}",
            f"--container-mounts={mounts}",
            f"--container-workdir={here}",
        ]
    return options


def _parse_minutes(text: str) -> float:
    """Returns the minutes of a duration as Slurm writes it (`[DAYS-]HOURS:MINUTES:SECONDS`), inf for `infinite`."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return math.inf
    days, hours, minutes, seconds = (int(number or 0) for number in found.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def _check_partition(key: str, config: SlurmConfig, limits_min: Mapping[str, float]) -> None:
    """Checks that a partition exists and allows the time: Slurm lets a job that asks for more wait for ever.

    Args:
        key: `partition` or `head_partition`.
        config: The settings of the jobs.
        limits_min: The longest job in minutes by partition; the name of the default partition ends with `*`.

    Raises:
        ConfigError: It does not, or no partition is named and the cluster has no default one.
    """
    value = getattr(config, key) or config.partition
    names = sorted(name.rstrip("*") for name in limits_min)
    wanted = value.split(",") if value else [name.rstrip("*") for name in limits_min if name.endswith("*")]
    if not wanted:
        raise ConfigError(
            f"`worker.{key}` must be set, because this cluster has no default partition: {', '.join(names) or 'none'}."
        )
    for name in wanted:
        if name not in names:
            raise ConfigError(
                f"`worker.{key}` must be one of {', '.join(names)}, but got {name!r}.{nearest(name, names)}"
            )
    limit = max(minutes for name, minutes in limits_min.items() if name.rstrip("*") in wanted)
    if config.timeout_min > limit:
        raise ConfigError(
            f"`worker.timeout_min <= {limit:.0f}` must hold in partition `{','.join(wanted)}`, "
            f"but got {config.timeout_min!r}."
        )


def _test(config: SlurmConfig, jobs: SlurmJobs) -> list[str]:
    """Asks Slurm whether it would take a job; returns a warning where the job would have to wait.

    Raises:
        ConfigError: It would not.
    """
    with _login_environment():
        answer = _run(["sbatch", "--test-only"], given=jobs.text(1))
    if answer.returncode == 0:
        return []
    refusal = _last_line(answer.stderr.replace('Try "sbatch --help" for more information', ""))
    words = refusal.lower()
    if any(word in words for word in BUSY):
        return [f"Slurm can't start the jobs now, they will wait: {refusal}."]
    if UNFIT in words:
        cpus, gpus = (config.processes_per_job * each for each in (config.cpus, config.gpus))
        memory = f" and {config.mem_gb:g} GB" if config.mem_gb else ""
        raise ConfigError(
            f"one job must fit a machine with {cpus} processor cores, {gpus} GPUs{memory} (`worker.processes_per_job` "
            f"times `worker.cpus` and `worker.gpus`, and `worker.mem_gb`), but sbatch says {refusal!r}."
        )
    if (key := next((key for word, key in KEYS.items() if word in words), None)) is None:
        raise ConfigError(f"`worker` must be something that Slurm takes, but sbatch says {refusal!r}.")
    got = getattr(config, key)
    raise ConfigError(f"`worker.{key}` must be something that Slurm takes, but got {got!r}: sbatch says {refusal!r}.")


def _last_line(text: str) -> str:
    """Returns the last line of a message by Slurm, without the command's name and the full stop."""
    line = next(iter(reversed(text.strip().splitlines())), "nothing")
    for prefix in ("sbatch: ", "error: ", "Batch job submission failed: ", "allocation failure: "):
        line = line.removeprefix(prefix)
    return line.strip().rstrip(".")


def _run(command: Sequence[str], *, given: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
