"""Draws the modules that the base's checkpoint lacks, such as a classifier's head, from the run's own seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

DEVIATION = 0.02
"""Default standard deviation of new weights, for a model whose settings have no `initializer_range`; the value of BERT,
RoBERTa and GPT-2."""


def draw_head(model: nn.Module, names: Sequence[str], *, generator: torch.Generator | None) -> None:
    """Draws the parameters of new modules in a copy of the base: weights normal, biases 0, norms' weights 1.

    They are drawn in fp32 and rounded to the base's dtype; methods train them in fp32. The parameters are replaced, so
    no tensor of the base is written to.

    Args:
        model: A copy from `copy_sharing_weights`, with no LoRA layers yet.
        names: Names of the new modules (`BaseModel.head`).
        generator: CPU random stream (`seeds.init`), drawn in the model's order before anything else of a run.
    """
    deviation = _deviation(model)
    for name in names:
        for module in model.get_submodule(name).modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                values = _draw(key, parameter, deviation=deviation, generator=generator)
                # a model on the meta device gets its weights from the checkpoint later, which lacks these
                place = "cpu" if parameter.is_meta else parameter.device
                values = values.to(place, parameter.dtype)
                setattr(module, key, nn.Parameter(values, requires_grad=parameter.requires_grad))


def _draw(key: str, parameter: Tensor, *, deviation: float, generator: torch.Generator | None) -> Tensor:
    if parameter.dim() > 1:
        return torch.randn(parameter.shape, generator=generator) * deviation
    return torch.ones(parameter.shape) if key == "weight" else torch.zeros(parameter.shape)


def _deviation(model: nn.Module) -> float:
    settings: Any = getattr(model, "config", None)
    if hasattr(settings, "get_text_config"):
        settings = settings.get_text_config()  # a model for images and text nests the settings of its text part
    return float(getattr(settings, "initializer_range", None) or DEVIATION)
