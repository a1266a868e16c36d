"""Finds the layers that a `LoraConfig` adapts, and the rank and α of each. The model is not changed.

The model may be on the meta device, so that a wrong pattern is reported before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lorasweep.config.method import ALL_LINEAR_PATTERN, REGEX_PREFIX, LoraConfig, scaling_factor
from lorasweep.lora.fully_trained import is_inside, match_modules_to_save
from lorasweep.lora.layer_kinds import (
    count_parameters,
    find_fused_experts,
    is_linear,
    matrix_shape,
)
from lorasweep.lora.patterns import find_first_match, fits_pattern, suggest_layer
from lorasweep.wording import Note, format_share

PatternValue = TypeVar("PatternValue", int, float)

HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "qa_outputs"})
"""Names that transformers gives to the head of a model. `all-linear` does not match heads."""
GATE_NAMES = frozenset(
    {"gate", "router", "shared_expert_gate", "in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj"}
)
"""Names that transformers gives to routers of experts, and to layers with one output per head that gate linear
attention. `all-linear` does not match them: they have as few outputs as experts or heads, often fewer than the rank."""
EXPERT_LAYER_NAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Names of the layers in an expert. In a model with fused experts, PEFT (0.21) replaces these names in `target_modules`
by the fused parameters, even if they name other layers, such as shared experts. It keeps `target_parameters`."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """How one layer is adapted."""

    config: LoraConfig
    """Settings of all layers. This layer's rank and α may differ from them, because of patterns."""
    rank: int
    alpha: float

    @property
    def scaling(self) -> float:
        return scaling_factor(alpha=self.alpha, rank=self.rank, rule=self.config.scaling)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The layers of a model that a `LoraConfig` adapts."""

    targets: Mapping[str, Target]
    """How each adapted layer is adapted, by its name and in the model's order."""
    unmatched: tuple[str, ...]
    """Names of the linear layers that are not adapted."""
    trainable_params: int
    """Number of trainable parameters: Σ r (d_in + d_out) over the adapted layers, and the modules that train in
    full."""
    matched_fraction: float
    """Fraction of the model's parameters that are in adapted layers, or in modules that train in full."""
    fused_experts: tuple[str, ...]
    """Names of the parameters of fused experts. No pattern of `targets` matches them."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the adapted layers in the model's order."""
        return tuple(self.targets)

    @property
    def note(self) -> Note:
        """The share of the parameters that is adapted; a warning if it leaves out fused experts."""
        matched, other = format_share(self.matched_fraction), format_share(1 - self.matched_fraction)
        text = f"LoRA adapts layers with {matched} of the model's parameters"
        text += f"; `method.targets` leaves out {other}" if self.matched_fraction < 1 else ""
        if not self.fused_experts:
            return Note(kind="sweep", text=f"{text}.")
        parameters = ", ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in self.fused_experts))
        # not `all-linear`, with which PEFT would train the routers too
        modules = ", ".join(sorted({name.rpartition(".")[2] for name in self.layers} - EXPERT_LAYER_NAMES))
        text += (
            ", among them all experts of the model, which are fused into parameters such as "
            f"`{self.fused_experts[0]}`. PEFT trains them, each run alone: `method=peft method.config={{peft_type: "
            f"LORA, r: 8, target_modules: [{modules}], target_parameters: [{parameters}]}}`."
        )
        return Note(kind="warning", text=text)


def find_targets(model: nn.Module, config: LoraConfig) -> Coverage:
    """Returns the layers that `inject_lora` would adapt, without changing the model.

    Raises:
        ValueError: A pattern matches no layer that can be adapted; the rank is above the smaller side of a layer's
            weight; or a setting does not fit a layer.
    """
    layers = find_adaptable_layers(model)
    trained = match_modules_to_save(model, config.modules_to_save)
    matched = {n for pattern in get_target_patterns(config) for n in _match_pattern(pattern, model, config, trained)}
    names = [name for name in layers if name in matched]
    _check_settings_match_layers(config, names, list(layers))
    targets, added = {}, 0
    for name in names:
        rank = get_pattern_value(name, config.rank_pattern, config.rank)
        d_out, d_in = matrix_shape(layers[name])
        if rank > min(d_out, d_in):  # it would add no new updates, only parameters
            raise ValueError(
                f"`method.rank <= {min(d_out, d_in)}` must hold for layer {name!r} ({d_out} × {d_in}), "
                f"but got {rank}. Lower `method.rank`, or exclude the layer with `method.exclude`."
            )
        alpha = get_pattern_value(name, config.alpha_pattern, config.alpha)
        targets[name] = Target(config=config, rank=rank, alpha=alpha)
        added += rank * (d_in + d_out)
    return Coverage(
        targets=targets,
        unmatched=tuple(name for name in layers if name not in matched),
        trainable_params=added + sum(p.numel() for module in trained.values() for p in module.parameters()),
        matched_fraction=count_parameters(nn.ModuleList([*(layers[name] for name in names), *trained.values()]))
        / count_parameters(model),
        fused_experts=tuple(find_fused_experts(model)),
    )


def _check_settings_match_layers(config: LoraConfig, names: list[str], all_names: list[str]) -> None:
    """Refuses a pattern that matches no layer, because it must be a mistake."""
    settings: list[tuple[str, Collection[str], list[str]]] = [
        ("rank_pattern", config.rank_pattern, names),
        ("alpha_pattern", config.alpha_pattern, names),
        ("exclude", config.exclude, all_names),
    ]
    for setting, patterns, choices in settings:
        for pattern in patterns:
            if not any(fits_pattern(pattern, name) for name in choices):
                hint = suggest_layer(pattern, choices)
                raise ValueError(f"`method.{setting}` must match layers, but {pattern!r} matches none.{hint}")


def get_target_patterns(config: LoraConfig) -> tuple[str, ...]:
    """Returns the patterns of `config.targets` without duplicates. A text is one regular expression, as in PEFT."""
    if isinstance(config.targets, str):
        is_preset = config.targets == ALL_LINEAR_PATTERN
        return (config.targets if is_preset else f"{REGEX_PREFIX}{config.targets}",)
    return tuple(dict.fromkeys(config.targets))


def find_adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that can be adapted by name, in the model's order. A layer with two names appears once."""
    return {name: module for name, module in model.named_modules() if name and is_linear(module)}


def get_pattern_value(name: str, patterns: Mapping[str, PatternValue], default: PatternValue) -> PatternValue:
    """Returns the value of the first pattern that matches the layer `name`, or the default."""
    key = find_first_match(patterns, name)
    return default if key is None else patterns[key]


def is_excluded(name: str, config: LoraConfig, trained: Collection[str]) -> bool:
    """Returns whether a layer of `targets` is excluded by `exclude` or a module that trains in full."""
    return is_inside(name, trained) or find_first_match(config.exclude, name) is not None


def _match_pattern(pattern: str, model: nn.Module, config: LoraConfig, trained: Collection[str]) -> tuple[str, ...]:
    """Returns the names of the layers that a pattern of `targets` adapts."""
    layers = find_adaptable_layers(model)
    if pattern == ALL_LINEAR_PATTERN:
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        fitting = [
            name
            for name, layer in layers.items()
            if layer is not head and (HEAD_NAMES | GATE_NAMES).isdisjoint(name.split("."))
        ]
    else:
        fitting = [name for name in layers if fits_pattern(pattern, name)]
    if not fitting:
        raise ValueError(
            f"`method.targets` must match linear layers, but {pattern!r} matches none.{suggest_layer(pattern, layers)}"
        )
    names = tuple(name for name in fitting if not is_excluded(name, config, trained))
    if not names:
        raise ValueError(
            f"`method.targets` must match a layer that is not excluded, but {pattern!r} matches only layers such as "
            f"{fitting[0]!r}. Change `method.exclude` or `method.modules_to_save`."
        )
    return names
