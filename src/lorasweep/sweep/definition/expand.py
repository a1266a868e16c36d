"""Lists the arms of a sweep: `expand: {method.rank: [1, 4]}` creates one arm per value, each with its own search."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.alpha_over_rank import get_rival_key, merge_layers, spell_out_multiplier
from lorasweep.sweep.definition.sweep_file import ArmConfig, SweepFile

MAX_EXPANDED_ARMS = 1000
"""Maximum number of arms that one `expand` creates. Each is composed before the sweep starts."""


@dataclass(frozen=True, kw_only=True)
class ExpandedArm:
    """An arm of a sweep file, or one of the arms that its `expand` creates (fields as in `Arm`)."""

    name: str
    config: ArmConfig
    expanded_from: str | None = None
    expanded: Mapping[str, Any] = field(default_factory=dict)


def expand_arms(file: SweepFile, overrides: Mapping[str, Any], *, used_keys: set[str]) -> list[ExpandedArm]:
    """Returns the arms of a sweep file. An arm with `expand` appears once per combination of its values.

    The override `arms.ARM.expand.KEY` replaces the values of KEY. Keys of such overrides are added to `used_keys`.

    Raises:
        ConfigError: A key has no values or is also swept, or two arms have the same name.
    """
    arms: dict[str, ExpandedArm] = {}
    for name, config in file.arms.items():
        prefix = f"arms.{name}.expand."
        typed = {key.removeprefix(prefix): value for key, value in overrides.items() if key.startswith(prefix)}
        used_keys |= {prefix + key for key in typed}
        for arm in _expand(name, config, merge_layers(config.expand, typed)):
            if arm.name in arms:
                raise ConfigError(f"arms must have different names, but two are called {arm.name!r}. Rename one.")
            arms[arm.name] = arm
    return list(arms.values())


def get_arm_overrides(arm: ExpandedArm, overrides: Mapping[str, Any], *, used_keys: set[str]) -> list[dict[str, Any]]:
    """Returns the overrides for an arm's expansion (`arms.lora.KEY`) and for the arm (`arms.lora-rank4.KEY`), by KEY.

    The full keys of the returned overrides are added to `used_keys`.

    Raises:
        ConfigError: An override sets a key over which the arm is expanded.
    """
    layers: list[dict[str, Any]] = []
    for name in (arm.expanded_from or "", arm.name):
        prefix = f"arms.{name}."
        keys = [key for key in overrides if key.startswith(prefix) and not key.startswith(prefix + "expand.")]
        layers.append({key.removeprefix(prefix): overrides[key] for key in keys})
        used_keys.update(keys)
        refuse_expanded_keys(arm, layers[-1], prefix=prefix)
    return layers


def refuse_expanded_keys(arm: ExpandedArm, keys: Iterable[str], *, prefix: str = "") -> None:
    """Raises ConfigError if the arm is expanded over one of the keys, which the user typed with this prefix."""
    for key in keys:
        if key in arm.expanded or get_rival_key(key) in arm.expanded:
            raise ConfigError(
                f"`{prefix}{key}` must not be set, because arm `{arm.expanded_from}` is expanded over it. "
                f"Write `arms.{arm.expanded_from}.expand.{key}=[..]` for other values."
            )


def _expand(name: str, config: ArmConfig, expand: Mapping[str, Any]) -> Iterator[ExpandedArm]:
    if not expand:
        yield ExpandedArm(name=name, config=config)
        return
    where = f"arms.{name}.expand"
    for key, values in expand.items():
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"`{where}.{key}` must be a list with at least one value, but got {values!r}.")
        if key in config.space or get_rival_key(key) in config.space:
            raise ConfigError(f"`{key}` must be in `expand` or in `space` of arm `{name}`, but is in both.")
    if (count := math.prod(map(len, expand.values()))) > MAX_EXPANDED_ARMS:
        raise ConfigError(f"`{where}` must create at most {MAX_EXPANDED_ARMS:,} arms, but has {count:,} combinations.")
    for combination in itertools.product(*expand.values()):
        # one value of `method.alpha` may be a number and the next value a multiplier
        expanded = spell_out_multiplier(dict(zip(expand, combination, strict=True)), where=where)
        labels = [_label(key, value) for key, value in expanded.items()]
        yield ExpandedArm(name="-".join([name, *labels]), config=config, expanded_from=name, expanded=expanded)


def _label(key: str, value: Any) -> str:
    """Returns a value as part of an arm's name: `rank4`, `alpha_over_rank0_5`, `targets_q_proj_v_proj`."""
    name = key.rpartition(".")[2]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return name + re.sub(r"[^0-9A-Za-z-]", "_", str(value) if isinstance(value, int) else f"{value:g}")
    words = value if isinstance(value, list | tuple) else [value]
    return "_".join([name, *(re.sub(r"[^0-9A-Za-z-]+", "_", str(word)).strip("_") for word in words)])
