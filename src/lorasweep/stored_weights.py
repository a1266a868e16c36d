"""Counts the weights of quantised parameters, and lists their scales."""

from __future__ import annotations

from torch import Tensor, nn

WEIGHTS = ("weight", "bias")
"""Names of the parameters of a linear layer. A quantised one may have further parameters: its scales."""


def list_scales(parameter: Tensor) -> list[Tensor]:
    """Returns the tensors, other than its bytes, with which a 4-bit parameter of bitsandbytes is dequantised.

    Their order is always the same. The list is empty for every other parameter.
    """
    state = getattr(parameter, "quant_state", None)
    return [] if state is None else [tensor for _, tensor in sorted(state.as_dict(packed=True).items())]


def count_parameters(model: nn.Module) -> int:
    """Returns the number of weights and biases of a model; tied ones count once, and scales of quantised ones do not.

    A 4-bit parameter has fewer elements than weights.
    """
    quantised = [
        module for module in model.modules() if isinstance(module, nn.Linear) and not module.weight.is_floating_point()
    ]
    scales = {p for layer in quantised for name, p in layer.named_parameters(recurse=False) if name not in WEIGHTS}
    states = {p: getattr(p, "quant_state", None) for p in model.parameters() if p not in scales}
    return sum(p.numel() if state is None else int(state.shape.numel()) for p, state in states.items())
