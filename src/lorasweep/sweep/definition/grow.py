"""Grows a sweep that has begun: more trials, arms or seeds. Settings on which its trials depend must stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasweep.config.build import as_settings
from lorasweep.config.compose import dotted_items
from lorasweep.config.method import ALPHA_OVER_RANK
from lorasweep.errors import ConfigError
from lorasweep.record import SweepChange
from lorasweep.sweep.definition.arms import Arm, Definition, make_paths_absolute, restore_definition
from lorasweep.sweep.definition.space import describe_space
from lorasweep.wording import join_words

CHANGEABLE_GROUPS = ("worker", "confirm")
"""Groups of a sweep's settings that change no trial of the search. `reopen_sweep` checks those of `confirm`."""
CHANGEABLE_KEYS = ("sweep.trials", "sweep.output")
"""Settings that change no trial that has begun. The numbers of trials are checked separately."""
MISSING = "nothing"
"""Shown in messages in place of a setting that is missing."""


def grow_definition(
    old: Definition, *, changes: Mapping[str, Any], content: Any = None, source: Path | None = None
) -> Definition:
    """Returns the definition of a sweep that has begun, with changes applied.

    Args:
        old: The sweep's definition so far.
        changes: Overrides, such as `{"arms.lora.trials": 20}`.
        content: The content of a sweep file that replaces the earlier one; None keeps the earlier one.
        source: The path of that file.

    Raises:
        ConfigError: A key is wrong, or a trial that has begun would change.
    """
    if not changes and content is None:
        return old
    overrides = old.raw["overrides"]
    if "worker" in changes:  # the new kind of workers may not have the old kind's settings
        overrides = {key: value for key, value in overrides.items() if key.split(".")[0] != "worker"}
    raw = {"file": old.raw["file"] if content is None else content, "overrides": {**overrides, **changes}}
    new = restore_definition(make_paths_absolute(raw), source=old.source if content is None else source)
    _check_arms(old, new)
    return new


def list_grown_arms(old: Definition, new: Definition) -> dict[str, int]:
    """Returns the number of trials of each arm that is new or has more trials."""
    before = {arm.name: arm.trials for arm in old.arms}
    return {arm.name: arm.trials for arm in new.arms if arm.trials != before.get(arm.name)}


def warn_of_late_growth(change: SweepChange) -> list[str]:
    """Returns a warning if the sweep got more trials or arms after the confirm stage had begun."""
    if not change.trials or change.stage != "confirm":
        return []
    grown = join_words([f"`{name}`" for name in change.trials])
    return [
        f"The search of {grown} grew at {change.at}, after winners had been scored on test data. Winners are chosen on "
        "validation data only. But if you searched on because of scores on test data, verdicts are less certain than "
        "they say."
    ]


def _check_arms(old: Definition, new: Definition) -> None:
    """Raises ConfigError unless every old arm is there, in the old order, with the settings of its trials."""
    if new.name != old.name:
        raise ConfigError(f"`name` must stay {old.name!r} in a sweep that has begun, but got {new.name!r}.")
    arms = {arm.name: arm for arm in new.arms}
    names = [arm.name for arm in old.arms]
    if [name for name in arms if name in names] != names:
        raise ConfigError(
            f"a sweep that has begun must keep its arms ({', '.join(names)}) in their order, but got "
            f"{', '.join(arms)}. Add arms after them, or start a new sweep."
        )
    for arm in old.arms:
        before, after = _list_settings(arm), _list_settings(arms[arm.name])
        for key in dict.fromkeys([*before, *after]):
            if (value := after.get(key, MISSING)) != (kept := before.get(key, MISSING)):
                raise ConfigError(
                    f"arm `{arm.name}`: `{key}` must stay {kept!r}, because its trials have begun, but got {value!r}. "
                    "Start a new sweep, or add a new arm with the other value."
                )
        if arms[arm.name].trials < arm.trials:
            raise ConfigError(
                f"`arms.{arm.name}.trials >= {arm.trials}` must hold, because the sweep has that many, "
                f"but got {arms[arm.name].trials}. Start a new sweep for fewer trials."
            )


def _list_settings(arm: Arm) -> dict[str, Any]:
    """Returns all settings on which an arm's trials depend by dotted key, the ranges of swept keys first."""
    settings = {**as_settings(arm.corner_configs[0]), **as_settings(arm.sweep_config)}
    multiplier = (ALPHA_OVER_RANK, arm.settings.get(ALPHA_OVER_RANK))  # the first run has only the α of its rank
    return describe_space(arm.space) | {
        key: value
        for key, value in (multiplier, *dotted_items(settings))
        if not isinstance(value, Mapping)
        and key not in (*arm.space, *CHANGEABLE_KEYS)
        and key.split(".")[0] not in CHANGEABLE_GROUPS
    }
