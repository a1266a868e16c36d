"""`lora`: trains a low-rank change of each target layer; the base is frozen (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lorasweep.config.method import LoraConfig, MethodConfig
from lorasweep.errors import ConfigError, RecordError
from lorasweep.lora import (
    find_targets,
    inject_lora,
    load_adapter,
    remove_lora,
    save_adapter,
    split_lora_parameters,
)
from lorasweep.lora.patterns import REGEX_PREFIX
from lorasweep.methods.head_init import draw_head
from lorasweep.methods.method import ParameterGroup, untie_settings
from lorasweep.models.load import BaseModel


class LoraMethod:
    """Trains A and B of each adapted layer in fp32; the layer casts them itself, so no autocast is needed."""

    name = "lora"
    needs_autocast = False

    def check(self, model: nn.Module, config: MethodConfig, *, head: tuple[str, ...] = ()) -> None:
        """Checks that the targets match layers, and that the rank is not above the maximum rank of any of them.

        Raises:
            ConfigError: The targets match no layer, or the rank is above the maximum of a matched layer.
        """
        assert isinstance(config, LoraConfig)
        try:
            find_targets(model, train_head(config, head))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def prepare(
        self, model: nn.Module, config: MethodConfig, *, generator: torch.Generator, head: tuple[str, ...] = ()
    ) -> None:
        """Draws a new head, replaces the targets by LoRA layers, and makes a copy of the head trainable in full.

        Raises:
            ConfigError: The targets match no layer, the rank is above the maximum of a matched layer, or the model has
                LoRA layers already.
        """
        assert isinstance(config, LoraConfig)
        try:
            draw_head(model, head, generator=generator)
            # the weights of a model on the meta device are read later, but A and B are drawn here
            device = "cpu" if any(parameter.is_meta for parameter in model.parameters()) else None
            inject_lora(model, train_head(config, head), generator=generator, device=device)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns A and B as one group, or as two with different rates (LoRA+, Hayou et al. 2024, arXiv 2402.12354).

        Other trained parameters (a head, DoRA's row lengths, biases) form a third group, `other`, if there are any.
        """
        a, b, other = map(tuple, split_lora_parameters(model))
        rest = [ParameterGroup(name="other", params=other, lr_factor=1.0)] if other else []
        if lr_ratio_b == 1:
            return [ParameterGroup(name="lora", params=a + b, lr_factor=1.0), *rest]
        return [
            ParameterGroup(name="lora_a", params=a, lr_factor=1.0),
            ParameterGroup(name="lora_b", params=b, lr_factor=lr_ratio_b),
            *rest,
        ]

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes the adapter without the base, in PEFT's format."""
        save_adapter(model, folder, base_path=base.path, base_fingerprint=base.fingerprint)

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads an adapter into the LoRA layers of a prepared model, or injects it into a model without LoRA layers.

        Raises:
            RecordError: A file is missing or damaged, or belongs to another base, rank or choice of layers.
        """
        try:
            load_adapter(model, folder)
        except ValueError as error:
            raise RecordError(str(error)) from error

    def merge(self, model: nn.Module) -> None:
        """Adds each change to its layer's weight and rounds the sum once; a changed weight is no longer tied."""
        remove_lora(model, keep_change=True)
        untie_settings(model)


def train_head(config: LoraConfig, head: Sequence[str]) -> LoraConfig:
    """Returns the settings with the modules of a new head added to the modules to train in full (`modules_to_save`)."""
    exactly = tuple(f"{REGEX_PREFIX}{re.escape(name)}" for name in head)
    return replace(config, modules_to_save=(*config.modules_to_save, *exactly)) if head else config
