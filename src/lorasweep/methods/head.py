"""`head`: trains only the new head in fp32, or the output head if the model has no new head.

If the output head was tied to the embeddings, it is untied and the embeddings stay frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lorasweep.config.method import MethodConfig
from lorasweep.errors import ConfigError
from lorasweep.methods.method import Method, train_copies, untie_settings


class HeadMethod(Method):
    """Trains a head. A new head starts from the values that the run draws, an output head from the base's weights.

    Merging rounds the head to the base's dtype; for a bf16 base, autocast did so in training too.
    """

    name = "head"
    needs_autocast = True
    weights_file = "head.safetensors"

    def check(self, model: nn.Module, config: MethodConfig, *, new_head_names: Sequence[str] = ()) -> None:
        """Checks that there is a new head, or that the model has an output head."""
        if not new_head_names:
            find_head(model)

    def _make_trainable(self, model: nn.Module, config: Any, *, new_head_names: Sequence[str], **_: Any) -> None:
        heads = [model.get_submodule(name) for name in new_head_names] or [find_head(model)]
        for head in heads:
            # only inside the head, so that an output head that was tied to the embeddings gets its own weight
            train_copies(head, head.parameters())
        untie_settings(model)


def find_head(model: nn.Module) -> nn.Module:
    """Returns the layer that transformers calls the output embeddings, or else a classifier's head.

    A classifier's head is the only module with parameters beside the network (`base_model_prefix`).

    Raises:
        ConfigError: The model has neither.
    """
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if callable(get_output_embeddings) else None
    if head is None:
        network = getattr(model, "base_model_prefix", None)
        others = [
            child for name, child in model.named_children() if name != network and any(True for _ in child.parameters())
        ]
        head = others[0] if network and len(others) == 1 else None
    if head is None:
        raise ConfigError(
            f"`method=head` needs a model with an output head, but {type(model).__name__} has none. Use `method=lora`."
        )
    return cast(nn.Module, head)
