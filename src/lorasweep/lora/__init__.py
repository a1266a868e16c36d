"""Low-rank adaptation for any torch module, usable alone: adapt, train, merge, save in PEFT's format.

    from lorasweep.lora import LoraConfig, inject_lora, save_adapter
    coverage = inject_lora(model, LoraConfig(rank=8, alpha=16, targets="all-linear"))

`targets` finds layers, `inject` puts `layers` in their place, `functional` does the mathematics, `merge` writes it into
weights, `files` to disk.
"""

from lorasweep.config.method import LoraConfig
from lorasweep.lora.files import load_adapter, lora_state, save_adapter
from lorasweep.lora.functional import lora_linear, scaling_factor
from lorasweep.lora.inject import inject_lora
from lorasweep.lora.layers import LoraLinear, lora_layers
from lorasweep.lora.merge import merge_lora, unmerge_lora
from lorasweep.lora.targets import Coverage, check_rank, find_targets

__all__ = [
    "Coverage",
    "LoraConfig",
    "LoraLinear",
    "check_rank",
    "find_targets",
    "inject_lora",
    "load_adapter",
    "lora_layers",
    "lora_linear",
    "lora_state",
    "merge_lora",
    "save_adapter",
    "scaling_factor",
    "unmerge_lora",
]
