"""The training step of one run, and of a pack: the forward pass of a micro-batch up to each slot's loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorasweep.config.run import RunConfig
from lorasweep.data.rows import Batch, move_tensor
from lorasweep.lora.dropout import FunctionalDropout, drop_from_default_stream
from lorasweep.lora.packed.slots import Slots
from lorasweep.objectives.objective import Objective
from lorasweep.training.run_inputs import RunInputs


def compute_losses(
    model: nn.Module, batch: Batch, *, inputs: RunInputs, configs: Sequence[RunConfig], slots: Slots | None = None
) -> Float[Tensor, " slots"]:
    """Returns each slot's sum of losses of a micro-batch, divided by the weight of its whole step, in fp32 or wider.

    The micro-batch belongs to one run, or to a pack if `slots` are given. `configs` are the runs' settings. Dropout of
    one run draws from torch's default stream. In a pack it draws from the stream of each slot, and draws no masks for
    the padding that a slot has only because another slot has longer rows.
    """
    if slots is not None:
        slots.sequence_lengths = tuple(batch["slot_lengths"].tolist()) if "slot_lengths" in batch else None
    drop = drop_from_default_stream if slots is None else slots.drop
    # a compiled model keeps torch's functional dropout; packs are never compiled
    with nullcontext() if configs[0].trainer.compile else FunctionalDropout(drop):
        objective = inputs.data.objective
        losses = objective.losses(model, add_slot_settings(batch, configs, objective))
    return losses.view(len(configs), -1).sum(1) / batch["step_weight"]


def add_slot_settings(batch: Batch, configs: Sequence[RunConfig], objective: Objective) -> Batch:
    """Returns a batch of all slots' rows with the numbers of `Objective.get_slot_numbers` for each row."""
    by_slot = [objective.get_slot_numbers(config.objective) for config in configs]
    ids = batch["input_ids"]
    values = {name: torch.tensor([settings[name] for settings in by_slot]) for name in by_slot[0]}
    rows = len(ids) // len(configs)
    return batch | {name: move_tensor(x, ids.device).repeat_interleave(rows) for name, x in values.items()}
