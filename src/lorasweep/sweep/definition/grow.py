"""Grows a sweep that has begun: more trials, more arms. Settings that change its trials must stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorasweep.config.build import as_settings
from lorasweep.config.compose import dotted_items
from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError
from lorasweep.record import SweepChange
from lorasweep.sweep.definition.arms import Arm, Definition, Round, make_paths_absolute, restore_definition
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

    If `list_grown_arms` finds an arm afterwards, the definition needs one more round (`add_round`).

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
    raw = make_paths_absolute(
        {"file": old.raw["file"] if content is None else content, "overrides": {**overrides, **changes}}
    )
    new = restore_definition({**raw, "rounds": old.raw["rounds"]}, source=old.source if content is None else source)
    _check_arms(old, new)
    return new


def add_round(definition: Definition, *, trials: Mapping[str, int], confirm_seeds: int) -> Definition:
    """Returns the definition with one more round; the arguments are the fields of `Round`."""
    ended = Round(trials=dict(trials), confirm_seeds=confirm_seeds)
    raw = {**definition.raw, "rounds": [*definition.raw["rounds"], asdict(ended)]}
    return replace(definition, raw=raw, rounds=(*definition.rounds, ended))


def list_grown_arms(old: Definition, new: Definition) -> dict[str, int]:
    """Returns the number of trials of each arm that is new or has more trials."""
    before = {arm.name: arm.trials for arm in old.arms}
    return {arm.name: arm.trials for arm in new.arms if arm.trials != before.get(arm.name)}


def describe_growth(change: SweepChange) -> list[str]:
    """Returns a sentence if the sweep got more trials or arms."""
    if not change.trials:
        return []
    grown = join_words([f"{count} trials of `{name}`" for name, count in change.trials.items()])
    return [f"The sweep grew to {grown} at {change.at}, in the stage `{change.stage}`."]


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
    if missing := [name for name in names if name not in arms]:
        raise ConfigError(
            f"a sweep that has begun must keep its arms, but `{missing[0]}` is missing in {', '.join(arms)}. "
            "Add arms after it, or start a new sweep."
        )
    if (order := [name for name in arms if name in names]) != names:
        raise ConfigError(
            f"a sweep that has begun must keep the order of its arms ({', '.join(names)}), but got {', '.join(order)}."
        )
    for arm in old.arms:
        grown = arms[arm.name]
        for key, before, after in _list_differences(arm, grown):
            raise ConfigError(
                f"arm `{arm.name}`: `{key}` must stay {before!r}, because its trials have begun, but got {after!r}. "
                "Start a new sweep, or add a new arm with the other value."
            )
        if grown.trials < arm.trials:
            raise ConfigError(
                f"`arms.{arm.name}.trials >= {arm.trials}` must hold, because the sweep has that many, "
                f"but got {grown.trials}. Start a new sweep for fewer trials."
            )


def _list_differences(old: Arm, new: Arm) -> Iterator[tuple[str, Any, Any]]:
    """Yields each setting that differs and that changes trials: its key, its old value and its new value."""
    swept = dict.fromkeys([*old.space, *new.space])
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        (_describe_values(old, swept), _describe_values(new, swept)),
        (_list_sweep_settings(old), _list_sweep_settings(new)),
        *zip(map(_list_run_settings, old.corner_configs), map(_list_run_settings, new.corner_configs), strict=False),
    )
    for before, after in pairs:
        for key in dict.fromkeys([*before, *after]):
            if before.get(key, MISSING) != after.get(key, MISSING):
                yield key, before.get(key, MISSING), after.get(key, MISSING)


def _describe_values(arm: Arm, keys: Iterable[str]) -> dict[str, Any]:
    """Returns for each key its range in the arm's space, or else its value."""
    values = {**_list_run_settings(arm.corner_configs[0]), **describe_space(arm.space)}
    return {key: values.get(key, MISSING) for key in keys}


def _list_sweep_settings(arm: Arm) -> dict[str, Any]:
    return {
        key: value
        for key, value in _flatten(as_settings(arm.sweep_config)).items()
        if key.split(".")[0] not in CHANGEABLE_GROUPS and key not in CHANGEABLE_KEYS
    }


def _list_run_settings(config: RunConfig) -> dict[str, Any]:
    return _flatten(as_settings(config))


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings by dotted keys, without the mappings themselves."""
    return {key: value for key, value in dotted_items(settings) if not isinstance(value, Mapping)}
