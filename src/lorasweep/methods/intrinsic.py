"""`intrinsic`: trains d numbers, projected at random into all weights (arXiv 1804.08838; 2012.13255, sections 3 and 4).

The intrinsic dimension of a task is the smallest d that reaches most (in the papers 90 %) of the performance of full
fine-tuning. `projection` implements the random projection P.
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
from lorasweep.lora.patterns import block_of
from lorasweep.methods.method import Method, ParameterGroup, read_weights, write_weights
from lorasweep.methods.projection import WEIGHTS_PER_CHUNK, add_projection, block_size, draw_signs
from lorasweep.models.load import BaseModel

SEED_LIMIT = 2**32
"""Seeds of the projection are below this number: torch's CPU generator uses 32 bits of a seed."""


class IntrinsicMethod(Method):
    """Trains θ = θ0 + P θ_d (`did`), or for each layer i θ_i = θ0_i + λ_i P_i θ_(d-m) (`said`); θ is all weights.

    Every forward pass computes each weight in fp32 and rounds it once to the base's dtype, in which the model runs. The
    computed weights take as much memory as the base until the backward pass has used them; the projection itself takes
    two bits per weight. Only θ_d and λ are trained. They are saved together with the seed of P.

    A new head is part of θ: it starts from the drawn values, and the same d numbers change it.
    """

    name = "intrinsic"
    weights_file = "intrinsic.safetensors"

    def check(self, model: nn.Module, config: MethodConfig, *, new_head_names: Sequence[str] = ()) -> None:
        """Checks that d is at most the number of weights, and with `said` more than the number of layers."""
        assert isinstance(config, IntrinsicConfig)
        weights = find_weights(model)
        num_weights, num_layers = sum(map(Tensor.numel, weights.values())), len(number_layers(weights))
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
        layers = number_layers(weights)
        num_weights = sum(map(Tensor.numel, weights.values()))
        coordinates = Coordinates(config, num_layers=len(layers), num_weights=num_weights)
        updates = {
            id(weight): ProjectedUpdate(coordinates, layer=layers[layer_of(name)], like=weight)
            for name, weight in weights.items()
        }
        # under all names of a weight, so that tied weights stay tied; lists, because parametrizing adds modules
        for module in list(model.modules()):
            for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(weight) in updates:
                    parametrize.register_parametrization(module, name, updates[id(weight)], unsafe=True)
        coordinates.updates = tuple(updates.values())
        coordinates.draw_projection(int(torch.randint(SEED_LIMIT, (), generator=generator)))

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns the numbers as one group, and the scales as another with √(D/d) times their learning rate.

        With columns of P of length 1, as in the paper, both groups would have the same learning rate.
        """
        coordinates = find_coordinates(model)
        groups = [ParameterGroup(name="intrinsic", params=(coordinates.numbers,), lr_factor=1.0)]
        if coordinates.scales is not None:
            factor = math.sqrt(coordinates.num_weights / len(coordinates.numbers))
            groups.append(ParameterGroup(name="scales", params=(coordinates.scales,), lr_factor=factor))
        return groups

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes the numbers, the scales and (as metadata) the projection's seed to `intrinsic.safetensors`."""
        coordinates = find_coordinates(model)
        metadata = {"base_fingerprint": base.fingerprint, "seed": str(coordinates.seed), **coordinates.layout()}
        write_weights(folder / self.weights_file, dict(coordinates.named_parameters()), metadata=metadata)

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads `intrinsic.safetensors`, and draws the projection of the saved seed again."""
        coordinates, file = find_coordinates(model), folder / self.weights_file
        tensors = read_weights(file, expected=dict(coordinates.named_parameters()))
        with safe_open(file, framework="pt") as opened:
            stored = opened.metadata() or {}
        for key, expected in coordinates.layout().items():
            if stored.get(key) != expected:
                raise RecordError(
                    f"{str(file)!r} must have `{key}` {expected!r}, but got {stored.get(key)!r}. "
                    "Load it into the base and method that it was trained with."
                )
        coordinates.draw_projection(int(stored["seed"]))
        coordinates.load_state_dict(tensors)

    def merge(self, model: nn.Module) -> None:
        """Replaces each parametrized weight by its current value, in tensors that no other model shares."""
        merged: dict[int, nn.Parameter] = {}
        for module in list(model.modules()):
            if not parametrize.is_parametrized(module):
                continue
            for name, (update, *_) in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
                # tied weights have one update, and stay tied
                if id(update) not in merged:
                    merged[id(update)] = nn.Parameter(getattr(module, name).detach(), requires_grad=False)
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                setattr(module, name, merged[id(update)])


class Coordinates(nn.Module):
    """The trained parameters: θ_d, or with `said` θ_(d-m) and the scales λ of the m layers.

    Attributes:
        numbers: θ_d with `did`, θ_(d-m) with `said`; zeros at first.
        scales: λ, one per layer, ones at first; None with `did`.
        num_weights: D, the number of weights of the model.
        updates: The weight updates that are computed from these parameters, in order of the weights' names.
    """

    def __init__(self, config: IntrinsicConfig, *, num_layers: int, num_weights: int) -> None:
        super().__init__()
        self.form = config.form
        num_scales = num_layers if config.form == "said" else 0
        self.numbers = nn.Parameter(torch.zeros(config.dim - num_scales))
        self.scales = nn.Parameter(torch.ones(num_scales)) if num_scales else None
        self.num_weights = num_weights
        self.updates: tuple[ProjectedUpdate, ...] = ()
        self.seed = 0

    @property
    def block(self) -> int:
        """Number of weights per block of the projection."""
        return block_size(len(self.numbers))

    def scaled_numbers(self, layer: int) -> Float[Tensor, " block"]:
        """Returns the vector to project into a layer's weights: λ_i θ_(d-m) / √(d-m), padded with zeros to a block."""
        factor: float | Tensor = 1 / math.sqrt(len(self.numbers))
        if self.scales is not None:
            factor = self.scales[layer] * factor
        return pad(self.numbers * factor, (0, self.block - len(self.numbers)))

    def draw_projection(self, seed: int) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        for update in self.updates:
            update.draw_signs(generator)

    def layout(self) -> dict[str, str]:
        """Returns the metadata that, beside the seed, determines the projection."""
        return {
            "form": self.form,
            "num_weights": str(self.num_weights),
            "weights_per_chunk": str(WEIGHTS_PER_CHUNK),
        }


class ProjectedUpdate(nn.Module):
    """The update of one weight, as a torch parametrization of it; tied weights share one update."""

    signs: Tensor

    def __init__(self, coordinates: Coordinates, *, layer: int, like: Tensor) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.layer = layer
        self.num_weights = like.numel()
        self.register_buffer("signs", torch.empty(0, dtype=torch.uint8, device=like.device), persistent=False)

    def draw_signs(self, generator: torch.Generator) -> None:
        """Draws this weight's part of the projection."""
        block = self.coordinates.block
        self.signs = draw_signs(self.num_weights, block=block, generator=generator).to(self.signs.device)

    def forward(self, weight: Tensor) -> Tensor:
        return add_projection(weight, self.coordinates.scaled_numbers(self.layer), self.signs)


def find_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns every floating-point parameter by name, sorted by name; tied parameters appear once."""
    return {name: weight for name, weight in sorted(model.named_parameters()) if weight.is_floating_point()}


def layer_of(name: str) -> str:
    """Returns the layer of a weight: its block, or the module that holds the weight if it is outside of blocks."""
    return block_of(name) or name.rpartition(".")[0]


def number_layers(weights: Iterable[str]) -> dict[str, int]:
    """Returns the index of each layer of these weights, in order of the weights."""
    return {layer: index for index, layer in enumerate(dict.fromkeys(map(layer_of, weights)))}


def find_coordinates(model: nn.Module) -> Coordinates:
    """Returns the trained parameters of a prepared model."""
    return next(module for module in model.modules() if isinstance(module, Coordinates))
