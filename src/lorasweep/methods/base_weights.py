"""Methods of the base's own weights: `full` trains fp32 copies of all or some, and `frozen` trains none.

The base's weights, which other runs share, do not change. The base may have any dtype.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.config.method import ALL_PARAMETERS, FrozenConfig, FullConfig
from lorasweep.errors import ConfigError
from lorasweep.methods.method import Method, clear_tie_setting, replace_by_trainable_copies
from lorasweep.models.load import BaseModel
from lorasweep.wording import shorten


class FullMethod(Method[FullConfig]):
    """Trains fp32 copies of all weights, or of those that `method.parameters` names, and of a new head.

    Examples are the biases (BitFit, Ben Zaken et al. 2022, arXiv 2106.10199) and an output head. A tied weight of which
    one name is named is untied, so that embeddings stay frozen beside a trained head. Merging rounds trained weights to
    the dtype of the frozen ones. With a bf16 base, autocast rounds them in the same way during training.
    """

    needs_autocast = True
    weights_file = "model.safetensors"

    def check(self, model: nn.Module, *, new_head_names: Sequence[str] = ()) -> None:
        """Raises a ConfigError if `method.parameters` is no regular expression, or matches no parameter."""
        pattern = self.config.parameters
        try:
            found = find_parameters(model, pattern)
        except re.error as error:
            raise ConfigError(
                f"`method.parameters` must be a regular expression, but got {pattern!r}: {error}."
            ) from error
        if not found and not new_head_names:
            names = [name for name, _ in model.named_parameters()]
            raise ConfigError(
                f"`method.parameters` must match whole names of parameters, but {pattern!r} matches none. "
                f"The last of {type(model).__name__} are {shorten(names[-4:], 400)}."
            )

    def _make_trainable(self, model: nn.Module, *, base: BaseModel, **_: Any) -> None:
        head = {f"{name}.{key}" for name in base.new_head_names for key in find_parameters(model.get_submodule(name))}
        replace_by_trainable_copies(model, find_parameters(model, self.config.parameters) | head)
        if self.config.trains_all:
            return
        for norm in (module for module in model.modules() if "norm" in type(module).__name__.lower()):
            parameters = dict(norm.named_parameters(recurse=False))
            if any(parameter.requires_grad for parameter in parameters.values()):
                for name, parameter in parameters.items():  # torch requires one dtype for all parameters of a norm
                    if not parameter.requires_grad:
                        setattr(norm, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
        clear_tie_setting(model)

    def _get_tensors_to_save(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the trained parameters by name, and all persistent buffers if every parameter trains.

        A tied parameter has only its first name.
        """
        first_names = dict(model.named_parameters())
        if not all(parameter.requires_grad for parameter in first_names.values()):
            return super()._get_tensors_to_save(model)
        others = {name for name, _ in model.named_parameters(remove_duplicate=False) if name not in first_names}
        return {name: tensor for name, tensor in model.state_dict().items() if name not in others}


def find_parameters(model: nn.Module, pattern: str = ALL_PARAMETERS) -> set[str]:
    """Returns the names of the parameters that a regular expression matches, also the further names of tied ones."""
    owned = (
        (name, module.named_parameters(recurse=False, remove_duplicate=False)) for name, module in model.named_modules()
    )
    names = (f"{name}.{key}".lstrip(".") for name, parameters in owned for key, _ in parameters)
    return {name for name in names if re.fullmatch(pattern, name)}


class FrozenMethod(Method[FrozenConfig]):
    """Trains nothing and saves nothing, as a baseline for the other methods.

    A base without a head of its own knows no labels. Its new head gives the constant answer, such as the most frequent
    class of train, because a random head scores by chance: MiniLM on film reviews 0.585, 0.495, 0.545 on three seeds.
    """

    def _make_trainable(self, model: nn.Module, *, base: BaseModel, **_: Any) -> None:
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
