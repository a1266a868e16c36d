"""Sets α by its multiplier α/r: `method.alpha: {over_rank: ...}` in a sweep file is the key `method.alpha_over_rank`.

A sweep fixes or searches the multiplier. Each run gets `method.alpha` = multiplier × `method.rank`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorasweep.config.compose import compose_run
from lorasweep.config.method import LoraConfig
from lorasweep.config.ranges import is_number
from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError

ALPHA = "method.alpha"
MULTIPLIER = "method.alpha_over_rank"
OVER_RANK = "over_rank"


def spell_out_multiplier(settings: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Returns settings in which `method.alpha: {over_rank: X}` has become `method.alpha_over_rank: X`.

    `where` is the part of the sweep file that has the settings. It is used in messages.

    Raises:
        ConfigError: α and its multiplier are both given, or `over_rank` has other keys beside it.
    """
    spelled: dict[str, Any] = {}
    for key, value in settings.items():
        if key.endswith(ALPHA) and isinstance(value, Mapping) and OVER_RANK in value:
            if len(value) > 1:
                raise ConfigError(f"`{OVER_RANK}` must be the only key in `{key}` of `{where}`, but got {value!r}.")
            key, value = key.removesuffix(ALPHA) + MULTIPLIER, value[OVER_RANK]
        spelled[key] = value
    prefixes = {key.removesuffix(MULTIPLIER) for key in spelled if key.endswith(MULTIPLIER)}
    if len(spelled) < len(settings) or any(prefix + ALPHA in spelled for prefix in prefixes):
        raise ConfigError(f"`{where}` must have `{ALPHA}` or its multiplier α/r, but has both. Remove one of them.")
    return spelled


def merge_layers(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of all layers. Later layers win; α also replaces its multiplier, and vice versa."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = {**drop_rival_keys(merged, layer), **layer}
    return merged


def drop_rival_keys(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the lower layer without α if the upper layer has the multiplier, and vice versa."""
    rivals = {get_rival_key(key) for key in upper} - set(upper)
    return {key: value for key, value in lower.items() if key not in rivals}


def get_rival_key(key: str) -> str:
    """Returns the multiplier's key for α's key and vice versa. For any other key it returns that key."""
    return {ALPHA: MULTIPLIER, MULTIPLIER: ALPHA}.get(key, key)


def compose_with_multiplier(settings: Mapping[str, Any]) -> RunConfig:
    """Returns the settings of one run, as `compose_run` does. If the multiplier is set, α is computed from it.

    Raises:
        ConfigError: A key or value is wrong, or the multiplier does not fit the other settings.
    """
    config = compose_run({key: value for key, value in settings.items() if key != MULTIPLIER})
    if MULTIPLIER not in settings:
        return config
    multiplier, method = settings[MULTIPLIER], config.method
    if not isinstance(method, LoraConfig):
        raise ConfigError(f"`{MULTIPLIER}` is a setting of `method=lora`, but got it with `method={method.name}`.")
    if not is_number(multiplier) or multiplier < 0:
        raise ConfigError(f"`{MULTIPLIER}` must be a finite number >= 0, but got {multiplier!r}.")
    if method.rank_pattern:
        raise ConfigError(
            f"`method.rank_pattern` must be empty with `{MULTIPLIER}`, which needs one rank for all layers, "
            f"but got {dict(method.rank_pattern)!r}. Give `method.alpha` and `method.alpha_pattern`."
        )
    return dataclasses.replace(config, method=dataclasses.replace(method, alpha=float(multiplier * method.rank)))
