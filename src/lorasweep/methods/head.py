"""`head`: trains only the new head in fp32, or the output head if the model has no new head.

An output head that is tied to the embeddings is untied, so that the embeddings stay frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lorasweep.config.method import MethodConfig
from lorasweep.errors import ConfigError
from lorasweep.methods.method import Method, clear_tie_setting, replace_by_trainable_copies
from lorasweep.models.load import BaseModel


class HeadMethod(Method):
    """Trains a new head from random values, or an output head from the base's weights.

    Merging rounds the head to the base's dtype. With a bf16 base, autocast rounds it in the same way during training.
    """

    name = "head"
    needs_autocast = True
    weights_file = "head.safetensors"

    def check(self, model: nn.Module, config: MethodConfig, *, new_head_names: Sequence[str] = ()) -> None:
        """Raises a ConfigError if the model has neither a new head nor an output head."""
        if not new_head_names:
            find_head(model)

    def _make_trainable(self, model: nn.Module, config: Any, *, base: BaseModel, **_: Any) -> None:
        heads = [model.get_submodule(name) for name in base.new_head_names] or [find_head(model)]
        for head in heads:
            # replaced only inside the head, so that tied embeddings keep the frozen weight
            replace_by_trainable_copies(head, head.parameters())
        clear_tie_setting(model)


def find_head(model: nn.Module) -> nn.Module:
    """Returns the model's output embeddings (transformers' name of a language model's head), or a classifier's head.

    A classifier's head is the only module with parameters beside the network, which `base_model_prefix` names.

    Raises:
        ConfigError: The model has no such head.
    """
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if callable(get_output_embeddings) else None
    if head is None:
        network = getattr(model, "base_model_prefix", None)
        candidates = [
            child for name, child in model.named_children() if name != network and any(True for _ in child.parameters())
        ]
        head = candidates[0] if network and len(candidates) == 1 else None
    if head is None:
        raise ConfigError(
            f"`method=head` needs a model with an output head, but {type(model).__name__} has none. Use `method=lora`."
        )
    return cast(nn.Module, head)
