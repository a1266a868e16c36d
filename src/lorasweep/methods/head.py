"""`head`: the output head alone trains, in fp32; where it was tied to the embeddings, those stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn

from lorasweep.config.method import MethodConfig
from lorasweep.errors import ConfigError
from lorasweep.lora.files import serialise
from lorasweep.methods.method import (
    ParameterGroup,
    frozen_dtype,
    one_group,
    read_weights,
    replacing_files,
    train_copies,
    untie_settings,
)
from lorasweep.models.load import BaseModel

WEIGHTS_FILE = "head.safetensors"


class HeadMethod:
    """The output head trains from the base's weights."""

    name = "head"
    needs_autocast = True

    def check(self, model: nn.Module, config: MethodConfig) -> None:
        """Makes sure that the model says which layer its output head is.

        Raises:
            ConfigError: It has none.
        """
        find_head(model)

    def prepare(self, model: nn.Module, config: MethodConfig, *, generator: torch.Generator) -> None:
        """Replaces the head's parameters by trainable fp32 copies, which unties them from the embeddings.

        Raises:
            ConfigError: The model has no output head.
        """
        head = find_head(model)
        train_copies(head, head.parameters())
        untie_settings(model)

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns the head's parameters as one group."""
        return one_group("head", model)

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes `head.safetensors`: the head's parameters by their names in it."""
        state = {name: tensor.cpu().contiguous() for name, tensor in find_head(model).state_dict().items()}
        with replacing_files(folder) as new:
            metadata = {"format": "pt", "base_fingerprint": base.fingerprint}
            (new / WEIGHTS_FILE).write_bytes(serialise(state, metadata=metadata))

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads `head.safetensors`.

        Raises:
            RecordError: It is missing, damaged or of another model.
        """
        head = find_head(model)
        head.load_state_dict(read_weights(folder / WEIGHTS_FILE, expected=head.state_dict()))

    def merge(self, model: nn.Module) -> None:
        """Rounds the head to the dtype of the rest, in which bf16 autocast used it all along."""
        find_head(model).to(frozen_dtype(model)).requires_grad_(False)


def find_head(model: nn.Module) -> nn.Module:
    """Returns the layer that transformers calls the output embeddings.

    Raises:
        ConfigError: The model has none.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        raise ConfigError(
            f"`method=head` needs a model with an output head, but {type(model).__name__} has none. Use `method=lora`."
        )
    return cast(nn.Module, head)
