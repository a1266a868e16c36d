"""How many runs to train together: measured on a few steps at growing sizes, the largest that still pays."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from lorasweep.config.run import RunConfig
from lorasweep.lora.packed import inject_packed_lora, split_packed_parameters
from lorasweep.methods import copy_sharing_weights
from lorasweep.training.environment import resolve_device
from lorasweep.training.pack import slot_losses
from lorasweep.training.pack_optim import StackedAdamW
from lorasweep.training.run_log import Workbench, is_out_of_memory

LEAST_GAIN = 0.05
"""A size must save this share of a run's time over the size before it."""
MEMORY_ROOM = 0.2
"""Share of the memory that stays free at the size that is chosen."""
MEASURED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class PackMeasurement:
    """What a step costs at one size."""

    slots: int
    step_s: float
    """Median seconds of a step of all slots."""
    memory_bytes: int
    """Memory in use after it: allocated on the GPU, else resident in the process."""

    @property
    def slot_step_s(self) -> float:
        """Seconds of a step per slot."""
        return self.step_s / self.slots


def measure_pack_sizes(config: RunConfig, *, bench: Workbench, most: int) -> list[PackMeasurement]:
    """Measures sizes 1, 2, 4, ... up to `most`, and stops where one no longer pays or the next would not fit.

    Args:
        config: A run of the pack; its rank should be the largest of them.
        bench: Base model and data.
        most: Largest size to try, such as the number of trials left.
    """
    measured: list[PackMeasurement] = []
    slots = 1
    while slots <= most:
        try:
            measured.append(_measure(config, bench, slots=slots))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        if len(measured) > 1 and not _pays(measured[-1], measured[-2]):
            break
        if not _fits_twice(measured):
            break
        slots *= 2
    return measured


def choose_pack_size(measured: Sequence[PackMeasurement]) -> int:
    """Returns the largest size that still pays: each must beat the one before it by `LEAST_GAIN` per slot."""
    chosen = 1
    for before, now in pairwise(measured):
        if not _pays(now, before):
            break
        chosen = now.slots
    return chosen


def _pays(now: PackMeasurement, before: PackMeasurement) -> bool:
    return now.slot_step_s <= (1 - LEAST_GAIN) * before.slot_step_s


def _fits_twice(measured: Sequence[PackMeasurement]) -> bool:
    """Whether twice the last size would leave room, by what the last size took over the first."""
    last = measured[-1]
    per_slot = (last.memory_bytes - measured[0].memory_bytes) / max(last.slots - 1, 1) if len(measured) > 1 else 0
    return per_slot * last.slots <= (1 - MEMORY_ROOM) * free_memory_bytes()


def free_memory_bytes() -> int:
    """Returns the memory that is still free: on the GPU, else on the host."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _measure(config: RunConfig, bench: Workbench, *, slots: int) -> PackMeasurement:
    device = torch.device("cuda" if resolve_device(config.trainer) == "gpu" else "cpu")
    stream = torch.get_rng_state()
    model: nn.Module = copy_sharing_weights(bench.base.model)
    model.to(device)
    generators = [torch.Generator().manual_seed(0) for _ in range(slots)]
    inject_packed_lora(model, [config.method] * slots, generators=generators)  # type: ignore[list-item]
    model.train()
    optimizer = StackedAdamW(split_packed_parameters(model), [config.optim] * slots)
    rows = config.trainer.batch_size // config.trainer.accumulate
    chosen = torch.arange(rows) % len(bench.parts.train.tokens)
    blocks = bench.parts.train.tokens[chosen].repeat(slots, 1).to(device)
    times = []
    for _ in range(MEASURED_STEPS + 1):  # the first warms up
        started = time.perf_counter()
        slot_losses(model, blocks, slots=slots).mean(dim=1).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.clip_slots()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    torch.set_rng_state(stream)
    return PackMeasurement(slots=slots, step_s=sorted(times[1:])[MEASURED_STEPS // 2], memory_bytes=_memory_in_use())


def _memory_in_use() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
