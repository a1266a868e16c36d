"""Plain mappings become settings of the declared types, and whatever does not fit is one sentence with its key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from lorasweep.config.build import build, convert
from lorasweep.errors import ConfigError
from lorasweep.wording import nearest


@dataclass(frozen=True, kw_only=True)
class Round:
    name: Literal["round"] = "round"
    radius: float


@dataclass(frozen=True, kw_only=True)
class Square:
    name: Literal["square", "box"]
    sides: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    title: str
    shape: Round | Square
    colour: Literal["red", "green"]
    copies: int | None
    weights: Mapping[str, float]
    signed: bool


VALUES: dict[str, Any] = {
    "title": "t",
    "shape": {"name": "round", "radius": 1},
    "colour": "red",
    "copies": None,
    "weights": {"a": 1},
    "signed": True,
}


def test_build_makes_nested_settings():
    assert build(Drawing, VALUES) == Drawing(
        title="t", shape=Round(radius=1.0), colour="red", copies=None, weights={"a": 1.0}, signed=True
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("title", 3, "`page.title` must be a text, but got 3."),
        ("colour", "gren", r"`page.colour` must be one of red, green, but got 'gren'. Did you mean `green`\?"),
        ("colour", ["red"], r"`page.colour` must be one of red, green, but got \['red'\]"),
        ("copies", "many", "`page.copies` must be a whole number, but got 'many'."),
        ("weights", {"a": 10**400}, "`page.weights.a` must be a number, but got 1000"),
        ("copies", 2.0, "`page.copies` must be a whole number, but got 2.0."),
        ("copies", True, "`page.copies` must be a whole number, but got True."),
        ("signed", 1, "`page.signed` must be true or false, but got 1."),
        ("signed", "true", "`page.signed` must be true or false, but got 'true'."),
        ("weights", [1], r"`page.weights` must be a mapping, but got \[1\]."),
        ("weights", {"a": "x"}, "`page.weights.a` must be a number, but got 'x'."),
        ("weights", {"a": False}, "`page.weights.a` must be a number, but got False."),
        ("shape", {"name": "rond", "radius": 1}, r"one of round, square, box, but got 'rond'. Did you mean `round`\?"),
        ("shape", {"radius": 1}, "`page.shape` must be one of round, square, box, but got None."),
        ("shape", {"name": "round"}, "`page.shape.radius` must be set, but is missing."),
        ("shape", {"name": "box", "sides": 3}, "`page.shape.sides` must be a list, but got 3."),
        ("shape", {"name": "box", "sides": ["a"]}, "`page.shape.sides` must be a whole number, but got 'a'."),
        ("shape", "round", "`page.shape` must be a group of settings, but got 'round'."),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_key(name, value, message):
    with pytest.raises(ConfigError, match=message):
        build(Drawing, VALUES | {name: value}, key="page")


def test_an_unknown_key_is_refused_with_the_nearest_and_all_others():
    with pytest.raises(
        ConfigError, match=r"`page.titel` is not a setting. Did you mean `title`\? The settings of `page` are title, sh"
    ):
        build(Drawing, VALUES | {"titel": "t"}, key="page")


def test_an_unknown_key_at_the_top_is_refused_as_one_of_a_run():
    with pytest.raises(ConfigError, match=r"`zzz` is not a setting. The settings of `a run` are title"):
        build(Drawing, VALUES | {"zzz": 1})


def test_a_missing_key_is_refused():
    with pytest.raises(ConfigError, match=r"`page.signed` must be set, but is missing."):
        build(Drawing, {key: value for key, value in VALUES.items() if key != "signed"}, key="page")


@pytest.mark.parametrize(("text", "number"), [("1e-3", 1e-3), ("2", 2.0), ("-1.5E2", -150.0)])
def test_a_number_that_yaml_reads_as_text_is_a_number(text, number):
    assert convert(float, text, key="k") == number


def test_a_whole_number_becomes_a_float_where_one_is_declared():
    value = convert(float, 3, key="k")
    assert (value, type(value)) == (3.0, float)


@pytest.mark.parametrize("value", [[1, 2], (1, 2)])
def test_a_list_becomes_a_tuple(value):
    assert convert(tuple[int, ...], value, key="k") == (1, 2)


def test_a_union_of_plain_types_takes_the_first_that_fits():
    kind = str | tuple[str, ...]
    assert convert(kind, "q_proj", key="k") == "q_proj"
    assert convert(kind, ["q_proj", "v_proj"], key="k") == ("q_proj", "v_proj")


def test_a_union_of_settings_is_told_apart_by_name():
    assert convert(Round | Square, {"name": "box", "sides": [1]}, key="k") == Square(name="box", sides=(1,))


def test_null_is_refused_where_it_is_no_option():
    with pytest.raises(ConfigError, match=r"`k` must be a whole number, but got None."):
        convert(int, None, key="k")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optim.lrr", " Did you mean `optim.lr`?"),
        ("rank", " Did you mean `method.rank`?"),
        ("zzzzzzzz", ""),
    ],
)
def test_nearest_names_what_was_probably_meant(name, hint):
    assert nearest(name, ["optim.lr", "method.rank", "seed"]) == hint
