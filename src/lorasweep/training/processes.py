"""The processes that train one run together: how they start, agree, and end when one of them fails.

Lightning, torchrun, srun or Ray start them; Lightning's strategies make them train together. The first process alone
writes the run's folder. A process that fails ends, and its launcher then ends the others, so that none waits for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

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

from lorasweep.config.components import Component, instantiate
from lorasweep.config.run import TrainerConfig
from lorasweep.disk import write_atomically
from lorasweep.errors import ConfigError, LoraSweepError, OutOfMemory, RanksLost, RunError, describe_error, first_line
from lorasweep.training.environment import resolve_device
from lorasweep.training.fsdp import FsdpStrategy
from lorasweep.training.quiet import quiet_lightning

T = TypeVar("T")
Group: TypeAlias = Fabric | Strategy
"""A group of processes that can agree: Lightning's Fabric, or the strategy of a Trainer."""

FAILURE_FILE = "failed_rank.json"
"""Beside the run record: the reason why one of several processes ended, for the others and for the next start."""
FAILURE_WAIT_S = 3.0
"""Seconds that a process which lost another one waits for its reason."""


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


def find_launch(config: TrainerConfig) -> Launch:
    """Returns how the processes of a run are started: by torchrun (or Ray in its place), by srun, or else by Lightning.

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
    environ = os.environ
    if TorchElasticEnvironment.detect():
        size, num_nodes = int(environ.get("WORLD_SIZE", 1)), int(environ.get("GROUP_WORLD_SIZE", 1))
        environment: ClusterEnvironment = TorchElasticEnvironment()
    elif (size := int(environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:  # a step of srun; a batch script is one process
        if "SLURM_NTASKS_PER_NODE" not in environ:  # Lightning needs it
            raise ConfigError(f"`srun --ntasks-per-node` must be set, but got {size} tasks by another option.")
        num_nodes = int(environ.get("SLURM_STEP_NUM_NODES", 1))
        environment = SLURMEnvironment(auto_requeue=False)  # Slurm's own `--requeue` does it
    else:
        is_gpu = resolve_device(config) == "gpu"
        count = torch.cuda.device_count() if is_gpu else 1
        devices = count if config.devices == "auto" else config.devices
        if is_gpu and devices > count:
            raise ConfigError(
                f"`trainer.devices <= {count}` must hold, the number of GPUs of this node, but got {devices!r}."
            )
        return Launch(environment=LightningEnvironment(), devices=devices, num_nodes=config.num_nodes)
    # the product alone: Ray counts each process as a node
    if config.devices != "auto" and config.devices * config.num_nodes != size:
        raise ConfigError(
            f"`trainer.devices` times `trainer.num_nodes` must be {size}, the number of processes that were launched, "
            f"but got {config.devices!r} and {config.num_nodes!r}. Set them so, or launch others."
        )
    return Launch(environment=environment, devices=size // num_nodes, num_nodes=num_nodes)


def is_distributed(config: TrainerConfig, launch: Launch) -> bool:
    """Returns whether a run needs a process group."""
    return launch.size > 1 or config.strategy != "auto"


@contextmanager
def join_processes(config: TrainerConfig) -> Iterator[Fabric]:
    """Starts the processes of a run, unless torchrun or srun has, and connects them inside the block.

    An inner block joins the group of the outer one. Lightning starts processes by running the command again.

    Raises:
        ConfigError: As `find_launch`.
    """
    launch = find_launch(config)
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
            _connect_under_torchrun(fabric)
        if is_distributed(config, launch):
            fabric.launch()
    try:
        yield fabric
        if begins:
            fabric.barrier()  # a launcher could take a process that ends before the others for a failure
    except BaseException:
        for child in getattr(fabric.strategy.launcher, "procs", ()) if begins else ():
            child.kill()  # it may wait for this process, and writes no files
        raise
    finally:
        if begins and dist.is_initialized():
            dist.destroy_process_group()


def _connect_under_torchrun(fabric: Fabric) -> None:
    """Creates the process group under keys of this start.

    torchrun keeps its store when it restarts processes. Under the same keys the new processes would find the addresses
    of the old ones.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = next(rendezvous("env://", rank, size))[0]
    keys = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if fabric.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=keys, rank=rank, world_size=size)


def build_strategy(config: TrainerConfig, launch: Launch) -> Strategy | str:
    """Returns the strategy for Lightning's Trainer.

    Raises:
        ConfigError: `trainer.strategy` can't be built.
    """
    if isinstance(config.strategy, Component):
        return instantiate(config.strategy, key="trainer.strategy", expected=Strategy)  # type: ignore[type-abstract]
    if config.is_sharded:
        return FsdpStrategy(data_parallel_size=launch.size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return "ddp" if config.strategy == "auto" and is_distributed(config, launch) else config.strategy


def on_first(group: Group, action: Callable[[], T]) -> T:
    """Runs an action on the first process; returns its result, or raises its error, on every process.

    Raises:
        RunError: On the other processes, in place of an error that is no `LoraSweepError`.
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
    """Checks that all processes have the same values; keys are those of the settings that the values come from.

    Raises:
        ConfigError: On every process, if one value differs.
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
    """Returns a seed for the random numbers that each process draws for its own rows; the first keeps `seed`."""
    if rank == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{rank}".encode()).digest()[:7], "little")


def explain_failure(error: BaseException, *, group: Fabric, folder: Path, micro_batches: int) -> BaseException:
    """Returns the error that one of several processes raises in place of an error of its own.

    Leaves a note in the run's folder if the error began here; otherwise the other process's note says why.

    Args:
        error: The error that ended the training on this process.
        group: The processes.
        folder: The run's folder.
        micro_batches: Micro-batches per step. They were too few if memory ran out.
    """
    rank = group.global_rank
    is_shared = isinstance(error, LoraSweepError) and not isinstance(error, OutOfMemory)  # raised by every process
    if group.world_size == 1 or is_shared or not isinstance(error, Exception):
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
    note = _read_note(folder, wait_s=FAILURE_WAIT_S)
    if note.get("too_large"):
        return _describe_memory(note["rank"])
    if note:
        return RunError(f"rank {note['rank']} failed: {note['reason']}")
    return RanksLost(
        f"every process of a run must live, but rank {rank} waits for a process that is gone "
        f"({first_line(error)[:80]}). Start the run again to resume from its last checkpoint."
    )


def take_failure_note(folder: Path) -> int | None:
    """Removes the note of the last failure; returns the micro-batches per step with which memory ran out, if it did."""
    note = _read_note(folder)
    (folder / FAILURE_FILE).unlink(missing_ok=True)
    return note.get("too_large")


def _describe_memory(rank: int) -> RanksLost:
    return RanksLost(
        f"rank {rank} ran out of memory. Start the run again: it begins with micro-batches of half the rows."
    )


def _read_note(folder: Path, *, wait_s: float = 0.0) -> dict[str, Any]:
    """Returns the note of a failed process, waiting for it; empty if there is none."""
    deadline = time.monotonic() + wait_s
    while True:
        with suppress(OSError, ValueError):  # not there, or not whole yet
            note: dict[str, Any] = json.loads((folder / FAILURE_FILE).read_text())
            return note
        if time.monotonic() >= deadline:
            return {}
        time.sleep(0.1)


def _is_lost_peer(error: Exception) -> bool:
    """Returns whether an error of gloo, NCCL or torch's store says that another process is gone."""
    words = ("gloo", "NCCL", "Connection closed by peer")
    is_named = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return is_named or isinstance(error, dist.DistError)
