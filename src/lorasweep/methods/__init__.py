"""Training methods. `METHODS` maps each `method.name` to its `Method`."""

from collections.abc import Mapping

from lorasweep.methods.base_weights import FrozenMethod, FullMethod
from lorasweep.methods.intrinsic import IntrinsicMethod
from lorasweep.methods.lora import LoraMethod, add_head_to_modules_to_save
from lorasweep.methods.method import Method, ParameterGroup, copy_sharing_weights, draw_head
from lorasweep.methods.peft import PeftMethod

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        LoraMethod(),
        FullMethod(),
        IntrinsicMethod(),
        FrozenMethod(),
        PeftMethod(),
    )
}

__all__ = ["METHODS", "Method", "ParameterGroup", "add_head_to_modules_to_save", "copy_sharing_weights", "draw_head"]
