"""Frozen dataclasses of settings from nested mappings: every key must be known and every value have its type."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from lorasweep.config.components import TARGET, Component
from lorasweep.errors import ConfigError
from lorasweep.wording import nearest

T = TypeVar("T")


def build(kind: type[T], values: Mapping[str, Any], *, key: str = "") -> T:
    """Returns an instance of a settings dataclass.

    A dataclass with a field `arguments` takes any key; keys without a field of their own become `arguments`.
    `_target_` is the field `target`.

    Args:
        kind: The dataclass.
        values: A value for every field, nested mappings for nested dataclasses.
        key: Dotted key of the mapping itself, for messages.

    Raises:
        ConfigError: A key is unknown or missing, or a value has another type than its field.
    """
    hints = _hints(cast("Any", kind))
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if "arguments" in names:
        values = _gather_arguments(names, values)
    for name in values:
        if name not in names:
            raise ConfigError(
                f"`{_join(key, str(name))}` is not a setting.{nearest(str(name), names)} "
                f"The settings of `{key or 'a run'}` are {', '.join(names)}."
            )
    missing = [name for name in names if name not in values]
    if missing:
        missed = TARGET if missing[0] == "target" else missing[0]
        raise ConfigError(f"`{_join(key, missed)}` must be set, but is missing.")
    return kind(**{name: convert(hints[name], values[name], key=_join(key, name)) for name in names})


def as_settings(value: Any) -> Any:
    """Returns settings as nested mappings, from which `build` makes the same settings."""
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: as_settings(getattr(value, f.name)) for f in fields(value)}
        target = {TARGET: own.pop("target")} if isinstance(value, Component) else {}
        arguments = own.pop("arguments", {})
        return {**target, **own, **arguments}
    if isinstance(value, Mapping):
        return {name: as_settings(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(as_settings, value))
    return value


def _gather_arguments(names: list[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by field; keys without a field are put into `arguments`."""
    own = {name: value for name, value in values.items() if name in names and name not in ("target", "arguments")}
    if "target" in names and TARGET in values:
        own["target"] = values[TARGET]
    return {**own, "arguments": {name: value for name, value in values.items() if name not in own and name != TARGET}}


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Returns the type of each field. Cached, because Python evaluates them from text."""
    return typing.get_type_hints(kind)


def convert(kind: Any, value: Any, *, key: str) -> Any:
    """Returns a value in its declared type: a list becomes a tuple, an int a float.

    Raises:
        ConfigError: The value does not have that type.
    """
    if kind is Any:
        return value
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(kind), value, key=key)
    if origin is Literal:
        if value not in get_args(kind):
            choices = [str(choice) for choice in get_args(kind)]
            raise ConfigError(
                f"`{key}` must be one of {', '.join(choices)}, but got {value!r}.{nearest(str(value), choices)}"
            )
        return value
    if is_dataclass(kind):
        _require(isinstance(value, Mapping), "a group of settings", value, key=key)
        return build(cast(type, kind), value, key=key)
    if origin is tuple:
        _require(isinstance(value, list | tuple), "a list", value, key=key)
        return tuple(convert(get_args(kind)[0], item, key=key) for item in value)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        _require(isinstance(value, Mapping), "a mapping", value, key=key)
        return {str(name): convert(get_args(kind)[1], item, key=f"{key}.{name}") for name, item in value.items()}
    return _convert_plain(kind, value, key=key)


def _convert_union(kinds: tuple[Any, ...], value: Any, *, key: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    options = [kind for kind in kinds if kind is not type(None)]
    components = [kind for kind in options if isinstance(kind, type) and issubclass(kind, Component)]
    if components and isinstance(value, Mapping) and TARGET in value:
        return build(components[0], value, key=key)
    named = [kind for kind in options if is_dataclass(kind) and kind not in components]
    if named and isinstance(value, Mapping):
        by_name = {name: kind for kind in named for name in get_args(_hints(cast("Any", kind))["name"])}
        name = value.get("name")
        if name not in by_name:
            raise ConfigError(
                f"`{key}` must be one of {', '.join(by_name)}, but got {name!r}.{nearest(str(name), by_name)}"
            )
        return build(cast(type, by_name[name]), value, key=key)
    errors = []
    for kind in options:
        try:
            return convert(kind, value, key=key)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _convert_plain(kind: Any, value: Any, *, key: str) -> Any:
    if kind is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                value = float(value)
            except ValueError:
                _require(False, "a number", value, key=key)
        _require(isinstance(value, int | float) and not isinstance(value, bool), "a number", value, key=key)
        return float(value)
    words = {int: "a whole number", bool: "true or false", str: "a text"}
    _require(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), words[kind], value, key=key)
    return value


def _require(
    holds: bool,  # noqa: FBT001 (reads as an assertion)
    what: str,
    value: Any,
    *,
    key: str,
) -> None:
    if not holds:
        raise ConfigError(f"`{key}` must be {what}, but got {value!r}.")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
