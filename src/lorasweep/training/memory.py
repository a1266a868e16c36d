"""Measures the memory of the machine and of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn


def machine_memory_bytes(device: torch.device) -> int:
    """Returns the total memory of a GPU, or of the host within the limits of its control groups.

    It does not depend on how much memory is free now, because packs are planned with it.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min([int(psutil.virtual_memory().total), *cgroup_limits()])


def free_memory_bytes() -> int:
    """Returns the memory of the host that can be allocated now without swapping."""
    return min([int(psutil.virtual_memory().available), *cgroup_limits()])


def cgroup_limits(
    *, memberships: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Yields the memory limits in bytes of this process's control groups and of their parent groups.

    Containers and Slurm set these limits, and psutil does not read them. See cgroups(7): `memberships` has lines
    `number:controllers:path`. `mount` has the groups of version 2, and `mount/memory` has the groups of version 1.
    """
    if not memberships.exists():  # macOS
        return
    for line in memberships.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2 has one hierarchy for all controllers
            root, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            try:
                yield int((root / folder / name).read_text())
            except (OSError, ValueError):  # the group is not visible in a container, or its limit is `max`
                continue


def count_saved_bytes(compute: Callable[[], Tensor], *, model: nn.Module) -> int:
    """Returns the bytes that a forward pass of the model keeps for its backward pass.

    Each storage counts once. Parameters and buffers of the model do not count.
    """
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep_size(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_storages:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep_size, lambda tensor: tensor):
        # `result` keeps all storages alive, so that no two of them have the same address
        result = compute()
    del result
    return sum(saved.values())
