"""`full`: trains fp32 copies of all weights. The base's weights, which other runs share, do not change."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasweep.disk import move_into_place
from lorasweep.errors import RecordError, first_line
from lorasweep.methods.method import Method, replace_by_trainable_copies
from lorasweep.models.load import BaseModel
from lorasweep.models.pretrained import load_pretrained, quiet_transformers


class FullMethod(Method):
    """Full fine-tuning with fp32 weights. The base may have any dtype."""

    name = "full"
    needs_autocast = True
    weights_file = "model.safetensors"

    def _make_trainable(self, model: nn.Module, config: Any, **_: Any) -> None:
        replace_by_trainable_copies(model, model.parameters())

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes model.safetensors in fp32, and config.json for a transformers model. It writes no tokenizer."""
        if not isinstance(model, PreTrainedModel):
            super().save(model, folder, base=base)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", suffix=".tmp", dir=folder) as name, quiet_transformers():
            model.save_pretrained(name, max_shard_size="1TB")
            for file in sorted(Path(name).iterdir()):
                file.chmod(0o644)  # safetensors creates files that only the owner can read
                move_into_place(file, folder / file.name)

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads model.safetensors into a prepared model."""
        if not isinstance(model, PreTrainedModel):
            super().load(model, folder)
            return
        try:
            saved = load_pretrained(type(model), str(folder), dtype=torch.float32, config=model.config)
        except Exception as error:
            raise RecordError(
                f"{str(folder)!r} must contain all weights of this {type(model).__name__}, "
                f"but can't be loaded: {first_line(error)}. Name the folder that the run saved."
            ) from error
        model.load_state_dict(saved.state_dict())

    def _get_tensors_to_save(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the parameters and the persistent buffers by name. A tied parameter has only its first name."""
        first_names = dict(model.named_parameters())
        all_names = dict(model.named_parameters(remove_duplicate=False))
        return {
            name: tensor for name, tensor in model.state_dict().items() if name in first_names or name not in all_names
        }
