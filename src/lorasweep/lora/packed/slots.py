"""Copies one slot of a pack to an ordinary adapted model, loads an adapter into a slot, and drops slots.

The pack's parameters stay the same objects, so that an optimizer still knows them; their shapes may change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lorasweep.lora.adapter_files import load_lora_state
from lorasweep.lora.inject import replace_module
from lorasweep.lora.packed.fully_trained import StackedModule, stacked_modules
from lorasweep.lora.packed.inject import check_slots, copy_base, find_slot_streams, put_solo
from lorasweep.lora.packed.layers import PackedLoraLayer, packed_layers


def slot_model(model: nn.Module, slot: int) -> nn.Module:
    """Returns a slot as an ordinary adapted model: copies of the slot's values, and the frozen base's own tensors.

    It can be given to `lora_state`, `save_adapter` and `merge_lora`, or be used alone. It takes the batch of one slot,
    and its dropout draws from torch's own generator. The pack is not changed.

    Raises:
        ValueError: The model is not packed or has no such slot.
    """
    check_slots(model, [slot])
    solo = copy_base(model)
    for name, packed in _packed_modules(model).items():
        module = packed.take(slot, solo.get_submodule(name))
        if module is not None:
            replace_module(solo, module.base, module)
    return solo


def load_slot(model: nn.Module, slot: int, state: Mapping[str, Tensor]) -> None:
    """Sets a slot's values from an adapter of the same layers, ranks and shapes, like the result of `lora_state`.

    Raises:
        ValueError: The model is not packed or has no such slot; the state has other names or shapes; a fused
            projection's B is not zero outside its parts. The slot is then unchanged.
    """
    solo = slot_model(model, slot)
    load_lora_state(solo, state, source=f"the state for slot {slot}")
    put_solo(model, slot, solo)


def compact_slots(model: nn.Module, keep: Sequence[int]) -> None:
    """Drops all slots except `keep`, which become slots 0, 1, ... in this order, so that the pack costs less.

    Ranks, layers and modules that only dropped slots used are removed. The remaining slots' values are unchanged.

    Raises:
        ValueError: The model is not packed; `keep` is empty, or has a slot twice or one that does not exist.
    """
    check_slots(model, keep)
    streams = find_slot_streams(model)
    for packed in _packed_modules(model).values():
        packed.keep_slots(keep)
        if not packed.is_used:
            replace_module(model, packed, packed.base)
    streams.generators[:] = [streams.generators[slot] for slot in keep]


def _packed_modules(model: nn.Module) -> dict[str, PackedLoraLayer | StackedModule]:
    return {**packed_layers(model), **stacked_modules(model)}
