"""Makes a pack of solo models that share one frozen base.

LoRA is injected into a copy of the base for each slot, as for a solo run. In the packed model, one packed layer
computes the layers of the same name in all solo models. So a slot has the layers, parameters and files of a solo run.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorasweep.config.method import LoraConfig
from lorasweep.lora.dropout import DropoutMasks
from lorasweep.lora.fully_trained import is_inside, trained_modules
from lorasweep.lora.inject import (
    check_not_injected,
    disable_encoder_fast_path,
    inject_lora,
    replace_dropout,
    replace_module,
)
from lorasweep.lora.layers import lora_layers
from lorasweep.lora.packed.layers import PackedLoraLayer, PackedTrainedModule
from lorasweep.lora.packed.slots import Slots
from lorasweep.lora.packed.weights import SlotWeights
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
    dropout_seeds: Sequence[int] | None = None,
    prepare_copy: PrepareSlotCopy | None = None,
) -> Slots:
    """Adapts `model` in place for a pack of trials. Slot k trains like a solo run of `inject_lora` with `configs[k]`.

    The model takes slot-major inputs of slots · B rows: the rows k · B to (k + 1) · B - 1 belong to slot k. The outputs
    have the same order. The adapter of slot k applies only to the rows of slot k. Each layer that at least one slot
    adapts becomes one packed layer. Train the parameters of `Slots.weights`; `Slots.models[k]` is the solo model of
    slot k, which works with `lora_state` and `save_adapter` (merge a copy of it).

    A step is fastest if neighbouring slots have similar ranks. Move the model to its device before this call.

    Dropout draws the mask of each slot by the slot's seed. Functional dropout, such as dropout of attention
    probabilities in transformers, does so inside `FunctionalDropout(slots.masks.drop)`, except in fused kernels.

    Args:
        model: Any module that `inject_lora` can adapt. The first dimension of its inputs must be the batch.
        configs: One per slot. All settings may differ.
        generators: CPU random stream of each slot's A, used as in `inject_lora`; torch's default stream if None.
        dropout_seeds: Seed of each slot's dropout masks; drawn from torch's default stream if None.
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
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    solos = [copy.deepcopy(model, dict(shared)) for _ in configs]
    try:
        each = zip(solos, configs, streams, strict=True)
        coverages = [_inject_solo(solo, config, stream, prepare_copy) for solo, config, stream in each]
        _check_slots_do_not_overlap(solos)
    except ValueError:
        for parameter in trained:
            parameter.requires_grad_(True)  # the copies share the parameters, and injecting LoRA froze them
        raise
    # all checks are done: nothing below can fail, so a refused model is unchanged
    if dropout_seeds is None:
        dropout_seeds = torch.randint(2**63 - 1, (len(configs),)).tolist()
    layers, device = [lora_layers(solo) for solo in solos], next(model.parameters()).device
    masks = DropoutMasks(dropout_seeds)
    slots = Slots(models=solos, weights=SlotWeights(solos, device=device), masks=masks, coverages=coverages)
    replace_dropout(model, masks)
    for name in dict.fromkeys(name for one in layers for name in one):
        base = model.get_submodule(name)
        replace_module(model, base, PackedLoraLayer(base, slots, name, [one.get(name) for one in layers]))
    for name in dict.fromkeys(name for solo in solos for name in trained_modules(solo)):
        base = model.get_submodule(name)
        replace_module(model, base, PackedTrainedModule(base, slots, name))
    disable_encoder_fast_path(model)
    return slots


def _inject_solo(
    solo: nn.Module, config: LoraConfig, generator: torch.Generator | None, prepare_copy: PrepareSlotCopy | None
) -> Coverage:
    """Turns a copy of the base into a solo model with LoRA. Draws in the order of a solo run: new head, then A."""
    if prepare_copy is not None:
        prepare_copy(solo, generator=generator)
    return inject_lora(solo, config, generator=generator)


def _check_slots_do_not_overlap(solos: Sequence[nn.Module]) -> None:
    """Checks that the solo models can share one pack.

    Raises:
        ValueError: A slot adapts a layer inside a module that another slot trains in full; or a module that trains in
            full is inside another one, shares a weight with another one, or has buffers.
    """
    layers = {name for solo in solos for name in lora_layers(solo)}
    modules = {name: module.base for solo in solos for name, module in trained_modules(solo).items()}
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
