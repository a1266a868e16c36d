"""Counts the weights of quantised parameters, and lists their scales."""

from __future__ import annotations

from torch import Tensor, nn


def list_scales(parameter: Tensor) -> list[Tensor]:
    """Returns the tensors, other than its bytes, with which a 4-bit parameter of bitsandbytes is dequantised.

    Their order is always the same. The list is empty for every other parameter.
    """
    state = getattr(parameter, "quant_state", None)
    return [] if state is None else [tensor for _, tensor in sorted(state.as_dict(packed=True).items())]


def count_parameters(model: nn.Module) -> int:
    """Returns the number of weights and biases of a model; tied ones count once.

    A 4-bit parameter has fewer elements than weights.
    """
    states = {p: getattr(p, "quant_state", None) for p in model.parameters()}
    return sum(p.numel() if state is None else int(state.shape.numel()) for p, state in states.items())
