"""Plain mappings become settings of the declared types, and whatever does not fit is one sentence with its key."""

from collections.abc import Mapping
from typing import Annotated, Literal

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from lorasweep.config.build import NonNegativeFloat, Positive, PositiveFloat, Settings, as_settings, build, convert
from lorasweep.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Round(Settings):
    name: Literal["round"] = "round"
    radius: PositiveFloat


@dataclass(frozen=True, kw_only=True)
class Square(Settings):
    name: Literal["square", "box"]
    sides: tuple[Positive, ...]


@dataclass(frozen=True, kw_only=True)
class Drawing(Settings):
    title: str
    shape: Annotated[Round | Square, Field(discriminator="name")]
    colour: Literal["red", "green"]
    copies: Positive | Literal["auto"] | None
    weights: Mapping[str, NonNegativeFloat]
    signed: bool


VALUES = {
    "title": "t",
    "shape": {"name": "round", "radius": 1},
    "colour": "red",
    "copies": None,
    "weights": {"a": 1},
    "signed": True,
}


def test_build_makes_nested_settings_that_come_back_from_mappings():
    made = Drawing(title="t", shape=Round(radius=1.0), colour="red", copies=None, weights={"a": 1.0}, signed=True)
    assert build(Drawing, VALUES) == build(Drawing, as_settings(made)) == made


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("colour", ["red"], r"`page.colour` must be one of red, green, but got \['red'\]"),
        ("copies", 0, "`page.copies >= 1` must hold, but got 0. It may also be 'auto'."),
        ("copies", True, "`page.copies` must be a whole number, but got True."),
        ("weights", [1], r"`page.weights` must be a mapping, but got \[1\]."),
        ("weights", {"a": 10**400}, "`page.weights.a` must be a number, but got 1000"),
        ("shape", {"name": "rond", "radius": 1}, r"one of round, square, box, but got 'rond'. Did you mean `round`\?"),
        ("shape", {"name": "round"}, "`page.shape.radius` must be set, but is missing."),
        ("shape", {"name": "box", "sides": ["a"]}, "`page.shape.sides` must be a whole number, but got 'a'."),
        ("titel", "t", r"`page.titel` is not a setting. Did you mean `page.title`\? .* are title, shape"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(name, value, message):
    with pytest.raises(ConfigError, match=message):
        build(Drawing, VALUES | {name: value}, key="page")


@pytest.mark.parametrize(
    ("kind", "value", "made"),
    [(float, "1e-3", 1e-3), (float, 3, 3.0), (tuple[int, ...], [1, 2], (1, 2)), (str | tuple[str, ...], "q", "q")],
)
def test_values_become_the_declared_type(kind, value, made):
    assert convert(kind, value, key="k") == made
