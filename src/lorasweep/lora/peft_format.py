"""Converts settings and tensors of LoRA layers to PEFT's `adapter_config.json` and tensor names, and back."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lorasweep.config.build import build
from lorasweep.config.method import LoraConfig
from lorasweep.config.peft_settings import ALL_LINEAR_PATTERN, convert_from_peft, int_if_whole
from lorasweep.lora.fully_trained import match_modules_to_save, trained_modules
from lorasweep.lora.layer_kinds import is_conv1d
from lorasweep.lora.layers import LoraLayer
from lorasweep.lora.patterns import fits_pattern, is_name_ending
from lorasweep.lora.targets import get_target_patterns, is_excluded

KEY_PREFIX = "base_model.model."
MAGNITUDE_KEY = "lora_magnitude_vector"
# fmt: off
UNSUPPORTED_KEYS = (
    "alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication",
    "layers_pattern", "lora_bias", "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)
# fmt: on
"""Keys of PEFT's configuration that must be unset. If lorasweep ignored them, the loaded model would compute
different outputs."""
INITS_KEEPING_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of PEFT's `init_lora_weights` that do not change the base's weights."""


def get_peft_tensors(layer: LoraLayer) -> dict[str, Tensor]:
    """Returns A, B and DoRA's magnitude of a layer, with PEFT's names and shapes."""
    lora_a, lora_b = layer.get_plain_matrices()
    magnitude: Tensor | None = layer.magnitude
    if isinstance(layer.base, nn.Conv2d):
        lora_a = lora_a.view(-1, *layer.weight.shape[1:])
        lora_b = lora_b[:, :, None, None]
        magnitude = None if magnitude is None else magnitude[None, :, None, None]
    name_a, name_b = _get_names_of_a_and_b(layer)
    return {name_a: lora_a, name_b: lora_b} | ({} if magnitude is None else {MAGNITUDE_KEY: magnitude})


def load_peft_tensors(layer: LoraLayer, tensors: Mapping[str, Tensor]) -> None:
    """Sets a layer's parameters from tensors with PEFT's names and shapes.

    Raises:
        ValueError: The layer can't represent these values (see `LoraLayer.load_plain_matrices`).
    """
    name_a, name_b = _get_names_of_a_and_b(layer)
    layer.load_plain_matrices(tensors[name_a].flatten(1), tensors[name_b].flatten(1))
    if layer.magnitude is not None:
        layer.magnitude.data.copy_(tensors[MAGNITUDE_KEY].flatten())


def _get_names_of_a_and_b(layer: LoraLayer) -> tuple[str, str]:
    if isinstance(layer.base, nn.Embedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def config_to_peft(layers: Mapping[str, LoraLayer], model: nn.Module, *, base_path: str) -> dict[str, Any]:
    """Returns the settings with which PEFT builds these layers in the base model at `base_path`.

    Every layer is written as a plain LoRA (`LoraLayer.get_plain_matrices`), so `init_lora_weights` is PEFT's default.
    """
    config = next(iter(layers.values())).config
    ranks = {name: layer.get_plain_matrices()[0].shape[0] for name, layer in layers.items()}
    alphas = {name: _compute_alpha(layer, ranks[name]) for name, layer in layers.items()}
    # the most common values are the defaults, so that the fewest layers need a pattern
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": find_task_type(model, has_trained_modules=bool(trained_modules(model))),
        "base_model_name_or_path": base_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int_if_whole(alpha),
        "lora_dropout": config.dropout,
        "target_modules": _build_peft_targets(model, layers),
        "rank_pattern": {_build_exact_regex(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_build_exact_regex(name): int_if_whole(a) for name, a in alphas.items() if a != alpha},
        "use_rslora": config.scaling == "alpha_over_sqrt_rank",
        "use_dora": config.variant == "dora",
        "bias": config.bias,
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "init_lora_weights": True,
        "modules_to_save": list(trained_modules(model)) or None,
    }


def config_from_peft(raw: object, model: nn.Module) -> LoraConfig:
    """Returns PEFT's settings (parsed JSON) as a `LoraConfig`, without patterns that match no layer of the base model.

    Raises:
        ValueError: The settings are not those of LoRA, or have a key that lorasweep does not support.
    """
    peft_type = raw.get("peft_type") if isinstance(raw, dict) else raw
    if not isinstance(raw, dict) or peft_type != "LORA":
        raise ValueError(f"`peft_type` must be 'LORA', but got {peft_type!r}. Only LoRA adapters can be loaded.")
    for key in UNSUPPORTED_KEYS:
        if raw.get(key):
            raise ValueError(f"`{key}` must be unset, but got {raw[key]!r}. lorasweep does not support this key.")
    if raw.get("init_lora_weights", True) not in INITS_KEEPING_BASE:
        raise ValueError(
            f"`init_lora_weights` must not change the base's weights, but got {raw['init_lora_weights']!r}. "
            "Convert the adapter with PEFT's `save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    try:
        return _drop_unused_targets(_build_config(raw, model), model)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"A key is missing or has a wrong type: {error!r}. Save the adapter again.") from error


def _build_config(raw: Mapping[str, Any], model: nn.Module) -> LoraConfig:
    names = [name for name, _ in model.named_modules()]
    settings = convert_from_peft(raw)
    for key in ("rank_pattern", "alpha_pattern"):
        settings[key] = {p: settings[key][p] for p in _keep_matching_patterns(settings[key], names)}
    for key in ("exclude", "modules_to_save"):
        settings[key] = _keep_matching_patterns(settings[key], names)
    return build(LoraConfig, settings, key="method")


def _drop_unused_targets(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Drops targets that match no layer or only excluded layers. PEFT allows them if another target matches."""
    trained = match_modules_to_save(model, config.modules_to_save)
    names = [name for name, _ in model.named_modules() if not is_excluded(name, config, trained)]
    used = _keep_matching_patterns((p for p in get_target_patterns(config) if p != ALL_LINEAR_PATTERN), names)
    return replace(config, targets=used) if used else config


def _keep_matching_patterns(patterns: Iterable[str], names: list[str]) -> tuple[str, ...]:
    return tuple(pattern for pattern in patterns if any(fits_pattern(pattern, name) for name in names))


def _build_exact_regex(name: str) -> str:
    return f"^{re.escape(name)}"


def _compute_alpha(layer: LoraLayer, rank: int) -> float:
    """Returns the α with which a plain LoRA of this rank has the same scaling as the layer."""
    if rank == layer.rank:
        return layer.target.alpha
    ratio = rank / layer.rank
    return layer.target.alpha * (ratio if layer.config.scaling == "alpha_over_rank" else math.sqrt(ratio))


def find_task_type(model: nn.Module, *, has_trained_modules: bool) -> str | None:
    """Returns PEFT's task name of a transformers model, for `AutoPeftModelFor...`; None if there is no such name.

    A classifier without a trained module gets None, because PEFT assumes that the head of a SEQ_CLS model has trained.
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS" if has_trained_modules else None
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def _build_peft_targets(model: nn.Module, layers: Mapping[str, LoraLayer]) -> list[str] | str:
    """Returns the last parts of the layers' names, or a regular expression if these parts match other layers too."""
    endings = sorted({name.rpartition(".")[2] for name in layers})
    # without names inside adapted layers and trained modules, such as `q_proj.base`
    inner = tuple(f"{name}." for name in (*layers, *trained_modules(model)))
    others = [n for n, _ in model.named_modules() if n not in layers and not f"{n}.".startswith(inner)]
    is_ambiguous = any(is_name_ending(ending, name) for name in others for ending in endings)
    return "|".join(map(re.escape, layers)) if is_ambiguous else endings
