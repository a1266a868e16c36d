"""Arms by expansion: `expand: {method.rank: [1, 4]}` makes one arm per value, each with its own search and budget.

Comes after `sweep_file`, before `definition`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lorasweep.config.sweep import ArmConfig, SweepFile
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.scaling import lay_over, rival, spell_out

MAX_ARMS = 1000


def expand_arms(file: SweepFile, overrides: Mapping[str, Any], *, used: set[str]) -> list[ArmConfig]:
    """Returns the arms of a sweep file, those with `expand` once per combination of its values.

    Args:
        file: The sweep file.
        overrides: The command line's; `arms.ARM.expand.KEY` gives other values to expand over.
        used: Overrides that have found their arm; those used here are added.

    Raises:
        ConfigError: A key has no values, is also searched, or two arms get the same name.
    """
    arms = [arm for written in file.arms for arm in _expand(_with_overrides(written, overrides, used=used))]
    seen: set[str] = set()
    for arm in arms:
        if arm.name in seen:
            raise ConfigError(f"arms must have different names, but two are called {arm.name!r}. Rename one.")
        seen.add(arm.name)
    return arms


def own_overrides(
    arm: ArmConfig, overrides: Mapping[str, Any], *, used: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what the command line says about an arm's whole expansion, and about it alone, by key.

    `arms.lora.KEY` reaches every arm that `lora` was expanded to, `arms.lora-rank4.KEY` one of them.

    Raises:
        ConfigError: It sets what the arm was expanded over.
    """
    of_family, own = (_overrides_of(name, arm, overrides, used=used) for name in (arm.expanded_from, arm.name))
    return of_family, own


def _overrides_of(name: str | None, arm: ArmConfig, overrides: Mapping[str, Any], *, used: set[str]) -> dict[str, Any]:
    prefix = f"arms.{name}."
    found = {key.removeprefix(prefix): value for key, value in overrides.items() if key.startswith(prefix)}
    found = {key: value for key, value in found.items() if not key.startswith("expand.")}
    used |= {prefix + key for key in found}
    for key in found:
        refuse_expanded(arm, key, written=prefix + key)
    return found


def refuse_expanded(arm: ArmConfig, key: str, *, written: str) -> None:
    """Raises ConfigError where an override sets what tells an arm from the others of its expansion."""
    if key in arm.expanded or rival(key) in arm.expanded:
        raise ConfigError(
            f"`{written}` must be left out, because arm `{arm.expanded_from}` is expanded over it. "
            f"Write `arms.{arm.expanded_from}.expand.{key}=[..]` for other values."
        )


def _with_overrides(arm: ArmConfig, overrides: Mapping[str, Any], *, used: set[str]) -> ArmConfig:
    prefix = f"arms.{arm.name}.expand."
    own = {key.removeprefix(prefix): value for key, value in overrides.items() if key.startswith(prefix)}
    used |= {prefix + key for key in own}
    return dataclasses.replace(arm, expand=lay_over(arm.expand, own)) if own else arm


def _expand(arm: ArmConfig) -> Iterator[ArmConfig]:
    if not arm.expand:
        yield arm
        return
    where = f"arms.{arm.name}.expand"
    for key, values in arm.expand.items():
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"`{where}.{key}` must be a list with at least one value, but got {values!r}.")
        if key in arm.space or rival(key) in arm.space:
            raise ConfigError(f"`{key}` must be in `expand` or in `space` of arm `{arm.name}`, but is in both.")
    if (count := math.prod(map(len, arm.expand.values()))) > MAX_ARMS:
        raise ConfigError(f"`{where}` must make at most {MAX_ARMS} arms, but makes {count:,}.")
    for combination in itertools.product(*arm.expand.values()):
        expanded = spell_out(dict(zip(arm.expand, combination, strict=True)), where=where)
        labels = [describe_value(key, value) for key, value in expanded.items()]
        yield dataclasses.replace(
            arm,
            name="-".join([arm.name, *labels]),
            expand={},
            expanded_from=arm.name,
            expanded=expanded,
        )


def describe_value(key: str, value: Any) -> str:
    """Returns a value as part of an arm's name: `rank4`, `alpha_over_rank0_5`, `targets_q_proj_v_proj`."""
    name = key.rpartition(".")[2]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return name + re.sub(r"[^0-9A-Za-z-]", "_", str(value) if isinstance(value, int) else f"{value:g}")
    words = value if isinstance(value, list | tuple) else [value]
    return "_".join([name, *(re.sub(r"[^0-9A-Za-z-]+", "_", str(word)).strip("_") for word in words)])
