"""Starts and connects the processes that train one run together, and lets them agree.

Lightning, torchrun, srun or Ray launch the processes. Only the first process writes the run's folder. A process that
fails ends. Its launcher then ends the other processes, because they would wait for it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import Strategy

from lorasweep.config.components import Component, instantiate
from lorasweep.config.run import TrainerConfig
from lorasweep.errors import ConfigError, LoraSweepError, RanksLost, RunError, describe_error, first_line
from lorasweep.training.environment import resolve_device
from lorasweep.training.fsdp import FsdpStrategy

T = TypeVar("T")
ProcessGroup: TypeAlias = Fabric | Strategy
"""Sends values between the processes of a run: Lightning's Fabric, or the strategy of a Trainer."""
IRRELEVANT_WARNINGS = (
    ".*does not have many workers.*",  # the data is in memory
    ".*your dataloader is not resumable.*",  # `SeededLoader` is
    ".*in eval mode at the start of training.*",  # norms with the statistics of a frozen base
    "The `srun` command is available",  # on the login node of a cluster
    ".*LeafSpec.*",  # Lightning with a newer torch
    ".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",
)
LOST_PROCESS_TEXTS = ("gloo", "NCCL", "Connection closed by peer")
"""Texts in the `RuntimeError` that torch raises if another process is gone."""


class Launch(NamedTuple):
    """How the processes of a run are started, and their number."""

    environment: ClusterEnvironment
    devices: int
    """Processes per node."""
    num_nodes: int

    @property
    def num_processes(self) -> int:
        """Number of processes on all nodes."""
        return self.devices * self.num_nodes


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hides Lightning's log lines and irrelevant warnings inside the block.

    Raises:
        ConfigError: Lightning refuses a setting, such as more GPUs than the machine has, or needs a missing package.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in IRRELEVANT_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    except MisconfigurationException as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"`trainer` must have settings that Lightning can use here, but: {message}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def find_launch(config: TrainerConfig) -> Launch:
    """Returns who starts the processes of a run: torchrun or Ray, srun, or else Lightning."""
    environ = os.environ
    if TorchElasticEnvironment.detect():  # Ray sets the same variables
        size, num_nodes = int(environ.get("WORLD_SIZE", 1)), int(environ.get("GROUP_WORLD_SIZE", 1))
        environment: ClusterEnvironment = TorchElasticEnvironment()
    elif (size := int(environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:  # in a step of srun; a batch script is one process
        num_nodes = int(environ.get("SLURM_STEP_NUM_NODES", 1))
        environment = SLURMEnvironment(auto_requeue=False)  # Slurm's own `--requeue` does it
    else:
        is_gpu = resolve_device(config) == "gpu"
        count = torch.cuda.device_count() if is_gpu else 1
        devices = count if config.devices == "auto" else config.devices
        return Launch(LightningEnvironment(), devices, config.num_nodes)
    # only the product is checked, because Ray counts each process as a node
    if config.devices != "auto" and config.devices * config.num_nodes != size:
        raise ConfigError(
            f"`trainer.devices` times `trainer.num_nodes` must be {size}, the number of launched processes, but got "
            f"{config.devices!r} and {config.num_nodes!r}. Change these settings or the number of launched processes."
        )
    return Launch(environment, size // num_nodes, num_nodes)


def is_distributed(config: TrainerConfig, launch: Launch) -> bool:
    return launch.num_processes > 1 or config.strategy != "auto"


@contextmanager
def join_processes(config: TrainerConfig) -> Iterator[Fabric]:
    """Starts the processes of a run, unless torchrun or srun has started them, and connects them inside the block.

    An inner block uses the processes of the outer block. Lightning starts a process by running this command again.
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
        is_outer = is_distributed(config, launch) and not dist.is_initialized()
        if is_distributed(config, launch):
            fabric.launch()
    try:
        yield fabric
        if is_outer:
            fabric.barrier()  # if one process ended early, its launcher could treat that as a failure
    except BaseException:
        for child in getattr(fabric.strategy.launcher, "procs", ()) if is_outer else ():
            child.kill()  # it may wait for this process; it writes no files that could be damaged
        raise
    finally:
        if is_outer and dist.is_initialized():
            dist.destroy_process_group()


def build_strategy(config: TrainerConfig, launch: Launch) -> Strategy | str:
    if isinstance(config.strategy, Component):
        return instantiate(config.strategy, key="trainer.strategy", expected=Strategy)  # type: ignore[type-abstract]
    if config.is_sharded:
        return FsdpStrategy(
            data_parallel_size=launch.num_processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return "ddp" if config.strategy == "auto" and is_distributed(config, launch) else config.strategy


def convert_lost_process(error: BaseException, *, num_processes: int) -> BaseException:
    """Returns `RanksLost` instead of torch's error that another process is gone, and other errors unchanged."""
    is_torch_error = isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PROCESS_TEXTS)
    if num_processes == 1 or not (is_torch_error or isinstance(error, dist.DistError)):
        return error
    return RanksLost(
        f"all processes of a run must keep running, but one is gone ({first_line(error)[:80]}). Read its own message, "
        "and start the run again to resume from its last checkpoint."
    )


def run_on_first(group: ProcessGroup, action: Callable[[], T]) -> T:
    """Runs an action on the first process. Returns its result, or raises its error, on every process.

    Raises:
        RunError: Raised on the other processes if the action's error is not a `LoraSweepError`.
    """
    outcome: tuple[Any, Exception | None] = (None, None)
    if group.is_global_zero:
        try:
            outcome = (action(), None)
        except Exception as error:
            ours = isinstance(error, LoraSweepError)
            # sent before it is raised, because the other processes wait for the outcome
            group.broadcast((None, error if ours else RunError(f"the first process failed: {describe_error(error)}")))
            raise
    value, failure = group.broadcast(outcome)
    if failure is not None:
        raise failure
    result: T = value
    return result
