"""Which layers get a change: from the patterns of a `LoraConfig` to layer names, before anything is touched.

Works on a model on the meta device, so that a wrong pattern is found before weights are loaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from lorasweep.config.method import LoraConfig

ALL_LINEAR = "all-linear"
REGEX_PREFIX = "re:"
HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "qa_outputs"})


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What a `LoraConfig` reaches in a model."""

    matched: Mapping[str, tuple[str, ...]]
    """Names of the layers that each pattern matched."""
    unmatched: tuple[str, ...]
    """Names of the linear layers that no pattern matched."""
    trainable_params: int
    """Numbers that train: Σ r (d_in + d_out) over the matched layers."""
    total_params: int
    """Numbers in the model, base and adapters together; a tensor used twice counts once."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all matched layers, each once, in the order of the patterns."""
        return tuple(dict.fromkeys(name for names in self.matched.values() for name in names))


def find_targets(model: nn.Module, config: LoraConfig, *, allow_full_rank: bool = False) -> Coverage:
    """What `inject_lora` would adapt. Changes nothing; the model may be on the meta device.

    Args:
        model: Any module that contains the layers.
        config: Its `targets` and `rank`.
        allow_full_rank: Whether a rank above a layer's own is a warning instead of an error.

    Raises:
        ValueError: A pattern matches nothing, or what it names is no linear layer; the rank is above a layer's size.
    """
    layers = linear_layers(model)
    matched = {pattern: _match_pattern(pattern, model, layers) for pattern in target_patterns(config)}
    names = dict.fromkeys(name for found in matched.values() for name in found)
    for name in names:
        check_rank(config.rank, name, layers[name], allow_full_rank=allow_full_rank)
    trainable = sum(config.rank * (layers[name].in_features + layers[name].out_features) for name in names)
    return Coverage(
        matched=matched,
        unmatched=tuple(name for name in layers if name not in names),
        trainable_params=trainable,
        total_params=trainable + sum(parameter.numel() for parameter in model.parameters()),
    )


def target_patterns(config: LoraConfig) -> tuple[str, ...]:
    """The patterns of `config.targets`, each once."""
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    return tuple(dict.fromkeys(targets))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside `model` by name, in the model's order; one used under two names appears once."""
    return {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}


def check_rank(rank: int, name: str, layer: nn.Linear, *, allow_full_rank: bool = False) -> None:
    """Refuses a rank above the layer's own, with which the change costs more than the weight and reaches no further.

    Raises:
        ValueError: `rank > min(d_in, d_out)`; only a warning with `allow_full_rank`.
    """
    limit = min(layer.in_features, layer.out_features)
    if rank <= limit:
        return
    message = (
        f"`method.rank <= {limit}` must hold for layer {name!r} ({layer.out_features} × {layer.in_features}), "
        f"but got {rank}. Lower `method.rank` or leave that layer out of `method.targets`."
    )
    if not allow_full_rank:
        raise ValueError(message)
    more = rank * (layer.in_features + layer.out_features) / (layer.in_features * layer.out_features)
    warnings.warn(f"{message} Its change has {more:.2g} times the layer's own numbers.", stacklevel=2)


def is_name_ending(ending: str, name: str) -> bool:
    """Whether `name` is `ending` or ends with it after a dot: `q_proj` fits `layers.0.q_proj`, not `seq_proj`."""
    return name == ending or name.endswith(f".{ending}")


def _match_pattern(pattern: str, model: nn.Module, layers: Mapping[str, nn.Linear]) -> tuple[str, ...]:
    found = tuple(name for name in layers if _fits(pattern, name, layers[name], model))
    if not found:
        raise ValueError(_explain_no_match(pattern, model, layers))
    return found


def _fits(pattern: str, name: str, layer: nn.Linear, model: nn.Module) -> bool:
    if pattern == ALL_LINEAR:
        return not _is_output_head(name, layer, model)
    if pattern.startswith(REGEX_PREFIX):
        return re.fullmatch(pattern.removeprefix(REGEX_PREFIX), name) is not None
    return is_name_ending(pattern, name)


def _is_output_head(name: str, layer: nn.Linear, model: nn.Module) -> bool:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    is_output = callable(get_output_embeddings) and get_output_embeddings() is layer
    return is_output or not HEAD_NAMES.isdisjoint(name.split("."))


def _explain_no_match(pattern: str, model: nn.Module, layers: Iterable[str]) -> str:
    """The error for a pattern without a match: it names no layer, something that holds layers, or nothing at all."""
    start = "`method.targets` must match linear layers"
    if pattern == ALL_LINEAR:
        return f"{start}, but {type(model).__name__} has none besides its output head. Name the layers to adapt."
    other = next((m for n, m in model.named_modules() if n and is_name_ending(pattern, n)), None)
    if other is not None:
        inside = sorted({name.rpartition(".")[2] for name in linear_layers(other)})
        advice = f"Name the layers inside it: {', '.join(map(repr, inside))}." if inside else "It has none inside."
        return f"{start}, but {pattern!r} is a {type(other).__name__}. {advice}"
    near = get_close_matches(pattern.removeprefix(REGEX_PREFIX), _name_endings(layers), n=3, cutoff=0.4)
    return f"{start}, but {pattern!r} matches none. Nearest: {', '.join(map(repr, near)) or 'nothing alike'}."


def _name_endings(names: Iterable[str]) -> list[str]:
    """Whole names and their last one and two parts, each once: what a user may have meant."""
    endings = (".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2, 0))
    return list(dict.fromkeys(endings))
