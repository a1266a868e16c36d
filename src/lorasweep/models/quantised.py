"""Quantised bases: linear layers whose frozen weights are stored in 4 or 8 bits (`model.quantization`).

bitsandbytes quantises, called by transformers while it reads the files. It always quantises on the CPU, so that the
stored bytes, and with them the fingerprint, are the same on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
TRANSFORMERS_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    # double quantisation of the blocks' scales, as in QLoRA (arXiv 2305.14314): 4.127 instead of 4.5 bits per weight
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""Arguments of transformers' `BitsAndBytesConfig` by the value of `model.quantization`."""
MAX_INT8 = 127
"""The largest whole number that a stored weight of `int8` has. bitsandbytes stores scales multiplied by it."""


class Int8Linear(nn.Linear):
    """A frozen linear layer with 8-bit weights and one scale per row. Activations keep their dtype.

    *Differs* from bitsandbytes' `Linear8bitLt`, which stores the same weights but also rounds activations to 8 bits, on
    a GPU always and on a CPU in evaluations only. Its outliers are found per batch, so a run in a pack would not equal
    the run alone. And its scales belong to the layer that computes first, but runs share the base's weights.

    Attributes:
        weight: (d_out, d_in) in int8.
        scale: (d_out,) in fp32.
    """

    def __init__(
        self, weight: Int8[Tensor, "d_out d_in"], scale: Float[Tensor, " d_out"], bias: Float[Tensor, " d_out"] | None
    ) -> None:
        d_out, d_in = weight.shape
        super().__init__(d_in, d_out, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        y: Tensor = _MultiplyByInt8.apply(x, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _MultiplyByInt8(torch.autograd.Function):
    """Returns x Wᵀ of an 8-bit W. Autograd alone would keep a copy of W in the dtype of x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.weight, ctx.scale = weight, scale  # not by `save_for_backward`: frozen weights are no activations
        return nn.functional.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad * ctx.scale.to(grad.dtype)) @ ctx.weight.to(grad.dtype), None, None


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
    _import_bitsandbytes()
    bits = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        **TRANSFORMERS_ARGUMENTS[config.quantization],
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_find_skipped_modules(config, model_class, settings),  # 4 bits have this argument too
    )
    return {"quantization_config": bits, "device_map": {"": "cpu"}}


def finish_quantised(model: PreTrainedModel, config: ModelConfig) -> None:
    """Changes a model that transformers has quantised so that runs can share its weights.

    Raises:
        ConfigError: No layer was quantised.
    """
    bitsandbytes: Any = import_module("bitsandbytes.nn")
    kind = bitsandbytes.Linear4bit if config.quantization == "nf4" else bitsandbytes.Linear8bitLt
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if not layers:
        needed = f" with a multiple of {BLOCK_SIZE} inputs" if config.quantization == "nf4" else ""
        raise ConfigError(
            f"`model.quantization={config.quantization}` must have linear layers{needed}, but {config.path!r} has none "
            f"beside its head. Use {'int8 or ' if needed else ''}none."
        )
    for name, layer in layers.items():
        if config.quantization == "nf4":
            # In evaluations on a CPU with AVX512-BF16, bitsandbytes (0.50) would store the weight in another order, for
            # which it has no backward pass: all later gradients would lack the base's part, without an error.
            layer.support_avx512bf16_for_cpu = False
            layer.quant_state = None  # the weight has it too; each run would copy that of the layer
        else:
            scale = layer.weight.SCB.detach() / MAX_INT8
            model.set_submodule(name, Int8Linear(layer.weight.data, scale, layer.bias))


def _find_skipped_modules(config: ModelConfig, model_class: Any, settings: Any) -> list[str]:
    """Returns the names of modules that are not quantised.

    They are the output head, tied layers (both by transformers' own rule), the modules of a classifier that the
    checkpoint may lack, and under nf4 layers whose rows are no multiple of `BLOCK_SIZE`.
    """
    with quiet_transformers(), torch.device("meta"):
        model: PreTrainedModel = model_class.from_config(settings, trust_remote_code=config.trust_remote_code)
    network = f"{model.base_model_prefix}."
    skipped = list(get_keys_to_not_convert(model))
    for name, module in model.named_modules():
        is_in_head = config.kind == "classifier" and (not name.startswith(network) or "pooler" in name.split("."))
        is_misaligned = config.quantization == "nf4" and _count_inputs(module) % BLOCK_SIZE
        # a name also skips the modules inside, so containers must not be named
        if is_misaligned or (is_in_head and any(True for _ in module.parameters(recurse=False))):
            skipped.append(name)
    return skipped


def _count_inputs(module: nn.Module) -> int:
    """Returns the number of inputs of a linear layer, or 0 for other modules."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0])
    return module.in_features if isinstance(module, nn.Linear) else 0


def _import_bitsandbytes() -> None:
    """Imports bitsandbytes without the native code that it would download from the hub."""
    if "bitsandbytes" in sys.modules:
        return
    with _hide_module("kernels"), quiet_transformers():
        import_module("bitsandbytes")


@contextmanager
def _hide_module(name: str) -> Iterator[None]:
    """Makes `import name` fail inside the block."""
    before = sys.modules.get(name)
    sys.modules[name] = cast(Any, None)
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
