"""`head`: trains only the new head in fp32, or the output head if the model has no new head.

If the output head was tied to the embeddings, it is untied and the embeddings stay frozen.
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
    """Trains a head: a new head starts from values that the run draws, an output head from the base's weights."""

    name = "head"
    needs_autocast = True

    def check(self, model: nn.Module, config: MethodConfig, *, head: tuple[str, ...] = ()) -> None:
        """Checks that there is a new head, or that the model has an output head.

        Raises:
            ConfigError: There is no new head, and the model has no output head.
        """
        if not head:
            find_head(model)

    def prepare(
        self, model: nn.Module, config: MethodConfig, *, generator: torch.Generator, head: tuple[str, ...] = ()
    ) -> None:
        """Draws a new head, and replaces the head's parameters by trainable fp32 copies, not tied to the embeddings.

        Raises:
            ConfigError: There is no new head, and the model has no output head.
        """
        draw_head(model, head, generator=generator)
        for module in map(model.get_submodule, head) if head else [find_head(model)]:
            train_copies(module, module.parameters())
        untie_settings(model)

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns the head's parameters as one group."""
        return one_group("head", model)

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes the head's parameters to `head.safetensors`, by their names in the model."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in _trained(model).items()}
        with replacing_files(folder) as new:
            metadata = {"format": "pt", "base_fingerprint": base.fingerprint}
            (new / WEIGHTS_FILE).write_bytes(serialise(state, metadata=metadata))

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads `head.safetensors` into a prepared model.

        Raises:
            RecordError: The file is missing or damaged, or belongs to another model.
        """
        own = _trained(model)
        for name, tensor in read_weights(folder / WEIGHTS_FILE, expected=own).items():
            own[name].data.copy_(tensor)

    def merge(self, model: nn.Module) -> None:
        """Rounds the head to the dtype of the frozen parameters; for a bf16 base, autocast did so in training too."""
        round_trained(model)


def find_head(model: nn.Module) -> nn.Module:
    """Returns the layer that transformers calls the output embeddings, or else a classifier's head.

    A classifier's head is the only module with parameters beside the network (`base_model_prefix`).

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
