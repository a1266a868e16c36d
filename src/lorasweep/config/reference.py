"""Lists all settings, each with the docstring of its field, its type with limits, and its value in `conf/`."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from lorasweep.config.build import TARGET, TYPE_DESCRIPTIONS, list_classes
from lorasweep.config.components import Component
from lorasweep.config.compose import Primary, default_options, packaged_folder
from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import SweepConfig

LIMITS = {"ge": ">=", "le": "<=", "gt": ">", "lt": "<"}
MAX_SHOWN_LIMIT = 2**31
"""Limits from this one on are not shown, because they only keep a number within its bits."""


class SettingEntry(NamedTuple):
    """One setting, described in Markdown."""

    key: str
    options: tuple[str, ...]
    """The options of its group that have it; empty if the group has no options."""
    about: str
    """The first paragraph of the docstring of its class."""
    default: str
    """The value in `conf/`. If options differ, each value with their names."""
    values: str
    meaning: str


def list_settings(primary: Primary) -> Iterator[SettingEntry]:
    """Yields all settings of a run or of a sweep. Those of several classes or options are several settings."""
    config: type = RunConfig if primary == "train" else SweepConfig
    file, groups = packaged_folder("conf") / f"{primary}.yaml", default_options(primary)
    content, meanings, hints = _read_yaml(file), read_docstrings(config), get_type_hints(config, include_extras=True)
    for group, hint in hints.items():
        files = sorted((packaged_folder("conf") / group).glob("*.yaml"))
        options, known = {path.stem: _read_option(path) for path in files}, {"defaults", "name", TARGET}
        for kind in (classes := [kind for kind in list_classes(hint) if kind is not Component]):
            names = get_args(get_type_hints(kind).get("name"))
            own = {name: one for name, one in options.items() if (TARGET in one) is issubclass(kind, Component)}
            own = {name: one for name, one in own.items() if not names or one["name"] in names}
            known |= {f.name for f in fields(kind)}
            yield from list_fields(kind, group, own or {"": content.get(group) or {}})
        if not classes:
            default = f"`{show_value(content.get(group, groups.get(group)))}`"
            yield SettingEntry(group, tuple(options), meanings[group], default, describe_type(hint), meanings[group])
        for path in files if classes else ():
            yield from _list_arguments(path, f"{group}.", known=known)
    yield from _list_arguments(file, "", known={"defaults", "hydra", *hints})


def _read_option(path: Path) -> dict[str, Any]:
    """Returns the content of a file in `conf/` with the files that its defaults list names."""
    content = _read_yaml(path)
    parents = [name for name in content.pop("defaults", []) if isinstance(name, str) and name != "_self_"]
    return {key: value for name in parents for key, value in _read_option(path.with_stem(name)).items()} | content


def list_fields(kind: type, group: str, options: Mapping[str, Mapping[str, Any]]) -> Iterator[SettingEntry]:
    """Yields the fields of a class of settings; `options` are those of the group that it belongs to."""
    hints, meanings = get_type_hints(kind, include_extras=True), read_docstrings(kind)
    about = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    skipped = ("arguments",) if "" in options else ("arguments", "name")  # an option's name chooses the class
    for field in (f.name for f in fields(kind) if f.name not in skipped):
        name, hint = TARGET if field == "target" else field, hints[field]
        given = {option: values[name] for option, values in options.items() if name in values}
        if list_classes(hint) == [hint]:
            yield from list_fields(hint, f"{group}.{name}", given)
            continue
        by_value: dict[str, list[str]] = {}
        for option, value in given.items():
            by_value.setdefault(f"`{show_value(value)}`", []).append(option)
        defaults = [
            f"{value} ({', '.join(names)})" if len(by_value) > 1 else value for value, names in by_value.items()
        ]
        default, key = ", ".join(defaults) or "none", f"{group}.{name}"
        yield SettingEntry(key, tuple(filter(None, options)), about, default, describe_type(hint), meanings[field])


def _list_arguments(path: Path, prefix: str, *, known: set[str]) -> Iterator[SettingEntry]:
    """Yields the settings of a file of `conf/` that are no fields of a class, with the comments behind them."""
    comments = dict(re.findall(r"^(\w+):[^#\n]* # (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    about, options = (
        (f"Further settings of `{path.stem}`.", (path.stem,)) if prefix else ("Settings of the command.", ())
    )
    content = _read_yaml(path)
    for key, value in content.items():
        if key not in known:
            meaning = comments.get(key, f"An argument of `{content.get(TARGET, path.stem)}`.")
            yield SettingEntry(f"{prefix}{key}", options, about, f"`{show_value(value)}`", "any value", meaning)


def describe_type(hint: Any) -> str:
    """Returns the values that a type allows, such as `a whole number >= 1, or null`."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Annotated:
        metadata = [limit for detail in arguments[1:] for limit in getattr(detail, "metadata", ())]
        limits = [(sign, getattr(one, name)) for one in metadata for name, sign in LIMITS.items() if hasattr(one, name)]
        shown = ", ".join(f"{sign} {limit:g}" for sign, limit in limits if limit < MAX_SHOWN_LIMIT)
        return f"{describe_type(arguments[0])} {shown}".strip()
    if kind is Literal:
        return ", ".join(f"`{show_value(value)}`" for value in arguments)
    if kind in (Union, types.UnionType):
        return ", or ".join(map(describe_type, arguments))
    if kind is not None:
        return f"a {'list' if kind is tuple else 'mapping'} of: {describe_type(arguments[0 if kind is tuple else 1])}"
    if is_dataclass(hint):
        return f"a class by `{TARGET}`"
    return {type(None): "`null`", Any: "any value", str: "a text"}.get(hint) or TYPE_DESCRIPTIONS[hint.__name__]


def show_value(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("\n", "\\n") or '""'
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()


def _read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def read_docstrings(kind: type) -> dict[str, str]:
    """Returns the docstring below each field of a class, also of inherited fields; an empty text if it has none."""
    found = {f.name: "" for f in fields(kind)}
    for parent in reversed([parent for parent in kind.__mro__ if is_dataclass(parent)]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        assert isinstance(node, ast.ClassDef)
        for statement, following in itertools.pairwise(node.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                found[ast.unparse(statement.target)] = " ".join(ast.literal_eval(following.value).split())
    return found
