"""What a run or a pack costs, measured on a few steps. `lorasweep plan` shows it; nothing is decided by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch

from lorasweep.config.run import OptimConfig, RunConfig
from lorasweep.data.batching import EvaluationSampler, MicroBatch, StepBatchSampler
from lorasweep.data.split import move_batch
from lorasweep.errors import OutOfMemory, first_line
from lorasweep.lora.packed import split_packed_parameters
from lorasweep.methods import METHODS
from lorasweep.training.batches import resolve_accumulate
from lorasweep.training.environment import device_of
from lorasweep.training.inputs import RunInputs
from lorasweep.training.optim import build_optimizer
from lorasweep.training.packs.optim import StackedAdamW
from lorasweep.training.packs.pack import slot_batch, slot_losses
from lorasweep.training.packs.size import build_pack
from lorasweep.training.prepare import prepare_model
from lorasweep.training.run_log import is_out_of_memory

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


def measure_run(config: RunConfig, *, inputs: RunInputs) -> RunCost:
    """Measures a few steps and a batch of evaluation of a run alone, under its method and precision; keeps nothing."""
    device = device_of(config.trainer)
    method = METHODS[config.method.name]
    state = torch.get_rng_state()
    model = prepare_model(config, inputs.base)
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=inputs.precision == "bf16" and method.needs_autocast)
    task, micros = inputs.splits.task, _micro_batches(config, inputs)
    batches = [move_batch(inputs.splits.train.batch(micro.indices), device) for micro in micros]
    times = [0.0]
    if trained:
        optimizer = build_optimizer(config.optim, method.trainable_groups(model, lr_ratio_b=config.optim.lr_ratio_b))

        def losses() -> Any:
            optimizer.zero_grad()
            for batch in batches:
                with autocast:
                    loss = task.losses(model, batch).sum() / micros[0].step_weight
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        def step() -> None:
            optimizer.step(losses)  # some optimizers ask for the loss more than once

        times = _time(step, device)
    held_out = inputs.splits.validation
    evaluation = EvaluationSampler(held_out, batch_size=config.trainer.eval_batch_size).batches
    longest = move_batch(held_out.batch(evaluation[-1]), device)

    def evaluate() -> None:
        with torch.no_grad(), autocast:
            task.score(model, longest)

    share = int(held_out.lengths.sum()) / int(held_out.lengths[torch.tensor(evaluation[-1])].sum())
    eval_s = median(_time(evaluate, device)) * share
    torch.set_rng_state(state)
    return RunCost(
        step_s=median(times),
        eval_s=eval_s,
        memory_bytes=_memory_in_use(),
        trainable_params=sum(p.numel() for p in trained),
    )


def measure_pack(config: RunConfig, *, inputs: RunInputs, slots: int) -> PackMeasurement:
    """Measures a few steps of a pack of equal runs; keeps nothing and decides nothing.

    Args:
        config: A run of the pack; its rank should be the largest of them.
        inputs: Base model and data.
        slots: Runs that train together.

    Raises:
        OutOfMemory: The pack does not fit.
    """
    device = device_of(config.trainer)
    stream = torch.get_rng_state()
    try:
        model = build_pack(config, inputs=inputs, slots=slots)
        assert isinstance(config.optim, OptimConfig)
        optimizer = StackedAdamW(split_packed_parameters(model), [config.optim] * slots)
        micros = _micro_batches(config, inputs, slots=slots)
        batches = [
            move_batch(slot_batch(inputs.splits.train, [micro] * slots, model=model), device) for micro in micros
        ]

        def step() -> None:
            for batch in batches:
                losses = slot_losses(inputs.splits.task, model, batch, slots=slots)
                (losses.sum() / micros[0].step_weight).backward()  # type: ignore[no-untyped-call]
            optimizer.clip_slots()
            optimizer.step()
            optimizer.zero_grad()

        times = _time(step, device)
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(first_line(error)) from error
        raise
    finally:
        torch.set_rng_state(stream)
    return PackMeasurement(slots=slots, step_s=median(times), memory_bytes=_memory_in_use())


def _micro_batches(config: RunConfig, inputs: RunInputs, *, slots: int = 1) -> list[MicroBatch]:
    """The first step's, cut as a pack of so many slots cuts it."""
    split, settings = inputs.splits.train, config.trainer
    accumulate = resolve_accumulate(settings, split, slots=slots)
    steps = StepBatchSampler(split, batch_size=settings.batch_size, num_steps=1, seed=0, accumulate=accumulate)
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


def _memory_in_use() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)
