"""Finds the layers that a `LoraConfig` adapts, and the rank, α and rows of each, before the model is changed.

Works on a model on the meta device, so that a wrong pattern is found before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.fully_trained import find_trained_biases, is_inside, match_modules_to_save
from lorasweep.lora.functional import Rows, scaling_factor
from lorasweep.lora.layer_kinds import can_be_adapted, is_linear, is_quantised, matrix_shape
from lorasweep.lora.patterns import ALL_LINEAR, block_index, first_fit, fits_pattern, nearest_layer, parse_rows

Number = TypeVar("Number", int, float)

HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "qa_outputs"})


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The layers of a model that a `LoraConfig` adapts."""

    matched: Mapping[str, tuple[str, ...]]
    """Names of the layers that each pattern matched."""
    unmatched: tuple[str, ...]
    """Names of the linear layers that are not adapted."""
    trainable_params: int
    """Number of parameters that train: Σ r (d_in + d_out) over the matched layers, and modules that train in full."""
    total_params: int
    """Number of parameters of the model with the added ones; a tensor that is used twice counts once."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all matched layers, each once, in the order of the patterns."""
        return tuple(dict.fromkeys(name for names in self.matched.values() for name in names))


@dataclass(frozen=True, kw_only=True)
class Target:
    """How one layer is adapted."""

    config: LoraConfig
    """Source of the init, variant, dropout and scaling rule; `rank` and `alpha` may differ from this layer's."""
    rank: int
    alpha: float
    rows: Rows = ()
    """Parts of a fused projection that have their own A and B; empty for the whole layer."""

    @property
    def scaling(self) -> float:
        return scaling_factor(alpha=self.alpha, rank=self.rank, rule=self.config.scaling)

    @property
    def width(self) -> int:
        """Number of rows of A: the rank, times the parts of a fused projection."""
        return self.rank * max(1, len(self.rows))

    def blocks(self) -> Iterator[tuple[tuple[int, int], slice]]:
        """Yields each part's range of rows, and its columns in a B that holds the parts block by block."""
        for index, part in enumerate(self.rows):
            yield part, slice(index * self.rank, (index + 1) * self.rank)


def find_targets(model: nn.Module, config: LoraConfig) -> Coverage:
    """Returns what `inject_lora` would adapt. Changes nothing; the model may be on the meta device.

    Args:
        model: Any module that contains the layers.
        config: What to adapt and how.

    Raises:
        ValueError: A pattern matches no layer, or a layer that can't be adapted; the rank is above the smaller side of
            a layer's weight; a setting does not fit a layer.
    """
    return plan_targets(model, config)[0]


def plan_targets(
    model: nn.Module, config: LoraConfig, *, allow_full_rank: bool = False
) -> tuple[Coverage, dict[str, Target]]:
    """Returns the coverage of `find_targets`, and how each layer is adapted, by its name, in the model's order."""
    layers = adaptable_layers(model)
    trained = match_modules_to_save(model, config.modules_to_save)
    matched = {pattern: _match_pattern(pattern, model, config, trained) for pattern in target_patterns(config)}
    matched_names = {name for names in matched.values() for name in names}
    names = [name for name in layers if name in matched_names]
    _check_effect(config, model, names)
    targets = {name: _plan_layer(name, layers[name], config, matched) for name in names}
    for name, target in targets.items():
        if not allow_full_rank:
            _check_rank(target.rank, name, layers[name])
        _check_variant(name, layers[name], config)
    added = sum(_count_parameters(layers[name], target) for name, target in targets.items())
    copied = sum(p.numel() for module in trained.values() for p in module.parameters())
    biases = sum(p.numel() for p in find_trained_biases(model, config.bias, names, trained).values())
    coverage = Coverage(
        matched=matched,
        unmatched=tuple(name for name, layer in layers.items() if is_linear(layer) and name not in matched_names),
        trainable_params=added + copied + biases,
        total_params=added + copied + sum(p.numel() for p in model.parameters()),
    )
    return coverage, targets


def target_patterns(config: LoraConfig) -> tuple[str, ...]:
    """Returns the patterns of `config.targets`, each once."""
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    return tuple(dict.fromkeys(targets))


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers inside `model` that can be adapted, by name, in order. A layer with two names appears once."""
    return {name: module for name, module in model.named_modules() if name and can_be_adapted(module)}


def value_for(name: str, patterns: Mapping[str, Number], default: Number) -> Number:
    """Returns the value of the first pattern that matches this layer, or the default."""
    key = first_fit(patterns, name)
    return default if key is None else patterns[key]


def is_excluded(name: str, config: LoraConfig, trained: Collection[str]) -> bool:
    """Returns whether a layer is not adapted even if `targets` match it; `trained` are modules that train in full."""
    has_wrong_index = bool(config.layers) and block_index(name) not in config.layers
    return has_wrong_index or is_inside(name, trained) or first_fit(config.exclude, name) is not None


def _match_pattern(pattern: str, model: nn.Module, config: LoraConfig, trained: Collection[str]) -> tuple[str, ...]:
    """Returns the names of the layers that this pattern adapts."""
    layers = adaptable_layers(model)
    if pattern == ALL_LINEAR:
        fitting = [name for name, layer in layers.items() if is_linear(layer) and not _is_head(name, layer, model)]
    else:
        fitting = [name for name in layers if fits_pattern(pattern, name)]
    if not fitting:
        raise ValueError(_explain_no_match(pattern, model))
    names = tuple(name for name in fitting if not is_excluded(name, config, trained))
    if not names:
        raise ValueError(
            f"`method.targets` must match a layer that is not excluded, but {pattern!r} matches only layers such as "
            f"{fitting[0]!r}. Change `method.exclude`, `method.layers` or `method.modules_to_save`."
        )
    return names


def _is_head(name: str, layer: nn.Module, model: nn.Module) -> bool:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    is_output = callable(get_output_embeddings) and get_output_embeddings() is layer
    return is_output or not HEAD_NAMES.isdisjoint(name.split("."))


def _plan_layer(name: str, layer: nn.Module, config: LoraConfig, matched: Mapping[str, tuple[str, ...]]) -> Target:
    num_rows = matrix_shape(layer)[0]
    choices = {parse_rows(pattern, num_rows=num_rows) for pattern, names in matched.items() if name in names}
    if len(choices) > 1:
        raise ValueError(
            f"`method.targets` must choose one set of rows of {name!r}, but got {sorted(choices)}. Name it once."
        )
    return Target(
        config=config,
        rank=value_for(name, config.rank_pattern, config.rank),
        alpha=value_for(name, config.alpha_pattern, config.alpha),
        rows=choices.pop(),
    )


def _check_effect(config: LoraConfig, model: nn.Module, names: list[str]) -> None:
    """Refuses a setting that has no effect on any layer: it is a mistake."""
    all_names = list(adaptable_layers(model))
    settings: list[tuple[str, Collection[str], list[str]]] = [
        ("rank_pattern", config.rank_pattern, names),
        ("alpha_pattern", config.alpha_pattern, names),
        ("exclude", config.exclude, all_names),
    ]
    for setting, patterns, choices in settings:
        for pattern in patterns:
            if not any(fits_pattern(pattern, name) for name in choices):
                hint = nearest_layer(pattern, choices)
                raise ValueError(f"`method.{setting}` must match layers, but {pattern!r} matches none.{hint}")
    unused = set(config.layers) - {block_index(name) for name in names}
    if unused:
        existing = sorted({index for index in map(block_index, all_names) if index is not None})
        raise ValueError(f"`method.layers` must be indices of matched layers, but got {min(unused)}. Use {existing}.")


def _check_rank(rank: int, name: str, layer: nn.Module) -> None:
    """Refuses a rank above the smaller side of the weight: it costs more than the weight and adds nothing."""
    d_out, d_in = matrix_shape(layer)
    if rank > min(d_out, d_in):
        raise ValueError(
            f"`method.rank <= {min(d_out, d_in)}` must hold for layer {name!r} ({d_out} × {d_in}), "
            f"but got {rank}. Lower `method.rank`, or exclude that layer with `method.exclude`."
        )


def _check_variant(name: str, layer: nn.Module, config: LoraConfig) -> None:
    """Refuses DoRA and PiSSA for a quantised layer, because they compute with the base's weight."""
    needs_weight = config.variant == "dora" or config.init == "pissa"
    if needs_weight and is_quantised(layer):
        setting = "method.variant=dora" if config.variant == "dora" else "method.init=pissa"
        raise ValueError(
            f"`{setting}` must have layers with floating-point weights, but {name!r} is a {type(layer).__name__}. "
            "Use the default, or exclude that layer with `method.exclude`."
        )


def _count_parameters(layer: nn.Module, target: Target) -> int:
    d_out, d_in = matrix_shape(layer)
    parts = target.rows or ((0, d_out),)
    magnitude = d_out if target.config.variant == "dora" else 0
    return target.rank * sum(d_in + past - first for first, past in parts) + magnitude


def _explain_no_match(pattern: str, model: nn.Module) -> str:
    """Returns the error message for a pattern that matches no layer, or only a module that contains layers."""
    start = "`method.targets` must match layers that can be adapted"
    if pattern == ALL_LINEAR:
        return f"{start}, but {type(model).__name__} has no linear layer except its head. Name the layers to adapt."
    other = next((m for n, m in model.named_modules() if n and fits_pattern(pattern, n)), None)
    if other is None:
        return f"{start}, but {pattern!r} matches none.{nearest_layer(pattern, adaptable_layers(model))}"
    endings = sorted({name.rpartition(".")[2] for name in adaptable_layers(other)})
    remedy = f"Name the layers inside it: {', '.join(map(repr, endings))}." if endings else "Name another layer."
    return f"{start}, but {pattern!r} is a {type(other).__name__}. {remedy}"
