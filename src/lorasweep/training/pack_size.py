"""Chooses how many runs train together, from example lengths, device and the number of remaining trials.

The choice does not depend on measured times or memory, so that a sweep can be repeated. A pack that runs out of memory
continues in smaller packs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lorasweep.config.run import RunConfig
from lorasweep.training.environment import Precision, get_device
from lorasweep.training.run_inputs import RunInputs

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


class PackSize(NamedTuple):
    """Maximum number of runs that train together, and a sentence for the record with the reason."""

    slots: int
    reason: str


def choose_pack_size(config: RunConfig, *, inputs: RunInputs, trials_left: int) -> PackSize:
    """Returns how many runs train together. `trials_left` is the number of runs that can share the pack, at least 1."""
    split, settings = inputs.splits.train, config.trainer
    device = get_device(settings).type
    most, max_tokens = MAX_SLOTS[device], MAX_PASS_TOKENS[device, inputs.precision]
    # mean tokens of one slot in a pass, without padding
    slot_tokens = settings.batch_size * float(split.lengths.double().mean()) / settings.accumulate
    limits = {
        f"the number of trials left is {trials_left}": trials_left,
        f"{most} is the maximum on {device} unless `worker.pack_size` is larger": most,
        f"a pass in {inputs.precision} may have {max_tokens:,} tokens": int(max_tokens / slot_tokens),
    }
    reason = min(limits, key=lambda name: limits[name])  # the first of equal limits
    slots = max(1, limits[reason])
    size = "Trials run alone" if slots == 1 else f"Packs have up to {slots} slots"
    return PackSize(slots, f"{size}, because {reason}.")
