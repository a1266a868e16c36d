"""Settings of workers that Slurm starts: an array of jobs, each one worker of a sweep (`conf/worker/slurm.yaml`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorasweep.config.limits import check_worker, require_at_least
from lorasweep.errors import ConfigError

OWNED_OPTIONS: Mapping[str, str | None] = {
    "partition": "worker.partition",
    "account": "worker.account",
    "qos": "worker.qos",
    "time": "worker.time_min",
    "nodes": "worker.nodes",
    "ntasks-per-node": "worker.tasks_per_node",
    "ntasks": "worker.tasks_per_node",
    "gpus": "worker.gpus",
    "gpus-per-node": "worker.gpus",
    "cpus-per-task": "worker.cpus",
    "mem": "worker.mem_gb",
    "constraint": "worker.constraint",
    "signal": "worker.signal_s",
    "array": "worker.num",
    "job-name": None,
    "output": None,
    "error": None,
    "open-mode": None,
    "requeue": None,
    "no-requeue": None,
}
"""Options of sbatch that lorasweep writes itself, with the key that sets each; None: they are not for a user."""


@dataclass(frozen=True, kw_only=True)
class SlurmWorkers:
    """Workers in an array of Slurm jobs; one that runs out of time is put in line again and goes on."""

    name: Literal["slurm"]
    num: int
    """Workers: jobs of the array."""
    pack_size: int | Literal["auto"]
    """Most trials that train together on one frozen base; `auto` measures, 1 trains each alone."""
    lease_s: float
    """A worker that gave no sign of life for so many seconds is taken for lost: its trials are gone on with elsewhere.
    """
    partition: str | None
    """None leaves it to the cluster, as for `account`, `qos`, `mem_gb` and `constraint`."""
    account: str | None
    qos: str | None
    time_min: int
    """Minutes until Slurm ends a job; the worker is put in line again before that."""
    signal_s: int
    """So many seconds before that Slurm tells the worker, which keeps a checkpoint of its trials."""
    nodes: int
    """Machines of one worker; more than one only for a trial that is spread over them."""
    tasks_per_node: int
    """Ranks of one worker on each of its machines, started by srun."""
    gpus: int
    """GPUs of one worker on each of its machines."""
    cpus: int
    """Processor cores of each rank."""
    mem_gb: float | None
    """Memory of one worker on each of its machines."""
    constraint: str | None
    """Features that a machine must have, in Slurm's words (`a100|h100`)."""
    setup: tuple[str, ...]
    """Lines of shell before the worker starts (`module load cuda`)."""
    container: str | None
    """Image for the option `--container-image` that the plugin pyxis adds to srun. Its `python3` must have lorasweep;
    the sweep's folder and the current one are mounted where they are."""
    extra: Mapping[str, str | int | bool]
    """More options of sbatch, by their long names (`{reservation: tuesday, exclusive: true}`)."""
    dry_run: bool
    """Prints the batch file and starts nothing."""

    def __post_init__(self) -> None:
        for key in ("num", "time_min", "nodes", "tasks_per_node", "cpus", "signal_s"):
            require_at_least(f"worker.{key}", getattr(self, key), 1)
        require_at_least("worker.gpus", self.gpus, 0)
        check_worker(pack_size=self.pack_size, lease_s=self.lease_s)
        if self.mem_gb is not None and not self.mem_gb > 0:
            raise ConfigError(f"`worker.mem_gb > 0` must hold, but got {self.mem_gb!r}. Leave it out for the default.")
        if self.signal_s >= 60 * self.time_min:
            raise ConfigError(
                f"`worker.signal_s < {60 * self.time_min}` must hold, the seconds of `worker.time_min`, "
                f"but got {self.signal_s!r}."
            )
        self._check_lines()
        self._check_extra()

    def _check_lines(self) -> None:
        texts = {key: getattr(self, key) for key in ("partition", "account", "qos", "constraint", "container")}
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
