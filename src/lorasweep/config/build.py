"""Creates the frozen dataclasses of settings from nested mappings; pydantic checks keys, types and limits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pkgutil import resolve_name
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import Discriminator, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, PydanticKnownError, core_schema

from lorasweep.config.other_names import suggest_setting
from lorasweep.errors import ConfigError
from lorasweep.wording import shorten, suggest_nearest

T = TypeVar("T")

Positive = Annotated[int, Field(strict=True, ge=1, lt=2**63)]
BatchSize = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]  # far above any batch that trains
NonNegative = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
AtLeastTwo = Annotated[int, Field(strict=True, ge=2, lt=2**63)]
Rank = Annotated[int, Field(strict=True, ge=1, lt=2**31)]  # so that the size of a layer's A and B fits 64 bits
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

TARGET = "_target_"
MAX_VALUE_CHARACTERS = 200
"""Maximum length of a value in an error message."""
COMPARISONS = {"greater_than_equal": ">=", "greater_than": ">", "less_than_equal": "<=", "less_than": "<"}
"""Comparison operator for each type of pydantic error that reports a limit."""
TYPE_DESCRIPTIONS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "dict": "a mapping",
    "mapping": "a mapping",
    "dataclass": "a group of settings",
}
"""Description of the required type for each type of pydantic error, by its first word (`int_type`, `int_parsing`)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of settings, whose keys are checked when `build` creates them. `_target_` is the field `target`.

    A class with a field `arguments` takes any key: keys without a field become `arguments`.
    """

    @model_validator(mode="before")
    @classmethod
    def check_keys(cls, values: Any) -> Any:
        """Returns values by the names of the fields. Raises pydantic's error if a key is no field."""
        if not isinstance(values, Mapping):  # the class was called directly: Python checks the names
            return values
        names = [f.name for f in fields(cls)]
        values = {"target" if name == TARGET and "target" in names else name: value for name, value in values.items()}
        unknown = {name: value for name, value in values.items() if name not in names}
        if "arguments" in names:
            return {**{name: value for name, value in values.items() if name in names}, "arguments": unknown}
        if unknown:
            raise PydanticCustomError("unknown_key", "{name}", {"name": str(next(iter(unknown))), "names": names})
        return values


class UnknownSettingError(ConfigError):
    """A key is no field of its settings."""


def get_union_tag(value: Any) -> str:
    """Returns the tag of a value in a union of our own settings and a component: `component` or `settings`."""
    names_class = TARGET in value if isinstance(value, Mapping) else hasattr(value, "target")
    return "component" if names_class else "settings"


SETTINGS_OR_COMPONENT = Discriminator(get_union_tag)


class ChosenByName(NamedTuple):
    """Annotates settings whose field `name` chooses their class in a registry, such as `lorasweep.tasks.DATA`.

    A registry is a mapping of names to classes. It may be in a package that imports this one, because it is found when
    settings are built.
    """

    registry: str
    """Import path of the mapping."""

    @property
    def classes(self) -> Mapping[str, type]:
        found: Mapping[str, type] = resolve_name(self.registry)
        return found

    def find_class(self, name: Any) -> type:
        """Returns the class of a name. Raises pydantic's error of a wrong tag."""
        if not isinstance(name, str) or name not in self.classes:
            names = ", ".join(map(repr, self.classes))
            context = {"discriminator": "'name'", "tag": str(name), "expected_tags": names}
            raise PydanticKnownError("union_tag_invalid", context)
        return self.classes[name]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        def validate(value: Any) -> Any:
            if isinstance(value, Mapping):
                return _adapter(self.find_class(value.get("name"))).validate_python(value)
            if isinstance(value, source):
                return value
            raise PydanticKnownError("dataclass_type", {"class_name": source.__name__})

        return core_schema.no_info_plain_validator_function(validate)


def list_classes(hint: Any) -> list[type]:
    """Returns the classes of settings that a type allows."""
    if get_origin(hint) is Annotated and (classes := _find_chosen(hint)):
        return classes
    if get_origin(hint) in (Union, UnionType, Annotated):
        return [kind for inner in get_args(hint) for kind in list_classes(inner)]
    return [hint] if is_dataclass(hint) and isinstance(hint, type) else []


def _find_chosen(hint: Any) -> list[type]:
    """Returns the classes of a type that is annotated with `ChosenByName`."""
    marks = [mark for mark in get_args(hint) if isinstance(mark, ChosenByName)]
    return list(dict.fromkeys(kind for mark in marks for kind in mark.classes.values()))


def build(kind: type[T], values: Mapping[str, Any], *, key: str = "") -> T:
    """Creates settings from a mapping with a value for every field without a default. `key` is the mapping's own key.

    Raises:
        ConfigError: A key is unknown or missing, or a value has another type than its field or breaks its limits.
    """
    built: T = convert(kind, values, key=key)
    return built


def convert(kind: Any, value: Any, *, key: str) -> Any:
    """Returns a value in its declared type: a list becomes a tuple, an int a float. Errors as in `build`."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        # pydantic's first error becomes one sentence: the dotted key, what must hold, and the value
        first, *others = error.errors(include_url=False)
        path = ".".join(filter(None, (key, *_find_names(first, value))))
        if first["type"] == "unknown_key":
            known = dotted_items(value, f"{key}.".lstrip(".")) if isinstance(value, Mapping) else ()
            name, names = first["ctx"]["name"], first["ctx"]["names"]
            raise make_unknown_error(path, name, names, others=[other for other, _ in known]) from error
        sentence = _describe(first, path)
        # a union such as `int | Literal["auto"]` has an error for each member
        words = [other["ctx"]["expected"] for other in others if other["type"] == "literal_error"]
        is_union = words and first["type"] != "literal_error"
        raise ConfigError(f"{sentence} It may also be {words[0]}." if is_union else sentence, key=path) from error


def _describe(error: ErrorDetails, key: str) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), shorten(error["input"], MAX_VALUE_CHARACTERS)
    if isinstance(cause := context.get("error"), ConfigError):  # raised by a `__post_init__`; the message has the key
        return str(cause)
    if kind == "missing":
        return f"`{key}` must be set, but is missing."
    if kind in COMPARISONS:
        limit = next(iter(context.values()))
        shown = f"{limit:g}" if isinstance(limit, float) else limit
        return f"`{key} {COMPARISONS[kind]} {shown}` must hold, but got {value}."
    if kind in ("literal_error", "union_tag_invalid"):
        expected = context.get("expected") or context["expected_tags"]
        choices = [choice.strip("' ") for choice in expected.replace(" or ", ", ").split(",")]
        given = context.get("tag", error["input"])
        near = suggest_nearest(given, choices) if isinstance(given, str) else ""
        return f"`{key}` must be one of {', '.join(choices)}, but got {shorten(given, MAX_VALUE_CHARACTERS)}.{near}"
    noun = TYPE_DESCRIPTIONS.get(kind.partition("_")[0])
    return f"`{key}` must be {noun}, but got {value}." if noun else f"`{key}`: {error['msg']}, but got {value}."


def _find_names(error: ErrorDetails, values: Any) -> list[str]:
    """Returns the keys that lead to the wrong value. Skips pydantic's names for the members of unions."""
    names = []
    for part in error["loc"]:
        is_missing = error["type"] == "missing" and part == error["loc"][-1]
        inner = values.get(part, MISSING) if isinstance(values, Mapping) else MISSING
        if is_missing or inner is error["input"] or isinstance(inner, Mapping | list | tuple):
            names.append(TARGET if part == "target" else str(part))
            values = inner
    return names


def as_settings(value: Any) -> Any:
    """Returns settings as nested mappings, from which `build` creates the same settings."""
    if is_dataclass(value) and not isinstance(value, type):
        settings = {f.name: as_settings(getattr(value, f.name)) for f in fields(value)}
        target = {TARGET: settings.pop("target")} if "target" in settings else {}
        arguments = settings.pop("arguments", {})
        return {**target, **settings, **arguments}
    if isinstance(value, Mapping):
        return {name: as_settings(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(as_settings, value))
    return value


def dotted_items(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys and values of nested mappings. Inner mappings are values too: `optim`, then `optim.lr`."""
    for name, value in values.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from dotted_items(value, f"{prefix}{name}.")


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of nested mappings that are no mappings, by dotted key."""
    return {key: value for key, value in dotted_items(values) if not isinstance(value, Mapping)}


def list_declared_types(kind: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted key and each type of every setting that a class declares: `("method.targets", tuple)`."""
    if get_origin(kind) is Annotated and (classes := _find_chosen(kind)):
        for member in classes:
            yield from list_declared_types(member, key)
    elif get_origin(kind) in (Union, UnionType, Annotated):
        members = get_args(kind)
        for member in members[:1] if get_origin(kind) is Annotated else members:
            yield from list_declared_types(member, key)
    elif is_dataclass(kind):
        for name, member in get_type_hints(kind, include_extras=True).items():
            yield from list_declared_types(member, f"{key}.{name}".lstrip("."))
    else:
        yield key, get_origin(kind) or kind


def make_unknown_error(key: str, name: str, names: Sequence[str], *, others: Iterable[str] = ()) -> UnknownSettingError:
    """Returns the error for a setting `name` of `key` that is none of `names`; `others` are dotted keys elsewhere."""
    unknown, *known = [f"{key}.{each}".lstrip(".") for each in (name, *names)]
    others = [other for other in others if not f"{other}.".startswith(f"{unknown}.")]
    near = suggest_setting(unknown, known) or suggest_nearest(unknown, others)
    place = f"of `{key}` " if key else ""
    return UnknownSettingError(
        f"`{unknown}` is not a setting.{near} The settings {place}are {', '.join(names)}.", key=unknown
    )


@cache  # pydantic builds a validator for each class, which is slow
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
