"""`bitfit`: trains only the biases, or the biases and the norms' weights (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lorasweep.config.method import BitfitConfig, MethodConfig
from lorasweep.errors import ConfigError
from lorasweep.methods.method import Method, replace_by_trainable_copies
from lorasweep.models.load import BaseModel


class BitfitMethod(Method):
    """Trains every bias in fp32, from the base's values. With `biases_and_norms`, it also trains the norms' weights.

    *Differs:* the paper trains biases only. Many recent models have no biases, so this class can train norms instead.
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
        for module in filter(is_norm, model.modules()):
            cast_frozen_norm_parameters(module)


def find_biases_and_norms(model: nn.Module, config: BitfitConfig) -> Iterator[nn.Parameter]:
    """Yields the biases of a model. With `biases_and_norms`, also yields all other parameters of the norms."""
    for module in model.modules():
        trains_all = config.train == "biases_and_norms" and is_norm(module)
        for name, parameter in module.named_parameters(recurse=False):
            if trains_all or name.endswith("bias"):
                yield parameter


def is_norm(module: nn.Module) -> bool:
    """Returns whether the name of a module's class contains `norm`."""
    return "norm" in type(module).__name__.lower()


def cast_frozen_norm_parameters(norm: nn.Module) -> None:
    """Converts the frozen parameters of a norm to fp32 copies if another parameter of the norm trains in fp32.

    torch requires one dtype for all parameters of a norm.
    """
    parameters = dict(norm.named_parameters(recurse=False))
    if any(parameter.requires_grad for parameter in parameters.values()):
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                setattr(norm, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
