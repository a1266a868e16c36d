"""Measures the cost of a run, alone or in a pack, on a few steps. `lorasweep plan` shows it; no decision uses it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from lorasweep.config.run import OptimConfig, RunConfig
from lorasweep.data.batching import EvaluationSampler
from lorasweep.data.split import move_batch, repeat_batch
from lorasweep.lora import split_lora_parameters
from lorasweep.methods import METHODS
from lorasweep.training.environment import device_of, peak_memory_bytes, reset_peak_memory
from lorasweep.training.failures import convert_memory_errors
from lorasweep.training.inputs import RunInputs
from lorasweep.training.optim import build_optimizer
from lorasweep.training.packs.optim import StackedAdamW
from lorasweep.training.packs.pack import build_pack, slot_losses
from lorasweep.training.packs.size import first_micro_batches
from lorasweep.training.prepare import prepare_model

NUM_MEASURED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """The cost of one run; in a pack, its share of the pack's cost."""

    slots: int
    """Slots of the pack; 1 for a run alone."""
    step_s: float
    """Median seconds of an optimizer step; 0 if nothing trains."""
    eval_s: float
    """Seconds of one evaluation, extrapolated from its longest batch."""
    memory_bytes: int
    """Peak memory of the whole pack, as `peak_memory_bytes` measures it."""
    trainable_params: int


def measure_run(config: RunConfig, *, inputs: RunInputs, slots: int | None = None) -> RunCost:
    """Measures a few training steps and one evaluation batch. Writes nothing.

    Args:
        config: The settings of the run, or in a pack of its run with the largest rank.
        inputs: Base model and data.
        slots: Runs with these settings that train together. None: the run trains alone.

    Raises:
        OutOfMemory: The run does not fit.
    """
    device, task, num = device_of(config.trainer), inputs.splits.task, slots or 1
    reset_peak_memory()
    # forked, because a measurement must not change what later runs draw
    with convert_memory_errors(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if slots is None:
            model = prepare_model(config, inputs.base).to(device)
            groups = METHODS[config.method.name].trainable_groups(model, lr_ratio_b=config.optim.lr_ratio_b)
            optimizer = build_optimizer(config.optim, groups) if groups else None
        else:
            assert isinstance(config.optim, OptimConfig)
            model, _ = build_pack([config] * slots, inputs=inputs)
            optimizer = StackedAdamW(split_lora_parameters(model), [config.optim] * slots)
        micros = first_micro_batches(config, inputs, slots=num, num_steps=1)
        train = inputs.splits.train
        batches = [move_batch(train.batch([*micro.indices] * num, slots=num), device) for micro in micros]

        def step() -> None:
            if isinstance(optimizer, StackedAdamW):
                losses()
                optimizer.clip_slots()
                optimizer.step()
            elif optimizer is not None:
                optimizer.step(lambda: losses().item())  # some optimizers ask for the loss more than once

        def losses() -> Tensor:
            assert optimizer is not None
            optimizer.zero_grad()
            for batch in batches:
                with inputs.autocast(config):
                    loss = slot_losses(task, model, batch, slots=num).sum() / micros[0].step_weight
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        # The longest batch stands for all: an evaluation takes as long as its number of tokens says.
        split = inputs.splits.validation
        longest = EvaluationSampler(split, batch_size=max(1, config.trainer.eval_batch_size // num)).batches[-1]
        held_out = repeat_batch(move_batch(split.batch(longest), device), slots=num)
        share = int(split.lengths[torch.tensor(longest)].sum()) / int(split.lengths.sum())

        def evaluate() -> None:
            with torch.no_grad(), inputs.autocast(config):
                task.score(model, held_out)

        step_s = _time(step, device) if optimizer is not None else 0.0
        eval_s = _time(evaluate, device) / share
    return RunCost(
        slots=num,
        step_s=step_s / num,
        eval_s=eval_s / num,
        memory_bytes=peak_memory_bytes(),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad) // num,
    )


def _time(action: Callable[[], None], device: torch.device) -> float:
    """Returns the median seconds of a few calls, after one that warms up."""
    times = []
    for _ in range(NUM_MEASURED_STEPS + 1):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[1:])
