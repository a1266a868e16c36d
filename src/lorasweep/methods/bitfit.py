"""`bitfit`: the biases alone train, or with them the norms' weights (Ben Zaken et al. 2022, arXiv 2106.10199)."""

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
    """Every bias trains from the base's, in fp32; with `biases_and_norms` the weights of norms too.

    *Differs* from the paper where norms train: many models of today have no biases, and their norms' weights are the
    only vectors that they have.
    """

    name = "bitfit"
    needs_autocast = True

    def check(self, model: nn.Module, config: MethodConfig, *, head: tuple[str, ...] = ()) -> None:
        """Makes sure that the model has what shall train.

        Raises:
            ConfigError: It has not.
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
        """Draws a new head, and replaces it and the vectors that train by fp32 copies.

        Raises:
            ConfigError: The model has none of it.
        """
        assert isinstance(config, BitfitConfig)
        self.check(model, config)
        draw_head(model, head, generator=generator)
        new = [parameter for name in head for parameter in model.get_submodule(name).parameters()]
        train_copies(model, [*find_vectors(model, config), *new])
        for module in filter(is_norm, model.modules()):
            train_beside_fp32(module)

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns the biases, the norms' weights and a new head as one group."""
        return one_group("bitfit", model)

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes `bitfit.safetensors`: what trained, by its names in the model."""
        state = {name: tensor.cpu().contiguous() for name, tensor in trained_state(model).items()}
        with replacing_files(folder) as new:
            metadata = {"format": "pt", "base_fingerprint": base.fingerprint}
            (new / WEIGHTS_FILE).write_bytes(serialise(state, metadata=metadata))

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads `bitfit.safetensors`.

        Raises:
            RecordError: It is missing, damaged, or of another model or choice of what trains.
        """
        state = trained_state(model)
        for name, tensor in read_weights(folder / WEIGHTS_FILE, expected=state).items():
            state[name].copy_(tensor)

    def merge(self, model: nn.Module) -> None:
        """Rounds what trained to the dtype of the rest, in which bf16 autocast used it all along."""
        round_trained(model)


def find_vectors(model: nn.Module, config: BitfitConfig) -> Iterator[nn.Parameter]:
    """Yields the biases of a model, and with `biases_and_norms` the weights of its norms."""
    for module in model.modules():
        whole = config.train == "biases_and_norms" and is_norm(module)
        for name, parameter in module.named_parameters(recurse=False):
            if whole or name.endswith("bias"):
                yield parameter


def is_norm(module: nn.Module) -> bool:
    """Whether this is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def train_beside_fp32(norm: nn.Module) -> None:
    """Puts fp32 copies in place of what stays frozen in a norm whose bias trains: torch wants one dtype for both."""
    parameters = dict(norm.named_parameters(recurse=False))
    if any(parameter.requires_grad for parameter in parameters.values()):
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                setattr(norm, name, nn.Parameter(parameter.detach().float(), requires_grad=False))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns what trains in a prepared model, by name; the tensors share its memory."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
