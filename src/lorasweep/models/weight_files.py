"""Builds a base model without weights, and reads single weights from its safetensors files.

Used if several processes shard a model: each process reads only its tensors, so no process holds the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lorasweep.models.pretrained import outermost_modules, quiet_transformers

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"


def has_weight_files(folder: Path) -> bool:
    return (folder / INDEX_FILE).is_file() or (folder / WEIGHTS_FILE).is_file()


class WeightFiles:
    """Reads single tensors from the safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX_FILE
        if index.is_file():
            names = json.loads(index.read_text())["weight_map"]
            if outside := [file for file in names.values() if Path(file).name != file]:
                raise ValueError(f"{INDEX_FILE} must name files beside it, but names {outside[0]!r}")
        else:
            with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
                names = dict.fromkeys(file.keys(), WEIGHTS_FILE)
        self._files = {name: folder / file for name, file in names.items()}

    def get_shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of a tensor, or None if no file has it."""
        if name not in self._files:
            return None
        with safe_open(self._files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Returns a tensor as it is stored."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def build_on_meta(
    model_class: Any, settings: Any, folder: Path, *, dtype: torch.dtype, may_lack_head: bool, **given: Any
) -> tuple[PreTrainedModel, tuple[str, ...], WeightFiles] | None:
    """Returns a model whose parameters are on the meta device, the names of its new modules, and its weight files.

    Buffers have their values. Returns None if the files have other names or shapes than the model's parameters, because
    only transformers can convert such files.

    Args:
        model_class: One of transformers' `AutoModel...` classes.
        settings: The model's configuration.
        folder: The folder of its files.
        dtype: Type of its parameters.
        may_lack_head: Whether weights outside the pre-trained network may be missing in the files.
        given: Passed on to `from_config`.
    """
    if getattr(settings, "quantization_config", None) is not None:
        return None
    files = WeightFiles(folder)
    with quiet_transformers(), _parameters_on_meta():
        model: PreTrainedModel = model_class.from_config(settings, dtype=dtype, **given)
    missing = [name for name, p in model.named_parameters() if files.get_shape(name) != tuple(p.shape)]
    network = f"{model.base_model_prefix}."
    if any(not may_lack_head or name.startswith(network) for name in missing):
        return None
    if any(files.get_shape(name) for name, buffer in model.named_buffers()):
        return None  # the files store a buffer, such as a running mean, that this model would not have
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model, outermost_modules(model, missing), files


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Puts every parameter that is created inside this context on the meta device.

    `torch.device("meta")` would also do this with buffers, but no file has the values of rotary frequencies.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # a tied parameter is on the meta device already
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
