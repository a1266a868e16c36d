"""`full`: trains fp32 copies of all weights. The base's weights, which other runs share, do not change."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorasweep.methods.method import Method, replace_by_trainable_copies


class FullMethod(Method):
    """Full fine-tuning with fp32 weights. The base may have any dtype."""

    name = "full"
    needs_autocast = True
    weights_file = "model.safetensors"

    def _make_trainable(self, model: nn.Module, config: Any, **_: Any) -> None:
        replace_by_trainable_copies(model, model.parameters())

    def _get_tensors_to_save(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the parameters and the persistent buffers by name. A tied parameter has only its first name."""
        first_names = dict(model.named_parameters())
        all_names = dict(model.named_parameters(remove_duplicate=False))
        return {
            name: tensor for name, tensor in model.state_dict().items() if name in first_names or name not in all_names
        }
