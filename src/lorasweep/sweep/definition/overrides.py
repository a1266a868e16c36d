"""Layers of settings and ranges, of which a definition is made: their merge, and those that a user types."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from lorasweep.config.build import TARGET, Positive, convert
from lorasweep.config.compose import SWEEP_GROUPS, default_options, is_hydra_override, merge_settings
from lorasweep.config.run import DECLARED_TYPES
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.ranges import Range, Space
from lorasweep.sweep.definition.sweep_file import ArmConfig, SweepFile
from lorasweep.wording import suggest_nearest

ARM_FIELDS: Mapping[str, Any] = {"trials": Positive | None, "confirm_each": str | None}
"""Types of the fields of an arm that overrides set as `arms.ARM.FIELD`."""
Layer: TypeAlias = Mapping[str, Any]
"""Dotted keys, each with its value or with the `Range` in which it is searched."""


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """The overrides that a user typed for a sweep, by what they change."""

    raw: Mapping[str, Any]
    """Dotted keys with values, lists of choices and mappings of bounds."""
    common: Layer
    """The settings and ranges of all arms."""
    own: Mapping[str, Layer]
    """The settings and ranges of one arm (`arms.NAME.KEY`), by its name."""
    fields: Mapping[str, Mapping[str, Any]]
    """The `ARM_FIELDS` of one arm, by its name."""
    left_out: Collection[str]
    """The arms that `arms.NAME=null` leaves out."""
    added: Mapping[str, ArmConfig]
    """The arms that `arms.NAME={settings: ..., space: ...}` adds."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Overrides:
        """Returns overrides from the keys and values of `config.command_line.parse_overrides`.

        Raises:
            ConfigError: A key is no override of a sweep, or a range is wrong.
        """
        common: dict[str, Any] = {}
        own: dict[str, dict[str, Any]] = {}
        fields: dict[str, dict[str, Any]] = {}
        left_out, added = set[str](), dict[str, ArmConfig]()
        for name, content in raw.items():
            if is_hydra_override(name):
                raise ConfigError(
                    f"a sweep's override must read `key=value`, but got {name!r}. `+` and `~` are for `lorasweep "
                    "train`; write a value, an option such as `logger=none`, or `arms.ARM=null` to leave out an arm."
                )
            match name.split(".", 2):
                case ["arms", arm] if content is None:
                    left_out.add(arm)
                case ["arms", arm] if isinstance(content, Mapping):
                    added[arm] = convert(ArmConfig, content, key=name)
                case ["arms", _]:
                    raise ConfigError(
                        f"`{name}` must be null, which leaves out an arm of the sweep file, or a new arm such as "
                        f"`{{settings: {{method: full}}}}`, but got {content!r}. Set one key with `{name}.KEY=VALUE`."
                    )
                case ["arms", arm, key] if key in ARM_FIELDS:
                    fields.setdefault(arm, {})[key] = convert(ARM_FIELDS[key], content, key=name)
                case ["arms", arm, key]:
                    is_group = "." in key or key in default_options("train")
                    if not is_group and (near := suggest_nearest(key, ARM_FIELDS)):
                        raise ConfigError(f"`{name}` is not a setting of an arm.{near}")
                    own.setdefault(arm, {})[key] = _parse_content(key, content)
                case _:
                    common[name] = _parse_content(name, content)
        return cls(raw=raw, common=common, own=own, fields=fields, left_out=left_out, added=added)

    @property
    def values(self) -> Layer:
        """The settings of all arms without the ranges."""
        return {key: value for key, value in self.common.items() if not isinstance(value, Range)}

    def change_arms(self, file: SweepFile) -> SweepFile:
        """Returns a sweep file without the arms that are left out, and with those that are added.

        Raises:
            ConfigError: An arm that is left out is not in the file, one that is added is, or no arm remains.
        """
        if known := [name for name in self.added if name in file.arms]:
            raise ConfigError(
                f"`arms.{known[0]}={{...}}` must name a new arm, but the sweep file has it. Set one key with "
                f"`arms.{known[0]}.KEY=VALUE`."
            )
        for name in self.left_out:
            if name not in file.arms:
                raise ConfigError(
                    f"`arms.{name}=null` must leave out an arm of the sweep file ({', '.join(file.arms)}), but it has "
                    f"no such arm.{suggest_nearest(f'arms.{name}', [f'arms.{one}' for one in file.arms])}"
                )
        arms = {name: arm for name, arm in {**file.arms, **self.added}.items() if name not in self.left_out}
        if not arms:
            raise ConfigError("a sweep must have at least one arm, but `arms.ARM=null` leaves out all. Keep one.")
        return replace(file, arms=arms)


def _parse_content(key: str, content: Any) -> Any:
    """Returns a value or a range. The declared type of the setting decides, or else the form of the content.

    A list, or a mapping with `low` or `high`, is a range. It is a value if the setting is declared as a list or a
    mapping, such as `method.targets` and `logger`. A setting of the sweep itself is always a value, because no search
    changes it.
    """
    has_form_of_range = isinstance(content, list) or (
        isinstance(content, Mapping) and not {"low", "high"}.isdisjoint(content) and TARGET not in content
    )
    is_value = key.split(".")[0] in SWEEP_GROUPS or not {tuple, Mapping}.isdisjoint(DECLARED_TYPES.get(key, ()))
    return content if is_value or not has_form_of_range else Range.parse(key, content)


def merge_layers(layers: Iterable[Layer]) -> tuple[dict[str, Any], Space]:
    """Returns the settings, and the ranges of the swept keys, that layers give. Later layers win.

    A value ends the search of its key, and of keys above and below it. A range replaces the values of its key and of
    keys below it. A group's option, such as `optim=sgd`, and the ranges of the group's keys do not replace each other.
    """
    settings: dict[str, Any] = {}
    space: Space = {}
    for layer in layers:
        ranges = {key: content for key, content in layer.items() if isinstance(content, Range)}
        values = {key: content for key, content in layer.items() if key not in ranges}
        merged = merge_settings(settings, values)
        settings = {key: value for key, value in merged.items() if not any(_covers(swept, key) for swept in ranges)}
        ended = {key for key in space if any(_covers(other, key) or _covers(key, other) for other in layer)}
        # a key whose range is replaced stays in its place, because samplers see the keys in their order
        space = {key: range_ for key, range_ in space.items() if key not in ended - ranges.keys()} | ranges
    return settings, space


def _covers(key: str, other: str) -> bool:
    """Returns whether a key equals another key or is above it. A group, such as `optim`, is above none."""
    return key == other or ("." in key and other.startswith(f"{key}."))
