"""The names that PEFT, TRL, axolotl, LLaMA-Factory and transformers have for our settings (`other_names.yaml`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lorasweep.wording import suggest_nearest

FACT = "recipe."
"""Beginning of the names of facts, which become settings together with others."""


@cache
def read_tables() -> Mapping[str, Any]:
    """Returns what each key of other tools' files means here, by the name of the tool."""
    tables: dict[str, Any] = yaml.safe_load((Path(__file__).with_suffix(".yaml")).read_text())
    return tables


@cache
def list_other_names() -> Mapping[str, str]:
    """Returns our dotted key for each name of other tools."""
    tables = read_tables()
    common = tables["common"]
    facts = {fact: ours for ours, fact in common["set_by"].items()} | common["known_as"]
    names: dict[str, str] = {**common["peft"], **common["typed"]}
    for table in tables.values():
        for theirs, rule in table["followed"].items():
            to = rule if isinstance(rule, str) else rule["to"]
            names.setdefault(theirs.rpartition(".")[2], facts.get(to, to) if to.startswith(FACT) else to)
    return {theirs: ours for theirs, ours in names.items() if not ours.startswith(FACT)}


def suggest_setting(key: str, choices: Iterable[str]) -> str:
    """Returns ` Did you mean ...?` with the nearest of the `choices`, or our key for another tool's name."""
    ours = list_other_names().get(key.rpartition(".")[2], key)
    theirs = "" if ours == key else f" Did you mean `{ours}`?"
    near = suggest_nearest(key, choices)
    return near or theirs if "." in key else theirs or near
