"""Writes the parts of the site that come from the code: the settings, the commands, and files of the root folder.

MkDocs calls `on_files` and `on_page_markdown` (mkdocs.yml, `hooks`). The other functions need only lorasweep.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from lorasweep.cli import build_parser
from lorasweep.config.components import Component
from lorasweep.config.compose import Primary, default_options
from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import SweepConfig

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""Files of the root folder that are also pages of the site."""
PRIMARIES: Mapping[Primary, type] = {"train": RunConfig, "sweep": SweepConfig}
SIGNS = {"ge": "≥", "le": "≤", "gt": ">", "lt": "<"}
OTHER_VALUES = {
    **dict.fromkeys(("module", "datamodule"), "a class by `_target_`, or `null`"),
    "seed": "whole number ≥ 0",
    "output": "text, or `null`",
    "resume": "`true`, `false`",
}
"""Possible values of the settings of a run that are in no group."""
KINDS = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", Any: "any value"}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of `ROOT_PAGES`."""
    from mkdocs.structure.files import File  # noqa: PLC0415 (tests import this module without MkDocs)

    for source, page in ROOT_PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for name, other in ROOT_PAGES.items():
            content = content.replace(f"]({name})", f"]({other})")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Inserts generated text, and changes what GitHub and MkDocs read differently."""
    for name, describe in {"settings": describe_settings, "commands": describe_commands}.items():
        before, mark, after = markdown.partition(f"<!-- {name} -->")
        if mark:  # the rest of its line tells readers of the file where the list is
            markdown = before + describe() + re.sub(".*", "", after, count=1)
    return adapt_links(unescape_pipes(markdown), folder=(ROOT / "docs" / page.file.src_uri).parent)


def unescape_pipes(markdown: str) -> str:
    r"""Returns the text with `a\|b` in code inside tables as `a|b`: GitHub needs the backslash, MkDocs shows it."""

    def unescape(line: str) -> str:
        return re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line

    return "\n".join(map(unescape, markdown.split("\n")))


def adapt_links(markdown: str, *, folder: Path) -> str:
    """Returns the text without links out of `docs/`, and with links to folders of tables pointing at a table."""

    def adapt(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = (folder / target).resolve()
        if not path.is_relative_to(ROOT / "docs"):
            return f"{text} (`{path.relative_to(ROOT)}`)"
        if path.is_dir():
            table = next(name for name in ("confirmed.csv", "runs.csv") if (path / name).is_file())
            return f"[{text}]({target.rstrip('/')}/{table})"
        return link[0]

    return re.sub(r"\[([^\]\n]+)\]\(((?!https?:|#|mailto:)[^)#\s]+)\)", adapt, markdown)


def describe_commands() -> str:
    """Returns a section for each command: its usage and its arguments."""
    parser = build_parser()
    (subcommands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help for action in subcommands._choices_actions}
    return "\n\n".join(_describe_command(name, sub, helps[name]) for name, sub in subcommands.choices.items())


def _describe_command(name: str, parser: argparse.ArgumentParser, summary: str | None) -> str:
    rows = [
        (", ".join(action.option_strings) or str(action.metavar or action.dest), action.help or "")
        for action in parser._actions
        if action.dest != "help"
    ]
    table = "\n".join(f"| `{argument}` | {_escape(text)} |" for argument, text in rows)
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    return f"## {name}\n\n{summary}\n\n```text\n{usage}\n```\n\n| argument | meaning |\n|---|---|\n{table}"


def describe_settings() -> str:
    """Returns a section for each group of settings: its options, and a table of its keys."""
    return "\n\n".join(
        text
        for primary, config in PRIMARIES.items()
        for text in (f"## Settings of a {'run' if primary == 'train' else 'sweep'}", *_describe_groups(primary, config))
    )


def _describe_groups(primary: Primary, config: type) -> Iterator[str]:
    content = _read_yaml(ROOT / "conf" / f"{primary}.yaml")
    groups = default_options(primary)
    hints = get_type_hints(config, include_extras=True)
    for key, hint in hints.items():
        if key in groups:
            yield from _describe_group(key, hint, default=str(groups[key]))
        elif is_dataclass(hint):
            yield f"### {key}\n\n{_first_paragraph(hint)}\n\n{_table(list_settings(hint, key, [content[key]]))}"
    rest = [key for key in content if key not in (*groups, "defaults", "hydra") and not isinstance(content[key], dict)]
    comments = read_comments(ROOT / "conf" / f"{primary}.yaml")
    if rest:
        rows = [(key, f"`{_show(content[key])}`", OTHER_VALUES[key], comments[key]) for key in rest]
        yield f"### Others\n\n{_table(rows)}"


def _describe_group(group: str, hint: Any, *, default: str) -> Iterator[str]:
    options = {path.stem: read_option(group, path.stem) for path in sorted((ROOT / "conf" / group).glob("*.yaml"))}
    names = ", ".join(f"`{name}`" for name in options)
    yield f"### {group}\n\n`{group}=` takes {names}; the default is `{default}`."
    for kind in _list_classes(hint):
        name_type = get_type_hints(kind).get("name")
        of_kind = [name for name in options if get_origin(name_type) is not Literal or name in get_args(name_type)]
        if of_kind:
            chosen = ["causal_lm"] if group == "model" else of_kind  # other models differ from it by their path alone
            title = "" if group == "model" else ", ".join(f"`{group}={name}`" for name in of_kind)
            rows = list_settings(kind, group, [options[name] for name in chosen])
            yield f"{title}{': ' if title else ''}{_first_paragraph(kind)}\n\n{_table(rows)}"
    typed = {f.name for kind in _list_classes(hint) for f in fields(kind)}
    for name, option in options.items():
        if not typed.issuperset(option):  # arguments of a component or a schedule, described in the file
            text = (ROOT / "conf" / group / f"{name}.yaml").read_text(encoding="utf-8").rstrip()
            yield f"`{group}={name}`:\n\n```yaml\n{text}\n```"


def list_settings(kind: type, group: str, options: list[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Returns key, default, possible values and meaning of each field of a settings class, in Markdown.

    Args:
        kind: The class.
        group: Dotted key of the class's settings.
        options: The content of each file in `conf/` that has these settings. Their first values are the defaults.
    """
    hints, meanings = get_type_hints(kind, include_extras=True), read_docstrings(kind)
    rows = []
    for f in fields(kind):
        if f.name in ("name", "target", "arguments"):
            continue
        hint = hints[f.name]
        if is_dataclass(hint) and isinstance(hint, type) and not issubclass(hint, Component):
            rows += list_settings(hint, f"{group}.{f.name}", [option[f.name] for option in options if f.name in option])
            continue
        given = {str(option[f.name]): f"`{_show(option[f.name])}`" for option in options if f.name in option}
        rows.append((f"{group}.{f.name}", " or ".join(given.values()), describe_type(hint), meanings[f.name]))
    return rows


def read_docstrings(kind: type) -> dict[str, str]:
    """Returns the docstring below each field of a class, also of inherited fields; an empty text if it has none."""
    found = {f.name: "" for f in fields(kind)}
    for parent in reversed([parent for parent in kind.__mro__ if is_dataclass(parent)]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        body = node.body
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                found[statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    return found


def describe_type(hint: Any) -> str:
    """Returns the values that a type allows, such as `whole number ≥ 1, or null`."""
    if hint is type(None):
        return "`null`"
    if get_origin(hint) is Annotated:
        kind, *details = get_args(hint)
        limits = [limit for detail in details for limit in getattr(detail, "metadata", ())]
        bounds = [
            (sign, getattr(limit, name)) for limit in limits for name, sign in SIGNS.items() if hasattr(limit, name)
        ]
        return " ".join([describe_type(kind), ", ".join(f"{sign} {bound:g}" for sign, bound in bounds)]).strip()
    if get_origin(hint) is Literal:
        return ", ".join(f"`{_show(value)}`" for value in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return ", or ".join(map(describe_type, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"list of: {describe_type(get_args(hint)[0])}"
    if isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Mapping):
        return f"mapping to: {describe_type(get_args(hint)[1])}"
    if isinstance(hint, type) and issubclass(hint, Component):
        return "a class by `_target_`"
    return KINDS[hint]


def read_option(group: str, option: str) -> dict[str, Any]:
    """Returns the content of a file in `conf/` with the files that its defaults list names."""
    content = _read_yaml(ROOT / "conf" / group / f"{option}.yaml")
    parents = [name for name in content.pop("defaults", []) if name != "_self_"]
    return {key: value for name in parents for key, value in read_option(group, name).items()} | content


def read_comments(path: Path) -> dict[str, str]:
    """Returns the comment behind each top-level key of a YAML file."""
    return dict(re.findall(r"^(\w+):[^#\n]* # (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE))


def _read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def _list_classes(hint: Any) -> list[type]:
    """Returns the classes of settings in a type, which may be a union or annotated."""
    if get_origin(hint) in (Union, types.UnionType, Annotated):
        return [kind for inner in get_args(hint) for kind in _list_classes(inner)]
    return [hint] if is_dataclass(hint) and isinstance(hint, type) and not issubclass(hint, Component) else []


def _show(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("\n", "\\n") or '""'
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _first_paragraph(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    if not rows:
        return ""
    lines = [
        f"| `{key}` | {default} | {_escape(values)} | {_escape(meaning)} |" for key, default, values, meaning in rows
    ]
    return "\n".join(["| key | default | values | meaning |", "|---|---|---|---|", *lines])


def _escape(text: str) -> str:
    r"""Returns a text for a cell of a table, with `\|` for each `|` outside of code."""
    return re.sub(r"`[^`]*`|\|", lambda found: "\\|" if found[0] == "|" else found[0], " ".join(text.split()))
