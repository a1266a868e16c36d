"""Sorts the keys of another tool's file into taken, without effect, not taken and refused, by the table of the tool."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lorasweep.config.build import (
    AtLeastTwo,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    convert,
    list_declared_types,
)
from lorasweep.config.run import RunConfig
from lorasweep.wording import shorten

DECLARED: Mapping[str, frozenset[Any]] = {
    name: frozenset(kind for key, kind in list_declared_types(RunConfig) if key == name)
    for name, _ in list_declared_types(RunConfig)
}
"""The types of each setting of a run."""
FACT_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("recipe.micro_batch", "recipe.accumulate", "recipe.batch"), Positive),
    "recipe.epochs": PositiveFloat,
    "recipe.max_steps": int,
    "recipe.length": AtLeastTwo,
    **dict.fromkeys(("recipe.warmup_steps", "recipe.clip_norm", "recipe.min_lr_rate"), NonNegativeFloat),
    "recipe.warmup_ratio": Fraction,
    **dict.fromkeys(("recipe.dora", "recipe.all_linear"), bool),
    "recipe.targets": str | tuple[str, ...],
}
"""The types of numbers in their files that become settings only together with others."""
FACT = "recipe."
UNKNOWN = "lorasweep does not know this key"


@dataclass(frozen=True, kw_only=True)
class MappedKeys:
    """The keys of a file, each in exactly one of four lists, and the settings that follow from those that are taken."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Our dotted keys with values, and facts (`recipe.epochs`) that become settings together with others."""
    taken: dict[str, str] = field(default_factory=dict)
    """Our key for each of theirs."""
    no_effect: dict[str, str] = field(default_factory=dict)
    """Their keys that change nothing in the result, each with the reason."""
    not_taken: dict[str, str] = field(default_factory=dict)
    """Their keys that are not followed, each with what that changes."""
    refused: dict[str, str] = field(default_factory=dict)
    """Their keys for which no sweep is drafted, each with the reason."""

    def add(self, other: MappedKeys) -> None:
        """Adds the keys and settings of another part of the file."""
        for part in fields(self):
            getattr(self, part.name).update(getattr(other, part.name))

    def refuse(self, key: str, why: str) -> None:
        self.taken.pop(key, None)
        self.refused[key] = why

    def pop_facts(self) -> dict[str, Any]:
        """Removes the facts from the settings, and returns them without `recipe.`."""
        keys = [key for key in self.settings if key.startswith(FACT)]
        return {key.removeprefix(FACT): self.settings.pop(key) for key in keys}


def sort_keys(values: Mapping[Any, Any], table: Mapping[str, Any], *, prefix: str = "") -> MappedKeys:
    """Returns the keys of a part of a file in their lists. `prefix` stands before each key, such as `datasets.`.

    Raises ConfigError if the value of a taken key has the wrong type.
    """
    found, lists = MappedKeys(), ("no_effect", "not_taken", "refused")
    places = {key: (name, why) for name in lists for why, keys in table.get(name, {}).items() for key in keys}
    for key, value in values.items():
        name, rule = f"{prefix}{key}", table["taken"].get(key)
        rule = {"to": rule} if isinstance(rule, str) else rule
        choices = rule.get("values", {}) if rule else {}
        single = value[0] if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], dict) else value
        choice = single if isinstance(single, bool | int | float | None) else str(single)
        if rule is None and key not in places:
            found.not_taken[name] = UNKNOWN
        elif (choice not in choices and value in (None, "", [], {})) or (rule is None and not value):
            found.no_effect[name] = "empty or switched off"
        elif rule is None:
            section, why = places[key]
            getattr(found, section)[name] = why
        elif choice in choices or not re.search(rule.get("refuse", "(?!)"), str(choice)):
            if choices and choice not in choices and "otherwise" in rule:
                found.not_taken[name] = f"{rule['otherwise']} (it is {shorten(value)})"
                if key in table.get("defaults", {}):
                    found.settings[rule["to"]] = choices[table["defaults"][key]]
                continue
            content = choices.get(choice, value)
            if isinstance(content, str) and "separator" in rule and rule["separator"] in content:
                content = [part.strip() for part in content.split(rule["separator"])]
            several = content if isinstance(content, dict) and choices else {rule["to"]: content}
            found.settings.update({ours: _convert(ours, given, name=name) for ours, given in several.items()})
            found.taken[name] = rule["to"]
        else:
            found.refused[name] = f"it is {shorten(value)}, and {rule['why']}"
    return found


def _convert(key: str, value: Any, *, name: str) -> Any:
    """Returns a value in the type of our key: `1e-4`, which YAML reads as a text, becomes a number."""
    kinds = DECLARED.get(key, frozenset())
    if kinds & {int, float, bool} and kinds <= {int, float, bool, type(None)}:
        return convert(float if float in kinds else int if int in kinds else bool, value, key=name)
    return convert(FACT_TYPES[key], value, key=name) if key in FACT_TYPES else value
