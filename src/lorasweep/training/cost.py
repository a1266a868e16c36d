"""What a run or a pack costs, measured on a few steps; and so how many runs to train together."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig
from lorasweep.data.batching import EvaluationSampler, MicroBatch, StepBatchSampler
from lorasweep.data.part import move_batch
from lorasweep.lora.packed import inject_packed_lora, split_packed_parameters
from lorasweep.methods import METHODS, copy_sharing_weights, draw_head, train_head
from lorasweep.training.batches import resolve_accumulate
from lorasweep.training.environment import device_of
from lorasweep.training.optim import build_optimizer
from lorasweep.training.pack import slot_batch, slot_losses
from lorasweep.training.pack_optim import StackedAdamW
from lorasweep.training.run import prepare_model
from lorasweep.training.run_log import is_out_of_memory
from lorasweep.training.workbench import Workbench

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


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What a run alone costs."""

    step_s: float
    """Median seconds of an optimizer step; 0 where nothing trains."""
    eval_s: float
    """Seconds of one evaluation, from one batch of it."""
    memory_bytes: int
    trainable_params: int


def measure_run(config: RunConfig, *, bench: Workbench) -> RunCost:
    """Measures a few steps and a batch of evaluation of a run alone, under its method and precision; keeps nothing."""
    device = device_of(config.trainer)
    method = METHODS[config.method.name]
    state = torch.get_rng_state()
    model = prepare_model(config, bench.base)
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bench.precision == "bf16" and method.needs_autocast)
    task, micros = bench.parts.task, _micro_batches(config, bench)
    batches = [move_batch(bench.parts.train.batch(micro.indices), device) for micro in micros]
    times = [0.0]
    if trained:
        optimizer = build_optimizer(config.optim, method.trainable_groups(model, lr_ratio_b=config.optim.lr_ratio_b))

        def step() -> None:
            for batch in batches:
                with autocast:
                    loss = task.losses(model, batch).sum() / micros[0].step_weight
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        times = _time(step, device)
    held_out = bench.parts.validation
    evaluation = EvaluationSampler(held_out, batch_size=config.trainer.eval_batch_size).batches
    longest = move_batch(held_out.batch(evaluation[-1]), device)

    def evaluate() -> None:
        with torch.no_grad(), autocast:
            task.score(model, longest)

    share = int(held_out.lengths.sum()) / int(held_out.lengths[torch.tensor(evaluation[-1])].sum())
    eval_s = _median(_time(evaluate, device)) * share
    torch.set_rng_state(state)
    return RunCost(
        step_s=_median(times),
        eval_s=eval_s,
        memory_bytes=_memory_in_use(),
        trainable_params=sum(p.numel() for p in trained),
    )


def measure_pack_sizes(config: RunConfig, *, bench: Workbench, most: int) -> list[PackMeasurement]:
    """Measures sizes 1, 2, 4, ... up to `most`, and stops where one no longer pays or the next would not fit.

    Args:
        config: A run of the pack; its rank should be the largest of them.
        bench: Base model and data.
        most: Largest size to try, such as the number of trials left.
    """
    with bench.telemetry.phase("loading"):
        return _measure_while_it_pays(config, bench, most=most)


def choose_pack_size(measured: Sequence[PackMeasurement]) -> int:
    """Returns the largest size that still pays: each must beat the one before it by `LEAST_GAIN` per slot."""
    chosen = 1
    for before, now in pairwise(measured):
        if not _pays(now, before):
            break
        chosen = now.slots
    return chosen


def _measure_while_it_pays(config: RunConfig, bench: Workbench, *, most: int) -> list[PackMeasurement]:
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
    device = device_of(config.trainer)
    stream = torch.get_rng_state()
    model: nn.Module = copy_sharing_weights(bench.base.model)
    model.to(device)
    generators = [torch.Generator().manual_seed(0) for _ in range(slots)]
    assert isinstance(config.method, LoraConfig)
    head = bench.base.head
    start = functools.partial(draw_head, names=head)
    inject_packed_lora(model, [train_head(config.method, head)] * slots, generators=generators, start=start)
    model.train()
    optimizer = StackedAdamW(split_packed_parameters(model), [config.optim] * slots)
    micros = _micro_batches(config, bench, slots=slots)
    batches = [move_batch(slot_batch(bench.parts.train, [micro] * slots, model=model), device) for micro in micros]

    def step() -> None:
        for batch in batches:
            losses = slot_losses(bench.parts.task, model, batch, slots=slots)
            (losses.sum() / micros[0].step_weight).backward()  # type: ignore[no-untyped-call]
        optimizer.clip_slots()
        optimizer.step()
        optimizer.zero_grad()

    times = _time(step, device)
    torch.set_rng_state(stream)
    return PackMeasurement(slots=slots, step_s=_median(times), memory_bytes=_memory_in_use())


def _micro_batches(config: RunConfig, bench: Workbench, *, slots: int = 1) -> list[MicroBatch]:
    """The first step's, cut as a pack of so many slots cuts it."""
    part, settings = bench.parts.train, config.trainer
    accumulate = resolve_accumulate(settings, part, slots=slots)
    steps = StepBatchSampler(part, batch_size=settings.batch_size, num_steps=1, seed=0, accumulate=accumulate)
    return steps.step(0)


def _time(action: Callable[[], None], device: torch.device) -> list[float]:
    """Seconds of each of `MEASURED_STEPS` calls, after one that warms up."""
    times = []
    for _ in range(MEASURED_STEPS + 1):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times[1:]


def _median(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 2]


def _memory_in_use() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
