"""`intrinsic`: trains d coordinates of a random subspace of all weights (arXiv 1804.08838; 2012.13255, sections 3, 4).

The intrinsic dimension of a task is the smallest d with which training reaches 90 % of the performance of full
fine-tuning. `projection` implements the random projection P from the d coordinates to the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import parametrize

from lorasweep.config.method import IntrinsicConfig, MethodConfig
from lorasweep.errors import ConfigError, RecordError
from lorasweep.lora.patterns import get_block_name
from lorasweep.methods.method import Method, ParameterGroup, read_weights, write_weights
from lorasweep.methods.projection import WEIGHTS_PER_CHUNK, add_projection, draw_signs, get_block_size
from lorasweep.models.load import BaseModel

SEED_LIMIT = 2**32
"""Seeds of the projection are below this limit, because torch's CPU generator uses only 32 bits of a seed."""


class IntrinsicMethod(Method):
    """Trains all weights θ in a random subspace: θ = θ0 + P θ_d (`did`).

    With `said`, each layer i also trains a scale λ_i: θ_i = θ0_i + λ_i P_i θ_(d-m). m is the number of layers.

    Only θ_d and λ are trained. They are saved with the seed of P. A new head is a part of θ: its θ0 are drawn values.

    Each forward pass computes every weight in fp32 and rounds it once to the base's dtype, in which the model runs.
    Until the end of the backward pass, the computed weights take as much memory as the base. P takes two bits per
    weight.
    """

    name = "intrinsic"
    weights_file = "intrinsic.safetensors"

    def check(self, model: nn.Module, config: MethodConfig, *, new_head_names: Sequence[str] = ()) -> None:
        """Raises a ConfigError if d is above the number of weights, or with `said` not above the number of layers."""
        assert isinstance(config, IntrinsicConfig)
        weights = find_weights(model)
        num_weights, num_layers = sum(map(Tensor.numel, weights.values())), len(index_layers(weights))
        if config.dim > num_weights:
            raise ConfigError(
                f"`method.dim` must be at most {num_weights}, the number of weights, but got {config.dim!r}. "
                "Lower `method.dim`, or use `method=full`."
            )
        if config.form == "said" and config.dim <= num_layers:
            raise ConfigError(
                f"`method.dim` must be more than {num_layers}, the number of layers, with `method.form=said`, "
                f"but got {config.dim!r}. Raise `method.dim`, or use `method.form=did`."
            )

    def _make_trainable(self, model: nn.Module, config: Any, *, generator: torch.Generator, **_: Any) -> None:
        weights = find_weights(model)
        layers = index_layers(weights)
        num_weights = sum(map(Tensor.numel, weights.values()))
        intrinsic = IntrinsicParameters(config, num_layers=len(layers), num_weights=num_weights)
        updates = {
            id(weight): ProjectedUpdate(intrinsic, layer=layers[get_layer_name(name)], weight=weight)
            for name, weight in weights.items()
        }
        # Tied weights have several names, and each name gets the same update. The loops need lists, because
        # parametrizing adds modules.
        for module in list(model.modules()):
            for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(weight) in updates:
                    parametrize.register_parametrization(module, name, updates[id(weight)], unsafe=True)
        intrinsic.updates = tuple(updates.values())
        intrinsic.draw_projection(int(torch.randint(SEED_LIMIT, (), generator=generator)))

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns the coordinates as one group, and the scales as a group with √(D/d) times the learning rate.

        In the paper, both have the same learning rate, because the columns of P have length 1. Here they have length
        √(D/d).
        """
        intrinsic = find_intrinsic_parameters(model)
        groups = [ParameterGroup(name="intrinsic", params=(intrinsic.coordinates,), lr_factor=1.0)]
        if intrinsic.scales is not None:
            factor = math.sqrt(intrinsic.num_weights / len(intrinsic.coordinates))
            groups.append(ParameterGroup(name="scales", params=(intrinsic.scales,), lr_factor=factor))
        return groups

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes coordinates and scales to `intrinsic.safetensors`, with the projection's seed in the metadata."""
        intrinsic = find_intrinsic_parameters(model)
        metadata = {
            "base_fingerprint": base.fingerprint,
            "seed": str(intrinsic.seed),
            **intrinsic.get_projection_metadata(),
        }
        write_weights(folder / self.weights_file, dict(intrinsic.named_parameters()), metadata=metadata)

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads `intrinsic.safetensors`, and draws the projection again from the saved seed."""
        intrinsic, file = find_intrinsic_parameters(model), folder / self.weights_file
        tensors = read_weights(file, expected=dict(intrinsic.named_parameters()))
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        for key, expected in intrinsic.get_projection_metadata().items():
            if metadata.get(key) != expected:
                raise RecordError(
                    f"{str(file)!r} must have `{key}` {expected!r}, but got {metadata.get(key)!r}. "
                    "Load the file into the base and method with which it was trained."
                )
        intrinsic.draw_projection(int(metadata["seed"]))
        intrinsic.load_state_dict(tensors)

    def merge(self, model: nn.Module) -> None:
        """Replaces each parametrized weight by its current value, in a tensor that no other model shares."""
        merged: dict[int, nn.Parameter] = {}
        for module in list(model.modules()):
            if not parametrize.is_parametrized(module):
                continue
            for name, (update, *_) in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
                # tied weights have the same update, so they get the same merged weight and stay tied
                if id(update) not in merged:
                    merged[id(update)] = nn.Parameter(getattr(module, name).detach(), requires_grad=False)
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                setattr(module, name, merged[id(update)])


class IntrinsicParameters(nn.Module):
    """The trained parameters of `intrinsic`, and the seed of the projection.

    Attributes:
        coordinates: θ_d with `did`, θ_(d-m) with `said`; initially zeros.
        scales: λ, one per layer, initially ones; None with `did`.
        num_weights: D, the number of weights of the model.
        updates: The weight updates that are computed from these parameters, sorted by name of the weight.
    """

    def __init__(self, config: IntrinsicConfig, *, num_layers: int, num_weights: int) -> None:
        super().__init__()
        self.form = config.form
        num_scales = num_layers if config.form == "said" else 0
        self.coordinates = nn.Parameter(torch.zeros(config.dim - num_scales))
        self.scales = nn.Parameter(torch.ones(num_scales)) if num_scales else None
        self.num_weights = num_weights
        self.updates: tuple[ProjectedUpdate, ...] = ()
        self.seed = 0

    @property
    def block(self) -> int:
        """Number of weights per block of the projection."""
        return get_block_size(len(self.coordinates))

    def get_scaled_coordinates(self, layer: int) -> Float[Tensor, " block"]:
        """Returns the vector to project into a layer's weights: λ_i θ_(d-m) / √(d-m), padded with zeros to a block.

        With `did`: θ_d / √d.
        """
        factor: float | Tensor = 1 / math.sqrt(len(self.coordinates))
        if self.scales is not None:
            factor = self.scales[layer] * factor
        return pad(self.coordinates * factor, (0, self.block - len(self.coordinates)))

    def draw_projection(self, seed: int) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        for update in self.updates:
            update.draw_signs(generator)

    def get_projection_metadata(self) -> dict[str, str]:
        """Returns the settings that determine the projection together with the seed."""
        return {
            "form": self.form,
            "num_weights": str(self.num_weights),
            "weights_per_chunk": str(WEIGHTS_PER_CHUNK),
        }


class ProjectedUpdate(nn.Module):
    """A torch parametrization that adds a random projection of the coordinates to a weight. Tied weights share it."""

    signs: Tensor

    def __init__(self, intrinsic: IntrinsicParameters, *, layer: int, weight: Tensor) -> None:
        super().__init__()
        self.intrinsic = intrinsic
        self.layer = layer
        self.num_weights = weight.numel()
        self.register_buffer("signs", torch.empty(0, dtype=torch.uint8, device=weight.device), persistent=False)

    def draw_signs(self, generator: torch.Generator) -> None:
        """Draws the rows of the projection for this weight."""
        block = self.intrinsic.block
        self.signs = draw_signs(self.num_weights, block=block, generator=generator).to(self.signs.device)

    def forward(self, weight: Tensor) -> Tensor:
        return add_projection(weight, self.intrinsic.get_scaled_coordinates(self.layer), self.signs)


def find_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns every floating-point parameter by name, sorted by name. A tied parameter appears once."""
    return {name: weight for name, weight in sorted(model.named_parameters()) if weight.is_floating_point()}


def get_layer_name(name: str) -> str:
    """Returns the layer of a weight for `said`: its block, or its module if the weight is outside the blocks."""
    return get_block_name(name) or name.rpartition(".")[0]


def index_layers(weights: Iterable[str]) -> dict[str, int]:
    """Returns the index of each layer, in the order in which the layers first appear in `weights`."""
    return {layer: index for index, layer in enumerate(dict.fromkeys(map(get_layer_name, weights)))}


def find_intrinsic_parameters(model: nn.Module) -> IntrinsicParameters:
    """Returns the `IntrinsicParameters` of a prepared model."""
    return next(module for module in model.modules() if isinstance(module, IntrinsicParameters))
