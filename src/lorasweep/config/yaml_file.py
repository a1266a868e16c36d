"""Reads a YAML file that may come from a stranger. Tags run no code, and aliases can't multiply."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from lorasweep.disk import require_regular_file

MAX_BYTES = 2**20
"""Maximum size of a file. PyYAML would take minutes to read a much larger one."""
MAX_VALUES = 100_000
"""Maximum number of values if each alias is written out. Ten lines of aliases can stand for a billion values."""


def load_yaml(path: Path) -> Any:
    """Returns the content of a YAML file as OmegaConf reads it.

    Raises:
        ValueError: It is too large.
        Exception: It is missing or no YAML. PyYAML raises errors of many classes for a wrong tag.
    """
    require_regular_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    text = path.read_text(encoding="utf-8")
    if _count_values(yaml.compose(text, Loader=yaml.SafeLoader), known={}) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES:,} values, with each alias written out")
    return OmegaConf.load(io.StringIO(text))


def _count_values(node: Any, *, known: dict[int, int]) -> int:
    """Returns the number of values in a YAML node. `known` has the numbers of nodes that were counted, by `id`."""
    if id(node) not in known:
        known[id(node)] = MAX_VALUES  # of an alias that is inside its own anchor
        items = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for item in items for child in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_count_values(child, known=known) for child in children)
    return known[id(node)]
