"""`intrinsic`: d numbers train, projected at random into all weights (arXiv 1804.08838; 2012.13255, sections 3 and 4).

How few numbers reach most of what full fine-tuning gains is the intrinsic dimension of the task; `projection` has P.
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
"""The projection's seed lies below: torch's random stream on the CPU takes no longer one."""


class IntrinsicMethod:
    """θ = θ0 + P θ_d (`did`), or layer by layer θ_i = θ0_i + λ_i P_i θ_(d-m) (`said`), with every weight in θ.

    Every forward pass computes each weight anew, in fp32, and rounds it once to the base's dtype, in which the model
    runs. Until the backward pass has used them, they are one more copy of the weights in memory; the projection itself
    takes two bits per weight. Only θ_d and λ train and are saved, with the seed that gives P.

    A newly drawn head is weights like any others: it starts as drawn and moves within the same d numbers.
    """

    name = "intrinsic"
    needs_autocast = False

    def check(self, model: nn.Module, config: MethodConfig, *, head: tuple[str, ...] = ()) -> None:
        """Makes sure that d fits the number of weights and of layers.

        Raises:
            ConfigError: It does not.
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
        """Draws a new head, and makes every weight the base's plus a projected change that is zero at first.

        Raises:
            ConfigError: d does not fit the model, or it has such weights already.
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
        """Returns the numbers, and the scales at √(D/d) times their rate.

        With P's columns of length 1, as in the paper, both would have the same rate.
        """
        coordinates = require_coordinates(model)
        groups = [ParameterGroup(name="intrinsic", params=(coordinates.numbers,), lr_factor=1.0)]
        if coordinates.scales is not None:
            factor = math.sqrt(coordinates.num_weights / len(coordinates.numbers))
            groups.append(ParameterGroup(name="scales", params=(coordinates.scales,), lr_factor=factor))
        return groups

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes `intrinsic.safetensors`: the numbers, the scales and, in its metadata, the projection's seed."""
        coordinates = require_coordinates(model)
        metadata = {"format": "pt", "base_fingerprint": base.fingerprint, **coordinates.describe()}
        with replacing_files(folder) as new:
            (new / WEIGHTS_FILE).write_bytes(serialise(coordinates.state(), metadata=metadata))

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads `intrinsic.safetensors`, and draws the projection that was trained with.

        Raises:
            RecordError: It is missing, damaged or of another model, d or form.
        """
        coordinates, file = require_coordinates(model), folder / WEIGHTS_FILE
        state = read_weights(file, expected=coordinates.state())
        seed = _read_seed(file, expected=coordinates.describe())
        coordinates.draw(seed)
        coordinates.load_state_dict(state)

    def merge(self, model: nn.Module) -> None:
        """Puts the changed weights in place, on tensors of the model's own; it then is one of the base's kind again."""
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
    """What trains: θ_d, and under `said` the layers' scales λ, which start at 1.

    Attributes:
        numbers: θ_d, or without the scales θ_(d-m); zeros at first.
        scales: λ, one per layer; None under `did`.
        num_weights: D.
        changes: The projected changes that depend on them, in order of the weights' names.
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
        """Weights per block of the projection."""
        return block_size(len(self.numbers))

    def of(self, layer: int) -> Tensor:
        """Returns λ_i θ_(d-m) / √(d-m) with zeros up to a block's size: what is projected into a layer's weights."""
        factor = 1 / math.sqrt(len(self.numbers))
        numbers = self.numbers * factor if self.scales is None else self.numbers * (self.scales[layer] * factor)
        return pad(numbers, (0, self.block - len(self.numbers)))

    def draw(self, seed: int) -> None:
        """Draws the projection; the same seed gives the same."""
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        for change in self.changes:
            change.draw(generator)

    def state(self) -> dict[str, Tensor]:
        """Returns what trains, on the CPU, by name."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.named_parameters()}

    def describe(self) -> dict[str, str]:
        """Returns what else must be known to project again."""
        return {
            "form": self.form,
            "num_weights": str(self.num_weights),
            "piece": str(PIECE),
            "seed": str(self.seed),
        }


class ProjectedChange(nn.Module):
    """The change of one weight, as a parametrization of it; tied weights share theirs."""

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
        """Returns the weight with its change."""
        return add_projection(weight, self.coordinates.of(self.layer), self.signs)


def find_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns every parameter of floating point, by name and in its order; tied ones once."""
    return {name: weight for name, weight in sorted(model.named_parameters()) if weight.is_floating_point()}


def layer_of(name: str) -> str:
    """Returns the layer of a weight: its block, or outside of blocks the module that holds the weight."""
    return block_of(name) or name.rpartition(".")[0]


def layer_numbers(weights: Sequence[str] | Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the layers of these weights, numbered."""
    return {layer: number for number, layer in enumerate(dict.fromkeys(map(layer_of, weights)))}


def find_coordinates(model: nn.Module) -> Coordinates | None:
    """Returns what trains in a prepared model, or None."""
    return next((module for module in model.modules() if isinstance(module, Coordinates)), None)


def require_coordinates(model: nn.Module) -> Coordinates:
    """Returns what trains in a model that is known to be prepared."""
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
