"""Sorts the keys of another tool's file into followed, not followed and refused, by the table of the tool."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from lorasweep.config.build import (
    AtLeastTwo,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    convert,
)
from lorasweep.config.other_names import FACT
from lorasweep.config.run import DECLARED_TYPES
from lorasweep.wording import shorten

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
UNKNOWN_KEY = "lorasweep does not know this key"


@dataclass(frozen=True, kw_only=True)
class MappedKeys:
    """The keys of a file, each in exactly one of three lists, and the settings of those that are followed."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Our dotted keys with values, and facts (`recipe.epochs`) that become settings together with others."""
    followed: dict[str, str] = field(default_factory=dict)
    """Our key for each of theirs."""
    not_followed: dict[str, str] = field(default_factory=dict)
    """Their keys that are not followed, each with the reason, or with what that changes."""
    refused: dict[str, str] = field(default_factory=dict)
    """Their keys for which no sweep is drafted, each with the reason."""

    def add(self, other: MappedKeys) -> None:
        """Adds the keys and settings of another part of the file."""
        for part in fields(self):
            getattr(self, part.name).update(getattr(other, part.name))

    def refuse(self, key: str, why: str) -> None:
        self.followed.pop(key, None)
        self.refused[key] = why

    def pop_facts(self) -> dict[str, Any]:
        """Removes the facts from the settings, and returns them without `recipe.`."""
        keys = [key for key in self.settings if key.startswith(FACT)]
        return {key.removeprefix(FACT): self.settings.pop(key) for key in keys}


def sort_keys(values: Mapping[Any, Any], table: Mapping[str, Any], *, prefix: str = "") -> MappedKeys:
    """Returns the keys of a part of a file in their lists. `prefix` stands before each key, such as `datasets.`.

    Raises ConfigError if the value of a followed key has the wrong type.
    """
    found = MappedKeys()
    for key, value in values.items():
        name, rule = f"{prefix}{key}", table["followed"].get(key)
        rule = {"to": rule} if isinstance(rule, str) else rule
        choices = rule.get("values", {}) if rule else {}
        single = value[0] if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], dict) else value
        choice = single if isinstance(single, bool | int | float | None) else str(single)
        section, why = _find_reason(key, table) if rule is None else ("followed", "")
        if why == UNKNOWN_KEY:
            found.not_followed[name] = UNKNOWN_KEY
        elif (choice not in choices and value in (None, "", [], {})) or (
            rule is None and not value and key not in table["counts_as_given"]
        ):
            found.not_followed[name] = "empty or switched off"
        elif rule is None:
            (found.refused if section == "refused" else found.not_followed)[name] = why
        elif choice in choices or not re.search(rule.get("refuse", "(?!)"), str(choice)):
            if choices and choice not in choices and "otherwise" in rule:
                found.not_followed[name] = f"{rule['otherwise']} (it is {shorten(value)})"
                if key in table.get("defaults", {}):
                    found.settings[rule["to"]] = choices[table["defaults"][key]]
                continue
            content = choices.get(choice, value)
            if isinstance(content, str) and "separator" in rule and rule["separator"] in content:
                content = [part.strip() for part in content.split(rule["separator"])]
            several = content if isinstance(content, dict) and choices else {rule["to"]: content}
            found.settings.update({ours: _convert(ours, given, name=name) for ours, given in several.items()})
            found.followed[name] = rule["to"]
        else:
            found.refused[name] = f"it is {shorten(value)}, and {rule['why']}"
    return found


def find_key(table: Mapping[str, Any], ours: str) -> str | None:
    """Returns the tool's first key that sets one of our keys; None if it has none."""
    target = table["set_by"].get(ours, ours)
    rules = {key: rule if isinstance(rule, str) else rule["to"] for key, rule in table["followed"].items()}
    return next((key for key, to in rules.items() if to == target), None)


def _find_reason(key: str, table: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the section, and the reason for which a key is not followed or refused."""
    for section in ("refused", "not_followed", "patterns"):
        for why, patterns in table.get(section, {}).items():
            if any(fnmatchcase(key, pattern) for pattern in patterns):
                return section, why
    return "", UNKNOWN_KEY


def _convert(key: str, value: Any, *, name: str) -> Any:
    """Returns a value in the type of our key: `1e-4`, which YAML reads as a text, becomes a number."""
    kinds = DECLARED_TYPES.get(key, frozenset())
    if kinds & {int, float, bool} and kinds <= {int, float, bool, type(None)}:
        return convert(float if float in kinds else int if int in kinds else bool, value, key=name)
    return convert(FACT_TYPES[key], value, key=name) if key in FACT_TYPES else value
