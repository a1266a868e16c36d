"""`frozen`: the base model without training, as a baseline for the other methods.

A base without a head of its own knows no labels. Its new head gives the constant answer, such as the most frequent
class of train, because a random head scores by chance: MiniLM on film reviews 0.585, 0.495 and 0.545 on three seeds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorasweep.methods.method import Method
from lorasweep.models.load import BaseModel


class FrozenMethod(Method):
    """Trains nothing and saves nothing."""

    name = "frozen"

    def _make_trainable(self, model: nn.Module, config: Any, *, base: BaseModel, **_: Any) -> None:
        layer = find_output_layer(model, base)
        if layer is not None and base.labels is not None:
            weight = layer.weight
            layer.weight = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
            layer.bias = nn.Parameter(torch.tensor(base.labels.constant).to(weight), requires_grad=False)

    def merge(self, model: nn.Module) -> None:
        """Does nothing, because the model has no trained parameters."""


def find_output_layer(model: nn.Module, base: BaseModel) -> nn.Linear | None:
    """Returns the last linear layer of a new head if the constant answer is known; None if there is none."""
    num_outputs = 0 if base.labels is None else len(base.labels.constant)
    heads = [module for name in base.new_head_names for module in model.get_submodule(name).modules()]
    layers = [module for module in heads if isinstance(module, nn.Linear) and module.out_features == num_outputs]
    return layers[-1] if layers else None
