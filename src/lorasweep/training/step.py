"""The training step of one run, and of a pack: the forward pass of a micro-batch up to each slot's loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorasweep.config.run import RunConfig
from lorasweep.data.split import Batch, move_tensor
from lorasweep.lora.dropout import FunctionalDropout, drop_from_default_stream
from lorasweep.lora.packed.slots import Slots
from lorasweep.objectives.data_splits import read_slot_settings
from lorasweep.objectives.objective import Objective
from lorasweep.training.run_inputs import RunInputs
from lorasweep.training.unpadded import ignore_lengths, unpadded


class StepLosses(NamedTuple):
    """The forward pass of a micro-batch."""

    losses: Float[Tensor, " slots"]
    """Each slot's sum of losses divided by the weight of its whole step, in fp32."""
    num_positions: int
    """Number of positions that the model computed, with padding."""


def compute_losses(
    model: nn.Module, batch: Batch, *, inputs: RunInputs, configs: Sequence[RunConfig], slots: Slots | None = None
) -> StepLosses:
    """Computes a micro-batch of one run, or of a pack if `slots` are given. `configs` are the runs' settings.

    Two things differ. Dropout draws from torch's default stream, or from the streams of the slots. And the padding to
    the longest slot, which a run alone does not have, draws no masks.
    """
    num_slots = len(configs)
    layout = inputs.lay_out(batch, configs[0], model=model, slots=num_slots)
    drop, note_lengths = drop_from_default_stream, ignore_lengths
    if slots is not None:
        drop, note_lengths = slots.drop, slots.note_lengths
        longest = batch["row_lengths"].view(num_slots, -1).amax(1).tolist() if "row_lengths" in batch else [0]
        slots.note_lengths(longest if len(set(longest)) > 1 else None)
    # a compiled model keeps torch's functional dropout; no pack has one
    dropout = nullcontext() if configs[0].trainer.compile else FunctionalDropout(drop)
    with dropout, unpadded(model, layout, note_lengths=note_lengths):
        objective = inputs.data.objective
        losses = objective.losses(model, add_slot_settings(batch, configs, objective))
    positions = batch["input_ids"].numel() if layout is None else layout.num_positions
    return StepLosses(losses.view(num_slots, -1).sum(1) / batch["step_weight"], positions)


def add_slot_settings(batch: Batch, configs: Sequence[RunConfig], objective: Objective) -> Batch:
    """Returns a batch of all slots' rows with a number for each row for each setting of `Objective.slot_settings`."""
    by_slot = [read_slot_settings(config.objective, type(objective)) for config in configs]
    ids = batch["input_ids"]
    values = {name: torch.tensor([settings[name] for settings in by_slot]) for name in by_slot[0]}
    rows = len(ids) // len(configs)
    return batch | {name: move_tensor(x, ids.device).repeat_interleave(rows) for name, x in values.items()}
