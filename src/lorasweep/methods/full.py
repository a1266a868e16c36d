"""`full`: trains fp32 copies of all weights, so that it never writes to the base, which other runs share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasweep.config.method import MethodConfig
from lorasweep.errors import RecordError, first_line
from lorasweep.lora.adapter_files import serialise
from lorasweep.methods.head_init import draw_head
from lorasweep.methods.method import ParameterGroup, one_group, read_weights, replacing_files, train_copies
from lorasweep.models.load import BaseModel
from lorasweep.models.pretrained import LOADING_ERRORS, load_pretrained, quiet_transformers

WEIGHTS_FILE = "model.safetensors"


class FullMethod:
    """Full fine-tuning, with fp32 weights for a base of any dtype."""

    name = "full"
    needs_autocast = True

    def check(self, model: nn.Module, config: MethodConfig, *, head: tuple[str, ...] = ()) -> None:
        """Does nothing: the method fits every model."""

    def prepare(
        self, model: nn.Module, config: MethodConfig, *, generator: torch.Generator, head: tuple[str, ...] = ()
    ) -> None:
        """Draws a new head and replaces each parameter by a trainable fp32 copy; tied parameters stay tied."""
        draw_head(model, head, generator=generator)
        train_copies(model, model.parameters())

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns all parameters as one group."""
        return one_group("full", model)

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes model.safetensors in fp32. For a transformers model, also writes config.json, but no tokenizer.

        For any other model, the file has the parameters, each tied one once, and the buffers.
        """
        with replacing_files(folder) as new, quiet_transformers():
            if isinstance(model, PreTrainedModel):
                model.save_pretrained(new, max_shard_size="1TB")
            else:
                state = {name: tensor.detach().cpu().contiguous() for name, tensor in _named_tensors(model).items()}
                (new / WEIGHTS_FILE).write_bytes(serialise(state, metadata={"format": "pt"}))

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads model.safetensors into a prepared model.

        Raises:
            RecordError: The file is missing or damaged, or belongs to another model.
        """
        if not isinstance(model, PreTrainedModel):
            own = _named_tensors(model)
            for name, tensor in read_weights(folder / WEIGHTS_FILE, expected=own).items():
                own[name].data.copy_(tensor)
            return
        try:
            saved = load_pretrained(type(model), str(folder), dtype=torch.float32, config=model.config)
        except LOADING_ERRORS as error:
            raise RecordError(
                f"{str(folder)!r} must hold the whole weights of this {type(model).__name__}, "
                f"but can't be loaded: {first_line(error)}. Name the folder that the run saved."
            ) from error
        model.load_state_dict(saved.state_dict())

    def merge(self, model: nn.Module) -> None:
        """Does nothing: the weights stay in fp32."""


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the parameters and the persistent buffers by name; a tied one only once."""
    stored = model.state_dict(keep_vars=True)
    once = {id(tensor): name for name, tensor in reversed(stored.items())}
    return {name: stored[name] for name in sorted(once.values())}
