"""Measures the time and memory of a run, alone or in a pack, on a few steps. Only `lorasweep plan` uses the result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import EvaluationSampler
from lorasweep.data.split import move_batch, repeat_batch
from lorasweep.lora import slot_model
from lorasweep.methods import METHODS
from lorasweep.training.environment import get_device, peak_memory_bytes, reset_peak_memory
from lorasweep.training.failures import convert_memory_errors
from lorasweep.training.inputs import RunInputs
from lorasweep.training.optim import build_optimizer
from lorasweep.training.packs.optim import SlotOptimizer
from lorasweep.training.packs.pack import build_pack, compute_slot_losses
from lorasweep.training.packs.size import build_first_micro_batches
from lorasweep.training.prepare import prepare_model

NUM_MEASURED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """The cost of one run. In a pack, time and parameters are the run's share."""

    slots: int
    """Number of runs that train together; 1 for a run alone."""
    step_s: float
    """Median seconds of an optimizer step; 0 if nothing trains."""
    eval_s: float
    """Seconds of one evaluation, extrapolated from its longest batch."""
    memory_bytes: int
    """Peak memory of the whole pack, not of one run."""
    trainable_params: int


def measure_run(config: RunConfig, *, inputs: RunInputs, slots: int | None = None) -> RunCost:
    """Measures a few training steps and one evaluation batch. Writes nothing.

    Args:
        config: The settings of the run. For a pack, the settings of its run with the largest rank.
        inputs: Base model and data.
        slots: Number of runs with these settings that train together. None: the run trains alone.

    Raises:
        OutOfMemory: The run does not fit.
    """
    device, task, num_slots = get_device(config.trainer), inputs.splits.task, slots or 1
    reset_peak_memory()
    # a measurement must not change the random numbers of later runs
    with convert_memory_errors(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        optimizer, slot_optimizers = None, []
        if slots is None:
            model = prepare_model(config, inputs.base).to(device)
            groups = METHODS[config.method.name].trainable_groups(model, lr_ratio_b=config.optim.lr_ratio_b)
            optimizer = build_optimizer(config.optim, groups) if groups else None
        else:
            model, _ = build_pack([config] * slots, inputs=inputs)
            heads = inputs.base.new_head_names
            slot_optimizers = [SlotOptimizer(slot_model(model, k), config, head_names=heads) for k in range(slots)]
        micro_batches = build_first_micro_batches(config, inputs, slots=num_slots, num_steps=1)
        train = inputs.splits.train
        batches = [
            move_batch(train.batch([*micro_batch.indices] * num_slots, slots=num_slots), device)
            for micro_batch in micro_batches
        ]

        def train_step() -> None:
            if optimizer is not None:
                optimizer.step(lambda: backpropagate().item())  # some optimizers ask for the loss more than once
            else:
                backpropagate()
                for slot_optimizer in slot_optimizers:
                    slot_optimizer.step()

        def backpropagate() -> Tensor:
            if optimizer is not None:
                optimizer.zero_grad()
            for batch in batches:
                with inputs.autocast(config):
                    loss = compute_slot_losses(task, model, batch, slots=num_slots).sum() / micro_batches[0].step_weight
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        # Only the longest batch is measured. The time of a whole evaluation follows from its number of tokens.
        split = inputs.splits.validation
        batch_size = max(1, config.trainer.eval_batch_size // num_slots)
        longest_rows = EvaluationSampler(split, batch_size=batch_size).batches[-1]
        longest_batch = repeat_batch(move_batch(split.batch(longest_rows), device), slots=num_slots)
        token_fraction = int(split.lengths[torch.tensor(longest_rows)].sum()) / int(split.lengths.sum())

        def evaluate() -> None:
            with torch.no_grad(), inputs.autocast(config):
                task.score(model, longest_batch)

        step_s = _measure_seconds(train_step, device) if optimizer or slot_optimizers else 0.0
        eval_s = _measure_seconds(evaluate, device) / token_fraction
    return RunCost(
        slots=num_slots,
        step_s=step_s / num_slots,
        eval_s=eval_s / num_slots,
        memory_bytes=peak_memory_bytes(),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad) // num_slots,
    )


def _measure_seconds(action: Callable[[], None], device: torch.device) -> float:
    """Returns the median seconds of a few calls, after one call to warm up."""
    times = []
    for _ in range(NUM_MEASURED_STEPS + 1):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[1:])
