"""PEFT's `adapter_config.json` to `LoraConfig` and back. `files` reads and writes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.layers import LoraLinear
from lorasweep.lora.targets import ALL_LINEAR, REGEX_PREFIX, is_name_ending

KEY_PREFIX = "base_model.model."
_SUPPORTED_ONLY_EMPTY = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "lora_ga_config",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)


def config_from_peft(raw: object) -> LoraConfig:
    """PEFT's settings as ours.

    Raises:
        ValueError: They are no LoRA settings, or say something that would silently be ignored here.
    """
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        got = raw.get("peft_type") if isinstance(raw, dict) else raw
        raise ValueError(f"`peft_type` must be 'LORA', but got {got!r}. Only LoRA adapters load here.")
    for key in _SUPPORTED_ONLY_EMPTY:
        if raw.get(key):
            raise ValueError(f"`{key}` must be unset, but got {raw[key]!r}. It is not supported here.")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"`bias` must be 'none', but got {raw['bias']!r}. It is not supported here.")
    try:
        return _convert(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"It must be a whole LoRA configuration, but got {error!r}. Save the adapter again."
        ) from error


def _convert(raw: Mapping[str, Any]) -> LoraConfig:
    targets = raw["target_modules"]
    if isinstance(targets, str):
        targets = targets if targets == ALL_LINEAR else f"{REGEX_PREFIX}{targets}"
    else:
        targets = tuple(sorted(targets))
    return LoraConfig(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        scaling="alpha_over_sqrt_rank" if raw.get("use_rslora") else "alpha_over_rank",
        targets=targets,
        dropout=float(raw.get("lora_dropout", 0.0)),
    )


def config_to_peft(layers: Mapping[str, LoraLinear], model: nn.Module, *, base_path: str) -> dict[str, Any]:
    """What PEFT needs to build these layers in the base model that is found at `base_path`."""
    config = next(iter(layers.values())).config
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "target_modules": _peft_targets(model, layers),
        "use_rslora": config.scaling == "alpha_over_sqrt_rank",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _peft_targets(model: nn.Module, layers: Mapping[str, LoraLinear]) -> list[str]:
    """Last parts of the layers' names where those mean exactly these layers to PEFT, else the whole names."""
    endings = sorted({name.rpartition(".")[2] for name in layers})
    inner = tuple(f"{name}." for name in layers)
    others = [name for name, _ in model.named_modules() if name not in layers and not name.startswith(inner)]
    clash = any(is_name_ending(ending, name) for name in others for ending in endings)
    return sorted(layers) if clash else endings
