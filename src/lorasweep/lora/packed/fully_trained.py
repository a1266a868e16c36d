"""Modules that slots of a pack train in full (`modules_to_save`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten  # see lora.fully_trained

from lorasweep.lora.fully_trained import TrainedModule, call_in_precision_of
from lorasweep.lora.packed.slots import Slots, check_rows


class PackedTrainedModule(nn.Module):
    """A frozen module, and the trainable copy of each slot that trains it. Other slots use the frozen module.

    Attributes:
        base: The frozen original.
        slots: The slots of the pack. All layers of the pack share this object.
        modules_of_slots: For each slot, the `TrainedModule` of its solo model; None if the slot does not train it.
        trained: The parameters of all copies.
    """

    def __init__(self, base: nn.Module, slots: Slots, modules: Sequence[TrainedModule | None]) -> None:
        super().__init__()
        self.base = base
        self.slots = slots
        self.modules_of_slots = list(modules)
        self.trained = nn.ParameterList(p for module in modules if module for p in module.trained.parameters())

    @property
    def weight(self) -> Tensor:
        """The base's weight. Some models read the dtype or device of their head's weight."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module for each slot, and concatenates the outputs.

        Each argument that has as many rows as the first tensor is split by slot. All slots get the other arguments
        whole.
        """
        leaves, spec = tree_flatten((args, kwargs))
        num_rows = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
        outputs, output_spec = [], spec
        for slot, module in enumerate(self.modules_of_slots):
            slot_args, slot_kwargs = tree_unflatten(
                [self._slice_for_slot(leaf, slot, num_rows) for leaf in leaves], spec
            )
            # so that dropout inside the module draws from this slot's stream
            with self.slots.compute_only_slot(slot):
                output, output_spec = tree_flatten(self._call(module, slot_args, slot_kwargs))
            outputs.append(output)
        joined = [torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*outputs, strict=True)]
        return tree_unflatten(joined, output_spec)

    def _call(self, module: TrainedModule | None, args: Any, kwargs: Any) -> Any:
        if module is None:
            return self.base(*args, **kwargs)
        parameters: dict[str, Tensor] = dict(module.trained.named_parameters())

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.base, parameters, args, kwargs)

        return call_in_precision_of(self.base, call, args, kwargs)

    def _slice_for_slot(self, leaf: Any, slot: int, num_rows: int) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != num_rows:
            return leaf
        check_rows(leaf, self.slots.num_slots)
        return leaf.chunk(self.slots.num_slots)[slot]


def packed_trained_modules(model: nn.Module) -> dict[str, PackedTrainedModule]:
    """Returns the `PackedTrainedModule`s of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedTrainedModule)}
