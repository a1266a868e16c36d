"""The modules of a pack: a frozen layer or module with the weights of all slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten  # see lora.fully_trained

from lorasweep.lora.dropout import check_slot_rows
from lorasweep.lora.fully_trained import call_in_precision_of
from lorasweep.lora.layers import AdaptedLayer, LoraLayer
from lorasweep.lora.packed.slots import Slots


class SlotRows:
    """A module whose inputs have the rows of all slots, slot after slot."""

    slots: Slots

    @property
    def num_groups(self) -> int:
        return self.slots.num_slots


class PackedLoraLayer(SlotRows, AdaptedLayer):
    """A frozen layer and one weight update per slot, which applies to the rows of the slot only.

    A slot that does not adapt this layer gets the frozen layer's output.

    Attributes:
        slots: The slots of the pack. All layers of the pack share this object.
        ranks: The rank of each slot; 0 if the slot does not adapt this layer.
        rates: The dropout rate of each slot.
    """

    def __init__(self, base: nn.Module, slots: Slots, name: str, layers: Sequence[LoraLayer | None]) -> None:
        super().__init__(base)
        self.slots = slots
        self.name = name
        self.ranks = [layer.rank if layer else 0 for layer in layers]
        self.rates = [layer.config.dropout if layer else 0.0 for layer in layers]
        self.drops = any(self.rates)

    def forward(self, x: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        # slot-major rows: then the rows of a slot, and of a group of slots, are one view of x without a copy
        check_slot_rows(x, self.slots.num_slots)
        keep = self.slots.masks.draw(x, self.rates, layer=self.name) if self.drops and self.training else None
        groups = self.slots.weights.find_stacks(self.name, dtype=self._find_dtype(), is_training=self.training)
        return self.add_update(x, groups, keep=keep)

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}"

    @property
    def dropout_rate(self) -> float:
        """The largest rate of a slot."""
        return max(self.rates)

    def _find_dtype(self) -> torch.dtype:
        """Returns the dtype of the products that `add_update` computes."""
        if self.calls_base:
            return next(self.slots.weights.parameters()).dtype
        device_type = self.weight.device.type
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else self.weight.dtype


class PackedTrainedModule(SlotRows, nn.Module):
    """A frozen module, and the trained copy of each slot that trains it in full. Other slots use the frozen module.

    Attributes:
        base: The frozen original.
        slots: The slots of the pack. All layers of the pack share this object.
    """

    def __init__(self, base: nn.Module, slots: Slots, name: str) -> None:
        super().__init__()
        self.base = base
        self.slots = slots
        self._prefix = f"{name}.trained."

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
        first, masks = next(leaf for leaf in leaves if isinstance(leaf, Tensor)), self.slots.masks
        check_slot_rows(first, self.slots.num_slots)
        outputs, output_spec, draws = [], spec, masks.count_draws()
        for slot in range(self.slots.num_slots):
            sliced = [
                leaf.chunk(self.slots.num_slots)[slot]
                if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == len(first)
                else leaf
                for leaf in leaves
            ]
            masks.set_draws(draws)  # each slot draws as its solo run does
            with masks.compute_only_slot(slot):
                output, output_spec = tree_flatten(self._call(slot, *tree_unflatten(sliced, spec)))
            outputs.append(output)
        joined = [torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*outputs, strict=True)]
        return tree_unflatten(joined, output_spec)

    def _call(self, slot: int, args: Any, kwargs: Any) -> Any:
        trained = self.slots.weights.find_others(slot)
        own = {
            name.removeprefix(self._prefix): value for name, value in trained.items() if name.startswith(self._prefix)
        }
        if not own:
            return self.base(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.base, own, args, kwargs)

        return call_in_precision_of(self.base, call, args, kwargs)


def packed_layers(model: nn.Module) -> dict[str, PackedLoraLayer]:
    """Returns the packed layers of `model` by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLoraLayer)}


def packed_trained_modules(model: nn.Module) -> Mapping[str, PackedTrainedModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedTrainedModule)}
