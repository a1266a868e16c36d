"""`intrinsic`: trains d numbers, projected at random into all weights (arXiv 1804.08838; 2012.13255, sections 3 and 4).

The intrinsic dimension of a task is the smallest d that reaches most (in the papers 90 %) of the performance of full
fine-tuning. `projection` implements the random projection P.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import parametrize

from lorasweep.config.method import IntrinsicConfig, MethodConfig
from lorasweep.errors import ConfigError, RecordError
from lorasweep.lora.adapter_files import serialise
from lorasweep.lora.patterns import block_of
from lorasweep.methods.head_init import draw_head
from lorasweep.methods.method import ParameterGroup, read_weights, replacing_files
from lorasweep.methods.projection import PIECE, add_projection, block_size, draw_signs
from lorasweep.models.load import BaseModel

WEIGHTS_FILE = "intrinsic.safetensors"
SEEDS = 2**32
"""Number of possible seeds of the projection, 0 to 2**32 - 1: torch's CPU generator uses 32 bits of a seed."""


class IntrinsicMethod:
    """Trains θ = θ0 + P θ_d (`did`), or for each layer i θ_i = θ0_i + λ_i P_i θ_(d-m) (`said`); θ is all weights.

    Every forward pass computes each weight in fp32 and rounds it once to the base's dtype, in which the model runs. The
    computed weights take as much memory as the base until the backward pass has used them; the projection itself takes
    two bits per weight. Only θ_d and λ are trained. They are saved together with the seed of P.

    A new head is part of θ: it starts from the drawn values, and the same d numbers change it.
    """

    name = "intrinsic"
    needs_autocast = False

    def check(self, model: nn.Module, config: MethodConfig, *, head: tuple[str, ...] = ()) -> None:
        """Checks that d fits the number of weights and the number of layers.

        Raises:
            ConfigError: d is more than the number of weights, or with `said` not more than the number of layers.
        """
        assert isinstance(config, IntrinsicConfig)
        weights = find_weights(model)
        count, layers = sum(weight.numel() for weight in weights.values()), len(layer_numbers(weights))
        if config.dim > count:
            raise ConfigError(
                f"`method.dim <= {count}` must hold, the number of weights, but got {config.dim!r}. "
                "Lower `method.dim`, or use `method=full`."
            )
        if config.form == "said" and config.dim <= layers:
            raise ConfigError(
                f"`method.dim > {layers}` must hold with `method.form=said`, which trains a scale for each of that "
                f"many layers, but got {config.dim!r}. Raise `method.dim`, or use `method.form=did`."
            )

    def prepare(
        self, model: nn.Module, config: MethodConfig, *, generator: torch.Generator, head: tuple[str, ...] = ()
    ) -> None:
        """Draws a new head, and adds to every weight a projected change, which is zero at first.

        Raises:
            ConfigError: d does not fit the model, or the model is prepared for this method already.
        """
        assert isinstance(config, IntrinsicConfig)
        if find_coordinates(model) is not None:
            raise ConfigError("`method=intrinsic` needs a model that it has not prepared yet, but got one that it has.")
        self.check(model, config)
        draw_head(model, head, generator=generator)
        weights = find_weights(model)
        layers = layer_numbers(weights)
        coordinates = Coordinates(config, num_layers=len(layers), num_weights=sum(w.numel() for w in weights.values()))
        changes = {
            id(weight): ProjectedChange(coordinates, layer=layers[layer_of(name)], like=weight)
            for name, weight in weights.items()
        }
        for module in list(model.modules()):
            for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(weight) in changes:
                    parametrize.register_parametrization(module, name, changes[id(weight)], unsafe=True)
        coordinates.changes = tuple(changes.values())
        coordinates.draw(int(torch.randint(SEEDS, (), generator=generator)))

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns the numbers as one group, and the scales as another with √(D/d) times their learning rate.

        With columns of P of length 1, as in the paper, both groups would have the same learning rate.
        """
        coordinates = require_coordinates(model)
        groups = [ParameterGroup(name="intrinsic", params=(coordinates.numbers,), lr_factor=1.0)]
        if coordinates.scales is not None:
            factor = math.sqrt(coordinates.num_weights / len(coordinates.numbers))
            groups.append(ParameterGroup(name="scales", params=(coordinates.scales,), lr_factor=factor))
        return groups

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes the numbers, the scales and (as metadata) the projection's seed to `intrinsic.safetensors`."""
        coordinates = require_coordinates(model)
        metadata = {"format": "pt", "base_fingerprint": base.fingerprint, **coordinates.describe()}
        with replacing_files(folder) as new:
            (new / WEIGHTS_FILE).write_bytes(serialise(coordinates.state(), metadata=metadata))

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads `intrinsic.safetensors`, and draws the projection of the saved seed again.

        Raises:
            RecordError: The file is missing or damaged, or belongs to another model, d or form.
        """
        coordinates, file = require_coordinates(model), folder / WEIGHTS_FILE
        state = read_weights(file, expected=coordinates.state())
        seed = _read_seed(file, expected=coordinates.describe())
        coordinates.draw(seed)
        coordinates.load_state_dict(state)

    def merge(self, model: nn.Module) -> None:
        """Replaces each parametrized weight by its current value, in tensors that no other model shares."""
        require_coordinates(model)
        merged: dict[int, nn.Parameter] = {}
        for module in list(model.modules()):
            if not parametrize.is_parametrized(module):
                continue
            for name, (change, *_) in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
                if id(change) not in merged:
                    merged[id(change)] = nn.Parameter(getattr(module, name).detach(), requires_grad=False)
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                setattr(module, name, merged[id(change)])


class Coordinates(nn.Module):
    """The trained parameters: θ_d, or with `said` θ_(d-m) and the scales λ of the m layers.

    Attributes:
        numbers: θ_d with `did`, θ_(d-m) with `said`; zeros at first.
        scales: λ, one per layer, ones at first; None with `did`.
        num_weights: D, the number of weights of the model.
        changes: The projected changes that are computed from them, in order of the weights' names.
    """

    def __init__(self, config: IntrinsicConfig, *, num_layers: int, num_weights: int) -> None:
        super().__init__()
        is_said = config.form == "said"
        self.form = config.form
        self.numbers = nn.Parameter(torch.zeros(config.dim - (num_layers if is_said else 0)))
        self.scales = nn.Parameter(torch.ones(num_layers)) if is_said else None
        self.num_weights = num_weights
        self.changes: tuple[ProjectedChange, ...] = ()
        self.seed = 0

    @property
    def block(self) -> int:
        """Number of weights per block of the projection."""
        return block_size(len(self.numbers))

    def of(self, layer: int) -> Tensor:
        """Returns the vector to project into a layer's weights: λ_i θ_(d-m) / √(d-m), padded with zeros to a block."""
        factor = 1 / math.sqrt(len(self.numbers))
        numbers = self.numbers * factor if self.scales is None else self.numbers * (self.scales[layer] * factor)
        return pad(numbers, (0, self.block - len(self.numbers)))

    def draw(self, seed: int) -> None:
        """Draws the projection; the same seed gives the same projection."""
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        for change in self.changes:
            change.draw(generator)

    def state(self) -> dict[str, Tensor]:
        """Returns the trained parameters by name, on the CPU."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.named_parameters()}

    def describe(self) -> dict[str, str]:
        """Returns the metadata that is needed to draw the same projection again."""
        return {
            "form": self.form,
            "num_weights": str(self.num_weights),
            "piece": str(PIECE),
            "seed": str(self.seed),
        }


class ProjectedChange(nn.Module):
    """The change of one weight, as a torch parametrization of it; tied weights share one change."""

    signs: Tensor

    def __init__(self, coordinates: Coordinates, *, layer: int, like: Tensor) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.layer = layer
        self.count = like.numel()
        self.register_buffer("signs", torch.empty(0, dtype=torch.uint8, device=like.device), persistent=False)

    def draw(self, generator: torch.Generator) -> None:
        """Draws this weight's part of the projection."""
        block = self.coordinates.block
        self.signs = draw_signs(self.count, block=block, generator=generator).to(self.signs.device)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight plus its change."""
        return add_projection(weight, self.coordinates.of(self.layer), self.signs)


def find_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns every floating-point parameter by name, sorted by name; tied parameters appear once."""
    return {name: weight for name, weight in sorted(model.named_parameters()) if weight.is_floating_point()}


def layer_of(name: str) -> str:
    """Returns the layer of a weight: its block, or the module that holds the weight if it is outside of blocks."""
    return block_of(name) or name.rpartition(".")[0]


def layer_numbers(weights: Sequence[str] | Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the number of each layer of these weights, counted from 0 in order of the weights."""
    return {layer: number for number, layer in enumerate(dict.fromkeys(map(layer_of, weights)))}


def find_coordinates(model: nn.Module) -> Coordinates | None:
    """Returns the trained parameters of a prepared model, or None if the model is not prepared."""
    return next((module for module in model.modules() if isinstance(module, Coordinates)), None)


def require_coordinates(model: nn.Module) -> Coordinates:
    """Returns the trained parameters of a model that is known to be prepared."""
    found = find_coordinates(model)
    assert found is not None, "prepare comes first"
    return found


def _read_seed(file: Path, *, expected: Mapping[str, str]) -> int:
    with safe_open(file, framework="pt") as opened:
        stored = opened.metadata() or {}
    for key in expected.keys() - {"seed"}:
        if stored.get(key) != expected[key]:
            raise RecordError(
                f"{str(file)!r} must have {key} {expected[key]!r}, but got {stored.get(key)!r}. "
                "Load it into the base and method that it was made with."
            )
    seed = stored.get("seed", "")
    if not (seed.isascii() and seed.isdigit() and int(seed) < SEEDS):
        raise RecordError(f"{str(file)!r} must have a seed below 2**32, but got {seed!r}. Take it from its run again.")
    return int(seed)
