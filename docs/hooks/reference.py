"""Writes the parts of the site that come from the code: settings, commands, keys of JSON, and files of the root folder.

MkDocs calls `on_files` and `on_page_markdown` (mkdocs.yml, `hooks`). The other functions need only lorasweep.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from lorasweep.cli import build_parser
from lorasweep.config.compose import Primary, default_options
from lorasweep.config.reference import list_settings, read_docstrings
from lorasweep.sweep.cost import Rates

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""Files of the root folder that are also pages of the site."""
PRIMARIES: Mapping[Primary, str] = {"train": "run", "sweep": "sweep"}
JSON_CLASSES = {"groups": {"groups.": Rates}}
"""By the place in `reference/json.md`, the classes whose fields are keys there, each by the start of its keys."""


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
    of_json = {name: partial(describe_fields, classes) for name, classes in JSON_CLASSES.items()}
    for name, describe in {"settings": describe_settings, "commands": describe_commands, **of_json}.items():
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
    """Returns a section for each command, with the text of `lorasweep help COMMAND`."""
    (subcommands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return "\n\n".join(
        f"## {name}\n\n```text\n{sub.format_help().rstrip()}\n```" for name, sub in subcommands.choices.items()
    )


def describe_fields(classes: Mapping[str, type]) -> str:
    """Returns a table of the fields of dataclasses, with their docstrings."""
    found = [(start + name, text) for start, kind in classes.items() for name, text in read_docstrings(kind).items()]
    return "\n".join(["| key | content |", "|---|---|", *(f"| `{key}` | {_escape(text)} |" for key, text in found)])


def describe_settings() -> str:
    """Returns a section for each group of settings, with the texts of `lorasweep help KEY` in tables."""
    return "\n\n".join(
        text
        for primary, title in PRIMARIES.items()
        for text in (f"## Settings of a {title}", *_describe_groups(primary))
    )


def _describe_groups(primary: Primary) -> Iterator[str]:
    defaults = default_options(primary)
    for group, of_group in groupby(list_settings(primary), key=lambda setting: setting.key.partition(".")[0]):
        names = ", ".join(f"`{path.stem}`" for path in sorted((ROOT / "conf" / group).glob("*.yaml")))
        takes = f"\n\n`{group}=` takes {names}; the default is `{defaults[group]}`." if group in defaults else ""
        yield f"### {group}{takes}"
        for (options, about), settings in groupby(of_group, key=lambda setting: (setting.options, setting.about)):
            title = ", ".join(f"`{group}={name}`" for name in options)
            rows = [
                f"| `{one.key}` | {one.default} | {_escape(one.values)} | {_escape(one.meaning)} |" for one in settings
            ]
            table = "\n".join(["| key | default | values | meaning |", "|---|---|---|---|", *rows])
            yield f"{title}{': ' if title else ''}{about}\n\n{table}"


def _escape(text: str) -> str:
    r"""Returns a text for a cell of a table, with `\|` for each `|` outside of code."""
    return re.sub(r"`[^`]*`|\|", lambda found: "\\|" if found[0] == "|" else found[0], " ".join(text.split()))
