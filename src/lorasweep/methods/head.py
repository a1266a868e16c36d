"""`head`: the new head alone trains, or the output head where there is no new one, in fp32.

Where the output head was tied to the embeddings, those stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lorasweep.config.method import MethodConfig
from lorasweep.errors import ConfigError
from lorasweep.lora.adapter_files import serialise
from lorasweep.methods.head_init import draw_head
from lorasweep.methods.method import (
    ParameterGroup,
    one_group,
    read_weights,
    replacing_files,
    round_trained,
    train_copies,
    untie_settings,
)
from lorasweep.models.load import BaseModel

WEIGHTS_FILE = "head.safetensors"


class HeadMethod:
    """A new head trains from values of its own, an output head from the base's weights."""

    name = "head"
    needs_autocast = True

    def check(self, model: nn.Module, config: MethodConfig, *, head: tuple[str, ...] = ()) -> None:
        """Makes sure that there is a new head, or that the model says which layer its output head is.

        Raises:
            ConfigError: It has none.
        """
        if not head:
            find_head(model)

    def prepare(
        self, model: nn.Module, config: MethodConfig, *, generator: torch.Generator, head: tuple[str, ...] = ()
    ) -> None:
        """Replaces the head's parameters by trainable fp32 copies, which unties them from the embeddings.

        Raises:
            ConfigError: The model has no output head.
        """
        draw_head(model, head, generator=generator)
        for module in map(model.get_submodule, head) if head else [find_head(model)]:
            train_copies(module, module.parameters())
        untie_settings(model)

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns the head's parameters as one group."""
        return one_group("head", model)

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes `head.safetensors`: the head's parameters by their names in the model."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in _trained(model).items()}
        with replacing_files(folder) as new:
            metadata = {"format": "pt", "base_fingerprint": base.fingerprint}
            (new / WEIGHTS_FILE).write_bytes(serialise(state, metadata=metadata))

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads `head.safetensors`.

        Raises:
            RecordError: It is missing, damaged or of another model.
        """
        own = _trained(model)
        for name, tensor in read_weights(folder / WEIGHTS_FILE, expected=own).items():
            own[name].data.copy_(tensor)

    def merge(self, model: nn.Module) -> None:
        """Rounds the head to the dtype of the rest, in which bf16 autocast used it all along."""
        round_trained(model)


def find_head(model: nn.Module) -> nn.Module:
    """Returns the layer that transformers calls the output embeddings, or a classifier's head.

    Raises:
        ConfigError: The model has neither.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        network = getattr(model, "base_model_prefix", None)
        outside = [
            child for name, child in model.named_children() if name != network and any(True for _ in child.parameters())
        ]
        head = outside[0] if network and len(outside) == 1 else None
    if head is None:
        raise ConfigError(
            f"`method=head` needs a model with an output head, but {type(model).__name__} has none. Use `method=lora`."
        )
    return cast(nn.Module, head)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
