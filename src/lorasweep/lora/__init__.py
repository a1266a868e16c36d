"""Low-rank adaptation for any torch module, usable alone: adapt, train, merge, save in PEFT's format.

    from lorasweep.lora import LoraConfig, inject_lora, save_adapter
    coverage = inject_lora(model, LoraConfig(rank=8, alpha=16, targets="all-linear"))

A `LoraConfig` selects layers with patterns (`targets`). `inject_lora` replaces these layers by LoRA layers and freezes
all other parameters. `packed` trains many adapters at once on one base model.
"""

from lorasweep.config.method import LoraConfig
from lorasweep.lora.adapter_files import load_adapter, lora_state, save_adapter
from lorasweep.lora.inject import inject_lora, merge_lora
from lorasweep.lora.layers import LoraLayer, lora_layers, split_lora_parameters
from lorasweep.lora.packed.inject import inject_packed_lora
from lorasweep.lora.packed.slots import Slots
from lorasweep.lora.targets import Coverage, find_targets

__all__ = [
    "Coverage",
    "LoraConfig",
    "LoraLayer",
    "Slots",
    "find_targets",
    "inject_lora",
    "inject_packed_lora",
    "load_adapter",
    "lora_layers",
    "lora_state",
    "merge_lora",
    "save_adapter",
    "split_lora_parameters",
]
