"""Quantises a base to 4 bits (QLoRA, arXiv 2305.14314) by bitsandbytes, which is optional; adapters stay in fp32.

The base's own forward computes its output, and the adapter's output is added to it (`AdaptedLayer.calls_base`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

from lorasweep.lora.inject import replace_module
from lorasweep.lora.patterns import first_fit


def quantise_base(
    model: nn.Module, *, exclude: Iterable[str] = (), quant_type: Literal["nf4", "fp4"] = "nf4"
) -> list[str]:
    """Replaces the linear layers of `model` by 4-bit layers; call it before `inject_lora`.

    Args:
        model: A model with floating-point weights.
        exclude: Patterns of layers to leave as they are; the output head should be among them.
        quant_type: NormalFloat (section 3 of QLoRA) or 4-bit floats.

    Returns:
        The names of the layers that are now quantised.

    Raises:
        ValueError: bitsandbytes is missing, or the model is not on a device that it supports.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "`bitsandbytes` must be installed for a 4-bit base, but it is missing. Type `pip install bitsandbytes`."
        )
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and first_fit(exclude, n) is None}
    devices = {layer.weight.device.type for layer in layers.values()}
    if not devices <= {"cpu", "cuda", "xpu"}:
        raise ValueError(
            f"The model must be on a CPU or CUDA device to be quantised, but it is on {devices}. Move it there."
        )
    for layer in layers.values():
        replace_module(model, layer, _quantised_layer(layer, quant_type))
    return list(layers)


def is_quantised(layer: nn.Module) -> bool:
    """Returns whether a layer's weight is stored in a form other than floating-point numbers."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return not weight.is_floating_point()


@torch.no_grad()
def dequantised_weight(layer: nn.Module) -> Tensor:
    """Returns the weight of a quantised linear layer in fp32, (d_out, d_in).

    Computed as the layer's outputs for unit vectors, without the bias, so that it works for any kind of quantisation.
    """
    assert isinstance(layer, nn.Linear)
    output: Tensor = layer(torch.eye(layer.in_features, device=layer.weight.device))  # (d_in, d_out)
    return (output if layer.bias is None else output - layer.bias).t().float()


def _quantised_layer(layer: nn.Linear, quant_type: str) -> nn.Module:
    bitsandbytes = importlib.import_module("bitsandbytes")  # optional, and slow to start
    dtype, device = layer.weight.dtype, layer.weight.device
    has_bias = layer.bias is not None
    quantised: nn.Module = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=has_bias, compute_dtype=dtype, quant_type=quant_type
    )
    quantised.load_state_dict(layer.state_dict())
    return quantised.to(device).requires_grad_(False)  # bitsandbytes quantises in `to`
