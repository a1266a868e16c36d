"""`full`: every weight trains, as fp32 copies, so that the base that other runs share is not written to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasweep.config.method import MethodConfig
from lorasweep.errors import ConfigError, RecordError
from lorasweep.methods.method import ParameterGroup, one_group, replacing_files, train_copies
from lorasweep.models.load import BaseModel
from lorasweep.models.pretrained import LOADING_ERRORS, first_line, load_pretrained, quiet_transformers


class FullMethod:
    """Full fine-tuning, with fp32 weights whatever the base is kept in."""

    name = "full"
    needs_autocast = True

    def check(self, model: nn.Module, config: MethodConfig) -> None:
        """Makes sure that transformers can save the model.

        Raises:
            ConfigError: It is not one of its models.
        """
        require_transformers(model)

    def prepare(self, model: nn.Module, config: MethodConfig, *, generator: torch.Generator) -> None:
        """Replaces every parameter by a trainable fp32 copy; tied ones stay tied.

        Raises:
            ConfigError: The model is not one of transformers'.
        """
        require_transformers(model)
        train_copies(model, model.parameters())

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns all parameters as one group."""
        return one_group("full", model)

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes config.json and model.safetensors (fp32): what transformers loads. The tokenizer is the base's."""
        with replacing_files(folder) as new, quiet_transformers():
            require_transformers(model).save_pretrained(new, max_shard_size="1TB")

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads model.safetensors.

        Raises:
            RecordError: It is missing, damaged or of another model.
        """
        kept = require_transformers(model)
        try:
            saved = load_pretrained(type(kept), str(folder), dtype=torch.float32, config=kept.config)
        except LOADING_ERRORS as error:
            raise RecordError(
                f"{str(folder)!r} must hold the whole weights of this {type(kept).__name__}, "
                f"but can't be loaded: {first_line(error)}. Name the folder that the run saved."
            ) from error
        kept.load_state_dict(saved.state_dict())

    def merge(self, model: nn.Module) -> None:
        """Leaves the weights as they are, in fp32."""


def require_transformers(model: nn.Module) -> PreTrainedModel:
    """Returns the model, known to be one that transformers can save and load.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"`method=full` needs a model of transformers, but got a {type(model).__name__}.")
    return model
