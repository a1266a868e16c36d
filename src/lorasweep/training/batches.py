"""How a run's steps are cut into micro-batches. Used before there is a run, by one, and by a pack."""

from __future__ import annotations

from lorasweep.config.run import TrainerConfig
from lorasweep.data.batching import StepBatchSampler, choose_accumulate
from lorasweep.data.part import Part
from lorasweep.record import RunRecord


def resolve_accumulate(config: TrainerConfig, part: Part, *, slots: int = 1, begun: RunRecord | None = None) -> int:
    """Returns the micro-batches per optimizer step.

    Args:
        config: The run's; `auto` is decided by the rows' lengths and the number of slots.
        part: The training part.
        slots: Runs that train together.
        begun: The record of the run where it goes on: it goes on with as many as it began with.
    """
    if begun is not None and "micro_batches" in begun.batching:
        return int(begun.batching["micro_batches"])
    if config.accumulate == "auto":
        return choose_accumulate(part, batch_size=config.batch_size, slots=slots)
    return config.accumulate


def typical_lengths(config: TrainerConfig, part: Part) -> list[int]:
    """Returns the lengths of the rows of the first steps' micro-batches, one micro-batch after the other."""
    accumulate = resolve_accumulate(config, part)
    steps = StepBatchSampler(part, batch_size=config.batch_size, num_steps=4, seed=0, accumulate=accumulate)
    return [int(part.lengths[row]) for micro in steps for row in micro.indices]
