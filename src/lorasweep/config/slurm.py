"""Settings of workers on machines that Slurm gives: jobs that join a sweep's Ray cluster (`conf/worker/slurm.yaml`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorasweep.config.limits import require_at_least
from lorasweep.errors import ConfigError

OWNED_OPTIONS: Mapping[str, str | None] = {
    **{name: name for name in ("partition", "account", "qos", "constraint", "requeue", "gpus")},
    "time": "timeout_min",
    "signal": "signal_delay_s",
    "no-requeue": "requeue",
    "mem": "mem_gb",
    "gpus-per-node": "gpus",
    "cpus-per-task": "cpus",
    **dict.fromkeys(("array", "nodes"), "jobs"),
    **dict.fromkeys(("ntasks", "ntasks-per-node"), "processes_per_job"),
    **dict.fromkeys(("job-name", "output", "error", "open-mode")),
}
"""Options of sbatch that lorasweep writes itself, with the key of `worker` for each; None: a user can't set it."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """Workers on machines that Slurm gives: each job starts one node of the sweep's own Ray cluster."""

    name: Literal["slurm"]
    jobs: int
    """Jobs, each on one machine. More may be added while the sweep runs."""
    processes_per_job: int
    """Processes that each job has room for. A worker has one process, or `trainer.devices` times `trainer.num_nodes`
    processes, which train each trial together."""
    gpus: int
    """GPUs of each process."""
    cpus: int
    """Processor cores of each process."""
    pack_size: int | Literal["auto"]
    """Most trials that train together on one frozen base; `auto` follows from memory and the trials left, 1 trains each
    alone."""
    head: Literal["here", "job"]
    """Where the controller and the head of the Ray cluster run: in this process, or in a Slurm job with one core."""
    head_ip: str | None
    """Address by which the jobs' machines reach the head; None is the address that Ray finds."""
    head_partition: str | None
    """Partition of the head's job; None is the same as `partition`."""
    partition: str | None
    """None leaves the choice to the cluster, as for `account`, `qos`, `mem_gb` and `constraint`."""
    account: str | None
    qos: str | None
    constraint: str | None
    """Features that a machine must have, in Slurm's syntax (`a100|h100`)."""
    mem_gb: float | None
    """Memory of one job."""
    timeout_min: int
    """Minutes until Slurm ends a job."""
    signal_delay_s: int
    """Seconds before the end of its time at which a job gets a signal, leaves the sweep and is requeued."""
    requeue: bool
    """Whether a job that is preempted or out of time is requeued; it then joins the sweep again."""
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
        for name in self.extra:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise ConfigError(
                    f"`worker.extra` must have long names of sbatch's options as its keys, but got {name!r}. "
                    "Write `mail-type` for `--mail-type`."
                )
            if name in OWNED_OPTIONS:
                own = OWNED_OPTIONS[name]
                advice = f"Set `worker.{own}` instead." if own else "Leave it out: lorasweep sets it by itself."
                raise ConfigError(
                    f"`worker.extra` must hold options that have no key of their own, but got {name!r}. {advice}"
                )
