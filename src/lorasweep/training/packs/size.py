"""Chooses how many runs train together, from memory, example lengths, device and trials left; reads no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import MicroBatch, StepBatchSampler
from lorasweep.data.split import move_batch
from lorasweep.errors import OutOfMemory
from lorasweep.training.environment import Precision, get_device
from lorasweep.training.failures import convert_memory_errors
from lorasweep.training.inputs import RunInputs, resolve_accumulate
from lorasweep.training.memory import count_saved_bytes, machine_memory_bytes
from lorasweep.training.packs.pack import build_pack, slot_batch, slot_losses
from lorasweep.wording import format_bytes

MAX_SLOTS: Mapping[str, int] = {"cpu": 8, "cuda": 32}
"""Maximum number of slots by device. CPU: on 2 cores, 16 slots instead of 8 made a trial's step of MiniLM-L6 (240
tokens) 1 to 3 % shorter. A step of `tiny` (512 tokens) became 1 % shorter in bf16 and longer in fp32
(docs/benchmarks.md, packs). GPU: the largest size that the benchmark tries; not measured."""
MAX_PASS_TOKENS: Mapping[tuple[str, Precision], int] = {
    ("cpu", "fp32"): 2048,
    ("cpu", "bf16"): 4096,
    ("cuda", "fp32"): 16384,
    ("cuda", "bf16"): 16384,
}
"""Maximum number of tokens that go through the model at once, by device and precision. CPU: with 512, 1,024 or 2,048
tokens per slot, larger passes made a trial's step of `tiny` at most 3 % shorter, or longer (docs/benchmarks.md). GPU:
four times the 4,096 tokens per adapter at which mLoRA reports a gain of at most 8 %; not measured."""
MAX_MEMORY_FRACTION: Mapping[str, float] = {"cpu": 0.5, "cuda": 0.8}
"""Fraction of the memory beside the base model that the slots of a pack may use. A step took 0.93 to 1.04 of the
counted bytes. The other memory is for evaluation, the data and, on a CPU, other processes."""
BYTES_PER_TRAINED_NUMBER = 16
"""A weight, its gradient and Adam's two moments, each in fp32."""
NUM_COUNTED_STEPS = 16
"""Number of first steps whose largest micro-batch is measured. More steps would make planning slower."""


class PackSize(NamedTuple):
    """Maximum number of runs that train together, and a sentence with the reason for the record."""

    slots: int
    reason: str


def choose_pack_size(config: RunConfig, *, inputs: RunInputs, trials_left: int) -> PackSize:
    """Returns how many runs train together. The answer depends only on the arguments and the machine.

    Costs one forward pass of one run. Draws nothing from torch's random streams.

    Args:
        config: The run of the pack that has the largest rank.
        inputs: Base model and data.
        trials_left: Number of runs that can share the pack, at least 1.
    """
    device = get_device(config.trainer)
    base_bytes = sum(tensor.nbytes for tensor in (*inputs.base.model.parameters(), *inputs.base.model.buffers()))
    try:
        with convert_memory_errors(), inputs.telemetry.phase("loading"):
            slot_bytes = count_slot_bytes(config, inputs=inputs)
    except OutOfMemory:
        return PackSize(1, "Trials run alone, because memory ran out in a forward pass of one of them.")
    max_bytes = max(0, int(MAX_MEMORY_FRACTION[device.type] * (machine_memory_bytes(device) - base_bytes)))
    limits = {
        f"the number of trials left is {trials_left}": trials_left,
        f"{format_bytes(max_bytes)} of memory hold no more": max_bytes // slot_bytes,
        f"a pack on {device.type} may have {MAX_SLOTS[device.type]} slots": MAX_SLOTS[device.type],
    }
    # More slots may be cut into more micro-batches, so the tokens of a pass need not grow with the slots: try each.
    max_tokens = MAX_PASS_TOKENS[device.type, inputs.precision]
    candidates = range(min(limits.values()), 0, -1)
    fitting = (slots for slots in candidates if count_pass_tokens(config, slots, inputs=inputs) <= max_tokens)
    limits[f"a pass in {inputs.precision} may have {max_tokens:,} tokens"] = next(fitting, 1)
    reason = min(limits, key=lambda name: limits[name])  # the first of equal limits
    slots = max(1, limits[reason])
    size = "Trials run alone" if slots == 1 else f"Packs have up to {slots} slots"
    return PackSize(slots, f"{size}, because {reason}; one slot needs about {format_bytes(slot_bytes)}.")


def count_slot_bytes(config: RunConfig, *, inputs: RunInputs) -> int:
    """Returns the memory of one slot: tensors that a forward pass saves for the backward pass, and AdamW's state.

    The pass has the largest micro-batch of a run alone. A pack may cut its steps further, so its slots need no more.
    """
    device, split = get_device(config.trainer), inputs.splits.train
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        model, _ = build_pack([config], inputs=inputs)
        micros = first_micro_batches(config, inputs, slots=1, num_steps=NUM_COUNTED_STEPS)
        largest = max(micros, key=lambda m: len(m.indices) * int(split.lengths[torch.tensor(m.indices)].max()))
        batch = move_batch(slot_batch(split, [largest], model=model), device)
        saved = count_saved_bytes(lambda: slot_losses(inputs.splits.task, model, batch, slots=1), model=model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return saved + BYTES_PER_TRAINED_NUMBER * trained


def count_pass_tokens(config: RunConfig, slots: int, *, inputs: RunInputs) -> int:
    """Returns the mean number of tokens, without padding, that go through the model of a pack at once."""
    split, settings = inputs.splits.train, config.trainer
    accumulate = resolve_accumulate(settings, split, slots=slots)
    return math.ceil(slots * settings.batch_size * float(split.lengths.double().mean()) / accumulate)


def first_micro_batches(config: RunConfig, inputs: RunInputs, *, slots: int, num_steps: int) -> list[MicroBatch]:
    """Returns the micro-batches of a run's first steps in a pack of this many slots."""
    split, settings = inputs.splits.train, config.trainer
    accumulate = resolve_accumulate(settings, split, slots=slots)
    size = settings.batch_size
    return list(StepBatchSampler(split, batch_size=size, num_steps=num_steps, seed=0, accumulate=accumulate))
