"""Methods that train fp32 copies of the base's weights: `full`, `head`, `bitfit`; and `frozen`, which trains none.

The base's weights, which other runs share, do not change. The base may have any dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorasweep.config.method import BitfitConfig, MethodConfig
from lorasweep.errors import ConfigError
from lorasweep.methods.method import Method, clear_tie_setting, replace_by_trainable_copies
from lorasweep.models.load import BaseModel


class FullMethod(Method):
    """Full fine-tuning with fp32 weights."""

    name = "full"
    needs_autocast = True
    weights_file = "model.safetensors"

    def _make_trainable(self, model: nn.Module, config: Any, **_: Any) -> None:
        replace_by_trainable_copies(model, model.parameters())

    def _get_tensors_to_save(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the parameters and the persistent buffers by name. A tied parameter has only its first name."""
        first_names = dict(model.named_parameters())
        others = {name for name, _ in model.named_parameters(remove_duplicate=False) if name not in first_names}
        return {name: tensor for name, tensor in model.state_dict().items() if name not in others}


class HeadMethod(Method):
    """Trains only a new head from random values, or an output head from the base's weights.

    An output head that is tied to the embeddings is untied, so that the embeddings stay frozen. Merging rounds the head
    to the base's dtype. With a bf16 base, autocast rounds it in the same way during training.
    """

    name = "head"
    needs_autocast = True
    weights_file = "head.safetensors"

    def check(self, model: nn.Module, config: MethodConfig, *, new_head_names: Sequence[str] = ()) -> None:
        """Raises a ConfigError if the model has neither a new head nor an output head."""
        if not new_head_names:
            find_head(model)

    def _make_trainable(self, model: nn.Module, config: Any, *, base: BaseModel, **_: Any) -> None:
        heads = [model.get_submodule(name) for name in base.new_head_names] or [find_head(model)]
        for head in heads:
            # replaced only inside the head, so that tied embeddings keep the frozen weight
            replace_by_trainable_copies(head, head.parameters())
        clear_tie_setting(model)


def find_head(model: nn.Module) -> nn.Module:
    """Returns the model's output embeddings (transformers' name of a language model's head), or a classifier's head.

    A classifier's head is the only module with parameters beside the network, which `base_model_prefix` names. Raises
    ConfigError if the model has no such head.
    """
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if callable(get_output_embeddings) else None
    if head is None and (network := getattr(model, "base_model_prefix", None)):
        others = [child for name, child in model.named_children() if name != network]
        candidates = [child for child in others if any(True for _ in child.parameters())]
        head = candidates[0] if len(candidates) == 1 else None
    if head is None:
        raise ConfigError(
            f"`method=head` needs a model with an output head, but {type(model).__name__} has none. Use `method=lora`."
        )
    return cast(nn.Module, head)


class BitfitMethod(Method):
    """Trains every bias (Ben Zaken et al. 2022, arXiv 2106.10199).

    *Differs:* the paper trains biases only. Many recent models have none, so `biases_and_norms` also trains the weights
    of norms.
    """

    name = "bitfit"
    needs_autocast = True
    weights_file = "bitfit.safetensors"

    def check(self, model: nn.Module, config: MethodConfig, *, new_head_names: Sequence[str] = ()) -> None:
        """Raises a ConfigError if `method.train` selects no parameter of the model."""
        assert isinstance(config, BitfitConfig)
        if any(True for _ in find_biases_and_norms(model, config)):
            return
        remedy = "`method.train=biases_and_norms` or " if config.train == "biases" else ""
        raise ConfigError(
            f"`method.train={config.train}` needs a model with {config.train.replace('_and_', ' or ')}, "
            f"but {type(model).__name__} has none. Use {remedy}`method=lora`."
        )

    def _make_trainable(self, model: nn.Module, config: Any, *, base: BaseModel, **_: Any) -> None:
        head = [parameter for name in base.new_head_names for parameter in model.get_submodule(name).parameters()]
        replace_by_trainable_copies(model, [*find_biases_and_norms(model, config), *head])
        for norm in filter(is_norm, model.modules()):
            parameters = dict(norm.named_parameters(recurse=False))
            if any(parameter.requires_grad for parameter in parameters.values()):
                for name, parameter in parameters.items():  # torch requires one dtype for all parameters of a norm
                    if not parameter.requires_grad:
                        setattr(norm, name, nn.Parameter(parameter.detach().float(), requires_grad=False))


def find_biases_and_norms(model: nn.Module, config: BitfitConfig) -> Iterator[nn.Parameter]:
    """Yields the biases of a model. With `biases_and_norms`, also yields all other parameters of the norms."""
    for module in model.modules():
        trains_all = config.train == "biases_and_norms" and is_norm(module)
        for name, parameter in module.named_parameters(recurse=False):
            if trains_all or name.endswith("bias"):
                yield parameter


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


class FrozenMethod(Method):
    """Trains nothing and saves nothing, as a baseline for the other methods.

    A base without a head of its own knows no labels. Its new head gives the constant answer, such as the most frequent
    class of train, because a random head scores by chance: MiniLM on film reviews 0.585, 0.495, 0.545 on three seeds.
    """

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
