"""Copies one slot of a pack to a solo model, loads an adapter into a slot, and drops slots.

The pack keeps its parameter objects, which an optimizer has, but their shapes may change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lorasweep.lora.adapter_files import load_lora_state
from lorasweep.lora.inject import replace_module
from lorasweep.lora.packed.fully_trained import StackedModule, stacked_modules
from lorasweep.lora.packed.inject import check_slots, copy_base, find_slot_streams, write_solo_to_slot
from lorasweep.lora.packed.layers import PackedLoraLayer, packed_layers


def slot_model(model: nn.Module, slot: int) -> nn.Module:
    """Returns a solo model with LoRA layers: copies of the slot's values, and the tensors of the shared frozen base.

    The model takes the batch of one slot, and works with `lora_state`, `save_adapter` and `merge_lora`. Its dropout
    draws from torch's default stream. The pack is not changed.

    Raises:
        ValueError: The model is not packed or has no such slot.
    """
    check_slots(model, [slot])
    solo = copy_base(model)
    for name, packed in _find_packed_modules(model).items():
        module = packed.copy_slot(slot, solo.get_submodule(name))
        if module is not None:
            replace_module(solo, module.base, module)
    return solo


def load_slot(model: nn.Module, slot: int, state: Mapping[str, Tensor]) -> None:
    """Sets a slot's values from the `lora_state` of a solo model with the same layers and ranks.

    Raises:
        ValueError: The model is not packed or has no such slot; a name or shape in the state differs; or B of a fused
            projection is not zero outside the parts. The slot is then unchanged.
    """
    solo = slot_model(model, slot)
    load_lora_state(solo, state, source=f"the state for slot {slot}")
    write_solo_to_slot(model, slot, solo)


def compact_slots(model: nn.Module, keep: Sequence[int]) -> None:
    """Drops all slots except `keep`, which become slots 0, 1, ... in this order.

    Ranks, layers and modules that only dropped slots used are removed, so that a step costs less. The values of the
    remaining slots are unchanged.

    Raises:
        ValueError: The model is not packed; or `keep` is empty, has a duplicate, or has a slot that does not exist.
    """
    check_slots(model, keep)
    streams = find_slot_streams(model)
    for packed in _find_packed_modules(model).values():
        packed.keep_slots(keep)
        if not packed.is_used:
            replace_module(model, packed, packed.base)
    streams.generators[:] = [streams.generators[slot] for slot in keep]


def _find_packed_modules(model: nn.Module) -> dict[str, PackedLoraLayer | StackedModule]:
    return {**packed_layers(model), **stacked_modules(model)}
