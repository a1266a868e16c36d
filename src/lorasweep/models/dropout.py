"""`model.dropout`: one rate for every dropout of the base model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

LAYER_DROP_NAMES = ("layerdrop", "layer_drop", "drop_path")
"""Parts of the names of rates at which whole layers are skipped."""


def set_dropout_settings(settings: Any, rate: float) -> None:
    """Sets every dropout rate in a model's settings (transformers' `PreTrainedConfig`), also in nested settings.

    Functions inside a model, such as attention, read their rate there. Rates at which whole layers are skipped are set
    only if the rate is 0.
    """
    for name, value in list(vars(settings).items()):
        is_rate = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        if "drop" in name and is_rate and (rate == 0 or not any(part in name for part in LAYER_DROP_NAMES)):
            setattr(settings, name, float(rate))
    for name in getattr(settings, "sub_configs", {}):
        if (nested := getattr(settings, name, None)) is not None:
            set_dropout_settings(nested, rate)


def set_dropout_modules(model: nn.Module, rate: float) -> int:
    """Sets the rate of every dropout module, of torch's attention and of recurrent layers, and returns their number."""
    dropouts = [module for module in model.modules() if isinstance(module, _DropoutNd)]
    for module in dropouts:
        module.p = rate
    others = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention | nn.RNNBase)]
    for other in others:
        setattr(other, "dropout", rate)  # noqa: B010 (typed as a module's attribute)
    return len(dropouts) + len(others)
