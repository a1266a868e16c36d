"""The kinds of layer that can be adapted, and the weight of each as a matrix (d_out, d_in)."""

from __future__ import annotations

from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`: a linear layer whose weight is stored as (d_in, d_out).

    It is known by its name, so that transformers is not needed.
    """
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def is_linear(module: nn.Module) -> bool:
    """Whether target `all-linear` selects this module: calling it multiplies its input by a weight.

    The output projection of `nn.MultiheadAttention` is not selected, because attention never calls it: attention reads
    its weight.
    """
    uncalled = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return is_conv1d(module) or (isinstance(module, nn.Linear) and not uncalled)


def can_be_adapted(module: nn.Module) -> bool:
    """Whether a low-rank change can be added: to a linear layer, an embedding, or a 2-D convolution without groups.

    An embedding can't be adapted if its forward pass renormalises its weight (`max_norm`) or is unknown to lorasweep.
    """
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return plain and module.max_norm is None
    return is_linear(module) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def has_custom_forward(module: nn.Module) -> bool:
    """Whether a linear layer has hooks or its own forward (quantised layers), so that it must be called."""
    own_forward = type(module).forward is not nn.Linear.forward and not is_conv1d(module)
    hooked = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    return bool(own_forward or hooked)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of the weight as a matrix: an embedding maps one-hot rows, a convolution whole patches."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features  # a quantised weight has another shape
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.weight[0].numel()
    first, second = module.weight.shape  # type: ignore[misc]
    return int(second), int(first)


def weight_to_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A view of a weight, as `module` stores it, that is its matrix (d_out, d_in)."""
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return weight.t()
    return weight.flatten(1)


def matrix_to_weight(module: nn.Module, matrix: Tensor) -> Tensor:
    """A view of a matrix (d_out, d_in) that has the shape in which `module` stores its weight."""
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return matrix.t()
    return matrix.view(-1, *module.weight.shape[1:]) if isinstance(module, nn.Conv2d) else matrix
