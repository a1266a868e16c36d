"""Makes a pack of solo models that share one frozen base; fills, drops and sorts its slots.

LoRA is injected into a copy of the base for each slot, as for a solo run. In the packed model, one packed layer
computes the layers of the same name in all solo models. So a slot has the layers, parameters and files of a solo run.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorasweep.config.method import LoraConfig
from lorasweep.lora.fully_trained import is_inside, trained_modules
from lorasweep.lora.inject import check_not_injected, disable_encoder_fast_path, inject_lora, replace_module
from lorasweep.lora.layers import lora_layers
from lorasweep.lora.packed.layers import (
    PackedLoraLayer,
    PackedTrainedModule,
    packed_layers,
    packed_trained_modules,
)
from lorasweep.lora.packed.slots import SlotDropout, Slots
from lorasweep.lora.targets import Coverage

PrepareSlotCopy: TypeAlias = Callable[..., None]
"""Prepares a slot's copy of the base before LoRA is injected, for example draws a new head: `f(copy, generator=...)`.

It may replace parameters of modules that the slot trains in full (`modules_to_save`). It must not write into existing
tensors, because all copies share them."""


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
    adapts becomes one packed layer. The parameters of slot k are those of `slot_model(model, k)`, for example for its
    optimizer.

    A step is fastest if neighbouring slots have similar ranks (`compact_slots` sorts slots). Move the model to its
    device before this call.

    Each `nn.Dropout` of the base draws from one stream per slot (`set_dropout_streams`). Functional dropout, such as
    dropout of attention probabilities in transformers, draws from torch's default stream for all rows. Inside
    `FunctionalDropout(slots.drop)` it draws from one stream per slot too, except in fused kernels.

    Args:
        model: Any module that `inject_lora` can adapt. The first dimension of its inputs must be the batch.
        configs: One per slot. All settings may differ.
        generators: CPU random stream of each slot's A, used as in `inject_lora`; torch's default stream if None.
        prepare_copy: Called with each slot's copy of the base and the slot's generator before LoRA is injected.

    Raises:
        ValueError: The model has a batch norm, or a configuration can't be packed with the others or is refused by
            `inject_lora`. The model is then unchanged.
    """
    streams = [None] * len(configs) if generators is None else generators
    check_not_injected(model)
    batch_norm = next((name for name, module in model.named_modules() if isinstance(module, _BatchNorm)), None)
    if batch_norm is not None:
        raise ValueError(
            f"A packed model must compute each row independently, but {batch_norm!r} is a batch norm, which mixes the "
            "slots. Train without packs."
        )
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
    slots = Slots(solos)
    for dropout in [module for module in model.modules() if type(module) is nn.Dropout]:
        replace_module(model, dropout, SlotDropout(dropout, slots))
    _update_layers(model, slots)
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

    An index equal to the number of slots adds a slot. The targets may be layers that no slot has adapted before. The
    other slots stay as they are. The new slot has new parameters, so it needs a new optimizer, and its dropout stream
    must be set.

    Raises:
        ValueError: The model is not packed; or `config` can't be packed with the other slots, or is refused by
            `inject_lora`. The pack is then unchanged.
    """
    slots = find_slots(model)
    solo = copy_base(model)
    coverage = _inject_solo(solo, config, generator, prepare_copy)
    _check_slots_do_not_overlap(model, [solo])
    # nothing below can fail; the slice also adds a slot after the last
    slots.models[slot : slot + 1], slots.generators[slot : slot + 1] = [solo], [None]
    _update_layers(model, slots)
    return coverage


def slot_model(model: nn.Module, slot: int) -> nn.Module:
    """Returns the solo model of a slot. It has the slot's parameters, so that training the pack trains this model.

    The model takes the batch of one slot, and works with `lora_state` and `save_adapter`; merge a copy of it. The model
    has the pack's mode (`train` or `eval`), and its dropout draws from torch's default stream.
    """
    return find_slots(model).models[slot].train(model.training)


def compact_slots(model: nn.Module, keep: Sequence[int]) -> None:
    """Drops all slots except `keep`, which become slots 0, 1, ... in this order. So it can also sort slots.

    Layers that only dropped slots adapt are removed, so that a step costs less. The other slots stay as they are.
    """
    slots = find_slots(model)
    # the object stays, because all layers and dropout modules of the pack refer to it
    slots.models = [slots.models[slot] for slot in keep]
    slots.generators = [slots.generators[slot] for slot in keep]
    _update_layers(model, slots)


def set_dropout_streams(model: nn.Module, streams: Sequence[torch.Generator | None]) -> None:
    """Sets the random stream of each slot's dropout masks, on the device of the inputs; None: torch's default stream.

    A slot draws the same masks as a solo run if its stream has the seed that the solo run gives to torch. This holds
    for LoRA layers on any device, and for the base's `nn.Dropout` on a CPU. The slot's batches must have the same shape
    as the solo run's batches.
    """
    find_slots(model).generators[:] = streams


def find_slots(model: nn.Module) -> Slots:
    """Returns the slots of a packed model. Raises a ValueError if the model is not packed."""
    layers = list(packed_layers(model).values())
    if not layers:
        raise ValueError("`model` must be packed, but it has no packed layers. Call `inject_packed_lora` first.")
    return layers[0].slots


def copy_base(model: nn.Module) -> nn.Module:
    """Returns a copy of the base model that shares the base's tensors. `model` may be packed or not."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    # With `memo`, deepcopy replaces each wrapper by a copy of the wrapper's base. Inner wrappers come first, because a
    # trained module may contain a dropout wrapper.
    for wrapper in reversed(list(model.modules())):
        if isinstance(wrapper, SlotDropout | PackedLoraLayer | PackedTrainedModule):
            memo[id(wrapper)] = copy.deepcopy(wrapper.base, memo)
    return copy.deepcopy(model, memo)


def _inject_solo(
    solo: nn.Module, config: LoraConfig, generator: torch.Generator | None, prepare_copy: PrepareSlotCopy | None
) -> Coverage:
    """Turns a copy of the base into a solo model with LoRA. Draws in the order of a solo run: new head, then A."""
    if prepare_copy is not None:
        prepare_copy(solo, generator=generator)
    return inject_lora(solo, config, generator=generator)


def _update_layers(model: nn.Module, slots: Slots) -> None:
    """Replaces the layers and modules that at least one slot trains by packed ones, and all others by their base."""
    layers, modules = [lora_layers(solo) for solo in slots.models], [trained_modules(solo) for solo in slots.models]
    # All packed layers are made anew, because the stacks of a layer have the slots' order and ranks. The
    # parameters are those of the solo models, so no value and no optimizer state is lost.
    slots.stacks.forget()
    for packed in list(model.modules()):
        if isinstance(packed, PackedLoraLayer | PackedTrainedModule):
            replace_module(model, packed, packed.base)
    kinds: list[tuple[Any, Sequence[Mapping[str, Any]]]] = [(PackedLoraLayer, layers), (PackedTrainedModule, modules)]
    for packed_class, by_slot in kinds:
        for name in dict.fromkeys(name for by_name in by_slot for name in by_name):
            base = model.get_submodule(name)
            replace_module(model, base, packed_class(base, slots, [by_name.get(name) for by_name in by_slot]))
    disable_encoder_fast_path(model)


def _check_slots_do_not_overlap(model: nn.Module, solos: Sequence[nn.Module]) -> None:
    """Checks that the new solo models and the slots of `model` can share one pack.

    Raises:
        ValueError: A slot adapts a layer inside a module that another slot trains in full; or a module that trains in
            full is inside another one, shares a weight with another one, or has buffers.
    """
    layers = {*packed_layers(model), *(name for solo in solos for name in lora_layers(solo))}
    modules = {name: module.base for solo in solos for name, module in trained_modules(solo).items()}
    modules |= {name: module.base for name, module in packed_trained_modules(model).items()}
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
