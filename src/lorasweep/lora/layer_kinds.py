"""Which layers can be adapted, and how each kind of layer stores its weight matrix (d_out, d_in), also in 4 bits."""

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


def can_be_adapted(module: nn.Module) -> bool:
    """Returns whether LoRA can adapt this module: a linear layer, an embedding, or a 2-D convolution without groups.

    An embedding can't be adapted if its forward pass renormalises its weight (`max_norm`) or is unknown to lorasweep.
    """
    if isinstance(module, nn.Embedding):
        has_known_forward = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return has_known_forward and module.max_norm is None
    return is_linear(module) or (isinstance(module, nn.Conv2d) and module.groups == 1)


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
    """Returns (d_out, d_in) of the weight matrix. d_in is an embedding's vocabulary or a convolution's patch size."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features  # a quantised weight has another shape
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.weight[0].numel()
    d_in, d_out = module.weight.shape  # type: ignore[misc]
    return int(d_out), int(d_in)


def weight_to_matrix(module: nn.Module, weight: Float[Tensor, "*weight_shape"]) -> Float[Tensor, "d_out d_in"]:
    """Returns a tensor that has the shape of `module`'s weight as a (d_out, d_in) matrix, without a copy."""
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return weight.t()
    return weight.flatten(1)


def matrix_to_weight(module: nn.Module, matrix: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "*weight_shape"]:
    """Returns a (d_out, d_in) matrix as a tensor that has the shape of `module`'s weight, without a copy."""
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return matrix.t()
    return matrix.view(-1, *module.weight.shape[1:]) if isinstance(module, nn.Conv2d) else matrix


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
