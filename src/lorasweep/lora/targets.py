"""Finds the layers that a `LoraConfig` adapts, and the rank, strength and rows of each, before anything is touched.

Works on a model on the meta device, so that a wrong pattern is found before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.functional import Rows, scaling_factor
from lorasweep.lora.layer_kinds import can_be_adapted, has_custom_forward, is_linear, matrix_shape
from lorasweep.lora.patterns import ALL_LINEAR, block_index, first_fit, fits_pattern, nearest_layer, parse_rows
from lorasweep.lora.trained import find_trained_biases, find_trained_modules, is_inside

Number = TypeVar("Number", int, float)

HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "qa_outputs"})


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The layers of a model that a `LoraConfig` adapts."""

    matched: Mapping[str, tuple[str, ...]]
    """Names of the layers that each pattern matched."""
    unmatched: tuple[str, ...]
    """Names of the linear layers that get no change."""
    trainable_params: int
    """Number of parameters that train: Σ r (d_in + d_out) over the matched layers, and modules that train in full."""
    total_params: int
    """Number of parameters of the model with the added ones; a tensor that is used twice counts once."""
    tied: Mapping[str, tuple[str, ...]]
    """The modules that hold the weight of a matched layer too, by the layer's name. They keep the base's weight, also
    when the layer is merged; a file format that ties them again loses the change."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all matched layers, each once, in the order of the patterns."""
        return tuple(dict.fromkeys(name for names in self.matched.values() for name in names))


@dataclass(frozen=True, kw_only=True)
class Target:
    """How one layer is adapted."""

    config: LoraConfig
    """Start, variant, dropout and scaling rule; its other settings are about the model as a whole."""
    rank: int
    """Rank r of the layer's change."""
    alpha: float
    """Strength α of the layer's change."""
    rows: Rows = ()
    """Parts of a fused projection, each with an A and a B of its own; empty for the whole layer."""

    @property
    def scaling(self) -> float:
        """Factor on the change."""
        return scaling_factor(alpha=self.alpha, rank=self.rank, rule=self.config.scaling)

    @property
    def width(self) -> int:
        """Rows of A: the rank, times the parts of a fused projection."""
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
        ValueError: A pattern matches nothing, or names something that can't be adapted; the rank is above a layer's
            size; a setting does not fit a layer.
    """
    return plan_targets(model, config)[0]


def plan_targets(
    model: nn.Module, config: LoraConfig, *, allow_full_rank: bool = False
) -> tuple[Coverage, dict[str, Target]]:
    """Returns what `find_targets` returns, and for each layer how it is adapted, in the model's order."""
    layers = adaptable_layers(model)
    trained = find_trained_modules(model, config.modules_to_save)
    matched = {pattern: _match_pattern(pattern, model, config, trained) for pattern in target_patterns(config)}
    found = {name for names in matched.values() for name in names}
    names = [name for name in layers if name in found]
    _check_effect(config, model, names)
    targets = {name: _plan_layer(name, layers[name], config, matched) for name in names}
    for name, target in targets.items():
        if not allow_full_rank:
            _check_rank(target.rank, name, layers[name])
        _check_variant(name, layers[name], config)
    added = sum(_count(layers[name], target) for name, target in targets.items())
    copied = sum(p.numel() for module in trained.values() for p in module.parameters())
    biases = sum(p.numel() for p in find_trained_biases(model, config.bias, names, trained).values())
    coverage = Coverage(
        matched=matched,
        unmatched=tuple(name for name, layer in layers.items() if is_linear(layer) and name not in found),
        trainable_params=added + copied + biases,
        total_params=added + copied + sum(p.numel() for p in model.parameters()),
        tied=_find_ties(model, names),
    )
    return coverage, targets


def target_patterns(config: LoraConfig) -> tuple[str, ...]:
    """The patterns of `config.targets`, each once."""
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    return tuple(dict.fromkeys(targets))


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers inside `model` that can be adapted, by name, in its order; one used under two names appears once."""
    return {name: module for name, module in model.named_modules() if name and can_be_adapted(module)}


def value_for(name: str, patterns: Mapping[str, Number], default: Number) -> Number:
    """Returns the value of the first pattern that names this layer, or the default."""
    key = first_fit(patterns, name)
    return default if key is None else patterns[key]


def _match_pattern(
    pattern: str, model: nn.Module, config: LoraConfig, trained: Mapping[str, nn.Module]
) -> tuple[str, ...]:
    """Names of the layers that get a change from this pattern."""
    by_name = tuple(name for name, layer in adaptable_layers(model).items() if _fits(pattern, name, layer, model))
    if not by_name:
        raise ValueError(_explain_no_match(pattern, model))
    found = tuple(name for name in by_name if not is_left_out(name, config, trained))
    if not found:
        raise ValueError(
            f"`method.targets` must leave layers to adapt, but all that {pattern!r} matches, such as {by_name[0]!r}, "
            "are left out by `method.exclude`, `method.layers` or `method.modules_to_save`. Change one of them."
        )
    return found


def _fits(pattern: str, name: str, module: nn.Module, model: nn.Module) -> bool:
    if pattern == ALL_LINEAR:
        return is_linear(module) and not _is_output_head(name, module, model)
    return fits_pattern(pattern, name)


def _is_output_head(name: str, layer: nn.Module, model: nn.Module) -> bool:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    is_output = callable(get_output_embeddings) and get_output_embeddings() is layer
    return is_output or not HEAD_NAMES.isdisjoint(name.split("."))


def is_left_out(name: str, config: LoraConfig, trained: Collection[str]) -> bool:
    """Whether a layer gets no change though `targets` match it; `trained` are the modules that train in full."""
    wrong_index = bool(config.layers) and block_index(name) not in config.layers
    return wrong_index or is_inside(name, trained) or first_fit(config.exclude, name) is not None


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
    """Refuses a setting that reaches no layer: it is a mistake."""
    every = list(adaptable_layers(model))
    settings = [
        ("rank_pattern", config.rank_pattern, names, "adapted layers"),
        ("alpha_pattern", config.alpha_pattern, names, "adapted layers"),
        ("exclude", config.exclude, every, "layers"),
    ]
    for setting, patterns, choices, kind in settings:
        for pattern in patterns:
            if not any(fits_pattern(pattern, name) for name in choices):
                hint = nearest_layer(pattern, choices)
                raise ValueError(f"`method.{setting}` must match {kind}, but {pattern!r} matches none.{hint}")
    unused = set(config.layers) - {block_index(name) for name in names}
    if unused:
        have = sorted({i for i in map(block_index, every) if i is not None})
        raise ValueError(
            f"`method.layers` must be indices of layers that match, but got {min(unused)}. There are: {have}."
        )


def _check_rank(rank: int, name: str, layer: nn.Module) -> None:
    """Refuses a rank above the layer's own: its change would cost more than the weight and reach no further."""
    d_out, d_in = matrix_shape(layer)
    if rank > min(d_out, d_in):
        raise ValueError(
            f"`method.rank <= {min(d_out, d_in)}` must hold for layer {name!r} ({d_out} × {d_in}), "
            f"but got {rank}. Lower `method.rank` or leave that layer out of `method.targets`."
        )


def _check_variant(name: str, layer: nn.Module, config: LoraConfig) -> None:
    """DoRA and PiSSA read the base's weight and DoRA its output without the bias, which only plain layers offer."""
    needs_weight = config.variant == "dora" or config.init == "pissa"
    is_plain = layer.weight.is_floating_point() and (  # type: ignore[operator]
        not isinstance(layer, nn.Linear) or not has_custom_forward(layer)
    )
    if needs_weight and not is_plain:
        setting = "method.variant=dora" if config.variant == "dora" else "method.init=pissa"
        raise ValueError(
            f"`{setting}` must have plain layers, but {name!r} is a {type(layer).__name__}. "
            "Use the default or leave that layer out of `method.targets`."
        )


def _count(layer: nn.Module, target: Target) -> int:
    """Returns how many numbers the change has."""
    d_out, d_in = matrix_shape(layer)
    parts = target.rows or ((0, d_out),)
    magnitude = d_out if target.config.variant == "dora" else 0
    return target.rank * sum(d_in + past - first for first, past in parts) + magnitude


def _find_ties(model: nn.Module, names: list[str]) -> dict[str, tuple[str, ...]]:
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    ties = {name: [h for h in holders[id(model.get_submodule(name).weight)] if h != name] for name in names}
    return {name: tuple(others) for name, others in ties.items() if others}


def _explain_no_match(pattern: str, model: nn.Module) -> str:
    """Gives the error for a pattern without a match: it names nothing, or something that holds layers."""
    start = "`method.targets` must match layers that can be adapted"
    if pattern == ALL_LINEAR:
        return (
            f"{start}, but {type(model).__name__} has no linear one besides its output head. Name the layers to adapt."
        )
    other = next((m for n, m in model.named_modules() if n and fits_pattern(pattern, n)), None)
    if other is not None:
        inside = sorted({name.rpartition(".")[2] for name in adaptable_layers(other)})
        advice = f"Name the layers inside it: {', '.join(map(repr, inside))}." if inside else "It has none inside."
        return f"{start}, but {pattern!r} is a {type(other).__name__}. {advice}"
    return f"{start}, but {pattern!r} matches none.{nearest_layer(pattern, adaptable_layers(model))}"
