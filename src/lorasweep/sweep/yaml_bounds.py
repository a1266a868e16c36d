"""What a sweep's YAML file may ask of a reader: looked at in its events, before anything of it is built.

A few lines of YAML can stand for more than a machine holds: an alias of a list of aliases. Comes before `sweep_file`.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from lorasweep.errors import ConfigError

MOST_BYTES = 2**20
MOST_NODES = 100_000
"""Values, keys, lists and mappings, each as often as an alias repeats it."""
MOST_DEPTH = 32


def check_bounds(source: Path) -> None:
    """Makes sure that a YAML file is small when all of its aliases are written out.

    Raises:
        ConfigError: It is too large, nested too deeply, or a value contains itself.
        YAMLError: It is no YAML.
        OSError: It can't be read.
    """
    with source.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{str(source)!r} must be a sweep file of at most {MOST_BYTES >> 20} MiB, but is larger.")
    if reason := _what_is_too_much(content.decode()):
        raise ConfigError(
            f"{str(source)!r} must be a sweep file with at most {MOST_NODES:,} values, {MOST_DEPTH} levels deep, "
            f"but {reason}. Write it out without aliases."
        )


def _what_is_too_much(text: str) -> str | None:
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and how many nodes there were before it
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                return f"`*{event.anchor}` contains itself"
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - before
        if count > MOST_NODES:
            return "it stands for more"
        if len(open_nodes) > MOST_DEPTH:
            return "it is deeper"
    return None
