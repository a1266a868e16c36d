"""Limits of YAML files that somebody else may have written."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import yaml

from lorasweep.disk import require_regular_file
from lorasweep.errors import ConfigError
from lorasweep.wording import format_bytes

MAX_YAML_BYTES = 2**18
"""Maximum size of a file. A larger one would be read for many seconds."""

MAX_VALUES = 10_000
"""Maximum number of values of a file with its aliases written out, which can multiply. So many take 8 s."""


def require_small_yaml(path: Path, *, what: str) -> None:
    """Raises ConfigError if a YAML file is too large, and errors of PyYAML and of the system if it can't be read."""
    require_regular_file(path)
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise ConfigError(
            f"{what} must have at most {format_bytes(MAX_YAML_BYTES)}, but {str(path)!r} has {format_bytes(size)}."
        )
    if _count_values(yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader), {}) > MAX_VALUES:
        raise ConfigError(
            f"{what} must have at most {MAX_VALUES:,} values, but {str(path)!r} has more when its aliases "
            "(`*name`) are written out."
        )


def _count_values(node: yaml.Node | None, counts: dict[int, float]) -> float:
    """Returns the number of values of a YAML node with its aliases written out; infinity if one contains itself."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = math.inf  # until it is counted
        children = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]
