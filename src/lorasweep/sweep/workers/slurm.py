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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, environment_variables
from submitit.helpers import clean_env

from lorasweep.config.slurm import SlurmConfig
from lorasweep.config.targets import trusted_packages
from lorasweep.disk import network_file_system
from lorasweep.errors import ConfigError, WorkerError
from lorasweep.sweep.workers.slurm_job import RayNode, SlurmTask, SweepHead
from lorasweep.wording import nearest

JOBS_FOLDER = "slurm"
HEAD_FOLDER = "slurm/head"
"""In a sweep's folder: what belongs to the jobs that are nodes, and to the one that leads the sweep."""
COMMANDS = ("sbatch", "srun", "sinfo", "squeue", "scancel")
COMMAND_TIMEOUT_S = 60
MAX_REQUEUES = 1000
"""Times that a job whose time is over is requeued. Without a head to join it ends by itself."""
HEAD_CPUS = 1
HEAD_MEM_GB = 4
"""Memory of the job that leads a sweep: its studies, and the libraries that they need."""
CONTAINER_PYTHON = "python3"
KEYS = {
    "account": "worker.account",
    "partition": "worker.partition",
    "qos": "worker.qos",
    "feature": "worker.constraint",
    "gres": "worker.gpus",
    "time limit": "worker.timeout_min",
    "reservation": "worker.extra",
    "node name": "worker.extra",
    "option": "worker.extra",
}
"""A word of a refusal by sbatch, and the key that it is about."""
LIVE_STATES = (
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"),
    *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "STAGE_OUT"),
)
"""States of a job that has not ended, in Slurm's words."""
UNFIT = "node configuration"
"""Words of the refusal of a job that no machine can hold."""
BUSY = ("busy", "down", "not available now", "drained")
"""Words of refusals of a job that can start later."""


def check_slurm(config: SlurmConfig, folder: Path) -> list[str]:
    """Checks that Slurm would take the jobs; returns sentences of warning.

    Args:
        config: What is asked for.
        folder: The sweep's folder, which need not exist yet.

    Raises:
        ConfigError: There is no Slurm here, it has no such partition, or it refuses the batch file.
    """
    for command in COMMANDS:
        if shutil.which(command) is None:
            raise ConfigError(
                f"`worker=slurm` must be typed on a machine with Slurm, but `{command}` is not found. "
                "Log in to the cluster, or leave `worker` out for a process on this machine."
            )
    machines = _read_machines()
    _check_partition("partition", config, machines)
    warnings = _test(config, RayNodes(config, folder))
    if config.head == "job":
        _check_partition("head_partition", config, machines)
        _test(config, _head_executor(config, folder))
    own = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    if not own.issuperset(machine.host for machine in machines) and network_file_system(folder) is None:
        warnings.append(
            f"The sweep's folder {str(folder)!r} seems to be on a disk of this machine alone: jobs elsewhere would not "
            "see it. Set `sweep.output` to a folder that all machines share."
        )
    return warnings


def batch_text(config: SlurmConfig, folder: Path) -> str:
    """Returns the batch file of the jobs, for `worker.dry_run`."""
    return RayNodes(config, folder).text(config.jobs)


def submit_nodes(config: SlurmConfig, folder: Path, *, num: int | None = None) -> list[str]:
    """Submits jobs that join the Ray cluster whose head `write_address` names, now or later; returns their ids.

    Args:
        config: What the jobs are like.
        folder: The sweep's folder.
        num: Jobs; None: `worker.jobs` of them.

    Raises:
        WorkerError: Slurm refuses them.
    """
    node = RayNode(
        folder=folder.resolve(),
        requeue=config.requeue,
        num_cpus=config.processes_per_job * config.cpus,
        num_gpus=config.processes_per_job * config.gpus,
    )
    return RayNodes(config, folder).submit_tasks(node, config.jobs if num is None else num)


def submit_head(config: SlurmConfig, folder: Path) -> str:
    """Submits a job that runs `lorasweep sweep --resume FOLDER`, and returns its id.

    Raises:
        WorkerError: Slurm refuses it.
    """
    head = SweepHead(folder=folder.resolve(), requeue=config.requeue, trusted=trusted_packages())
    return _head_executor(config, folder).submit_tasks(head, 1)[0]


def read_job_ids(folder: Path) -> list[str]:
    """Returns the id of every job ever submitted as a sweep's node; an array has one id for all of its jobs."""
    return sorted(path.name.split("_")[0] for path in (folder / JOBS_FOLDER).glob("*_submission.sh"))


def read_states(ids: Sequence[str]) -> dict[str, str] | None:
    """Returns the state of each job that Slurm still knows, by its id; None where Slurm does not answer.

    Args:
        ids: Ids of jobs; the id of an array stands for all of its jobs.

    Returns:
        States in Slurm's words, with the reason of a job that waits, such as `{"77_0": "RUNNING", "77_1": "PENDING
        (Priority)"}`. Slurm forgets a job some minutes after its end.
    """
    done = _run(["squeue", "--noheader", "--array", "--me", "--states=all", "--format=%i|%T|%r"])
    if done.returncode:
        return None
    states = {}
    for job, state, reason in (row.split("|") for row in done.stdout.splitlines()):
        if job in ids or job.partition("_")[0] in ids:
            waits = state == "PENDING" and reason != "None"
            states[job] = f"{state} ({reason})" if waits else state
    return states


def live_jobs(ids: Sequence[str]) -> int | None:
    """Returns how many jobs wait, run or end now; None where Slurm does not answer."""
    states = read_states(ids)
    return None if states is None else sum(state.split()[0] in LIVE_STATES for state in states.values())


def describe_nodes(ids: Sequence[str]) -> str:
    """Returns how many jobs are in which state: `2 running, 1 pending (Resources)`."""
    states = read_states(ids)
    if states is None:
        return "Slurm does not answer"
    return ", ".join(f"{count} {_lower(state)}" for state, count in Counter(states.values()).most_common()) or "none"


def cancel_nodes(ids: Sequence[str]) -> None:
    """Cancels jobs; those that have ended are left alone."""
    if ids:
        _run(["scancel", "--quiet", *ids])


class RayNodes(submitit.SlurmExecutor):
    """Writes and submits the batch files of a sweep's jobs."""

    def __init__(self, config: SlurmConfig, folder: Path, *, files: str = JOBS_FOLDER, **changes: Any) -> None:
        """Takes the settings.

        Args:
            config: What the jobs are like.
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
        """Says that Slurm is here; `check_slurm` tells in a sentence where it is not."""
        return 2

    def text(self, num: int) -> str:
        """Returns the batch file of so many jobs."""
        parameters = self.parameters
        if num > 1:  # submitit makes no array of a single job
            self.parameters = parameters | {"map_count": num}
        try:
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            self.parameters = parameters

    def submit_tasks(self, task: SlurmTask, num: int) -> list[str]:
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


def _head_executor(config: SlurmConfig, folder: Path) -> RayNodes:
    return RayNodes(
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
    """The settings by submitit's names."""
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


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """One machine as one partition offers it."""

    partition: str
    is_default: bool
    host: str
    limit_min: float
    """Most minutes of a job in this partition."""


def _read_machines() -> list[_Machine]:
    """Returns every machine of the cluster, once for each partition that it is in.

    Raises:
        ConfigError: Slurm does not answer.
    """
    done = _run(["sinfo", "--noheader", "--Node", "--format=%P|%n|%l"])
    if done.returncode:
        raise ConfigError(f"Slurm must answer, but `sinfo` says: {_last_line(done.stderr)}.")
    rows = (row.split("|") for row in done.stdout.splitlines())
    return [
        _Machine(
            partition=partition.strip().rstrip("*"),
            is_default=partition.strip().endswith("*"),
            host=host.strip(),
            limit_min=_parse_minutes(limit.strip()),
        )
        for partition, host, limit in rows
    ]


def _parse_minutes(text: str) -> float:
    """Returns the minutes of a duration as Slurm writes it (`[DAYS-]HOURS:MINUTES:SECONDS`), inf for `infinite`."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def _check_partition(key: str, config: SlurmConfig, machines: Sequence[_Machine]) -> None:
    """Checks that a partition exists and allows the time. Slurm itself lets a job that asks for more wait for ever.

    Raises:
        ConfigError: It does not, or none is named and the cluster has no default one.
    """
    value = getattr(config, key) or config.partition
    names = sorted({machine.partition for machine in machines})
    wanted = value.split(",") if value else [machine.partition for machine in machines if machine.is_default]
    if not wanted:
        choices = ", ".join(names) or "`sinfo` shows none at all"
        raise ConfigError(f"`worker.{key}` must be set, because this cluster has no default partition: {choices}.")
    for name in wanted:
        if name not in names:
            raise ConfigError(
                f"`worker.{key}` must be one of {', '.join(names)}, but got {name!r}.{nearest(name, names)}"
            )
    limit = max(machine.limit_min for machine in machines if machine.partition in wanted)
    if config.timeout_min > limit:
        raise ConfigError(
            f"`worker.timeout_min <= {limit:.0f}` must hold in partition `{','.join(dict.fromkeys(wanted))}`, "
            f"but got {config.timeout_min!r}."
        )


def _test(config: SlurmConfig, executor: RayNodes) -> list[str]:
    """Asks Slurm whether it would take a job; returns a warning where the job would have to wait.

    Raises:
        ConfigError: It would not.
    """
    with _login_environment():
        done = _run(["sbatch", "--test-only"], given=executor.text(1))
    if done.returncode == 0:
        return []
    said = _last_line(done.stderr.replace('Try "sbatch --help" for more information', ""))
    if any(word in said.lower() for word in BUSY):
        return [f"Slurm can't start the jobs now, they will wait: {said}."]
    if UNFIT in said.lower():
        cpus, gpus = (config.processes_per_job * each for each in (config.cpus, config.gpus))
        memory = f" and {config.mem_gb:g} GB" if config.mem_gb else ""
        raise ConfigError(
            f"one job must fit a machine with {cpus} processor cores, {gpus} GPUs{memory} (`worker.processes_per_job` "
            f"times `worker.cpus` and `worker.gpus`, and `worker.mem_gb`), but sbatch says {said!r}."
        )
    key = next((key for word, key in KEYS.items() if word in said.lower()), "worker")
    value = getattr(config, key.partition(".")[2], None)
    got = f", but got {value!r}" if value is not None else ""
    raise ConfigError(f"`{key}` must be something that Slurm takes{got}: sbatch says {said!r}.")


def _lower(state: str) -> str:
    word, _, reason = state.partition(" ")
    return f"{word.lower()} {reason}".strip()


def _last_line(text: str) -> str:
    """Returns the last line of a message of Slurm's, without the command's name and the full stop."""
    line = next(iter(reversed(text.strip().splitlines())), "nothing")
    for prefix in ("sbatch: ", "error: ", "Batch job submission failed: ", "allocation failure: "):
        line = line.removeprefix(prefix)
    return line.strip().rstrip(".")


def _run(command: Sequence[str], *, given: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
