"""α by its multiplier α/r: a sweep file's `method.alpha: {over_rank: ...}` is the key `method.alpha_over_rank`.

The multiplier is what a sweep fixes or searches; a run gets `method.alpha` = multiplier × `method.rank`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lorasweep.config.compose import compose_run
from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError

ALPHA = "method.alpha"
MULTIPLIER = "method.alpha_over_rank"
WORD = "over_rank"


def spell_out(settings: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Returns settings in which `method.alpha: {over_rank: X}` has become `method.alpha_over_rank: X`.

    Args:
        settings: Dotted keys, with or without an arm's name before them.
        where: The part of a sweep file that they stand in, for messages.

    Raises:
        ConfigError: α and its multiplier are both given, or `over_rank` does not stand alone.
    """
    spelled: dict[str, Any] = {}
    for key, value in settings.items():
        is_rule = key.endswith(ALPHA) and isinstance(value, Mapping) and WORD in value
        if is_rule and len(value) > 1:
            raise ConfigError(f"`{WORD}` must stand alone in `{key}` of `{where}`, but got {dict(value)!r}.")
        name = f"{key.removesuffix(ALPHA)}{MULTIPLIER}" if is_rule else key
        if name in spelled:
            raise ConfigError(f"`{name}` must be given once in `{where}`, but is given twice.")
        spelled[name] = value[WORD] if is_rule else value
    for key in spelled:
        if key.endswith(MULTIPLIER) and f"{key.removesuffix(MULTIPLIER)}{ALPHA}" in spelled:
            raise ConfigError(f"`{where}` must have `{ALPHA}` or its multiplier α/r, but has both. Leave one out.")
    return spelled


def lay_over(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings given in layers, of which later ones win; α and its multiplier replace each other."""
    layered: dict[str, Any] = {}
    for layer in layers:
        layered = {**drop_rivals(layered, layer), **layer}
    return layered


def drop_rivals(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the lower settings without α where the upper ones give its multiplier, and without that where α."""
    rivals = {rival(key) for key in upper} - set(upper)
    return {key: value for key, value in lower.items() if key not in rivals}


def rival(key: str) -> str:
    """Returns the key that says the same thing in another way, else the key itself."""
    return {ALPHA: MULTIPLIER, MULTIPLIER: ALPHA}.get(key, key)


def compose_scaled(settings: Mapping[str, Any]) -> RunConfig:
    """Returns the settings of one run, α worked out where its multiplier is given; arguments as in `compose_run`.

    Raises:
        ConfigError: A key or value is wrong, or the multiplier does not fit the other settings.
    """
    plain = {key: value for key, value in settings.items() if key != MULTIPLIER}
    config = compose_run(plain)
    if MULTIPLIER not in settings:
        return config
    multiplier, method = settings[MULTIPLIER], config.method
    if not isinstance(method, LoraConfig):
        raise ConfigError(f"`{MULTIPLIER}` is a setting of `method=lora`, but got it with `method={method.name}`.")
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or not 0 <= multiplier < math.inf:
        raise ConfigError(f"`{MULTIPLIER}` must be a finite number >= 0, but got {multiplier!r}.")
    if method.rank_pattern:
        raise ConfigError(
            f"`method.rank_pattern` must be empty with `{MULTIPLIER}`, which knows one rank, "
            f"but got {dict(method.rank_pattern)!r}. Give `method.alpha` and `method.alpha_pattern`."
        )
    return dataclasses.replace(config, method=dataclasses.replace(method, alpha=float(multiplier * method.rank)))
