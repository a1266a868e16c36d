"""Low-rank adaptation for any torch module, usable alone: adapt, train, merge, save in PEFT's format.

    from lorasweep.lora import LoraConfig, inject_lora, save_adapter
    coverage = inject_lora(model, LoraConfig(rank=8, alpha=16, targets="all-linear"))

`targets` finds layers of the `kinds` that can be adapted, by `patterns`; `inject` puts `layers` in their place, which
start as `initialise` says and compute by `functional`; `trained` is what trains in full beside them. `merge` writes the
change into weights, `files` writes it to disk in `peft_format`. `packed` trains many changes at once on one base.
"""

from lorasweep.config.method import LoraConfig
from lorasweep.lora.files import load_adapter, lora_state, save_adapter
from lorasweep.lora.functional import add_change, lora_linear, scaling_factor
from lorasweep.lora.inject import inject_lora
from lorasweep.lora.layers import LoraConv2d, LoraEmbedding, LoraLayer, LoraLinear, lora_layers
from lorasweep.lora.merge import merge_check, merge_lora, remove_lora, unmerge_lora
from lorasweep.lora.packed import (
    FilledSlot,
    PackedLoraLayer,
    compact_slots,
    fill_slot,
    inject_packed_lora,
    load_slot,
    num_slots,
    packed_layers,
    save_slot,
    set_dropout_streams,
    slot_model,
    slot_state,
    split_packed_parameters,
    stacked_modules,
    why_not_packable,
)
from lorasweep.lora.parameters import split_lora_parameters
from lorasweep.lora.quantised import quantise_base
from lorasweep.lora.targets import Coverage, check_rank, find_targets
from lorasweep.lora.trained import TrainedModule, trained_modules

__all__ = [
    "Coverage",
    "FilledSlot",
    "LoraConfig",
    "LoraConv2d",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "PackedLoraLayer",
    "TrainedModule",
    "add_change",
    "check_rank",
    "compact_slots",
    "fill_slot",
    "find_targets",
    "inject_lora",
    "inject_packed_lora",
    "load_adapter",
    "load_slot",
    "lora_layers",
    "lora_linear",
    "lora_state",
    "merge_check",
    "merge_lora",
    "num_slots",
    "packed_layers",
    "quantise_base",
    "remove_lora",
    "save_adapter",
    "save_slot",
    "scaling_factor",
    "set_dropout_streams",
    "slot_model",
    "slot_state",
    "split_lora_parameters",
    "split_packed_parameters",
    "stacked_modules",
    "trained_modules",
    "unmerge_lora",
    "why_not_packable",
]
