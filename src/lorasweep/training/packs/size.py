"""How many runs train together: a rule of memory, example lengths, device and trials left, which reads no clock."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig
from lorasweep.data.batching import MicroBatch, StepBatchSampler
from lorasweep.data.split import move_batch
from lorasweep.errors import OutOfMemory
from lorasweep.lora import inject_packed_lora
from lorasweep.methods import add_head_to_modules_to_save, copy_sharing_weights, draw_head
from lorasweep.training.environment import Precision, device_of
from lorasweep.training.failures import convert_memory_errors
from lorasweep.training.inputs import RunInputs, resolve_accumulate
from lorasweep.training.memory import count_saved_bytes, machine_memory_bytes
from lorasweep.training.packs.pack import slot_batch, slot_losses
from lorasweep.wording import format_bytes

MAX_SLOTS: Mapping[str, int] = {"cpu": 8, "cuda": 32}
"""Slots of a pack by device. CPU: from 8 to 16 slots a trial's step of MiniLM-L6 (240 tokens) became 1 to 3 % shorter
on 2 cores, that of `tiny` (512 tokens) 1 % in bf16 and longer in fp32 (docs/benchmarks.md, packs). GPU: the largest
size that the benchmark tries; nothing was measured there."""
MAX_PASS_TOKENS: Mapping[tuple[str, Precision], int] = {
    ("cpu", "fp32"): 2048,
    ("cpu", "bf16"): 4096,
    ("cuda", "fp32"): 16384,
    ("cuda", "bf16"): 16384,
}
"""Tokens that go through the model at once, by device and precision. CPU: with 512, 1,024 and 2,048 tokens per slot a
trial's step of `tiny` gained at most 3 % beyond these sizes, or became longer (docs/benchmarks.md). GPU: mLoRA reports
a gain of at most 8 % at 4,096 tokens per adapter, so four such slots are more than pay; nothing was measured here."""
MAX_MEMORY_FRACTION: Mapping[str, float] = {"cpu": 0.5, "cuda": 0.8}
"""Share of the machine's memory without the base model that the slots of a pack may have. A step took 0.93 to 1.04 of
the bytes that are counted for its slots; the rest is for evaluation, the data and, on a host, other processes."""
BYTES_PER_TRAINED_NUMBER = 16
"""Bytes of a weight, its gradient and Adam's two moments, each in fp32."""
NUM_COUNTED_STEPS = 16
"""Steps among whose micro-batches the largest is looked for: the memory of more steps would cost more to plan."""


class PackSize(NamedTuple):
    """How many runs train together at most, and why, as a sentence for the record."""

    slots: int
    reason: str


def choose_pack_size(config: RunConfig, *, inputs: RunInputs, trials_left: int) -> PackSize:
    """Returns how many runs train together. The same arguments on the same machine always give the same answer.

    Costs one forward pass of one run. Draws nothing from torch's random streams.

    Args:
        config: The run of the pack that has the largest rank.
        inputs: Base model and data.
        trials_left: Runs that can share the pack, at least 1.
    """
    device = device_of(config.trainer)
    base = sum(tensor.nbytes for tensor in (*inputs.base.model.parameters(), *inputs.base.model.buffers()))
    try:
        with convert_memory_errors(), inputs.telemetry.phase("loading"):
            slot_bytes = count_slot_bytes(config, inputs=inputs)
    except OutOfMemory:
        return PackSize(1, "Trials run alone, because memory ran out in a forward pass of one of them.")
    return limit_slots(
        device.type,
        inputs.precision,
        trials_left=trials_left,
        slot_bytes=slot_bytes,
        room_bytes=max(0, int(MAX_MEMORY_FRACTION[device.type] * (machine_memory_bytes(device) - base))),
        pass_tokens=functools.partial(count_pass_tokens, config, inputs=inputs),
    )


def limit_slots(
    device_type: str,
    precision: Precision,
    *,
    trials_left: int,
    slot_bytes: int,
    room_bytes: int,
    pass_tokens: Callable[[int], int],
) -> PackSize:
    """Returns the largest number of slots within all limits, at least 1, and names the limit that decides.

    Args:
        device_type: `cpu` or `cuda`.
        precision: The precision in which the base computes.
        trials_left: Runs that can share the pack.
        slot_bytes: Memory that one slot needs.
        room_bytes: Memory that the slots together may have.
        pass_tokens: Returns the tokens of one pass through the model of a pack of this many slots.
    """
    where = "a GPU" if device_type == "cuda" else "a CPU"
    max_tokens = MAX_PASS_TOKENS[device_type, precision]
    left = "one trial is left" if trials_left == 1 else f"{trials_left} trials are left"
    # of equal limits the first decides: that the trials are used up says more than the others
    limits = [
        (trials_left, left),
        (room_bytes // slot_bytes, "more would not fit"),
        (MAX_SLOTS[device_type], f"a pack on {where} may have {MAX_SLOTS[device_type]} slots"),
    ]
    slots, limit = min(limits, key=lambda pair: pair[0])
    # More slots are cut into more micro-batches, so the tokens of a pass need not grow with the slots: try each number.
    within = next((number for number in range(slots, 0, -1) if pass_tokens(number) <= max_tokens), 1)
    if within < slots:
        slots, limit = within, f"a pass on {where} in {precision} may have {max_tokens:,} tokens"
    slots = max(1, slots)
    size = "Trials run alone" if slots == 1 else f"Packs have up to {slots} slots"
    return PackSize(
        slots,
        f"{size}, because {limit}: one slot needs about {format_bytes(slot_bytes)} of the {format_bytes(room_bytes)} "
        f"that a pack may have, and its pass through the model has {pass_tokens(1):,} tokens.",
    )


def count_slot_bytes(config: RunConfig, *, inputs: RunInputs) -> int:
    """Returns the memory of one slot: the tensors that a forward pass keeps for the backward pass, and AdamW's.

    The pass is that of the largest micro-batch of a run alone. A pack cuts its steps into more, so its slots need less.
    """
    device, split = device_of(config.trainer), inputs.splits.train
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        model = build_pack(config, inputs=inputs, slots=1)
        micros = first_micro_batches(config, inputs, slots=1, num_steps=NUM_COUNTED_STEPS)
        largest = max(micros, key=lambda m: len(m.indices) * int(split.lengths[torch.tensor(m.indices)].max()))
        batch = move_batch(slot_batch(split, [largest], model=model), device)
        saved = count_saved_bytes(lambda: slot_losses(inputs.splits.task, model, batch, slots=1), model=model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return saved + BYTES_PER_TRAINED_NUMBER * trained


def count_pass_tokens(config: RunConfig, slots: int, *, inputs: RunInputs) -> int:
    """Returns the tokens without padding that go through the model at once in a pack, on average."""
    split, settings = inputs.splits.train, config.trainer
    accumulate = resolve_accumulate(settings, split, slots=slots)
    return math.ceil(slots * settings.batch_size * float(split.lengths.double().mean()) / accumulate)


def first_micro_batches(config: RunConfig, inputs: RunInputs, *, slots: int, num_steps: int) -> list[MicroBatch]:
    """Returns the micro-batches of the first steps of a run, cut as a pack of this many slots cuts them."""
    split, settings = inputs.splits.train, config.trainer
    accumulate = resolve_accumulate(settings, split, slots=slots)
    size = settings.batch_size
    return list(StepBatchSampler(split, batch_size=size, num_steps=num_steps, seed=0, accumulate=accumulate))


def build_pack(config: RunConfig, *, inputs: RunInputs, slots: int) -> nn.Module:
    """Returns a model of equal slots, ready to train, on the run's device; the base's weights are shared."""
    assert isinstance(config.method, LoraConfig)
    model: nn.Module = copy_sharing_weights(inputs.base.model)
    model.to(device_of(config.trainer))
    head = inputs.base.new_head_names
    inject_packed_lora(
        model,
        [add_head_to_modules_to_save(config.method, head)] * slots,
        generators=[torch.Generator().manual_seed(0) for _ in range(slots)],
        prepare_copy=functools.partial(draw_head, names=head),
    )
    return model.train()
