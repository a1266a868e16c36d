"""Modules (`modules_to_save`) that train in full, beside the LoRA layers.

Copies of them train. Nothing may write to the base's own tensors, because other models may share them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map  # not public, but transformers registers its outputs and caches here alone

from lorasweep.lora.patterns import fits_pattern, suggest_layer


class TrainedModule(nn.Module):
    """A frozen module and its trainable copy, which replaces it in the forward pass.

    Attributes:
        base: The frozen original.
        trained: The trainable copy, in fp32 or in the base's dtype if that is wider. It computes in the base's dtype,
            like all other methods.
    """

    def __init__(self, base: nn.Module, trained: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.trained = trained

    @property
    def weight(self) -> Tensor:
        """The trained weight. Some models read the weight of their head or embedding."""
        return self.trained.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.trained.bias  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return call_in_precision_of(self.base, self.trained, args, kwargs)


def call_in_precision_of(base: nn.Module, call: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Calls a module that has fp32 copies of the base's parameters, and computes in the dtype of the base."""
    parameter = next((parameter for parameter in base.parameters() if parameter.is_floating_point()), None)
    if parameter is None or parameter.dtype not in (torch.bfloat16, torch.float16):
        return call(*args, **kwargs)
    with torch.autocast(parameter.device.type, parameter.dtype):
        output = call(*args, **kwargs)
    # autocast returns fp32 from some layers
    return tree_map(
        lambda value: value.to(parameter.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value,
        output,
    )


def match_modules_to_save(model: nn.Module, patterns: Collection[str]) -> dict[str, nn.Module]:
    """Returns the matched modules by name. A module inside another matched module is not returned.

    Raises ValueError if a pattern matches no module; or a matched module is quantised; or it shares a parameter with a
    module that is not matched, so that a copy would untie them.
    """
    names = [name for name, _ in model.named_modules() if name]
    matched: dict[str, nn.Module] = {}
    for pattern in patterns:
        fitting = [name for name in names if fits_pattern(pattern, name)]
        if not fitting:
            raise ValueError(
                f"`method.modules_to_save` must match modules, but {pattern!r} matches none."
                f"{suggest_layer(pattern, names)}"
            )
        matched.update((name, model.get_submodule(name)) for name in fitting)
    outermost = {n: m for n, m in matched.items() if not any(n.startswith(f"{other}.") for other in matched)}
    for name, module in outermost.items():
        if not all(parameter.is_floating_point() for parameter in module.parameters()):
            raise ValueError(
                f"`method.modules_to_save` must match modules with floating-point weights, but {name!r} is quantised. "
                "Adapt it by `method.targets`, or use `model.quantization=none`."
            )
    copied = {id(parameter) for module in outermost.values() for parameter in module.parameters()}
    for name, module in model.named_modules():
        if not is_inside(name, outermost) and any(id(p) in copied for p in module.parameters(recurse=False)):
            raise ValueError(
                f"`method.modules_to_save` must include {name!r}, which shares a weight with a matched module "
                f"({', '.join(map(repr, outermost))}), but got {tuple(patterns)}. Add {name!r}."
            )
    return outermost


def copy_as_trainable(modules: Mapping[str, nn.Module]) -> dict[str, TrainedModule]:
    """Returns these modules with trainable fp32 copies. Modules that share a parameter have copies that share one."""
    # one deep copy of all modules, so that shared parameters stay shared
    copies = copy.deepcopy(dict(modules))
    for module in copies.values():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
                parameter.requires_grad_(True)
    return {name: TrainedModule(modules[name], copies[name]) for name in modules}


def trained_modules(model: nn.Module) -> dict[str, TrainedModule]:
    """Returns the modules of `model` that train in full by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedModule)}


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Returns whether `name` is one of these modules or inside one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
