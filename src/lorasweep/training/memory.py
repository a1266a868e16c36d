"""The memory of a machine and of a forward pass: counted, so that it does not depend on the memory that is free now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn


def machine_memory_bytes(device: torch.device) -> int:
    """Returns the memory of a GPU, or of the host within the limits of its control groups, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min([int(psutil.virtual_memory().total), *cgroup_limits()])


def cgroup_limits(
    *, memberships: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Yields the memory limits in bytes of the control groups of this process, and of the groups above them.

    Containers and Slurm set these limits; psutil does not read them. See cgroups(7). Yields nothing on systems without
    control groups.

    Args:
        memberships: A file of lines `number:controllers:path`.
        mount: The folder of the control groups of version 2, and in `memory` below it of version 1.
    """
    try:
        lines = memberships.read_text().splitlines()
    except OSError:
        return
    for line in lines:
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
            except (OSError, ValueError):  # no such group inside of a container; `max`, which is no limit
                continue


def count_saved_bytes(compute: Callable[[], Tensor], *, model: nn.Module) -> int:
    """Returns the bytes that a forward pass keeps for its backward pass, which is not run.

    Each storage counts once. Parameters and buffers of the model do not count: they exist without a pass, too.

    Args:
        compute: The forward pass. Its result is kept until all is counted.
        model: The model of the pass.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()
    del result
    return sum(saved.values())
