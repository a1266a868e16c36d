"""The training step of the slots of a pack, or of one run: the forward pass of a micro-batch up to each slot's loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorasweep.config.run import RunConfig
from lorasweep.data.rows import Batch, move_tensor
from lorasweep.objectives.objective import Objective


class SlotNumbers:
    """The numbers that an objective has for each slot, such as β of DPO, as tensors that are made once."""

    def __init__(self, configs: Sequence[RunConfig], objective: Objective) -> None:
        by_slot = [objective.get_slot_numbers(config.objective) for config in configs]
        self.num_slots = len(by_slot)
        self._values = {name: [numbers[name] for numbers in by_slot] for name in by_slot[0]}
        self._by_row: dict[tuple[torch.device, int], Batch] = {}

    def add_to(self, batch: Batch) -> Batch:
        """Returns a batch of all slots' rows with the numbers of each row."""
        ids = batch["input_ids"]
        key = ids.device, len(ids) // self.num_slots
        if key not in self._by_row:
            numbers = {name: torch.tensor(values).repeat_interleave(key[1]) for name, values in self._values.items()}
            self._by_row = {key: {name: move_tensor(values, ids.device) for name, values in numbers.items()}}
        return batch | self._by_row[key]


def compute_losses(model: nn.Module, batch: Batch, *, objective: Objective) -> Float[Tensor, " slots"]:
    """Returns each slot's sum of losses of a micro-batch, divided by the weight of its whole step, in fp32 or wider."""
    losses = objective.losses(model, batch)
    return losses.view(len(batch["step_weight"]), -1).sum(1) / batch["step_weight"]
