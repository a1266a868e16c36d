"""Settings of workers on machines that Slurm gives: jobs that join a sweep's Ray cluster (`conf/worker/slurm.yaml`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorasweep.config.limits import require_at_least
from lorasweep.errors import ConfigError

OWNED_OPTIONS: Mapping[str, str | None] = {
    "partition": "worker.partition",
    "account": "worker.account",
    "qos": "worker.qos",
    "constraint": "worker.constraint",
    "time": "worker.timeout_min",
    "signal": "worker.signal_delay_s",
    "requeue": "worker.requeue",
    "no-requeue": "worker.requeue",
    "mem": "worker.mem_gb",
    "array": "worker.jobs",
    "nodes": "worker.jobs",
    "ntasks": "worker.processes_per_job",
    "ntasks-per-node": "worker.processes_per_job",
    "gpus": "worker.gpus",
    "gpus-per-node": "worker.gpus",
    "cpus-per-task": "worker.cpus",
    "job-name": None,
    "output": None,
    "error": None,
    "open-mode": None,
}
"""Options of sbatch that lorasweep writes itself, with the key that sets each; None: a user can't set it."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """Workers on machines that Slurm gives: each job starts one node of the sweep's own Ray cluster."""

    name: Literal["slurm"]
    jobs: int
    """Jobs, each on one machine. More may be added while the sweep runs."""
    processes_per_job: int
    """Processes of workers that the machine of each job has room for. A worker has one, or as many as `trainer.devices`
    times `trainer.num_nodes`, which train each trial together."""
    gpus: int
    """GPUs of one process of a worker."""
    cpus: int
    """Processor cores of one process of a worker."""
    pack_size: int | Literal["auto"]
    """Most trials that train together on one frozen base; `auto` follows from memory and the trials left, 1 trains each
    alone."""
    head: Literal["here", "job"]
    """Where the controller and the head of the Ray cluster run: in this process, or in a Slurm job with one core."""
    head_ip: str | None
    """Address by which the jobs' machines reach the head; None is the one that Ray finds."""
    head_partition: str | None
    """Partition of that job; None is the same as `partition`."""
    partition: str | None
    """None leaves it to the cluster, as for `account`, `qos`, `mem_gb` and `constraint`."""
    account: str | None
    qos: str | None
    constraint: str | None
    """Features that a machine must have, in Slurm's words (`a100|h100`)."""
    mem_gb: float | None
    """Memory of one job."""
    timeout_min: int
    """Minutes until Slurm ends a job."""
    signal_delay_s: int
    """Seconds before that at which the job is told, leaves the sweep and is requeued."""
    requeue: bool
    """Whether a job that was preempted or out of time is requeued; it then joins the sweep again."""
    setup: tuple[str, ...]
    """Lines of shell before the node starts (`module load cuda`)."""
    container: str | None
    """Image for the option `--container-image` that the plugin pyxis adds to srun. Its `python3` must have lorasweep;
    the sweep's folder and the current one are mounted where they are."""
    extra: Mapping[str, str | int | bool]
    """More options of sbatch, by their long names (`{reservation: tuesday, exclusive: true}`)."""
    dry_run: bool
    """Prints the batch file and starts nothing."""

    def __post_init__(self) -> None:
        for key in ("jobs", "processes_per_job", "cpus", "timeout_min", "signal_delay_s"):
            require_at_least(f"worker.{key}", getattr(self, key), 1)
        require_at_least("worker.gpus", self.gpus, 0)
        if self.pack_size != "auto":
            require_at_least("worker.pack_size", self.pack_size, 1)
        if self.mem_gb is not None and not self.mem_gb > 0:
            raise ConfigError(f"`worker.mem_gb > 0` must hold, but got {self.mem_gb!r}. Leave it out for the default.")
        if self.signal_delay_s >= 60 * self.timeout_min:
            raise ConfigError(
                f"`worker.signal_delay_s < {60 * self.timeout_min}` must hold, the seconds of `worker.timeout_min`, "
                f"but got {self.signal_delay_s!r}."
            )
        self._check_lines()
        self._check_extra()

    def _check_lines(self) -> None:
        keys = ("partition", "head_partition", "account", "qos", "constraint", "container")
        texts = {key: getattr(self, key) for key in keys}
        texts |= {f"setup[{number}]": line for number, line in enumerate(self.setup)}
        texts |= {f"extra.{name}": value for name, value in self.extra.items()}
        for key, value in texts.items():
            if isinstance(value, str) and not (value.strip() and value.isprintable()):
                raise ConfigError(f"`worker.{key}` must be one line of text, but got {value!r}.")

    def _check_extra(self) -> None:
        for name in self.extra:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise ConfigError(
                    f"`worker.extra` must have long names of sbatch's options as its keys, but got {name!r}. "
                    "Write `mail-type` for `--mail-type`."
                )
            if name in OWNED_OPTIONS:
                key = OWNED_OPTIONS[name]
                advice = f"Set `{key}` instead." if key else "Leave it out: lorasweep needs it as it writes it."
                raise ConfigError(
                    f"`worker.extra` must hold options that have no key of their own, but got {name!r}. {advice}"
                )
