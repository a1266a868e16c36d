"""Measures the memory of the machine and of a forward pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from lorasweep.training.activation_checkpointing import checkpoint_activations


def machine_memory_bytes(device: torch.device) -> int:
    """Returns the total memory of a GPU, or of the host within the limits of its control groups.

    It does not depend on how much memory is free now, because packs are planned with it.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min([int(psutil.virtual_memory().total), *cgroup_limits()])


def free_memory_bytes() -> int:
    """Returns the host's memory that can be allocated now without swapping, within the limits of control groups."""
    return min([int(psutil.virtual_memory().available), *cgroup_limits(is_free=True)])


def cgroup_limits(
    *, is_free: bool = False, memberships: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Yields the memory limits in bytes of this process's control groups and of their parent groups.

    With `is_free`, yields what is left of each limit. Cached files count as free, because the system drops them.

    Containers and Slurm set these limits, and psutil does not read them. See cgroups(7): `memberships` has lines
    `number:controllers:path`. `mount` has the groups of version 2, and `mount/memory` has the groups of version 1.
    """
    if not memberships.exists():  # macOS
        return
    for line in memberships.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2 has one hierarchy for all controllers
            root, name, used = mount, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, name, used = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            try:
                limit, used_bytes = int((root / folder / name).read_text()), 0
                if is_free:
                    cached = re.search(
                        r"^(?:total_)?inactive_file (\d+)", (root / folder / "memory.stat").read_text(), re.M
                    )
                    used_bytes = int((root / folder / used).read_text()) - int(cached[1] if cached else 0)
                yield limit - used_bytes
            except (OSError, ValueError):  # the group is not visible in a container, or its limit is `max`
                continue


def count_saved_bytes(compute: Callable[[], Tensor], *, model: nn.Module, is_checkpointed: bool = False) -> int:
    """Returns the bytes that a forward pass of the model keeps for its backward pass.

    They are only counted, so no backward pass can follow. Each storage counts once. Parameters and buffers of the model
    do not count. With activation checkpointing (`is_checkpointed`) the bytes are those of the inputs of all blocks, and
    twice those that the largest block keeps when it is computed again, because the tensors of its backward pass take
    about as much. The model must then be prepared by `checkpoint_activations` again before it trains.
    """
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}
    largest_block = 0

    def note_storages(storages: dict[int, torch.UntypedStorage]) -> AbstractContextManager[None]:
        def note(tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in model_storages:
                storages[storage.data_ptr()] = storage  # keeps it alive, so that no two have the same address

        return torch.autograd.graph.saved_tensors_hooks(note, nn.Identity())

    @contextmanager
    def count_block() -> Iterator[None]:
        nonlocal largest_block
        block: dict[int, torch.UntypedStorage] = {}
        with note_storages(block):  # takes the place of the hooks that let the block be computed again
            yield
        num_bytes = sum(storage.nbytes() for address, storage in block.items() if address not in saved)
        largest_block = max(largest_block, num_bytes)

    if is_checkpointed:
        checkpoint_activations(model, lambda: (count_block(), nullcontext()))
    with note_storages(saved):
        compute()
    return sum(storage.nbytes() for storage in saved.values()) + 2 * largest_block
