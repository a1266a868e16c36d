"""Converts PEFT's settings to those of `LoraConfig`, without a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from lorasweep.config.components import require_package
from lorasweep.errors import ConfigError
from lorasweep.wording import join_words

ALL_LINEAR_PATTERN = "all-linear"
REGEX_PREFIX = "re:"
PLAIN_NAME = re.compile(r"\w+(\.\w+)*")
"""A layer's name or its end. It matches the same layers, whether it is read as a name or as a regular expression."""
INITS: Mapping[Any, str] = {True: "default", "gaussian": "gaussian", "orthogonal": "orthogonal", "pissa": "pissa"}
"""`LoraConfig.init` for each value of PEFT's `init_lora_weights`."""
# fmt: off
CONVERTED_FIELDS = frozenset({
    "r", "lora_alpha", "use_rslora", "target_modules", "lora_dropout", "init_lora_weights", "use_dora", "rank_pattern",
    "alpha_pattern", "exclude_modules", "layers_to_transform", "modules_to_save",
})
"""Fields of PEFT's `LoraConfig` that `convert_from_peft` and `read_peft_config` read."""
FIELDS_WITHOUT_EFFECT = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "runtime_config", "megatron_core", "qalora_group_size",
})
# fmt: on
"""Fields of PEFT's `LoraConfig` that say where an adapter belongs, follow from the model (`fan_in_fan_out`), or act
only with another field that is refused. All other fields must be empty."""


def import_peft(*, needed_by: str) -> Any:
    """Returns the package PEFT. Raises ConfigError if it is not installed."""
    require_package("peft", key=needed_by, extra="peft")
    return import_module("peft")


def read_peft_config(peft_config: Any) -> dict[str, Any]:
    """Converts a `peft.LoraConfig` to settings by field of our `LoraConfig`; errors as in `LoraConfig.from_peft`."""
    values = peft_config.to_dict()
    init = values.get("init_lora_weights")
    is_known = isinstance(init, str) or init is True  # 1 == True, but is no setting
    ours = INITS.get(init) if is_known else None
    refuse_unsupported_fields(values, also=() if ours or "init_lora_weights" not in values else ("init_lora_weights",))
    if not values["target_modules"]:
        raise ConfigError(
            f"`target_modules` must name layers, but got {values['target_modules']!r}, for which PEFT looks up the "
            "kind of the model. Use `all-linear`, or a list of names."
        )
    return convert_from_peft(values) | {"init": ours}


def refuse_unsupported_fields(values: Mapping[str, Any], *, also: Iterable[str] = ()) -> None:
    """Raises ConfigError if PEFT's settings are not those of LoRA, or have fields that lorasweep's layers can't do.

    If lorasweep ignored such a field, the model would compute other outputs. `also` has fields with unsupported values.
    """
    kind = getattr(values.get("peft_type"), "value", values.get("peft_type"))
    if kind != "LORA":
        raise ConfigError(
            f"`peft_type` must be LORA, but got {kind!r}. "
            f"Train it with `method=peft method.config={{peft_type: {kind}}}`."
        )
    known = CONVERTED_FIELDS | FIELDS_WITHOUT_EFFECT
    # PEFT's defaults of all other fields are empty, except the text "none" of `bias`
    refused = [name for name, value in values.items() if name not in known and value and value != "none"]
    if named := [*refused, *also]:
        given = join_words([f"`{name}` {values[name]!r}" for name in named])
        raise ConfigError(
            f"PEFT's settings must have only fields that lorasweep's LoRA layers can do, but got {given}. Use the "
            "default, or train it with `method=peft`."
        )


def convert_from_peft(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Converts PEFT's settings to settings by field of our `LoraConfig`. `init_lora_weights` is left out.

    Raises KeyError, TypeError or AttributeError if a setting is missing or of another type.
    """
    layers, targets = raw.get("layers_to_transform"), raw["target_modules"]
    return {
        "rank": raw["r"],
        "alpha": float(raw["lora_alpha"]),
        "scaling": "alpha_over_sqrt_rank" if raw.get("use_rslora") else "alpha_over_rank",
        "targets": targets if isinstance(targets, str) else tuple(sorted(targets)),
        "dropout": float(raw.get("lora_dropout", 0.0)),
        "variant": "dora" if raw.get("use_dora") else "lora",
        "rank_pattern": {_convert_key(key): rank for key, rank in (raw.get("rank_pattern") or {}).items()},
        "alpha_pattern": {_convert_key(key): alpha for key, alpha in (raw.get("alpha_pattern") or {}).items()},
        "exclude": _list_patterns(raw.get("exclude_modules") or ()),
        "layers": (layers,) if isinstance(layers, int) else tuple(layers or ()),
        "modules_to_save": tuple(raw.get("modules_to_save") or ()),
    }


def int_if_whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _list_patterns(modules: str | Iterable[str]) -> tuple[str, ...]:
    """Returns PEFT's list of names, or its string with a regular expression, as patterns."""
    return (f"{REGEX_PREFIX}{modules}",) if isinstance(modules, str) else tuple(sorted(modules))


def _convert_key(key: str) -> str:
    """Converts a key of PEFT's rank or alpha pattern. PEFT compares the key with the end of a layer's name."""
    return key if PLAIN_NAME.fullmatch(key) else rf"{REGEX_PREFIX}(.*\.)?({key})"
