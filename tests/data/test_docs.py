"""What the guide to one's own data shows is read as it says."""

import re
import shlex
from pathlib import Path

import pytest

from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import compose_run
from lorasweep.data.reading import read_source

GUIDE = (Path(__file__).parent.parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'^```\w+ title="([\w.]+)"\n(.*?)^```', GUIDE, flags=re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^lorasweep train (.*)$", GUIDE, flags=re.MULTILINE)
OTHER_COMMANDS = re.findall(r"^    lorasweep train (.*)$", GUIDE, flags=re.MULTILINE)


def data_of(command):
    settings = parse_overrides(shlex.split(command))
    return compose_run({key: value for key, value in settings.items() if key.split(".")[0] == "data"}).data


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_is_read(command, folder):
    for name, content in FILES.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "books").mkdir()
    (folder / "books" / "one.txt").write_text("a line of text\n" * 100)
    source = read_source(data_of(command))
    assert min(len(source.train), len(source.validation), len(source.test())) >= 1


@pytest.mark.parametrize("command", OTHER_COMMANDS)
def test_every_command_without_files_is_valid(command):
    assert data_of(command).path
