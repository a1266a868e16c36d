"""Which layers are linear, and how each kind stores its weight matrix (d_out, d_in), also in 4 bits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def is_conv1d(module: nn.Module) -> bool:
    """Returns whether this is transformers' `Conv1D` (weight: d_in, d_out), by its name; works without transformers."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def is_linear(module: nn.Module) -> bool:
    """Returns whether this is a linear layer that the model calls, unlike the `out_proj` of `nn.MultiheadAttention`."""
    is_never_called = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return is_conv1d(module) or (isinstance(module, nn.Linear) and not is_never_called)


def has_custom_forward(module: nn.Module) -> bool:
    """Returns whether a linear layer must be called, because it has hooks or its own `forward` (a quantised layer)."""
    is_custom = type(module).forward is not nn.Linear.forward and not is_conv1d(module)
    has_hooks = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    return bool(is_custom or has_hooks)


def is_quantised(layer: nn.Module) -> bool:
    """Returns whether a layer stores its weight in a dtype that is not floating-point."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return not weight.is_floating_point()


@torch.no_grad()
def dequantised_weight(layer: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """Returns the weight of a quantised linear layer in fp32: its output for unit vectors, minus the bias."""
    assert isinstance(layer, nn.Linear)
    output: Tensor = layer(torch.eye(layer.in_features, device=layer.weight.device))  # (d_in, d_out)
    return (output if layer.bias is None else output - layer.bias).t().float()


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Returns (d_out, d_in) of the weight matrix."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features  # a quantised weight has another shape
    d_in, d_out = module.weight.shape  # type: ignore[misc]
    return int(d_out), int(d_in)


def weight_to_matrix(module: nn.Module, weight: Float[Tensor, "*weight_shape"]) -> Float[Tensor, "d_out d_in"]:
    """Returns a tensor that has the shape of `module`'s weight as a (d_out, d_in) matrix, without a copy."""
    return weight.t() if is_conv1d(module) else weight.flatten(1)


def matrix_to_weight(module: nn.Module, matrix: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "_ _"]:
    """Returns a (d_out, d_in) matrix as a tensor that has the shape of a linear layer's weight, without a copy."""
    return matrix.t() if is_conv1d(module) else matrix


def list_scales(parameter: Tensor) -> list[Tensor]:
    """Returns the tensors, in a fixed order, with which a 4-bit parameter is dequantised; empty for all others."""
    state = getattr(parameter, "quant_state", None)
    return [] if state is None else [tensor for _, tensor in sorted(state.as_dict(packed=True).items())]


def find_fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that hold one matrix for each expert, (experts, ., .), by name and in the model's order.

    Since version 5 transformers stores experts in this way, and not as linear layers.
    """
    kernels = {p for module in model.modules() if isinstance(module, _ConvNd) for p in module.parameters(recurse=False)}
    named = model.named_parameters()
    return {name: p for name, p in named if p.dim() == 3 and len(p) > 1 and p not in kernels}


def count_parameters(model: nn.Module) -> int:
    """Returns the number of weights and biases of a model, also of 4-bit ones; tied ones count once."""
    states = {p: getattr(p, "quant_state", None) for p in model.parameters()}
    return sum(p.numel() if state is None else int(state.shape.numel()) for p, state in states.items())
