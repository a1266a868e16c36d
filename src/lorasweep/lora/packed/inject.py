"""Replaces the layers that at least one slot adapts by packed layers.

To initialise a slot, LoRA is injected into a copy of the base as for a solo run. The slot then gets the values of this
solo model.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorasweep.config.method import LoraConfig
from lorasweep.lora.fully_trained import is_inside, trained_modules
from lorasweep.lora.inject import check_not_injected, freeze, inject_lora, replace_module
from lorasweep.lora.layers import lora_layers
from lorasweep.lora.packed.dropout import SlotDropout, SlotStreams
from lorasweep.lora.packed.fully_trained import StackedModule, stacked_modules
from lorasweep.lora.packed.layers import PackedLoraLayer, packed_layers
from lorasweep.lora.targets import Coverage


class PrepareSlotCopy(Protocol):
    """Callback that prepares a slot's copy of the base before LoRA is injected, for example to draw a new head.

    The callback may replace parameters of modules that the slot trains in full (`modules_to_save`). It must not write
    into existing tensors, because all copies share them.
    """

    def __call__(self, model: nn.Module, /, *, generator: torch.Generator | None) -> None: ...


def inject_packed_lora(
    model: nn.Module,
    configs: Sequence[LoraConfig],
    *,
    generators: Sequence[torch.Generator | None] | None = None,
    prepare_copy: PrepareSlotCopy | None = None,
) -> list[Coverage]:
    """Adapts `model` in place for a pack of trials. Slot k trains like a solo run of `inject_lora` with `configs[k]`.

    The model takes slot-major inputs of slots · B rows: the rows k · B to (k + 1) · B - 1 belong to slot k. The outputs
    have the same order. The adapter of slot k applies only to the rows of slot k. Each layer that at least one slot
    adapts becomes one packed layer.

    Each `nn.Dropout` of the base draws from one stream per slot (`set_dropout_streams`). Functional dropout, such as
    dropout of attention probabilities in transformers, still draws from torch's default stream for all rows.

    Args:
        model: Any module that `inject_lora` can adapt. The first dimension of its inputs must be the batch.
        configs: One per slot. Ranks, α, scaling rule, dropout, init, targets and `modules_to_save` may differ.
        generators: CPU random stream of each slot's A and B, used as in `inject_lora`; torch's default stream if None.
        prepare_copy: Called with each slot's copy of the base and the slot's generator before LoRA is injected.

    Returns:
        For each slot, the matched and the unmatched layers.

    Raises:
        ValueError: A configuration can't be packed (`why_not_packable`), can't be packed with the others, or is
            refused by `inject_lora`. The model is then unchanged.
    """
    streams = [None] * len(configs) if generators is None else generators
    _check_model(model)
    if not configs:
        raise ValueError("A pack must have at least one slot, but got no configuration. Give one per slot.")
    _check_count(streams, len(configs), "generators")
    for slot, config in enumerate(configs):
        _check_packable(config, slot)
    # One solo model per slot, so that each slot's checks and random numbers are exactly those of a solo run.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    solos = [copy_base(model) for _ in configs]
    try:
        each = zip(solos, configs, streams, strict=True)
        coverages = [_inject_solo(solo, config, stream, prepare_copy) for solo, config, stream in each]
        _check_slots_do_not_overlap(model, solos)
    except ValueError:
        for parameter in trained:
            parameter.requires_grad_(True)  # the copies share the parameters, and injecting LoRA froze them
        raise
    # all checks are done: nothing below can fail, so a refused model is unchanged
    slot_streams = SlotStreams(len(configs))
    freeze(model)
    for dropout in [module for module in model.modules() if type(module) is nn.Dropout]:
        replace_module(model, dropout, SlotDropout(dropout, slot_streams))
    _add_missing_layers(model, solos, slot_streams)
    for slot, solo in enumerate(solos):
        write_solo_to_slot(model, slot, solo)
    return coverages


def fill_slot(
    model: nn.Module,
    slot: int,
    config: LoraConfig,
    *,
    generator: torch.Generator | None = None,
    prepare_copy: PrepareSlotCopy | None = None,
) -> Coverage:
    """Puts a new trial into a slot, with the initial values of a solo run of `inject_lora`.

    The other slots keep their exact values, and the pack keeps its parameter objects. A parameter may grow (for a
    larger rank) and new parameters may appear. So the caller must pass the parameters to the optimizer again
    (`StackedAdamW.replace_parameters`), and must set the slot's dropout stream.

    Args:
        model: A packed model.
        slot: Index of the slot.
        config: LoRA settings of the new trial. The rank may be above that of all slots, and the targets may be layers
            that no slot has adapted before.
        generator: CPU random stream of A and B, used as in `inject_lora`; torch's default stream if None.
        prepare_copy: As in `inject_packed_lora`.

    Returns:
        The matched and the unmatched layers.

    Raises:
        ValueError: The model is not packed or has no such slot; or `config` can't be packed (`why_not_packable`),
            can't be packed with the other slots, or is refused by `inject_lora`. The pack is then unchanged.
    """
    check_slots(model, [slot])
    _check_packable(config, slot)
    solo = copy_base(model)
    coverage = _inject_solo(solo, config, generator, prepare_copy)
    _check_slots_do_not_overlap(model, [solo])
    _add_missing_layers(model, [solo], find_slot_streams(model))
    write_solo_to_slot(model, slot, solo)
    return coverage


def why_not_packable(config: LoraConfig) -> str | None:
    """Returns a sentence that says why trials with these settings can't share a pack; None if they can."""
    if config.variant == "dora":
        return "`method.variant=dora` can't be packed: it trains row norms, which packed layers do not have."
    if config.init == "pissa":
        return "`method.init=pissa` can't be packed: it needs its initial update, which packed layers do not keep."
    if config.bias != "none":
        return f"`method.bias={config.bias}` can't be packed: it trains the base's biases, which all slots share."
    return None


def set_dropout_streams(model: nn.Module, streams: Sequence[torch.Generator | None]) -> None:
    """Sets the random stream of each slot's dropout masks, on the device of the inputs; None: torch's default stream.

    A slot draws the same masks as a solo run if its stream has the seed that the solo run gives to torch. This holds
    for LoRA layers on any device, and for the base's `nn.Dropout` on a CPU. The slot's batches must have the same shape
    as the solo run's batches. If the pack pads the batches, call `set_sequence_lengths` too.

    Raises:
        ValueError: The model is not packed, or there are more or fewer streams than slots.
    """
    slot_streams = find_slot_streams(model)
    _check_count(streams, slot_streams.num_slots, "dropout streams")
    slot_streams.generators[:] = streams


def set_sequence_lengths(model: nn.Module, lengths: Sequence[int] | None) -> None:
    """Sets the length of each slot's sequences before padding to the longest slot; None if no slot is padded.

    For inputs of shape (rows, length, ...), dropout then draws a mask only for a slot's unpadded length, so that the
    mask equals the solo run's.

    Raises:
        ValueError: The model is not packed, or there are more or fewer lengths than slots.
    """
    slot_streams = find_slot_streams(model)
    if lengths is not None:
        _check_count(lengths, slot_streams.num_slots, "sequence lengths")
    slot_streams.sequence_lengths = None if lengths is None else tuple(lengths)


def find_slot_streams(model: nn.Module) -> SlotStreams:
    """Returns the number of slots and their dropout streams, as the object that all layers of a packed model share.

    Raises:
        ValueError: The model is not packed.
    """
    layers = list(packed_layers(model).values())
    if not layers:
        raise ValueError("`model` must be packed, but it has no packed layers. Call `inject_packed_lora` first.")
    return layers[0].streams


def check_slots(model: nn.Module, slots: Sequence[int]) -> None:
    """Raises a ValueError if the model is not packed, or `slots` is empty, has a duplicate or a slot out of range."""
    count = find_slot_streams(model).num_slots
    if not slots or not set(slots) <= set(range(count)) or len(set(slots)) < len(slots):
        raise ValueError(
            f"Slots must be one or more distinct indices from 0 to {count - 1}, but got {list(slots)}. "
            "After `compact_slots`, the remaining slots have new indices."
        )


def copy_base(model: nn.Module) -> nn.Module:
    """Returns a copy of the base model that shares the base's tensors. `model` may be packed or not."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    # With `memo`, deepcopy replaces each wrapper by a copy of the wrapper's base. Inner wrappers come first, because a
    # stacked module may contain a dropout wrapper.
    for wrapper in reversed(list(model.modules())):
        if isinstance(wrapper, SlotDropout | PackedLoraLayer | StackedModule):
            memo[id(wrapper)] = copy.deepcopy(wrapper.base, memo)
    return copy.deepcopy(model, memo)


def write_solo_to_slot(model: nn.Module, slot: int, solo: nn.Module) -> None:
    """Copies the values of a solo model's LoRA layers and trained modules into a slot."""
    layers, modules = lora_layers(solo), trained_modules(solo)
    for name, stacked in stacked_modules(model).items():
        stacked.write_slot(slot, modules.get(name))
    for name, layer in packed_layers(model).items():
        layer.write_slot(slot, layers.get(name))


def _inject_solo(
    solo: nn.Module, config: LoraConfig, generator: torch.Generator | None, prepare_copy: PrepareSlotCopy | None
) -> Coverage:
    """Turns a copy of the base into a solo model with LoRA. Draws in the order of a solo run: new head, A and B."""
    if prepare_copy is not None:
        prepare_copy(solo, generator=generator)
    return inject_lora(solo, config, generator=generator)


def _add_missing_layers(model: nn.Module, solos: Sequence[nn.Module], streams: SlotStreams) -> None:
    """Adds packed layers and stacked modules for the layers and modules that a solo model trains, if missing.

    No slot uses an added layer or module yet.
    """
    packed, stacked = packed_layers(model), stacked_modules(model)
    # the user may have cast the pack to another dtype than fp32
    dtype = next((layer.lora_a.dtype for layer in packed.values()), torch.float32)
    capacities: dict[str, int] = {}
    for solo in solos:
        for name, layer in lora_layers(solo).items():
            capacities[name] = max(layer.target.total_rank, capacities.get(name, 0))
    for name, capacity in capacities.items():
        if name not in packed:
            base = model.get_submodule(name)
            replace_module(model, base, PackedLoraLayer(base, streams, dtype=dtype, capacity=capacity))
    for name in {name for solo in solos for name in trained_modules(solo)} - set(stacked):
        base = model.get_submodule(name)
        replace_module(model, base, StackedModule(base, streams))


def _check_model(model: nn.Module) -> None:
    check_not_injected(model)
    batch_norm = next((name for name, module in model.named_modules() if isinstance(module, _BatchNorm)), None)
    if batch_norm is not None:
        raise ValueError(
            f"A packed model must compute each row independently, but {batch_norm!r} is a batch norm, which mixes the "
            "slots. Train without packs."
        )


def _check_count(values: Sequence[object], num_slots: int, kind: str) -> None:
    if len(values) != num_slots:
        raise ValueError(f"The pack needs {num_slots} {kind}, one per slot, but got {len(values)}.")


def _check_packable(config: LoraConfig, slot: int) -> None:
    reason = why_not_packable(config)
    if reason is not None:
        raise ValueError(f"The trial of slot {slot} must be packable, but {reason} Train it without a pack.")


def _check_slots_do_not_overlap(model: nn.Module, solos: Sequence[nn.Module]) -> None:
    """Checks that the new solo models and the slots of `model` can share one pack.

    Raises:
        ValueError: A slot adapts a layer inside a module that another slot trains in full; or a module that trains in
            full is inside another one, shares a weight with another one, or has buffers.
    """
    layers = {*packed_layers(model), *(name for solo in solos for name in lora_layers(solo))}
    modules = {name: module.base for solo in solos for name, module in trained_modules(solo).items()}
    modules |= {name: module.base for name, module in stacked_modules(model).items()}
    for name in sorted(layers | set(modules)):
        if is_inside(name, [other for other in modules if other != name or name in layers]):
            raise ValueError(
                f"`method.modules_to_save` must be the same in all slots of a pack, but one slot trains {name!r} and "
                "another trains a module that contains it in full. Train them in separate packs."
            )
    # `parameters()` yields a shared parameter once per module, so a count above 1 means that two modules share it
    owners = Counter(id(p) for module in modules.values() for p in module.parameters())
    for name, module in modules.items():
        if any(owners[id(p)] > 1 for p in module.parameters()) or any(True for _ in module.buffers()):
            raise ValueError(
                f"A module that slots train must not have buffers or share a weight with another, but {name!r} does. "
                "Train these trials without packs."
            )
