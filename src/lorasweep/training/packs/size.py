"""Chooses how many runs train together, from memory, example lengths, device and the number of remaining trials.

The choice does not depend on measured times, so that a sweep can be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import MicroBatch, StepBatchSampler
from lorasweep.data.split import move_batch
from lorasweep.errors import ConfigError, OutOfMemory
from lorasweep.lora.layer_kinds import list_scales
from lorasweep.lora.packed.inject import find_slots
from lorasweep.training.environment import Precision, fork_random_streams, get_device
from lorasweep.training.failures import convert_memory_errors
from lorasweep.training.inputs import check_batch_memory
from lorasweep.training.memory import count_saved_bytes, machine_memory_bytes
from lorasweep.training.packs.pack import build_pack, build_pack_batch
from lorasweep.training.run_inputs import RunInputs
from lorasweep.training.step import compute_losses
from lorasweep.wording import format_bytes

MAX_SLOTS: Mapping[str, int] = {"cpu": 8, "cuda": 32}
"""Maximum number of slots by device.

CPU: with 16 slots instead of 8 on 2 cores, a trial's step of MiniLM-L6 (240 tokens) was 1 to 3 % shorter. A step of
`tiny` (512 tokens) was 1 % shorter in bf16 and longer in fp32 (docs/benchmarks.md, "Size of a pack on a CPU"). GPU: the
largest size that the benchmark tries, not measured."""
MAX_PASS_TOKENS: Mapping[tuple[str, Precision], int] = {
    ("cpu", "fp32"): 2048,
    ("cpu", "bf16"): 4096,
    ("cuda", "fp32"): 16384,
    ("cuda", "bf16"): 16384,
}
"""Maximum number of tokens in one pass through the model, by device and precision.

CPU: with 512, 1,024 or 2,048 tokens per slot, larger passes made a trial's step of `tiny` at most 3 % shorter, or
longer (docs/benchmarks.md). GPU: four times the 4,096 tokens per adapter at which mLoRA reports a gain of at most 8 %,
not measured."""
MAX_MEMORY_FRACTION: Mapping[str, float] = {"cpu": 0.5, "cuda": 0.8}
"""Maximum fraction of the memory without the base model that all slots of a pack may use.

In measurements of `tiny`, a step used 0.86 to 1.21 times the counted bytes. The remaining memory is for evaluation, the
data and, on a CPU, other processes."""
BYTES_PER_TRAINED_PARAMETER = 16
"""Four fp32 values: the parameter, its gradient and Adam's two moments."""
NUM_COUNTED_STEPS = 16
"""Number of first steps in which the largest micro-batch is searched. More steps would make planning slower."""


class PackSize(NamedTuple):
    """Maximum number of runs that train together, and a sentence for the record with the reason."""

    slots: int
    reason: str


def choose_pack_size(config: RunConfig, *, inputs: RunInputs, trials_left: int) -> PackSize:
    """Returns how many runs train together. The result depends only on the arguments and the machine.

    It takes one forward pass of one run, and leaves torch's random streams unchanged.

    Args:
        config: The run with the largest rank in the pack.
        inputs: Base model and data.
        trials_left: Number of runs that can share the pack, at least 1.
    """
    device = get_device(config.trainer)
    tensors = (*inputs.base.model.parameters(), *inputs.base.model.buffers())
    base_bytes = sum(part.nbytes for tensor in tensors for part in (tensor, *list_scales(tensor)))
    try:
        with convert_memory_errors():
            slot_bytes = count_slot_bytes(config, inputs=inputs)
    except OutOfMemory:
        return PackSize(1, "Trials run alone, because the forward pass of one trial ran out of memory.")
    except ConfigError:
        raise
    except ValueError as error:  # such as `method.modules_to_save` with both of two tied modules
        return PackSize(1, f"Trials run alone. {error}")
    max_bytes = max(0, int(MAX_MEMORY_FRACTION[device.type] * (machine_memory_bytes(device) - base_bytes)))
    most = MAX_SLOTS[device.type]
    limits = {
        f"the number of trials left is {trials_left}": trials_left,
        f"{format_bytes(max_bytes)} of memory hold no more": max_bytes // slot_bytes,
        f"{most} is the maximum on {device.type} unless `worker.pack_size` is larger": most,
    }
    # Try each number of slots: with more slots, a step may have more micro-batches, and then fewer tokens per pass.
    max_tokens = MAX_PASS_TOKENS[device.type, inputs.precision]
    candidates = range(min(limits.values()), 0, -1)
    fitting = (slots for slots in candidates if count_pass_tokens(config, slots, inputs=inputs) <= max_tokens)
    limits[f"a pass in {inputs.precision} may have {max_tokens:,} tokens"] = next(fitting, 1)
    reason = min(limits, key=lambda name: limits[name])  # the first of equal limits
    slots = max(1, limits[reason])
    size = "Trials run alone" if slots == 1 else f"Packs have up to {slots} slots"
    return PackSize(slots, f"{size}, because {reason}. One slot needs about {format_bytes(slot_bytes)}.")


def count_slot_bytes(config: RunConfig, *, inputs: RunInputs) -> int:
    """Returns the memory of one slot: tensors that are saved for the backward pass, and trained parameters with AdamW.

    The measured pass has the largest micro-batch of a solo run. A slot of a pack needs no more memory, because a pack
    has micro-batches of the same size or smaller.
    """
    device, split = get_device(config.trainer), inputs.data.train
    with fork_random_streams(device):
        model, _ = build_pack([config], inputs=inputs)
        micros = build_first_micro_batches(config, inputs, num_steps=NUM_COUNTED_STEPS)
        largest = max(micros, key=lambda m: len(m.indices) * int(split.padded_lengths[torch.tensor(m.indices)].max()))
        batch, slots = move_batch(build_pack_batch(split, [largest]), device), find_slots(model)
        saved = count_saved_bytes(
            lambda: compute_losses(model, batch, inputs=inputs, configs=[config], slots=slots).losses,
            model=model,
            is_checkpointed=config.trainer.activation_checkpointing,
        )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return saved + BYTES_PER_TRAINED_PARAMETER * trained


def count_pass_tokens(config: RunConfig, slots: int, *, inputs: RunInputs) -> int:
    """Returns the mean number of tokens, without padding, in one pass through the model of a pack."""
    split, settings = inputs.splits.train, config.trainer
    return math.ceil(slots * settings.batch_size * float(split.lengths.double().mean()) / settings.accumulate)


def build_first_micro_batches(config: RunConfig, inputs: RunInputs, *, num_steps: int) -> list[MicroBatch]:
    split, settings = inputs.data.train, config.trainer
    check_batch_memory(settings, split)
    size, accumulate = settings.batch_size, settings.accumulate
    return list(StepBatchSampler(split, batch_size=size, num_steps=num_steps, seed=0, accumulate=accumulate))
