"""Converts `LoraConfig` and tensors to PEFT's `adapter_config.json` and tensor names, and back."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.fully_trained import match_modules_to_save, trained_modules
from lorasweep.lora.layer_kinds import is_conv1d
from lorasweep.lora.layers import LoraLayer
from lorasweep.lora.patterns import ALL_LINEAR, REGEX_PREFIX, fits_pattern, is_name_ending
from lorasweep.lora.targets import is_excluded, target_patterns

KEY_PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
# fmt: off
UNSUPPORTED_KEYS = (
    "alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication",
    "layers_pattern", "lora_bias", "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)
# fmt: on
"""Keys of PEFT's configuration that must be unset, because ignoring them would load another model."""
INITS_KEEPING_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of PEFT's `init_lora_weights` that leave the base's weights as they are."""


def layer_tensors(layer: LoraLayer) -> dict[str, Tensor]:
    """Returns a layer's tensors by PEFT's names and in its shapes: A, B and DoRA's row lengths."""
    lora_a, lora_b = layer.matrices()
    magnitude: Tensor | None = layer.magnitude
    if isinstance(layer.base, nn.Conv2d):
        lora_a = lora_a.view(-1, *layer.weight.shape[1:])
        lora_b = lora_b[:, :, None, None]
        magnitude = None if magnitude is None else magnitude[None, :, None, None]
    name_a, name_b = _names_of_a_and_b(layer)
    return {name_a: lora_a, name_b: lora_b} | ({} if magnitude is None else {MAGNITUDE: magnitude})


def load_layer_tensors(layer: LoraLayer, tensors: Mapping[str, Tensor]) -> None:
    """Sets a layer's parameters from tensors like those of `layer_tensors`.

    Raises:
        ValueError: The layer can't represent them (see `LoraLayer.load_matrices`).
    """
    name_a, name_b = _names_of_a_and_b(layer)
    layer.load_matrices(tensors[name_a].flatten(1), tensors[name_b].flatten(1))
    if layer.magnitude is not None:
        layer.magnitude.data.copy_(tensors[MAGNITUDE].flatten())


def _names_of_a_and_b(layer: LoraLayer) -> tuple[str, str]:
    if isinstance(layer.base, nn.Embedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def config_to_peft(layers: Mapping[str, LoraLayer], model: nn.Module, *, base_path: str) -> dict[str, Any]:
    """Returns the settings with which PEFT builds these layers in the base model at `base_path`.

    Every layer is written as one plain LoRA (see `LoraLayer.matrices`), so `init_lora_weights` is always the default.
    """
    config = next(iter(layers.values())).config
    ranks = {name: layer.matrices()[0].shape[0] for name, layer in layers.items()}
    alphas = {name: _alpha_at(layer, ranks[name]) for name, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": base_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _int_if_whole(alpha),
        "lora_dropout": config.dropout,
        "target_modules": _peft_targets(model, layers),
        "rank_pattern": {_exactly(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(name): _int_if_whole(a) for name, a in alphas.items() if a != alpha},
        "use_rslora": config.scaling == "alpha_over_sqrt_rank",
        "use_dora": config.variant == "dora",
        "bias": config.bias,
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "init_lora_weights": True,
        "modules_to_save": list(trained_modules(model)) or None,
    }


def config_from_peft(raw: object, model: nn.Module) -> LoraConfig:
    """Returns PEFT's settings (parsed JSON) as a `LoraConfig`, without patterns that match nothing in the base model.

    Raises:
        ValueError: They are not LoRA settings, or have a key that is not supported here.
    """
    peft_type = raw.get("peft_type") if isinstance(raw, dict) else raw
    if not isinstance(raw, dict) or peft_type != "LORA":
        raise ValueError(f"`peft_type` must be 'LORA', but got {peft_type!r}. Only LoRA adapters can be loaded.")
    for key in UNSUPPORTED_KEYS:
        if raw.get(key):
            raise ValueError(f"`{key}` must be unset, but got {raw[key]!r}. It is not supported here.")
    if raw.get("init_lora_weights", True) not in INITS_KEEPING_BASE:
        raise ValueError(
            f"`init_lora_weights` must leave the base as it is, but got {raw['init_lora_weights']!r}. "
            "Convert the adapter with PEFT's `save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    try:
        return _drop_unused_targets(_convert(raw, model), model)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a key is missing or has a wrong type: {error!r}. Save the adapter again.") from error


def _convert(raw: Mapping[str, Any], model: nn.Module) -> LoraConfig:
    names = [name for name, _ in model.named_modules()]
    layers = raw.get("layers_to_transform")
    return LoraConfig(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        scaling="alpha_over_sqrt_rank" if raw.get("use_rslora") else "alpha_over_rank",
        targets=_patterns(raw["target_modules"]) or "",
        dropout=float(raw.get("lora_dropout", 0.0)),
        variant="dora" if raw.get("use_dora") else "lora",
        rank_pattern=_pattern_values(raw.get("rank_pattern"), names),
        alpha_pattern=_pattern_values(raw.get("alpha_pattern"), names),
        exclude=_having_effect(_patterns(raw.get("exclude_modules") or ()), names),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        modules_to_save=_having_effect(raw.get("modules_to_save") or (), names),
        bias=raw.get("bias", "none"),
    )


def _drop_unused_targets(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Drops targets that match nothing or only excluded layers. PEFT allows such targets if another one matches."""
    trained = match_modules_to_save(model, config.modules_to_save)
    names = [name for name, _ in model.named_modules() if not is_excluded(name, config, trained)]
    used = _having_effect((p for p in target_patterns(config) if p != ALL_LINEAR), names)
    return replace(config, targets=used) if used else config


def _pattern_values(values: Mapping[str, Any] | None, names: list[str]) -> dict[str, Any]:
    keyed = {_ending(key): value for key, value in (values or {}).items()}
    return {key: keyed[key] for key in _having_effect(keyed, names)}


def _having_effect(patterns: Iterable[str], names: list[str]) -> tuple[str, ...]:
    return tuple(pattern for pattern in patterns if any(fits_pattern(pattern, name) for name in names))


def _patterns(modules: str | Iterable[str]) -> tuple[str, ...]:
    """Converts PEFT's names (a list) or regular expression (a string) to patterns of `LoraConfig`."""
    if isinstance(modules, str):
        return (ALL_LINEAR,) if modules == ALL_LINEAR else (f"{REGEX_PREFIX}{modules}",)
    return tuple(sorted(modules))


def _ending(key: str) -> str:
    """Converts the key of a rank or alpha pattern, which PEFT matches with the end of a name."""
    return f"{REGEX_PREFIX}(.*\\.)?({key})"


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _alpha_at(layer: LoraLayer, rank: int) -> float:
    """Returns the α with which a LoRA of this rank has the layer's scaling."""
    if rank == layer.rank:
        return layer.target.alpha
    ratio = rank / layer.rank
    return layer.target.alpha * (ratio if layer.config.scaling == "alpha_over_rank" else math.sqrt(ratio))


def _int_if_whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _task_type(model: nn.Module) -> str | None:
    """Returns PEFT's name of the task of a transformers model, which `AutoPeftModelFor...` needs; else None.

    With SEQ_CLS, PEFT assumes that `classifier` or `score` trained. So a classifier without a trained module gets None.
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS" if trained_modules(model) else None
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def _peft_targets(model: nn.Module, layers: Mapping[str, LoraLayer]) -> list[str] | str:
    """Returns the last parts of the layers' names, or a regular expression if they match other layers as well."""
    endings = sorted({name.rpartition(".")[2] for name in layers})
    inner = tuple(f"{name}." for name in (*layers, *trained_modules(model)))
    others = [n for n, _ in model.named_modules() if n not in layers and not f"{n}.".startswith(inner)]
    clash = any(is_name_ending(ending, name) for name in others for ending in endings)
    return "|".join(map(re.escape, layers)) if clash else endings
