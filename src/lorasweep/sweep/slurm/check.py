"""What is wrong with a request for Slurm workers, in one sentence and before anything is queued.

Partitions and their machines come from `sinfo`, names from `sacctmgr` where the cluster keeps accounts; the rest is
asked of Slurm itself by `sbatch --test-only`.
"""

from __future__ import annotations

import getpass
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasweep.config.build import nearest
from lorasweep.config.run import RunConfig
from lorasweep.config.slurm import SlurmWorkers
from lorasweep.errors import ConfigError
from lorasweep.sweep.slurm.batch import Batch, last_line
from lorasweep.sweep.slurm.task import COMMAND_TIMEOUT_S, parse_duration_s

COMMANDS = ("sbatch", "srun", "sinfo", "squeue")
SINFO_FORMAT = "%P|%c|%m|%G|%l|%n"
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
OWN_PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run")
"""Folders that each machine has for itself."""
KEYS = {
    "account": "worker.account",
    "partition": "worker.partition",
    "qos": "worker.qos",
    "feature": "worker.constraint",
    "gres": "worker.gpus",
    "time limit": "worker.time_min",
    "memory": "worker.mem_gb",
    "reservation": "worker.extra",
    "node name": "worker.extra",
    "option": "worker.extra",
    "node configuration": "worker",
}
"""A word of what sbatch says, and the key that it is about."""
BUSY = ("busy", "down", "not available now", "drained")
"""Words of refusals that a job in line outlasts."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine as one partition offers it."""

    partition: str
    in_default: bool
    cpus: int
    memory_mb: int
    gpus: int
    limit_s: int | None
    """The longest time of a job; None where there is none."""
    host: str


def check_slurm(workers: SlurmWorkers, sweep: Path, *, name: str, storage: str) -> list[str]:
    """Checks that Slurm would take the workers and that they can meet; returns sentences of warning.

    Args:
        workers: What is asked for.
        sweep: The sweep's folder, which need not be there yet.
        name: The sweep's name.
        storage: Where the studies are kept.

    Raises:
        ConfigError: There is no Slurm here, or no such partition, account or machine, or they can't meet.
    """
    require_slurm()
    machines = _choose(workers, read_machines())
    check_size(workers, machines)
    _check_names(workers)
    warnings = _try(workers, sweep, name=name)
    if is_this_machine(machines):
        return warnings
    if storage == "journal":
        raise ConfigError(
            "`storage` must be postgresql or mysql for workers on several machines, but got 'journal', which is for "
            "one. Type `storage=postgresql`."
        )
    place = local_place(sweep)
    if place is not None:
        warnings.append(
            f"The sweep's folder {str(sweep)!r} is in {place}, which each machine has for itself: workers elsewhere "
            "will not see it. Set `sweep.output` to a folder that all machines share."
        )
    return warnings


def check_ranks(workers: SlurmWorkers, configs: Iterable[RunConfig]) -> None:
    """Checks that runs are spread over exactly the ranks that srun starts: ranks too many would be workers on one GPU.

    Raises:
        ConfigError: They are not.
    """
    for config in configs:
        for key, asked, by in (
            ("devices", workers.tasks_per_node, "tasks_per_node"),
            ("num_nodes", workers.nodes, "nodes"),
        ):
            value = getattr(config.trainer, key)
            if value not in (asked, "auto"):
                raise ConfigError(
                    f"`worker.{by} == trainer.{key}` must hold, because a worker spreads each trial over all of "
                    f"its ranks, but got {asked!r} and {value!r}."
                )


def is_slurm_here() -> bool:
    """Whether Slurm's commands are on this machine."""
    return all(map(shutil.which, COMMANDS))


def require_slurm() -> None:
    """Raises ConfigError unless Slurm's commands are here."""
    for command in COMMANDS:
        if shutil.which(command) is None:
            raise ConfigError(
                f"`worker=slurm` must be typed on a machine with Slurm, but `{command}` is not found. "
                "Log in to the cluster, or leave `worker` out for a process on this machine."
            )


def read_machines() -> list[Machine]:
    """Returns every machine of the cluster, once for each partition that it is in.

    Raises:
        ConfigError: Slurm does not answer.
    """
    rows = _ask(["sinfo", "--noheader", "--Node", "--format", SINFO_FORMAT]).splitlines()
    return [_read_machine(row) for row in rows if row.count("|") == SINFO_FORMAT.count("|")]


def _read_machine(row: str) -> Machine:
    partition, cpus, memory, gres, limit, host = row.split("|")
    return Machine(
        partition=partition.rstrip("*"),
        in_default=partition.endswith("*"),
        cpus=_number(cpus),
        memory_mb=_number(memory),
        gpus=sum(int(count) for count in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres)),
        limit_s=parse_duration_s(limit.strip()),
        host=host.strip(),
    )


def _number(text: str) -> int:
    found = re.match(r"\d+", text.strip())
    return int(found.group()) if found else 0


def _choose(workers: SlurmWorkers, machines: Sequence[Machine]) -> list[Machine]:
    """The machines that the workers may be given.

    Raises:
        ConfigError: A partition does not exist, or none is named and the cluster has no default.
    """
    names = sorted({machine.partition for machine in machines})
    if not names:
        raise ConfigError("Slurm must have a partition with machines, but `sinfo` shows none.")
    if workers.partition is None:
        chosen = [machine for machine in machines if machine.in_default]
        if not chosen:
            raise ConfigError(
                f"`worker.partition` must be set, because this cluster has no default one: {', '.join(names)}."
            )
        return chosen
    wanted = workers.partition.split(",")
    for partition in wanted:
        if partition not in names:
            raise ConfigError(
                f"`worker.partition` must be one of {', '.join(names)}, but got {partition!r}."
                f"{nearest(partition, names)}"
            )
    return [machine for machine in machines if machine.partition in wanted]


def check_size(workers: SlurmWorkers, machines: Sequence[Machine]) -> None:
    """Checks that the machines have what a worker asks for.

    Raises:
        ConfigError: No machine has, or there are fewer of them.
    """
    where = f"in partition `{','.join(dict.fromkeys(machine.partition for machine in machines))}`"
    gpus = max(machine.gpus for machine in machines)
    if workers.gpus > gpus:
        raise ConfigError(
            f"`worker.gpus <= {gpus}` must hold {where}, the GPUs of its largest machine, but got {workers.gpus!r}."
            + ("" if gpus else " Set `worker.gpus=0`, or another `worker.partition`.")
        )
    cpus = max(machine.cpus for machine in machines) // workers.tasks_per_node
    if workers.cpus > cpus:
        each = f", for each of {workers.tasks_per_node} ranks" if workers.tasks_per_node > 1 else ""
        raise ConfigError(
            f"`worker.cpus <= {cpus}` must hold {where}, the processor cores of its largest machine{each}, "
            f"but got {workers.cpus!r}."
        )
    memory_gb = max(machine.memory_mb for machine in machines) / 1024
    if workers.mem_gb is not None and workers.mem_gb > memory_gb:
        raise ConfigError(
            f"`worker.mem_gb <= {memory_gb:.0f}` must hold {where}, the memory of its largest machine, "
            f"but got {workers.mem_gb!r}."
        )
    num_machines = len({machine.host for machine in machines})
    if workers.nodes > num_machines:
        raise ConfigError(
            f"`worker.nodes <= {num_machines}` must hold {where}, the number of its machines, "
            f"but got {workers.nodes!r}."
        )
    limits = [machine.limit_s for machine in machines]
    longest_min = None if None in limits else max(limit for limit in limits if limit is not None) // 60
    if longest_min is not None and workers.time_min > longest_min:
        raise ConfigError(
            f"`worker.time_min <= {longest_min}` must hold {where}, the longest time of a job, "
            f"but got {workers.time_min!r}."
        )


def _check_names(workers: SlurmWorkers) -> None:
    """Checks account and quality of service where the cluster keeps accounts; else Slurm leaves them out of account.

    Raises:
        ConfigError: It has none of that name for this user.
    """
    asked = (
        ("worker.account", workers.account, ["show", "assoc", f"user={getpass.getuser()}", "format=account"]),
        ("worker.qos", workers.qos, ["show", "qos", "format=name"]),
    )
    for key, value, words in asked:
        if value is None or shutil.which("sacctmgr") is None:
            continue
        done = _run(["sacctmgr", "--noheader", "--parsable2", *words])
        names = sorted(set(done.stdout.split())) if done.returncode == 0 else []
        if names and value.lower() not in names:
            raise ConfigError(f"`{key}` must be one of {', '.join(names)}, but got {value!r}.{nearest(value, names)}")


def _try(workers: SlurmWorkers, sweep: Path, *, name: str) -> list[str]:
    """Asks Slurm whether it would take the batch file; returns a warning where it would have to wait.

    Raises:
        ConfigError: It would not.
    """
    done = _run(["sbatch", "--test-only"], given=Batch(workers, sweep, name=name).text())
    if done.returncode == 0:
        return []
    said = last_line(done.stderr.replace('Try "sbatch --help" for more information', ""))
    if any(word in said.lower() for word in BUSY):
        return [f"Slurm can't start the workers now, they will wait in line: {said}."]
    key = next((key for word, key in KEYS.items() if word in said.lower()), "worker")
    value = getattr(workers, key.partition(".")[2], None)
    got = f", but got {value!r}" if value is not None else ""
    raise ConfigError(f"`{key}` must be something that Slurm takes{got}: sbatch says {said!r}.")


def is_this_machine(machines: Iterable[Machine]) -> bool:
    """Whether all workers will be on the machine that this process is on."""
    own = {"localhost", socket.gethostname(), socket.gethostname().partition(".")[0]}
    return all(machine.host in own for machine in machines)


def local_place(path: Path) -> str | None:
    """Returns the place that a path is in where each machine has such a place for itself, else None."""
    path = path.resolve()
    for place in OWN_PLACES:
        if path.is_relative_to(place):
            return f"`{place}`"
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    around = [(row[1], row[2]) for row in mounts if path.is_relative_to(row[1])]
    folder, kind = max(around, key=lambda row: len(row[0]), default=("/", ""))
    return f"`{folder}`, a file system in memory ({kind})" if kind in MEMORY_FILE_SYSTEMS else None


def _ask(command: Sequence[str]) -> str:
    done = _run(command)
    if done.returncode:
        raise ConfigError(f"Slurm must answer, but `{command[0]}` says: {last_line(done.stderr)}.")
    return done.stdout


def _run(command: Sequence[str], *, given: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"nothing for {COMMAND_TIMEOUT_S} s")
