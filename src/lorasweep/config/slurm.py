"""Settings of workers that run as Slurm jobs, which join a sweep's Ray cluster (`conf/worker/slurm.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic.dataclasses import dataclass

from lorasweep.config.build import NonNegative, Positive, PositiveFloat, Settings
from lorasweep.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(Settings):
    """Settings of workers that run as Slurm jobs: each job starts one node of the sweep's own Ray cluster."""

    name: Literal["slurm"]
    jobs: Positive
    """Number of jobs, each on one machine. More may be added while the sweep runs."""
    processes_per_job: Positive
    """Maximum number of processes in each job. A worker has one process, or `trainer.devices` times
    `trainer.num_nodes` processes, which train each trial together."""
    gpus: NonNegative
    """Number of GPUs of each process."""
    cpus: Positive
    """Number of CPU cores of each process."""
    pack_size: Positive | Literal["auto"]
    """Maximum number of trials that train together on one frozen base. `auto` chooses it from the memory and the number
    of trials left; 1 trains each trial alone."""
    head_ip: str | None
    """IP address at which the jobs reach the head; null uses the address that Ray finds."""
    partition: str | None
    """Partition of the jobs. Null uses the cluster's default; the same holds for `account`, `qos`, `constraint` and
    `mem_gb`."""
    account: str | None
    """Account that Slurm charges."""
    qos: str | None
    """Quality of service of the jobs."""
    constraint: str | None
    """Features that a machine must have, in Slurm's syntax (`a100|h100`)."""
    mem_gb: PositiveFloat | None
    """Memory of one job in GB."""
    timeout_min: Positive
    """Time limit of a job in minutes, after which Slurm ends it."""
    signal_delay_s: Positive
    """Slurm signals a job this many seconds before its time limit. The job then leaves the sweep and, if `requeue` is
    set, is requeued."""
    requeue: bool
    """Whether a job that was preempted or reached its time limit is requeued; it then joins the sweep again."""
    setup: tuple[str, ...]
    """Shell commands to run before the node starts, such as `module load cuda`."""
    extra: Mapping[str, str | int | bool]
    """Further sbatch options by their long names, such as `{reservation: tuesday, exclusive: true}`. They replace
    options that the other settings give."""
    dry_run: bool
    """Whether to print the batch file and submit nothing."""

    def __post_init__(self) -> None:
        if self.signal_delay_s >= 60 * self.timeout_min:
            raise ConfigError(
                f"`worker.signal_delay_s < {60 * self.timeout_min}` must hold, because `worker.timeout_min` is "
                f"{self.timeout_min} minutes, but got {self.signal_delay_s!r}. Change one of them."
            )
