"""`bitfit`: trains only the biases, or the biases and the norms' weights (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lorasweep.config.method import BitfitConfig, MethodConfig
from lorasweep.errors import ConfigError
from lorasweep.lora.adapter_files import serialise
from lorasweep.methods.head_init import draw_head
from lorasweep.methods.method import (
    ParameterGroup,
    one_group,
    read_weights,
    replacing_files,
    round_trained,
    train_copies,
)
from lorasweep.models.load import BaseModel

WEIGHTS_FILE = "bitfit.safetensors"


class BitfitMethod:
    """Trains every bias in fp32, starting from the base's values; with `biases_and_norms` also the norms' weights.

    *Differs* from the paper with `biases_and_norms`: many recent models have no biases, and their norms' weights are
    their only vectors.
    """

    name = "bitfit"
    needs_autocast = True

    def check(self, model: nn.Module, config: MethodConfig, *, head: tuple[str, ...] = ()) -> None:
        """Checks that the model has parameters that `config.train` selects.

        Raises:
            ConfigError: The model has no biases, or with `biases_and_norms` neither biases nor norms.
        """
        assert isinstance(config, BitfitConfig)
        if any(True for _ in find_vectors(model, config)):
            return
        kind = type(model).__name__
        if config.train == "biases":
            raise ConfigError(
                f"`method.train=biases` needs a model with biases, but {kind} has none. "
                "Use `method.train=biases_and_norms`, which trains its norms' weights, or `method=lora`."
            )
        raise ConfigError(
            f"`method=bitfit` needs a model with biases or norms, but {kind} has neither. Use `method=lora`."
        )

    def prepare(
        self, model: nn.Module, config: MethodConfig, *, generator: torch.Generator, head: tuple[str, ...] = ()
    ) -> None:
        """Draws a new head, and replaces the parameters of the head and the selected vectors by trainable fp32 copies.

        Raises:
            ConfigError: The model has no biases, or with `biases_and_norms` neither biases nor norms.
        """
        assert isinstance(config, BitfitConfig)
        self.check(model, config)
        draw_head(model, head, generator=generator)
        new = [parameter for name in head for parameter in model.get_submodule(name).parameters()]
        train_copies(model, [*find_vectors(model, config), *new])
        for module in filter(is_norm, model.modules()):
            train_beside_fp32(module)

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns all trained parameters (biases, norms' weights and a new head) as one group."""
        return one_group("bitfit", model)

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes the trained parameters to `bitfit.safetensors`, by their names in the model."""
        state = {name: tensor.cpu().contiguous() for name, tensor in trained_state(model).items()}
        with replacing_files(folder) as new:
            metadata = {"format": "pt", "base_fingerprint": base.fingerprint}
            (new / WEIGHTS_FILE).write_bytes(serialise(state, metadata=metadata))

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads `bitfit.safetensors` into a prepared model.

        Raises:
            RecordError: The file is missing or damaged, or belongs to another model or another `method.train`.
        """
        state = trained_state(model)
        for name, tensor in read_weights(folder / WEIGHTS_FILE, expected=state).items():
            state[name].copy_(tensor)

    def merge(self, model: nn.Module) -> None:
        """Rounds the trained parameters to the dtype of the frozen ones."""
        round_trained(model)


def find_vectors(model: nn.Module, config: BitfitConfig) -> Iterator[nn.Parameter]:
    """Yields the biases of a model, and with `biases_and_norms` also all other parameters of its norms."""
    for module in model.modules():
        whole = config.train == "biases_and_norms" and is_norm(module)
        for name, parameter in module.named_parameters(recurse=False):
            if whole or name.endswith("bias"):
                yield parameter


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module is a norm: whether the name of its class contains `norm`."""
    return "norm" in type(module).__name__.lower()


def train_beside_fp32(norm: nn.Module) -> None:
    """Replaces a norm's frozen parameters by fp32 copies if its others train, because torch requires one dtype."""
    parameters = dict(norm.named_parameters(recurse=False))
    if any(parameter.requires_grad for parameter in parameters.values()):
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                setattr(norm, name, nn.Parameter(parameter.detach().float(), requires_grad=False))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the trained parameters of a prepared model by name; the tensors share the model's memory."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
