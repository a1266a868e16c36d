"""`lora`: trains a low-rank weight update of each target layer. The base is frozen (arXiv 2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lorasweep.config.method import REGEX_PREFIX, LoraConfig
from lorasweep.errors import ConfigError, RecordError
from lorasweep.lora import (
    Coverage,
    find_targets,
    inject_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    split_lora_parameters,
)
from lorasweep.methods.method import Method, ParameterGroup, clear_tie_setting
from lorasweep.models.load import BaseModel


class LoraMethod(Method[LoraConfig]):
    """Trains A and B of each adapted layer in fp32, and a new head in full. The adapter is saved in PEFT's format.

    No autocast is needed, because LoRA layers cast A and B to the base's dtype.
    """

    def find_coverage(self, model: nn.Module, *, new_head_names: Sequence[str] = ()) -> Coverage:
        try:
            return find_targets(model, self.get_slot_config(new_head_names))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def get_slot_config(self, new_head_names: Sequence[str]) -> LoraConfig:
        """Returns the settings with the modules of a new head in `modules_to_save`."""
        # a regular expression matches only the whole name, a plain name would also match other modules with this ending
        patterns = tuple(f"{REGEX_PREFIX}{re.escape(name)}" for name in new_head_names)
        return replace(self.config, modules_to_save=(*self.config.modules_to_save, *patterns))

    def _make_trainable(self, model: nn.Module, *, base: BaseModel, generator: torch.Generator) -> None:
        inject_lora(model, self.get_slot_config(base.new_head_names), generator=generator)

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns A and B as one group, or as two groups if `lr_ratio_b` is not 1 (LoRA+, arXiv 2402.12354).

        If other parameters train (a head), they form the group `other`.
        """
        a, b, other = map(tuple, split_lora_parameters(model))
        named = [("lora", a + b, 1.0)] if lr_ratio_b == 1 else [("lora_a", a, 1.0), ("lora_b", b, lr_ratio_b)]
        named += [("other", other, 1.0)] if other else []
        return [ParameterGroup(name=name, params=params, lr_factor=factor) for name, params, factor in named]

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        save_adapter(model, folder, base_path=base.path)

    def load(self, model: nn.Module, folder: Path) -> None:
        try:
            load_adapter(model, folder)
        except ValueError as error:
            raise RecordError(str(error)) from error

    def merge(self, model: nn.Module) -> None:
        """Replaces each LoRA layer by a plain layer with the merged weight, which is no longer tied."""
        merge_lora(model)
        clear_tie_setting(model)
