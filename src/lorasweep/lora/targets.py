"""Which layers get a change, and which rank, strength and rows: found from a `LoraConfig` before anything is touched.

Works on a model on the meta device, so that a wrong pattern is found before weights are loaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.functional import Rows
from lorasweep.lora.kinds import can_be_adapted, is_linear, matrix_shape
from lorasweep.lora.patterns import ALL_LINEAR, block_index, first_fit, fits_pattern, nearest_names, parse_rows
from lorasweep.lora.trained import find_trained_biases, find_trained_modules, is_inside

HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "qa_outputs"})


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What a `LoraConfig` reaches in a model."""

    matched: Mapping[str, tuple[str, ...]]
    """Names of the layers that each pattern matched."""
    unmatched: tuple[str, ...]
    """Names of the linear layers that get no change."""
    trainable_params: int
    """Numbers that train: Σ r (d_in + d_out) over the matched layers, and what trains in full."""
    total_params: int
    """Numbers in the model, base and what was added together; a tensor used twice counts once."""
    tied: Mapping[str, tuple[str, ...]]
    """For each matched layer whose weight other modules hold too: those modules. They keep the base's weight, also when
    the layer is merged; a file format that ties them again loses the change."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all matched layers, each once, in the order of the patterns."""
        return tuple(dict.fromkeys(name for names in self.matched.values() for name in names))


@dataclass(frozen=True, kw_only=True)
class Target:
    """How one layer is to be adapted."""

    rank: int
    """Rank of its change."""
    alpha: float
    """Strength of its change."""
    rows: Rows = ()
    """Parts of a fused projection; empty for the whole layer."""


def find_targets(model: nn.Module, config: LoraConfig, *, allow_full_rank: bool = False) -> Coverage:
    """What `inject_lora` would adapt. Changes nothing; the model may be on the meta device.

    Args:
        model: Any module that contains the layers.
        config: What to adapt and how.
        allow_full_rank: Whether a rank above a layer's own is a warning instead of an error.

    Raises:
        ValueError: A pattern matches nothing, or what it names is no layer that can be adapted; the rank is above a
            layer's size; a setting does not fit a layer.

    Warns:
        UserWarning: A pattern matches only some of the layers that differ in their index alone.
    """
    return plan_targets(model, config, allow_full_rank=allow_full_rank)[0]


def plan_targets(
    model: nn.Module, config: LoraConfig, *, allow_full_rank: bool = False
) -> tuple[Coverage, dict[str, Target]]:
    """`find_targets`, and for each layer how it is to be adapted, in the model's order."""
    layers = adaptable_layers(model)
    trained = find_trained_modules(model, config.modules_to_save)
    matched = {pattern: _match_pattern(pattern, model, config, trained) for pattern in target_patterns(config)}
    found = {name for names in matched.values() for name in names}
    names = [name for name in layers if name in found]
    _check_effect(config, model, names)
    targets = {name: _plan_layer(name, layers[name], config, matched) for name in names}
    for name, target in targets.items():
        check_rank(target.rank, name, layers[name], allow_full_rank=allow_full_rank)
        _check_variant(name, layers[name], config)
    added = sum(_count(layers[name], target, config) for name, target in targets.items())
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


def rank_of(name: str, config: LoraConfig) -> int:
    """Rank of the change of this layer."""
    key = first_fit(config.rank_pattern, name)
    return config.rank if key is None else config.rank_pattern[key]


def alpha_of(name: str, config: LoraConfig) -> float:
    """Strength α of the change of this layer."""
    key = first_fit(config.alpha_pattern, name)
    return config.alpha if key is None else config.alpha_pattern[key]


def check_rank(rank: int, name: str, layer: nn.Module, *, allow_full_rank: bool = False) -> None:
    """Refuses a rank above the layer's own, with which the change costs more than the weight and reaches no further.

    Raises:
        ValueError: `rank > min(d_in, d_out)`; only a warning with `allow_full_rank`.
    """
    d_out, d_in = matrix_shape(layer)
    limit = min(d_out, d_in)
    if rank <= limit:
        return
    message = (
        f"`method.rank <= {limit}` must hold for layer {name!r} ({d_out} × {d_in}), "
        f"but got {rank}. Lower `method.rank` or leave that layer out of `method.targets`."
    )
    if not allow_full_rank:
        raise ValueError(message)
    more = rank * (d_in + d_out) / (d_in * d_out)
    warnings.warn(f"{message} Its change has {more:.2g} times the layer's own numbers.", stacklevel=2)


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
    _warn_of_gaps(pattern, found, model, config, trained)
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


def _warn_of_gaps(
    pattern: str, found: tuple[str, ...], model: nn.Module, config: LoraConfig, trained: Mapping[str, nn.Module]
) -> None:
    """Warns where a pattern that names no index matches `layers.0.up` and not `layers.1.up`, which is another kind."""
    if re.search(r"\d", pattern):
        return
    kinds = {_without_index(name) for name in found if not name.rpartition(".")[2].isdecimal()}
    missing = [
        f"{name!r} ({type(module).__name__})"
        for name, module in model.named_modules()
        if _without_index(name) in kinds and name not in found and not is_left_out(name, config, trained)
    ]
    if missing:
        few = ", ".join(missing[:3])
        warnings.warn(f"`method.targets` {pattern!r} matches {len(found)} layers, but not {few}.", stacklevel=2)


def _without_index(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _plan_layer(name: str, layer: nn.Module, config: LoraConfig, matched: Mapping[str, tuple[str, ...]]) -> Target:
    num_rows = matrix_shape(layer)[0]
    choices = {parse_rows(pattern, num_rows=num_rows) for pattern, names in matched.items() if name in names}
    if len(choices) > 1:
        raise ValueError(
            f"`method.targets` must choose one set of rows of {name!r}, but got {sorted(choices)}. Name it once."
        )
    return Target(
        rank=rank_of(name, config),
        alpha=alpha_of(name, config),
        rows=choices.pop(),
    )


def _check_effect(config: LoraConfig, model: nn.Module, names: list[str]) -> None:
    """A setting that reaches no layer is a mistake."""
    settings = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    for setting, patterns in settings.items():
        for pattern in patterns:
            if not any(fits_pattern(pattern, name) for name in names):
                near = nearest_names(pattern, names)
                raise ValueError(
                    f"`method.{setting}` must match adapted layers, but {pattern!r} matches none. Nearest: {near}."
                )
    every = list(adaptable_layers(model))
    for pattern in config.exclude:
        if not any(fits_pattern(pattern, name) for name in every):
            near = nearest_names(pattern, every)
            raise ValueError(f"`method.exclude` must match layers, but {pattern!r} matches none. Nearest: {near}.")
    indices = {block_index(name) for name in names}
    for index in config.layers:
        if index not in indices:
            have = sorted({i for i in map(block_index, every) if i is not None})
            raise ValueError(
                f"`method.layers` must be indices of layers that match, but got {index}. There are: {have}."
            )


def _check_variant(name: str, layer: nn.Module, config: LoraConfig) -> None:
    """DoRA and PiSSA read the base's weight and DoRA its output without the bias, which only plain layers offer."""
    needs_weight = config.variant == "dora" or config.init == "pissa"
    plain = layer.weight.is_floating_point() and (  # type: ignore[operator]
        not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward
    )
    if needs_weight and not plain:
        setting = "method.variant=dora" if config.variant == "dora" else "method.init=pissa"
        raise ValueError(
            f"`{setting}` must have plain layers, but {name!r} is a {type(layer).__name__}. "
            "Use the default or leave that layer out of `method.targets`."
        )


def _count(layer: nn.Module, target: Target, config: LoraConfig) -> int:
    d_out, d_in = matrix_shape(layer)
    parts = target.rows or ((0, d_out),)
    magnitude = d_out if config.variant == "dora" else 0
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
    return f"{start}, but {pattern!r} matches none. Nearest: {nearest_names(pattern, list(adaptable_layers(model)))}."
