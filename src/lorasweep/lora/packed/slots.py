"""One slot of a pack as an ordinary adapter, an adapter put into a slot, slots refilled and dropped.

Parameters stay the same objects through all of this, so an optimizer can follow; their shapes may change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.files import lora_state, save_adapter
from lorasweep.lora.inject import replace_module
from lorasweep.lora.layers import lora_layers
from lorasweep.lora.packed.inject import (
    SlotStart,
    add_layers,
    check_packable,
    check_together,
    copy_base,
    inject_solo,
    pack_of,
    put_solo,
)
from lorasweep.lora.packed.layers import PackedLoraLayer, packed_layers
from lorasweep.lora.packed.trained import StackedModule, stacked_modules
from lorasweep.lora.peft_format import KEY_PREFIX, layer_tensors, load_layer_tensors
from lorasweep.lora.targets import Coverage
from lorasweep.lora.trained import trained_modules


@dataclass(frozen=True, kw_only=True)
class FilledSlot:
    """What filling a slot did."""

    coverage: Coverage
    """What the new configuration matched."""
    grown: tuple[str, ...]
    """Layers whose capacity grew: the shapes of their parameters changed."""
    added: tuple[str, ...]
    """Layers and modules that no slot had adapted or trained so far: parameters that an optimizer does not know."""

    @property
    def changes_parameters(self) -> bool:
        """Whether an optimizer must follow."""
        return bool(self.grown or self.added)


def slot_model(model: nn.Module, slot: int) -> nn.Module:
    """A slot as an ordinary adapted model, with copies of the slot's values and the very tensors of the frozen base.

    Args:
        model: A packed model; it stays as it is.
        slot: Which of its slots.

    Returns:
        What `inject_lora` makes, trained as far as the slot is: for `merge_lora`, `save_adapter`, or use alone.
        Its inputs have B rows. Dropout draws from torch's own stream.

    Raises:
        ValueError: The model is not packed or has no such slot.
    """
    _check_slots(model, [slot])
    solo = copy_base(model)
    for name, packed in packed_layers(model).items():
        layer = packed.take(slot, solo.get_submodule(name))
        if layer is not None:
            replace_module(solo, layer.base, layer)
    for name, stacked in stacked_modules(model).items():
        module = stacked.take(slot, solo.get_submodule(name))
        if module is not None:
            replace_module(solo, module.base, module)
    return solo


def slot_state(model: nn.Module, slot: int) -> dict[str, Tensor]:
    """A copy of the slot's tensors under PEFT's names: what `lora_state` gives of its solo run.

    Raises:
        ValueError: The model is not packed or has no such slot.
    """
    return lora_state(slot_model(model, slot))


def save_slot(
    model: nn.Module, slot: int, folder: str | Path, *, base_path: str, base_fingerprint: str | None = None
) -> None:
    """Writes a slot as the files that `save_adapter` writes of its solo run.

    Args:
        model: A packed model.
        slot: Which of its slots.
        folder: Made when missing.
        base_path: Where the base model is from.
        base_fingerprint: What identifies the base's weights.

    Raises:
        ValueError: The model is not packed or has no such slot.
    """
    save_adapter(slot_model(model, slot), folder, base_path=base_path, base_fingerprint=base_fingerprint)


def load_slot(model: nn.Module, slot: int, state: Mapping[str, Tensor]) -> None:
    """Sets a slot's values from an adapter of the same layers, ranks and shapes, as `slot_state` or a file gives it.

    Raises:
        ValueError: The model is not packed or has no such slot; the state has other names or shapes; a fused
            projection's B is not zero outside its parts. The slot is then unchanged.
    """
    solo = slot_model(model, slot)
    _check_state(lora_state(solo), state)
    given = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in state.items()}
    for name, layer in lora_layers(solo).items():
        load_layer_tensors(layer, {key: given[f"{name}.{key}"] for key in layer_tensors(layer)})
    for name, module in trained_modules(solo).items():
        module.trained.load_state_dict({key: given[f"{name}.{key}"] for key in module.trained.state_dict()})
    put_solo(model, slot, solo)


def fill_slot(
    model: nn.Module,
    slot: int,
    config: LoraConfig,
    *,
    generator: torch.Generator | None = None,
    start: SlotStart | None = None,
) -> FilledSlot:
    """Starts a new trial in a slot, in place of the one that was there: what `inject_lora` makes of `config`.

    The other slots' values stay bit for bit. The slot's dropout stream is `set_dropout_streams`' business, its
    optimizer state the optimizer's.

    Args:
        model: A packed model.
        slot: Which of its slots.
        config: What the new trial adapts and how; any rank, and layers that no slot had adapted.
        generator: CPU random stream for A and B, drawn in the model's order; torch's own when None.
        start: What is drawn before them, as in `inject_packed_lora`.

    Returns:
        What was matched, and which parameters grew or are new.

    Raises:
        ValueError: The model is not packed or has no such slot; `config` can't be packed, alone or with the other
            slots, or `inject_lora` refuses it. The pack is then unchanged.
    """
    _check_slots(model, [slot])
    check_packable(config, slot)
    solo = copy_base(model)
    coverage = inject_solo(solo, config, generator, start)
    pack = pack_of(model)
    check_together(model, [solo])
    added = add_layers(model, [solo], pack)
    return FilledSlot(coverage=coverage, grown=put_solo(model, slot, solo), added=added)


def compact_slots(model: nn.Module, keep: Sequence[int]) -> None:
    """Drops all slots but these, which become slots 0, 1, ... in this order, so that the pack costs less.

    Ranks, layers and modules that no slot left needs go too. The values of those that stay are the same bit for bit.

    Raises:
        ValueError: The model is not packed; `keep` is empty, names a slot twice or one that is not there.
    """
    _check_slots(model, keep)
    pack = pack_of(model)
    layers: list[PackedLoraLayer | StackedModule] = [*packed_layers(model).values(), *stacked_modules(model).values()]
    for layer in layers:
        layer.keep_slots(keep)
        if not layer.is_used:
            replace_module(model, layer, layer.base)
    pack.generators[:] = [pack.generators[slot] for slot in keep]


def _check_slots(model: nn.Module, slots: Sequence[int]) -> None:
    count = pack_of(model).num_slots
    wrong = [slot for slot in slots if not 0 <= slot < count]
    if wrong or not slots or len(set(slots)) < len(slots):
        raise ValueError(
            f"Slots must be distinct numbers from 0 to {count - 1}, at least one, but got {list(slots)}. "
            "The slots of a pack are counted anew when it is compacted."
        )


def _check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    advice = "Fill the slot with the adapter's configuration first."
    if set(state) != set(expected):
        odd = sorted(set(state) ^ set(expected))
        raise ValueError(f"The state must have the slot's names, but {odd[0]!r} is in one of them only. {advice}")
    for key, like in expected.items():
        if state[key].shape != like.shape:
            got, shape = tuple(state[key].shape), tuple(like.shape)
            raise ValueError(f"{key!r} must have the slot's shape {shape}, but got {got}. {advice}")
