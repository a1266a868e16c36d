"""`model.dropout`: one rate for every dropout of the base, in its settings and in its modules."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

WHOLE_LAYERS = ("layerdrop", "layer_drop", "drop_path")
"""Parts of the names of rates at which whole layers are left out."""


def set_dropout_settings(settings: Any, rate: float) -> None:
    """Sets every dropout rate in a model's settings (transformers' `PreTrainedConfig`), also in those of its parts.

    Functions inside a model (dropout of attention probabilities) read their rate there. Rates at which whole layers are
    left out are set only when the rate is 0.
    """
    for name, value in list(vars(settings).items()):
        is_rate = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        if "drop" in name and is_rate and (rate == 0 or not any(part in name for part in WHOLE_LAYERS)):
            setattr(settings, name, float(rate))
    for name in getattr(settings, "sub_configs", {}):
        if (part := getattr(settings, name, None)) is not None:
            set_dropout_settings(part, rate)


def set_dropout_modules(model: nn.Module, rate: float) -> int:
    """Sets the rate of every dropout module, attention of torch's own and recurrent layers included.

    Returns:
        How many there are.
    """
    plain = [module for module in model.modules() if isinstance(module, _DropoutNd)]
    for module in plain:
        module.p = rate
    others = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention | nn.RNNBase)]
    for other in others:
        setattr(other, "dropout", rate)  # noqa: B010 (typed as a module's attribute)
    return len(plain) + len(others)
