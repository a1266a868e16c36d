"""How a run's steps are cut into micro-batches. Used before there is a run, by one, and by a pack."""

from __future__ import annotations

from lorasweep.config.run import TrainerConfig
from lorasweep.data.batching import choose_accumulate
from lorasweep.data.split import Split
from lorasweep.record import RunRecord


def resolve_accumulate(config: TrainerConfig, split: Split, *, slots: int = 1, begun: RunRecord | None = None) -> int:
    """Returns the micro-batches per optimizer step.

    Args:
        config: The run's; `auto` is decided by the rows' lengths and the number of slots.
        split: The training split.
        slots: Runs that train together.
        begun: The record of the run where it goes on: it goes on with as many as it began with.
    """
    if begun is not None and "micro_batches" in begun.batching:
        return int(begun.batching["micro_batches"])
    if config.accumulate == "auto":
        return choose_accumulate(split, batch_size=config.batch_size, slots=slots)
    return config.accumulate
