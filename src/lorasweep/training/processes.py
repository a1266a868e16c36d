"""The processes that train one run together: where they meet, how they agree, and what is left when one fails.

Lightning, torchrun, srun or Ray start them; Lightning's strategies make them train together. The first process alone
writes the run's folder. A process that fails ends, so that whoever started it ends the others too: nobody waits.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import Strategy
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from lorasweep.config.run import TrainerConfig
from lorasweep.config.targets import Component, instantiate
from lorasweep.disk import write_atomically
from lorasweep.errors import ConfigError, LoraSweepError, OutOfMemory, RanksLost, RunError, describe_error, first_line
from lorasweep.training.environment import resolve_device
from lorasweep.training.fsdp import FsdpStrategy
from lorasweep.training.quiet import quiet_lightning

T = TypeVar("T")

FAILURE_FILE = "failed_rank.json"
"""Beside the run record: why a process of several ended. It is read by the others, and when the run starts again."""
FAILURE_WAIT_S = 3.0
"""Seconds in which a process that failed has written why."""


class Group(Protocol):
    """Processes that can agree: Lightning's Fabric, or the strategy of a Trainer."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the first process."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Returns the first process's object."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the processes of a run are started."""

    environment: ClusterEnvironment
    devices: int
    """Processes per node."""
    num_nodes: int

    @property
    def size(self) -> int:
        """Processes on all nodes."""
        return self.devices * self.num_nodes


def find_launch(config: TrainerConfig, cluster: ClusterEnvironment | None = None) -> Launch:
    """Returns who starts the processes of a run: the given cluster, torchrun, srun, or else Lightning.

    Raises:
        ConfigError: Others were started than the settings ask for, there are not enough GPUs, or the strategy needs a
            package that is not installed.
    """
    if config.is_sharded and isinstance(config.strategy, Component):
        raise ConfigError("`trainer.strategy` must be fsdp for `ModelParallelStrategy`, but got its class.")
    if config.strategy_name.startswith("deepspeed") and find_spec("deepspeed") is None:
        raise ConfigError(
            f"`trainer.strategy={config.strategy_name}` needs the package deepspeed, which is not installed. "
            "Run `pip install deepspeed`."
        )
    if cluster is not None:  # Ray, where each process sees its own GPU only
        return Launch(environment=cluster, devices=1, num_nodes=cluster.world_size())
    found = os.environ.get
    if TorchElasticEnvironment.detect():
        num_nodes = int(found("GROUP_WORLD_SIZE", 1))
        devices = int(found("WORLD_SIZE", 1)) // num_nodes
        environment: ClusterEnvironment = TorchElasticEnvironment()
    elif (tasks := int(found("SLURM_STEP_NUM_TASKS", 1))) > 1:  # a step of srun; a batch script is one process
        if "SLURM_NTASKS_PER_NODE" not in os.environ:  # which Lightning asks for
            raise ConfigError(f"`srun --ntasks-per-node` must be set, but got {tasks} tasks by another option.")
        num_nodes = int(found("SLURM_STEP_NUM_NODES", 1))
        devices = tasks // num_nodes
        environment = SLURMEnvironment(auto_requeue=False)  # Slurm's own `--requeue` does it
    else:
        devices = _auto_devices(config) if config.devices == "auto" else config.devices
        if resolve_device(config) == "gpu" and devices > (there := torch.cuda.device_count()):
            raise ConfigError(
                f"`trainer.devices <= {there}` must hold, the number of GPUs of this node, but got {devices!r}."
            )
        return Launch(environment=LightningEnvironment(), devices=devices, num_nodes=config.num_nodes)
    if config.devices not in ("auto", devices) or config.num_nodes != num_nodes:
        raise ConfigError(
            f"`trainer.devices` and `trainer.num_nodes` must be what was launched, {devices} on {num_nodes} nodes, but "
            f"got {config.devices!r} and {config.num_nodes!r}. Set them so, or launch others."
        )
    return Launch(environment=environment, devices=devices, num_nodes=num_nodes)


def is_distributed(config: TrainerConfig, launch: Launch) -> bool:
    """Whether a run needs a process group."""
    return launch.size > 1 or config.strategy != "auto"


@contextmanager
def join_processes(config: TrainerConfig, *, cluster: ClusterEnvironment | None = None) -> Iterator[Fabric]:
    """Starts the processes of a run where nobody has, and lets them meet; at the end they part.

    Inside of another such block nothing is started. Lightning starts processes by running the command again.

    Args:
        config: How many there are.
        cluster: Where they meet, if not as `find_launch` finds.

    Raises:
        ConfigError: As `find_launch`.
    """
    launch = find_launch(config, cluster)
    with quiet_lightning():
        fabric = Fabric(
            accelerator=resolve_device(config),
            devices=launch.devices,
            num_nodes=launch.num_nodes,
            strategy="ddp" if is_distributed(config, launch) else "auto",
            plugins=[launch.environment],
        )
        begins = is_distributed(config, launch) and not dist.is_initialized()
        if begins and isinstance(launch.environment, TorchElasticEnvironment):
            _meet_under_torchrun(fabric)
        if is_distributed(config, launch):
            fabric.launch()
    try:
        yield fabric
        if begins:
            fabric.barrier()  # so that no launcher takes a process that ends first for a failure
    except BaseException:
        for child in getattr(fabric.strategy.launcher, "procs", ()) if begins else ():
            child.kill()  # it may wait for this process, and has nothing to write
        raise
    finally:
        if begins and dist.is_initialized():
            dist.destroy_process_group()


def _meet_under_torchrun(fabric: Fabric) -> None:
    """Makes the process group with keys of this start.

    torchrun keeps its store when it starts processes again, with the addresses of those that are gone, which would be
    taken for those of the new ones.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = next(rendezvous("env://", rank, size))[0]
    keys = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if fabric.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=keys, rank=rank, world_size=size)


def build_strategy(config: TrainerConfig, launch: Launch) -> Strategy | str:
    """Returns what `trainer.strategy` means, for Lightning's Trainer.

    Raises:
        ConfigError: It can't be made.
    """
    if isinstance(config.strategy, Component):
        return instantiate(config.strategy, key="trainer.strategy", expected=Strategy)  # type: ignore[type-abstract]
    if config.is_sharded:
        return FsdpStrategy(data_parallel_size=launch.size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return "ddp" if config.strategy == "auto" and is_distributed(config, launch) else config.strategy


def on_first(group: Group, action: Callable[[], T]) -> T:
    """Returns on every process what the action returned on the first, or raises what it raised there.

    Raises:
        RunError: On the other processes, in place of an error that is not one of ours.
    """
    outcome: tuple[Any, Exception | None] = (None, None)
    if group.is_global_zero:
        try:
            outcome = (action(), None)
        except Exception as error:
            ours = isinstance(error, LoraSweepError)
            group.broadcast((None, error if ours else RunError(f"the first process failed: {describe_error(error)}")))
            raise
    value, failure = group.broadcast(outcome)
    if failure is not None:
        raise failure
    result: T = value
    return result


def require_same(own: dict[str, Any]) -> None:
    """Makes sure that all processes have the same values, by the keys of the settings that they come from.

    Raises:
        ConfigError: On every process: they have not.
    """
    if not dist.is_initialized():
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    for rank, other in enumerate(found):
        for key, value in found[0].items():
            if other[key] != value:
                raise ConfigError(
                    f"`{key}` must be the same for every process of a run, but rank 0 has {value!r} and rank {rank} "
                    f"{other[key]!r}. Put the same files on every node."
                )


def seed_of_rank(seed: int, rank: int) -> int:
    """Returns a process's own seed of what each draws for its own rows; that of the first is the seed itself."""
    if rank == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{rank}".encode()).digest()[:7], "little")


def explain_failure(error: BaseException, *, group: Fabric, folder: Path, micro_batches: int) -> BaseException:
    """Returns what a process of several raises in place of an error that it may have alone; leaves a note for others.

    Args:
        error: What ended the training here.
        group: The processes.
        folder: The run's.
        micro_batches: Micro-batches per step, which were too large where memory ran out.
    """
    rank = group.global_rank
    agreed = isinstance(error, LoraSweepError) and not isinstance(error, OutOfMemory)
    if group.world_size == 1 or agreed or not isinstance(error, Exception):
        return error
    if not _is_lost_peer(error):
        is_memory = isinstance(error, OutOfMemory)
        note: dict[str, Any] = {
            "rank": rank,
            "reason": describe_error(error),
            "too_large": micro_batches if is_memory else None,
        }
        write_atomically(folder / FAILURE_FILE, json.dumps(note))
        return _describe_memory(rank) if is_memory else error
    note = _wait_for_note(folder)
    if note.get("too_large"):
        return _describe_memory(note["rank"])
    if note:
        return RunError(f"rank {note['rank']} failed: {note['reason']}")
    return RanksLost(
        f"every process of a run must be there, but rank {rank} waits for one that is gone ({first_line(error)[:80]}). "
        "Start the run again to go on from its last checkpoint."
    )


def take_failure_note(folder: Path) -> int | None:
    """Returns the micro-batches per step that were too large when the run ended last, and forgets why it did."""
    note = _read_note(folder)
    (folder / FAILURE_FILE).unlink(missing_ok=True)
    return note.get("too_large")


def _describe_memory(rank: int) -> RanksLost:
    return RanksLost(
        f"rank {rank} ran out of memory. Start the run again: it begins with micro-batches of half the rows."
    )


def _wait_for_note(folder: Path) -> dict[str, Any]:
    deadline = time.monotonic() + FAILURE_WAIT_S
    while not (note := _read_note(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return note


def _read_note(folder: Path) -> dict[str, Any]:
    try:
        note: dict[str, Any] = json.loads((folder / FAILURE_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return note


def _is_lost_peer(error: Exception) -> bool:
    """Whether a process waited for another one that is gone, as gloo, NCCL and torch's store say it."""
    words = ("gloo", "NCCL", "Connection closed by peer")
    tells = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return tells or isinstance(error, dist.DistError)


def _auto_devices(config: TrainerConfig) -> int:
    return torch.cuda.device_count() if resolve_device(config) == "gpu" else 1
