"""Loads models with transformers' `from_pretrained`, quietly, and checks that no weight is missing.

Pickle files and code from the hub are refused unless the caller allows them. With `model.quantization=nf4`,
bitsandbytes stores linear layers in 4 bits while transformers reads the files. It always quantises on the CPU, so that
the stored bytes, and with them the fingerprint, are the same on every machine.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import logging as transformers_logging

from lorasweep.config.run import ModelConfig
from lorasweep.errors import ConfigError
from lorasweep.lora.layer_kinds import is_conv1d, matrix_shape

QUANTISING_PACKAGES = ("bitsandbytes", "accelerate")
"""Packages that quantise. They are optional (`lorasweep[quantised]`)."""
BLOCK_SIZE = 64
"""Number of weights that share a scale in nf4. bitsandbytes' kernel for CPUs (0.50) uses wrong scales for a matrix
whose rows have another length than a multiple of it, so such a layer is not quantised."""
NF4_ARGUMENTS: Mapping[str, Any] = {
    # double quantisation of the blocks' scales, as in QLoRA (arXiv 2305.14314): 4.127 instead of 4.5 bits per weight
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
"""Arguments of transformers' `BitsAndBytesConfig` for `model.quantization=nf4`."""


def load_pretrained(
    model_class: Any, source: str, *, dtype: torch.dtype, may_lack_head: bool = False, **settings: Any
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Loads a model in `dtype`, and returns it with the names of its new modules (`outermost_modules`).

    The head is every module outside the pre-trained network (`classifier`, `score`), and the pooler inside. With
    `may_lack_head` the checkpoint may have none, or one for other labels. A new head is initialised as its architecture
    defines, with a fixed seed. Later, each run draws the head again. Some buffers (rotary frequencies) stay fp32.
    A network without a head loses its pooler, which computes nothing that is used.

    Raises:
        ValueError: Weights are missing or have the wrong shape. transformers alone would only warn.
        Exception: The files are missing, damaged or of an unknown kind. transformers raises errors of many classes.
    """
    model: PreTrainedModel
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the same weights at each call, whatever the seed of the run
        model, info = model_class.from_pretrained(
            source,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # `info` names them, and no error is raised
            output_loading_info=True,
            **({"use_safetensors": True, "trust_remote_code": False} | settings),
        )
    missing = sorted(info["missing_keys"]) + sorted(name for name, *_ in info["mismatched_keys"])
    if model.base_model is model and getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]
        missing = [name for name in missing if not name.startswith("pooler.")]
    network = f"{model.base_model_prefix}."
    needed = [
        name for name in missing if not may_lack_head or (name.startswith(network) and "pooler" not in name.split("."))
    ]
    if needed:
        raise ValueError(f"{len(needed)} of its weights are missing or have another shape, such as {needed[0]!r}")
    return model, outermost_modules(model, missing)


def outermost_modules(model: nn.Module, parameters: Collection[str]) -> tuple[str, ...]:
    """Returns the names of the modules whose parameters are all given: of two nested modules only the outer one."""
    names = set(parameters)

    def is_covered(module: str) -> bool:
        inside = model.get_submodule(module).named_parameters(prefix=module, remove_duplicate=False)
        return all(name in names for name, _ in inside)

    modules: dict[str, None] = {}  # in the order of the parameters
    for parameter in parameters:
        name = parameter.rpartition(".")[0]
        while (parent := name.rpartition(".")[0]) and is_covered(parent):
            name = parent
        modules[name] = None
    return tuple(name for name in modules if not any(name.startswith(f"{other}.") for other in modules))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off transformers' progress bars and log messages. Our errors report problems instead."""
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR + 1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def build_quantisation_arguments(
    config: ModelConfig, model_class: Any, settings: Any, *, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns the arguments with which `from_pretrained` quantises a model on the CPU.

    `settings` are the model's configuration, and `dtype` is that of the computation and of all other parameters. The
    output head, tied layers, modules that a classifier's checkpoint may lack, and layers whose number of inputs is no
    multiple of `BLOCK_SIZE` are not quantised.
    """
    if getattr(settings, "quantization_config", None) is not None:
        raise ConfigError(
            f"`model.quantization` must be none for a model whose files are quantised already, but got "
            f"{config.quantization!r} with {config.path!r}."
        )
    with quiet_transformers(), torch.device("meta"):
        model: PreTrainedModel = model_class.from_config(settings, trust_remote_code=config.trust_remote_code)
    # by transformers' own rule: the output head and tied layers
    skipped, network = list(get_keys_to_not_convert(model)), f"{model.base_model_prefix}."
    for name, module in model.named_modules():
        may_be_missing = config.kind == "classifier" and (not name.startswith(network) or "pooler" in name.split("."))
        is_layer = isinstance(module, nn.Linear) or is_conv1d(module)
        is_misaligned = is_layer and matrix_shape(module)[1] % BLOCK_SIZE
        # a name also skips the modules inside, so containers must not be named
        if is_misaligned or (may_be_missing and any(True for _ in module.parameters(recurse=False))):
            skipped.append(name)
    quantisation = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        **NF4_ARGUMENTS,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,  # also used with 4 bits
    )
    return {"quantization_config": quantisation, "device_map": {"": "cpu"}}


def finish_quantised(model: PreTrainedModel, config: ModelConfig) -> None:
    """Lets runs share the weights of a model that transformers has quantised. Refuses one without 4-bit layers."""
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
        layer.quant_state = None  # the weight has the same state; a second one would be copied for each run
