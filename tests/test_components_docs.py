"""The page on parts says what is so: each of its commands composes, and it names every shipped option."""

import shlex
from pathlib import Path

import pytest

from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import compose_run
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.sweep_file import find_sweep_file

PAGE = (Path(__file__).parent.parent / "docs" / "components.md").read_text(encoding="utf-8")
COMMANDS = [line for line in PAGE.splitlines() if line.startswith("lorasweep ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_composes(line):
    _, command, *words = shlex.split(line)
    if command == "train":
        compose_run(parse_overrides(words))
    else:
        read_definition(find_sweep_file(words[0]), words[1:])
