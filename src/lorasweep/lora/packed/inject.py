"""Puts packed layers in place of the layers that any slot adapts, from one ordinary injection per slot."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorasweep.config.method import LoraConfig
from lorasweep.lora.inject import check_not_injected, freeze, inject_lora, replace_module
from lorasweep.lora.layers import LoraLayer, lora_layers
from lorasweep.lora.packed.dropout import SlotDropout, SlotStreams, slot_dropouts
from lorasweep.lora.packed.layers import packed_class, packed_layers
from lorasweep.lora.packed.trained import StackedModule, stacked_modules
from lorasweep.lora.targets import Coverage
from lorasweep.lora.trained import is_inside, trained_modules


class SlotStart(Protocol):
    """What gives a slot's copy of the base its own start."""

    def __call__(self, model: nn.Module, /, *, generator: torch.Generator | None) -> None:
        """Replaces parameters of the copy."""


def inject_packed_lora(
    model: nn.Module,
    configs: Sequence[LoraConfig],
    *,
    generators: Sequence[torch.Generator | None] | None = None,
    start: SlotStart | None = None,
) -> list[Coverage]:
    """Adapts `model` in place for a pack of trials: slot k is what `inject_lora` makes of `configs[k]`.

    The model then takes slot-major inputs of slots · B rows, those of slot k from k · B on, and gives outputs in the
    same order. Each slot's change meets its own rows only. Every layer that any slot adapts gets one stacked layer.
    Dropout modules of the base then draw from one stream per slot (`set_dropout_streams`); dropout that a function
    inside the model draws, such as that of attention probabilities in transformers, still draws for all rows from
    torch's own stream.

    Args:
        model: Any module that `inject_lora` handles, whose inputs have the batch first.
        configs: One for each slot; ranks, α, scaling rule, dropout, start, targets and `modules_to_save` may differ.
        generators: CPU random stream of each slot's A and B, drawn as by `inject_lora`; torch's own where None.
        start: Called as `start(copy, generator=...)` with each slot's own copy of the modules before it is adapted, to
            replace parameters of modules that the slot trains in full: a new head, drawn from the slot's stream as a
            solo run draws it. Must not write to tensors, which the copies share.

    Returns:
        What each slot matched and what not.

    Raises:
        ValueError: A configuration can't be packed, alone (`why_not_packable`) or with the others, or `inject_lora`
            refuses it; the model is then unchanged.
    """
    _check_request(model, configs, generators)
    streams = [None] * len(configs) if generators is None else generators
    solos, coverages = _inject_copies(model, configs, streams, start)
    pack = SlotStreams(len(configs))
    freeze(model)
    for dropout in [module for module in model.modules() if type(module) is nn.Dropout]:
        replace_module(model, dropout, SlotDropout(dropout, pack))
    add_layers(model, solos, pack)
    for slot, solo in enumerate(solos):
        put_solo(model, slot, solo)
    return coverages


def why_not_packable(config: LoraConfig) -> str | None:
    """Why trials of this configuration must run alone, in one sentence; None where they can share a pack."""
    if config.variant == "dora":
        return "`method.variant=dora` can't be packed: it trains row lengths, which packed layers do not have."
    if config.init == "pissa":
        return "`method.init=pissa` can't be packed: it trains a part of the weight, which slots share."
    if config.bias != "none":
        return f"`method.bias={config.bias}` can't be packed: it trains the base's biases, which slots share."
    return None


def split_packed_parameters(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The stacked A, the stacked B, and what else trains, in the model's order; the first dimension is the slot."""
    layers = packed_layers(model).values()
    other = [p for module in stacked_modules(model).values() for p in module.stacked]
    return [layer.lora_a for layer in layers], [layer.lora_b for layer in layers], other


def set_dropout_streams(model: nn.Module, streams: Sequence[torch.Generator | None]) -> None:
    """Gives each slot the random stream of its dropout masks, on the device of the inputs; None means torch's own.

    A slot whose stream is seeded as a solo run seeds torch's draws the masks of that run: those of its changes, and
    those of the base's `nn.Dropout` modules on a CPU. Batches must have the shape that the solo run's have.

    Raises:
        ValueError: The model is not packed, or there are more or fewer streams than slots.
    """
    pack = pack_of(model)
    if len(streams) != pack.num_slots:
        raise ValueError(f"There must be {pack.num_slots} dropout streams, one per slot, but got {len(streams)}.")
    pack.generators[:] = streams


def set_row_lengths(model: nn.Module, lengths: Sequence[int] | None) -> None:
    """Says how long each slot's rows would be alone, where a batch pads them to those of the longest slot.

    Dropout then draws for each slot what its solo run draws: in inputs (rows, length, ...), for its own length.

    Raises:
        ValueError: The model is not packed, or there are more or fewer lengths than slots.
    """
    pack = pack_of(model)
    if lengths is not None and len(lengths) != pack.num_slots:
        raise ValueError(f"There must be {pack.num_slots} row lengths, one per slot, but got {len(lengths)}.")
    pack.lengths = None if lengths is None else tuple(lengths)


def num_slots(model: nn.Module) -> int:
    """How many slots a packed model has.

    Raises:
        ValueError: It is not packed.
    """
    return pack_of(model).num_slots


def pack_of(model: nn.Module) -> SlotStreams:
    """What the layers of a packed model share.

    Raises:
        ValueError: It is not packed.
    """
    layers = list(packed_layers(model).values())
    if not layers:
        raise ValueError("`model` must be packed, but it has no packed layers. Call `inject_packed_lora` first.")
    return layers[0].streams


def copy_base(model: nn.Module) -> nn.Module:
    """A copy of the modules of a packed model's base model, or of any other model; its tensors are the very same."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for wrappers in (slot_dropouts(model), packed_layers(model), stacked_modules(model)):
        for wrapper in wrappers.values():
            memo[id(wrapper)] = copy.deepcopy(wrapper.base, memo)
    return copy.deepcopy(model, memo)


def check_together(model: nn.Module, solos: Sequence[nn.Module]) -> None:
    """Refuses slots that can't share one model, which may be packed already.

    Raises:
        ValueError: A slot adapts a layer inside a module that another one trains in full; modules that train are one
            inside another, share a weight, or have buffers of their own.
    """
    layers = {*packed_layers(model), *_layers_by_name(solos)}
    modules = {name: module.base for solo in solos for name, module in trained_modules(solo).items()}
    modules |= {name: module.base for name, module in stacked_modules(model).items()}
    for name in sorted(layers | set(modules)):
        if is_inside(name, [other for other in modules if other != name or name in layers]):
            raise ValueError(
                f"Slots of a pack must agree on what `method.modules_to_save` names, but {name!r} is adapted or "
                "trained in one slot and lies inside what another one trains in full. Train them in separate packs."
            )
    _check_modules(modules)


def add_layers(model: nn.Module, solos: Sequence[nn.Module], pack: SlotStreams) -> tuple[str, ...]:
    """Puts packed layers, as yet without a change, wherever one of these models has an ordinary one and `model` none.

    Returns:
        The names of the layers and modules that were added.
    """
    present = packed_layers(model)
    dtype = next((layer.lora_a.dtype for layer in present.values()), torch.float32)
    layers = {name: found for name, found in _layers_by_name(solos).items() if name not in present}
    modules = {name for solo in solos for name in trained_modules(solo)} - set(stacked_modules(model))
    for name, found in layers.items():
        base = model.get_submodule(name)
        capacity = max(layer.matrices()[0].shape[0] for layer in found)
        replace_module(model, base, packed_class(found[0])(base, pack, dtype=dtype, capacity=capacity))
    for name in modules:
        base = model.get_submodule(name)
        replace_module(model, base, StackedModule(base, pack))
    return (*layers, *sorted(modules))


def put_solo(model: nn.Module, slot: int, solo: nn.Module) -> tuple[str, ...]:
    """Gives a slot the changes and trained modules of an ordinary adapted model.

    Returns:
        The names of the layers that had to grow.
    """
    layers, modules = lora_layers(solo), trained_modules(solo)
    for name, stacked in stacked_modules(model).items():
        stacked.put(slot, modules.get(name))
    return tuple(name for name, layer in packed_layers(model).items() if layer.put(slot, layers.get(name)))


def _check_request(
    model: nn.Module, configs: Sequence[LoraConfig], generators: Sequence[torch.Generator | None] | None
) -> None:
    check_not_injected(model)
    if packed_layers(model):
        raise ValueError("`model` must have no LoRA layers yet, but it is packed. Load the base model again.")
    mixing = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if mixing:
        raise ValueError(
            f"`model` must treat each row by itself to be packed, but {mixing[0]!r} takes statistics over a batch, in "
            "which all slots have rows. Run its trials alone."
        )
    if not configs:
        raise ValueError("A pack must have at least one slot, but got no configuration.")
    if generators is not None and len(generators) != len(configs):
        raise ValueError(f"There must be {len(configs)} generators, one per slot, but got {len(generators)}.")
    for slot, config in enumerate(configs):
        check_packable(config, slot)


def _inject_copies(
    model: nn.Module,
    configs: Sequence[LoraConfig],
    generators: Sequence[torch.Generator | None],
    start: SlotStart | None,
) -> tuple[list[nn.Module], list[Coverage]]:
    """One ordinary adapted model per slot, which share the base's tensors, and what each adapts."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    solos = [copy_base(model) for _ in configs]
    try:
        each = zip(solos, configs, generators, strict=True)
        coverages = [inject_solo(solo, config, generator, start) for solo, config, generator in each]
        check_together(model, solos)
    except ValueError:
        for parameter in trained:
            parameter.requires_grad_(True)  # injecting a copy froze it
        raise
    return solos, coverages


def inject_solo(
    solo: nn.Module, config: LoraConfig, generator: torch.Generator | None, start: SlotStart | None
) -> Coverage:
    """Makes a slot's ordinary adapted model of a copy, drawing in a solo run's order: the start, then A and B."""
    if start is not None:
        start(solo, generator=generator)
    return inject_lora(solo, config, generator=generator)


def check_packable(config: LoraConfig, slot: int) -> None:
    """Refuses a configuration that `why_not_packable` has a reason against.

    Raises:
        ValueError: It has.
    """
    reason = why_not_packable(config)
    if reason is not None:
        raise ValueError(f"Slot {slot} must be packable, but {reason} Run it alone.")


def _check_modules(modules: Mapping[str, nn.Module]) -> None:
    owners = Counter(id(p) for module in modules.values() for p in {id(p): p for p in module.parameters()}.values())
    for name, module in modules.items():
        if any(owners[id(p)] > 1 for p in module.parameters()):
            raise ValueError(
                f"Modules that slots train must not share a weight, but {name!r} does. Run these trials alone."
            )
        if set(module.state_dict()) != {n for n, _ in module.named_parameters(remove_duplicate=False)}:
            raise ValueError(
                f"A module that slots train must have no buffers of its own, but {name!r} has. Run these trials alone."
            )


def _layers_by_name(solos: Sequence[nn.Module]) -> dict[str, list[LoraLayer]]:
    found: dict[str, list[LoraLayer]] = {}
    for solo in solos:
        for name, layer in lora_layers(solo).items():
            found.setdefault(name, []).append(layer)
    return found
