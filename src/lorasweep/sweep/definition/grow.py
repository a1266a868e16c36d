"""Grows a sweep that has begun: more trials, arms or seeds. Settings on which its trials depend must stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorasweep.config.build import as_settings
from lorasweep.config.compose import dotted_items
from lorasweep.config.method import ALPHA_OVER_RANK
from lorasweep.errors import ConfigError
from lorasweep.record import SweepChange
from lorasweep.sweep.definition.arms import Arm, Definition, make_paths_absolute, restore_definition
from lorasweep.sweep.definition.sweep_file import describe_space
from lorasweep.wording import join_words

CHANGEABLE_KEYS = ("sweep.trials", "sweep.output", "confirm.seeds", "confirm.looks")
"""Settings that change no trial that has begun, beside those of `worker`. Numbers of trials and seeds are checked
separately."""
MISSING = "nothing"
"""Shown in messages in place of a setting that is missing."""


def grow_definition(old: Definition, *, changes: Mapping[str, Any]) -> Definition:
    """Returns the definition of a sweep that has begun, with changes such as `{"arms.lora.trials": 20}` applied.

    Raises:
        ConfigError: A key is wrong, or a trial that has begun would change.
    """
    if not changes:
        return old
    overrides = old.raw["overrides"]
    if "worker" in changes:  # the new kind of workers may not have the old kind's settings
        overrides = {key: value for key, value in overrides.items() if key.split(".")[0] != "worker"}
    raw = {"file": old.raw["file"], "overrides": {**overrides, **changes}}
    new = restore_definition(make_paths_absolute(raw), source=old.source)
    _check_arms(old, new)
    return new


def list_grown_arms(old: Definition, new: Definition) -> dict[str, int]:
    """Returns the number of trials of each arm that is new or has more trials."""
    before = {arm.name: arm.trials for arm in old.arms}
    return {arm.name: arm.trials for arm in new.arms if arm.trials != before.get(arm.name)}


def warn_of_late_growth(changes: Sequence[SweepChange]) -> list[str]:
    """Returns a warning if the sweep got more trials, arms or seeds after the confirm stage had begun."""
    late = [change for change in changes if change.stage == "confirm"]
    grown = [f"trials of `{name}`" for change in late for name in change.trials]
    grown += ["seeds" for change in late if {"confirm.seeds", "confirm.looks"} & change.settings.keys()]
    if not grown:
        return []
    return [
        f"The sweep got more {join_words(list(dict.fromkeys(grown)))} up to {late[-1].at}, after test scores were "
        "known. Settings are still chosen on validation data alone. But if you went on because of test scores, the "
        "chance of a false verdict is higher than 5 %."
    ]


def _check_arms(old: Definition, new: Definition) -> None:
    """Raises ConfigError unless every old arm is there, with the settings of its trials."""
    arms = {arm.name: arm for arm in new.arms}
    for arm in old.arms:
        if arm.name not in arms:
            raise ConfigError(f"a sweep that has begun must keep its arm `{arm.name}`. Start a new sweep without it.")
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
        and not key.startswith("worker.")
    }
