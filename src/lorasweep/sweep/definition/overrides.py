"""Overrides: settings and ranges that a user types for a sweep, and their fold with those of the sweep file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.config.build import TARGET, Positive, build, convert, list_declared_types
from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import (
    SWEEP_GROUPS,
    compose_options,
    compose_run,
    default_options,
    is_hydra_override,
    merge_settings,
)
from lorasweep.config.run import METHODS_ON_QUANTISED_BASE, RunConfig
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.ranges import Range, Space
from lorasweep.sweep.definition.sweep_file import (
    ArmConfig,
    SweepFile,
    make_paths_absolute,
    name_in_errors,
    require_folder_name,
)
from lorasweep.wording import suggest_nearest

CONFIRM_ENDING = "-confirm"
"""An ending that an arm's name must not have. The folder of a confirm run has the name of its arm, this ending and a
number."""
QUANTIZATION = "model.quantization"
ARM_FIELDS: Mapping[str, Any] = {"trials": Positive | None, "confirm_each": str | None}
"""Types of the fields of an arm that overrides set as `arms.ARM.FIELD`."""
DECLARED = frozenset(list_declared_types(RunConfig))
"""The dotted key of each setting of a run with each of its types. Arguments of other packages' classes are missing."""
DECLARED_KEYS = sorted({key for key, _ in DECLARED})


@dataclass(frozen=True)
class Value:
    """A value that a setting has in every run."""

    content: Any


@dataclass(frozen=True, kw_only=True)
class Override:
    """A value or a range for a setting of one arm, the `scope`, or of all arms (None)."""

    scope: str | None = None
    key: str
    given: Value | Range


@dataclass(frozen=True, kw_only=True)
class SweepOverrides:
    """The overrides that a user typed for a sweep."""

    raw: Mapping[str, Any]
    """Dotted keys with values, lists of choices and mappings of bounds. `parse` returns the same overrides for them."""
    arms: Mapping[str, ArmConfig | None]
    """The arms that `arms.NAME={settings: ...}` adds, and None for those that `arms.NAME=null` leaves out."""
    settings: tuple[Override, ...]

    @classmethod
    def parse(cls, given: Sequence[str] | Mapping[str, Any]) -> SweepOverrides:
        """Returns overrides from arguments of the command line, or from a mapping of dotted keys to values.

        Raises:
            ConfigError: An argument is no override of a sweep, or a range or an arm is wrong.
        """
        raw = make_paths_absolute(parse_overrides(given))
        arms: dict[str, ArmConfig | None] = {}
        settings = []
        for name, content in raw.items():
            if is_hydra_override(name):
                raise ConfigError(
                    f"a sweep's override must read `key=value`, but got {name!r}. `+` and `~` are for `lorasweep "
                    "train`; write a value, an option such as `logger=none`, or `arms.ARM=null` to leave out an arm."
                )
            match name.split(".", 2):
                case ["arms", arm]:
                    arms[arm] = None if content is None else build(ArmConfig, content, key=name)
                case ["arms", arm, key] if key in ARM_FIELDS:
                    value = Value(convert(ARM_FIELDS[key], content, key=name))
                    settings.append(Override(scope=arm, key=key, given=value))
                case ["arms", arm, key]:
                    is_group = "." in key or key in default_options("train")
                    if not is_group and (near := suggest_nearest(key, ARM_FIELDS)):
                        raise ConfigError(f"`{name}` is not a setting of an arm.{near}")
                    settings.append(Override(scope=arm, key=key, given=_parse_content(key, content)))
                case _:
                    settings.append(Override(key=name, given=_parse_content(name, content)))
        return cls(raw=raw, arms=arms, settings=tuple(settings))

    def for_arm(self, name: str | None) -> list[Override]:
        """Returns the overrides that a user typed for this arm; for None, those for all arms."""
        return [override for override in self.settings if override.scope == name]


NO_OVERRIDES = SweepOverrides(raw={}, arms={}, settings=())


@dataclass(frozen=True, kw_only=True)
class ArmSettings:
    """The settings, ranges and budget that the sweep file and the overrides give one arm."""

    name: str
    settings: Mapping[str, Any]
    """Dotted keys and values of its runs and of the sweep, without the swept keys."""
    space: Space
    trials: int | None
    has_own_trials: bool
    """Whether the number is typed for this arm (`arms.ARM.trials`), so that it wins over `sweep.trials`."""
    confirm_each: str | None
    taken: Sequence[Override]
    """The typed overrides that apply to the arm."""


def _parse_content(key: str, content: Any) -> Value | Range:
    """Returns a value or a range. The declared type of the setting decides, or else the form of the content.

    A list, or a mapping with `low` or `high`, is a range. It is a value if the setting is declared as a list or a
    mapping, such as `method.targets` and `logger`. A setting of the sweep itself is always a value, because no search
    changes it.
    """
    has_form_of_range = isinstance(content, list) or (
        isinstance(content, Mapping) and not {"low", "high"}.isdisjoint(content) and TARGET not in content
    )
    is_value = key.split(".")[0] in SWEEP_GROUPS or not DECLARED.isdisjoint([(key, tuple), (key, Mapping)])
    return Value(content) if is_value or not has_form_of_range else _parse_range(key, content)


def _parse_range(key: str, content: Any) -> Range:
    """Returns the range of a setting, in whole numbers if its declared type is `int`. Errors as in `Range.parse`.

    An argument of another package's class has no declared type. It is searched in whole numbers if its bounds are.
    """
    is_whole = isinstance(content, Mapping) and all(isinstance(bound, int) for bound in content.values())
    if key in DECLARED_KEYS:
        is_whole = (key, int) in DECLARED and (key, float) not in DECLARED
    return Range.parse(key, content, is_whole=is_whole)


def fold_sweep(file: SweepFile, overrides: SweepOverrides) -> tuple[dict[str, Any], list[ArmSettings]]:
    """Returns the settings that hold for all arms, and those of each arm, from the sweep file and the overrides.

    Raises:
        ConfigError: A name, a range or an option is wrong, or no arm takes an override.
    """
    common, _ = _fold([_list_overrides(file.settings), overrides.for_arm(None)])
    for name, added in overrides.arms.items():
        if (name in file.arms) is not (added is None):
            key = f"arms.{name}"
            given = overrides.raw[key]
            raise ConfigError(
                f"`{key}` must be the settings of a new arm, or null to leave out an arm of the sweep file "
                f"({', '.join(file.arms)}), but got {'null' if given is None else repr(given)}."
                f"{suggest_nearest(key, [f'arms.{name}' for name in file.arms])} "
                f"Set one key of an arm with `{key}.KEY=VALUE`."
            )
    arms = {name: arm for name, arm in {**file.arms, **overrides.arms}.items() if arm is not None}
    if not arms:
        raise ConfigError("a sweep must have at least one arm, but `arms.ARM=null` leaves out all of them. Keep one.")
    folded = [_fold_arm(name, arm, file, overrides) for name, arm in arms.items()]
    for override in overrides.settings:
        if not any(override in arm.taken for arm in folded):
            key = override.key if override.scope is None else f"arms.{override.scope}.{override.key}"
            raise ConfigError(
                f"`{key}` must be a setting of at least one arm ({', '.join(arms)}), but is not."
                f"{suggest_nearest(key, DECLARED_KEYS)} Write `arms.ARM.KEY=VALUE` for one arm only."
            )
    return common, folded


def _fold_arm(name: str, arm: ArmConfig, file: SweepFile, overrides: SweepOverrides) -> ArmSettings:
    """Returns the settings, ranges and budget that the sweep file and the overrides give an arm.

    Later settings win: the file's, the arm's, the overrides for all arms, then those for this arm (`arms.ARM.KEY`).
    An override for all arms skips an arm whose method lacks the setting. A range skips an arm that searches nothing.
    """
    require_folder_name("an arm's name", name)
    if name.endswith(CONFIRM_ENDING):
        raise ConfigError(f"an arm's name must not end in `{CONFIRM_ENDING}`, but got {name!r}. Rename the arm.")
    for_all = [override for override in overrides.for_arm(None) if arm.space or isinstance(override.given, Value)]
    own = overrides.for_arm(name)
    own_keys = {override.key for override in own}
    if of_sweep := [key for key in (*arm.settings, *own_keys) if key.split(".")[0] in SWEEP_GROUPS]:
        raise ConfigError(
            f"`{of_sweep[0]}` must be set once for the whole sweep, but arm `{name}` sets it; `arms.{name}.trials` "
            "alone may differ."
        )
    with name_in_errors(f"arm `{name}`"):
        of_arm = _list_overrides(arm.settings, arm.space)
        settings, space = _fold([_list_overrides(file.settings), of_arm, for_all, own])
        fields = {key: settings.pop(key) for key in ARM_FIELDS if key in own_keys}
        options = compose_options("train", settings)
    method, model = options["method"], options["model"]
    keys = [override.key for override in for_all]
    lacking = {key for key in keys if key.startswith("method.") and key.split(".")[1] not in method}
    for key in lacking - own_keys:
        settings.pop(key, None)
        space.pop(key, None)
    is_quantised = settings.get(QUANTIZATION, model.get("quantization", "none")) != "none"
    # a quantisation that the arm itself sets stays, and is refused
    is_own = not {"model", QUANTIZATION}.isdisjoint([*arm.settings, *own_keys])
    if is_quantised and not is_own and method.get("name") not in METHODS_ON_QUANTISED_BASE:
        settings[QUANTIZATION] = "none"
    trials = fields.get("trials", None if arm.space and not space else arm.trials)
    if not space and (trials or 1) != 1:
        raise ConfigError(
            f"`arms.{name}.trials` must be 1 for an arm without a space, but got {trials!r}. Add a `space`."
        )
    each = fields.get("confirm_each", arm.confirm_each)
    range_ = space.get(each or "")
    if each and (range_ is None or len(range_.choices) < 2):
        with name_in_errors(f"arm `{name}`"):  # a wrong value of the key is the first cause
            compose_run({k: v for k, v in settings.items() if k.split(".")[0] not in SWEEP_GROUPS}, require_all=False)
        raise ConfigError(
            f"`arms.{name}.confirm_each` must be a swept key with a list of at least two choices, but got {each!r}."
            f"{suggest_nearest(each, space)} Write it in `space`, such as `method.rank: [1, 4, 16]`, or set "
            f"`arms.{name}.confirm_each=null`."
        )
    taken = [*(override for override in for_all if override.key not in lacking), *own]
    return ArmSettings(
        name=name,
        settings=settings,
        space=space,
        trials=trials,
        has_own_trials=fields.get("trials") is not None,
        confirm_each=each,
        taken=taken,
    )


def _list_overrides(settings: Mapping[str, Any], space: Mapping[str, Any] | None = None) -> list[Override]:
    """Returns the settings and the ranges of a part of a sweep file as overrides."""
    values = [Override(key=key, given=Value(value)) for key, value in settings.items()]
    return values + [Override(key=key, given=_parse_range(key, range_)) for key, range_ in (space or {}).items()]


def _fold(layers: Sequence[Sequence[Override]]) -> tuple[dict[str, Any], Space]:
    """Returns the settings, and the ranges of the swept keys, that layers of overrides give. Later layers win.

    A value ends the search of its key, and of keys above and below it. A range replaces the values of its key and of
    keys below it. A group's option, such as `optim=sgd`, and the ranges of the group's keys do not replace each other.
    """
    settings: dict[str, Any] = {}
    space: Space = {}
    for layer in layers:
        values = {override.key: override.given.content for override in layer if isinstance(override.given, Value)}
        ranges = {override.key: override.given for override in layer if isinstance(override.given, Range)}
        merged = merge_settings(settings, values)
        settings = {key: value for key, value in merged.items() if not any(_covers(swept, key) for swept in ranges)}
        changed = [*values, *ranges]
        ended = {key for key in space if any(_covers(other, key) or _covers(key, other) for other in changed)}
        # a key whose range is replaced stays in its place, because samplers see the keys in their order
        space = {key: range_ for key, range_ in space.items() if key not in ended - ranges.keys()} | ranges
    return settings, space


def _covers(key: str, other: str) -> bool:
    """Returns whether a key equals another key or is above it. A group, such as `optim`, is above none."""
    return key == other or ("." in key and other.startswith(f"{key}."))
