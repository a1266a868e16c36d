"""Quantised bases: linear layers whose frozen weights are stored in 4 bits (`model.quantization=nf4`).

bitsandbytes quantises, called by transformers while it reads the files. It always quantises on the CPU, so that the
stored bytes, and with them the fingerprint, are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from lorasweep.config.model import ModelConfig
from lorasweep.errors import ConfigError
from lorasweep.models.pretrained import quiet_transformers

PACKAGES = ("bitsandbytes", "accelerate")
"""Packages that quantise. They are optional (`lorasweep[quantised]`)."""
BLOCK_SIZE = 64
"""Number of weights that share a scale in nf4. bitsandbytes' kernel for CPUs (0.50) takes wrong scales for a matrix
whose rows are no multiple of it, so such a layer is not quantised."""
TRANSFORMERS_ARGUMENTS: Mapping[str, Any] = {
    # double quantisation of the blocks' scales, as in QLoRA (arXiv 2305.14314): 4.127 instead of 4.5 bits per weight
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
"""Arguments of transformers' `BitsAndBytesConfig` for `model.quantization=nf4`."""


def build_arguments(config: ModelConfig, model_class: Any, settings: Any, *, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments with which `from_pretrained` quantises a model on the CPU.

    Args:
        config: Settings of the model.
        model_class: One of transformers' `AutoModel...` classes.
        settings: The model's configuration. It must not be quantised already.
        dtype: Type in which the layers compute, and of all other parameters.
    """
    if getattr(settings, "quantization_config", None) is not None:
        raise ConfigError(
            f"`model.quantization` must be none for a model whose files are quantised already, but got "
            f"{config.quantization!r} with {config.path!r}."
        )
    bits = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        **TRANSFORMERS_ARGUMENTS,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_find_skipped_modules(config, model_class, settings),  # 4 bits have this argument too
    )
    return {"quantization_config": bits, "device_map": {"": "cpu"}}


def finish_quantised(model: PreTrainedModel, config: ModelConfig) -> None:
    """Changes a model that transformers has quantised so that runs can share its weights.

    Raises:
        ConfigError: No layer was quantised.
    """
    linear_4bit: Any = import_module("bitsandbytes.nn").Linear4bit
    layers: list[Any] = [module for module in model.modules() if isinstance(module, linear_4bit)]
    if not layers:
        raise ConfigError(
            f"`model.quantization=nf4` must have linear layers with a multiple of {BLOCK_SIZE} inputs, but "
            f"{config.path!r} has none beside its head. Use none."
        )
    for layer in layers:
        # In evaluations on a CPU with AVX512-BF16, bitsandbytes (0.50) would store the weight in another order, for
        # which it has no backward pass: all later gradients would lack the base's part, without an error.
        layer.support_avx512bf16_for_cpu = False
        layer.quant_state = None  # the weight has it too; each run would copy that of the layer


def _find_skipped_modules(config: ModelConfig, model_class: Any, settings: Any) -> list[str]:
    """Returns the names of modules that are not quantised.

    They are the output head, tied layers (both by transformers' own rule), the modules of a classifier that the
    checkpoint may lack, and layers whose rows are no multiple of `BLOCK_SIZE`.
    """
    with quiet_transformers(), torch.device("meta"):
        model: PreTrainedModel = model_class.from_config(settings, trust_remote_code=config.trust_remote_code)
    network = f"{model.base_model_prefix}."
    skipped = list(get_keys_to_not_convert(model))
    for name, module in model.named_modules():
        is_in_head = config.kind == "classifier" and (not name.startswith(network) or "pooler" in name.split("."))
        is_misaligned = _count_inputs(module) % BLOCK_SIZE
        # a name also skips the modules inside, so containers must not be named
        if is_misaligned or (is_in_head and any(True for _ in module.parameters(recurse=False))):
            skipped.append(name)
    return skipped


def _count_inputs(module: nn.Module) -> int:
    """Returns the number of inputs of a linear layer, or 0 for other modules."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0])
    return module.in_features if isinstance(module, nn.Linear) else 0
