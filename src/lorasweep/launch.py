"""How this process was launched: alone, or by torchrun or srun as one of several ranks that train together.

Reads their environment variables and nothing else; `training.ranks` makes the ranks meet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The place of a process among those that were launched together."""

    rank: int = 0
    """0 to `size - 1`."""
    size: int = 1
    """Processes on all nodes."""
    local_rank: int = 0
    """Place among the processes of its node."""
    num_nodes: int = 1

    @property
    def local_size(self) -> int:
        """Processes per node; what does not divide evenly is no launch of ours."""
        return self.size // self.num_nodes


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Returns how torchrun or srun launched this process; of a process that was started alone, rank 0 of 1.

    Slurm's variables of a *step* count: those of a job are there in its batch script too, which is one process.
    """
    found = environment.get
    if "TORCHELASTIC_RUN_ID" in environment:
        return Launch(
            rank=int(found("RANK", 0)),
            size=int(found("WORLD_SIZE", 1)),
            local_rank=int(found("LOCAL_RANK", 0)),
            num_nodes=int(found("GROUP_WORLD_SIZE", 1)),
        )
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        return Launch(
            rank=int(found("SLURM_PROCID", 0)),
            size=int(found("SLURM_STEP_NUM_TASKS", 1)),
            local_rank=int(found("SLURM_LOCALID", 0)),
            num_nodes=int(found("SLURM_STEP_NUM_NODES", 1)),
        )
    return Launch()


def describe_launch(*, devices: int, num_nodes: int) -> str:
    """Returns what to type before `-m lorasweep ...`, so that so many processes are launched."""
    if num_nodes == 1:
        return f"`torchrun --nproc-per-node {devices} -m lorasweep ...`"
    return (
        f"`srun --nodes {num_nodes} --ntasks-per-node {devices} python -m lorasweep ...`, or on each node `torchrun "
        f"--nnodes {num_nodes} --nproc-per-node {devices} --rdzv-backend c10d --rdzv-endpoint HOST:29400 "
        "-m lorasweep ...`"
    )


def meeting_point(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Returns host and port where the ranks of a Slurm step meet; torchrun says it itself.

    `MASTER_ADDR` and `MASTER_PORT` come first; otherwise the step's first node, and a port made of job and step.
    """
    found = environment.get
    number = int(found("SLURM_JOB_ID", "0")) * 7 + int(found("SLURM_STEP_ID", "0")) % 7
    on_one_node = int(found("SLURM_STEP_NUM_NODES", "1")) == 1
    host = "127.0.0.1" if on_one_node else first_host(found("SLURM_STEP_NODELIST", "127.0.0.1"))
    return found("MASTER_ADDR", host), int(found("MASTER_PORT", 20000 + number % 20000))


def first_host(nodes: str) -> str:
    """Returns the first host of a list in Slurm's notation, such as `node[03-05,9],login`."""
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return nodes.split(",")[0]
    number = rest.split("]")[0].split(",")[0].split("-")[0]
    return name + number + rest.partition("]")[2].split(",")[0]
