"""`model.dropout`: sets the same rate for every dropout of the base model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

LAYER_DROP_NAMES = ("layerdrop", "layer_drop", "drop_path")
"""Rates whose names contain one of these skip whole layers."""


def set_dropout_settings(settings: Any, rate: float) -> None:
    """Sets every dropout rate in a model's configuration (transformers' `PreTrainedConfig`), also in nested ones.

    Functions inside a model, such as attention, read their rate there. Rates that skip whole layers are set only to 0.
    """
    for name, value in list(vars(settings).items()):
        is_rate = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        if "drop" in name and is_rate and (rate == 0 or not any(part in name for part in LAYER_DROP_NAMES)):
            setattr(settings, name, float(rate))
    for name in getattr(settings, "sub_configs", {}):
        if (nested := getattr(settings, name, None)) is not None:
            set_dropout_settings(nested, rate)


def set_dropout_modules(model: nn.Module, rate: float) -> None:
    """Sets the rate of all dropout modules, also of those that do not read it from the configuration."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = rate
