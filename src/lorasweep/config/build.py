"""Creates frozen dataclasses of settings from nested mappings: each key must be known, each value have its type."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from lorasweep.config.components import TARGET, Component
from lorasweep.config.limits import COMPARISONS
from lorasweep.errors import ConfigError
from lorasweep.wording import nearest

T = TypeVar("T")


def build(kind: type[T], values: Mapping[str, Any], *, key: str = "") -> T:
    """Creates an instance of a settings dataclass.

    A dataclass with a field `arguments` takes any key; keys without a field become `arguments`. `_target_` is the field
    `target`. A field with a default may be missing.

    Args:
        kind: The dataclass.
        values: A value for every field, nested mappings for nested dataclasses.
        key: Dotted key of the mapping itself, for messages.

    Raises:
        ConfigError: A key is unknown or missing, or a value has another type than its field or breaks its limits.
    """
    hints = _field_types(kind)  # type: ignore[arg-type]
    if "arguments" in hints:
        values = _gather_arguments(hints, values)
    for name in values:
        if name not in hints:
            raise ConfigError(
                f"`{_join(key, str(name))}` is not a setting.{nearest(str(name), hints)} "
                f"The settings of `{key or 'a run'}` are {', '.join(hints)}."
            )
    for f in fields(kind):  # type: ignore[arg-type]
        if (name := f.name) not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"`{_join(key, TARGET if name == 'target' else name)}` must be set, but is missing.")
    return kind(
        **{name: convert(hint, values[name], key=_join(key, name)) for name, hint in hints.items() if name in values}
    )


def check_fields(settings: Any, *, key: str) -> None:
    """Raises ConfigError if a field of a dataclass that was created without `build` has a wrong value."""
    kind: Any = type(settings)
    for name, field_type in _field_types(kind).items():
        convert(field_type, getattr(settings, name), key=_join(key, name))


def as_settings(value: Any) -> Any:
    """Returns settings as nested mappings, from which `build` creates the same settings."""
    if is_dataclass(value) and not isinstance(value, type):
        settings = {f.name: as_settings(getattr(value, f.name)) for f in fields(value)}
        target = {TARGET: settings.pop("target")} if isinstance(value, Component) else {}
        arguments = settings.pop("arguments", {})
        return {**target, **settings, **arguments}
    if isinstance(value, Mapping):
        return {name: as_settings(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(as_settings, value))
    return value


def convert(kind: Any, value: Any, *, key: str) -> Any:
    """Returns a value in its declared type: a list becomes a tuple, an int a float.

    Raises:
        ConfigError: The value does not have that type, or breaks a limit.
    """
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _convert_limited(*get_args(kind), value=value, key=key)
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(kind), value, key=key)
    if origin is Literal:
        if value not in get_args(kind):
            raise _not_one_of(map(str, get_args(kind)), value, key=key)
        return value
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise _wrong_type("a group of settings", value, key=key)
        return build(kind, value, key=key)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong_type("a list", value, key=key)
        return tuple(convert(get_args(kind)[0], item, key=key) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong_type("a mapping", value, key=key)
        return {str(name): convert(get_args(kind)[1], item, key=f"{key}.{name}") for name, item in value.items()}
    return _convert_plain(kind, value, key=key)


def _convert_limited(kind: Any, *limits: tuple[str, float], value: Any, key: str) -> Any:
    value = convert(kind, value, key=key)
    for sign, limit in limits:
        if not COMPARISONS[sign](value, limit):
            raise ConfigError(f"`{key} {sign} {limit}` must hold, but got {value!r}.")
    return value


def _convert_union(kinds: tuple[Any, ...], value: Any, *, key: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, Mapping):
        components = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Component)]
        if components and TARGET in value:
            return build(components[0], value, key=key)
        # The other dataclasses differ by the values that their field `name` takes.
        groups: list[Any] = [kind for kind in kinds if is_dataclass(kind) and kind not in components]
        by_name = {name: kind for kind in groups for name in get_args(_field_types(kind)["name"])}
        if by_name and value.get("name") not in by_name:
            raise _not_one_of(by_name, value.get("name"), key=key)
        if by_name:
            return build(by_name[value["name"]], value, key=key)
    errors = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return convert(kind, value, key=key)
            except ConfigError as error:
                errors.append(error)
    if any(isinstance(kind, type) and issubclass(kind, Component) for kind in kinds):
        raise ConfigError(f"{errors[0]} `{key}.{TARGET}` names a class.") from errors[0]
    if words := [repr(word) for kind in kinds[1:] if get_origin(kind) is Literal for word in get_args(kind)]:
        raise ConfigError(f"{errors[0]} It may also be {' or '.join(words)}.") from errors[0]
    raise errors[0]


def _convert_plain(kind: Any, value: Any, *, key: str) -> Any:
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):  # YAML 1.1 reads 1e-3 as text
        try:
            value = float(value)
        except (ValueError, OverflowError):  # 10**400 is no float
            raise _wrong_type("a number", value, key=key) from None
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong_type(names[kind], value, key=key)
    return float(value) if kind is float else value


def _gather_arguments(names: typing.Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by field; keys without a field are put into `arguments`."""
    gathered = {name: value for name, value in values.items() if name in names and name not in ("target", "arguments")}
    arguments = {name: value for name, value in values.items() if name not in gathered and name != TARGET}
    if "target" in names and TARGET in values:
        gathered["target"] = values[TARGET]
    return {**gathered, "arguments": arguments}


@cache  # because Python evaluates the types from text
def _field_types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields(kind)}


def _wrong_type(wanted: str, value: Any, *, key: str) -> ConfigError:
    return ConfigError(f"`{key}` must be {wanted}, but got {value!r}.")


def _not_one_of(choices: typing.Iterable[str], value: Any, *, key: str) -> ConfigError:
    names = list(choices)
    return ConfigError(f"`{key}` must be one of {', '.join(names)}, but got {value!r}.{nearest(str(value), names)}")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
