"""Training methods. `bind` returns the `Method` of a run's settings."""

from collections.abc import Mapping
from typing import Any

from lorasweep.config.method import (
    FrozenConfig,
    FullConfig,
    IntrinsicConfig,
    LoraConfig,
    MethodConfig,
    MethodSettings,
    PeftConfig,
)
from lorasweep.methods.base_weights import FrozenMethod, FullMethod
from lorasweep.methods.intrinsic import IntrinsicMethod
from lorasweep.methods.lora import LoraMethod
from lorasweep.methods.method import Method, ParameterGroup, copy_sharing_weights, draw_head
from lorasweep.methods.peft import PeftMethod

METHODS: Mapping[type[MethodSettings], type[Method[Any]]] = {
    LoraConfig: LoraMethod,
    FullConfig: FullMethod,
    IntrinsicConfig: IntrinsicMethod,
    FrozenConfig: FrozenMethod,
    PeftConfig: PeftMethod,
}

__all__ = ["METHODS", "Method", "ParameterGroup", "bind", "copy_sharing_weights", "draw_head"]


def bind(config: MethodConfig) -> Method[Any]:
    """Returns the method of these settings."""
    return METHODS[type(config)](config)
