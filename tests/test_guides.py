"""The guides are true: files and commands are read, overrides are taken."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import compose_run
from lorasweep.sweep.controller.lifecycle import grow_definition
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.confirm import draw_confirm_seeds, find_warnings
from lorasweep.sweep.definition.sweep_file import find_sweep_file
from lorasweep.tasks.task import read_source

pytestmark = pytest.mark.docs
DOCS = Path(__file__).parents[1] / "docs"
SWEEPS, PARTS, *DATA_PAGES = (
    (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("sweeps", "components", "data", "chats")
)
DATA = "\n".join(DATA_PAGES)
FILES = dict(re.findall(r'^```\w+ title="([\w.]+)"\n(.*?)^```', DATA, flags=re.MULTILINE | re.DOTALL))
COMMANDS = [
    words for words in re.findall(r"^lorasweep train (.*)$", DATA, flags=re.MULTILINE) if "model=causal_lm" not in words
]
FILE, RETAIN = re.findall(r"^```yaml\n(.*?)^```", SWEEPS, flags=re.MULTILINE | re.DOTALL)
LINES = [line for line in SWEEPS.splitlines() if line.startswith("    ")]
OVERRIDES = [line for line in LINES if "=" in line and "lorasweep" not in line]
GROWTH = [line for line in LINES if "sweep --resume outputs/ranks " in line]


def data_of(command):
    settings = parse_overrides(shlex.split(command))
    return compose_run({key: value for key, value in settings.items() if key.split(".")[0] == "data"}).data


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_is_read(command, here):
    for name, content in FILES.items():
        (here / name).write_text(content, encoding="utf-8")
    (here / "books").mkdir()
    (here / "books" / "one.txt").write_text("a line of text\n" * 100)
    source = read_source(data_of(command))
    assert min(len(source.train), len(source.validation), len(source.test())) >= 1


@pytest.mark.parametrize("command", re.findall(r"^    lorasweep train (.*)$", DATA, flags=re.MULTILINE))
def test_every_command_without_files_is_valid(command):
    assert data_of(command).path


@pytest.mark.parametrize("line", [line for line in PARTS.splitlines() if line.startswith("lorasweep ")])
def test_each_command_of_the_page_on_parts_composes(line):
    _, command, *words = shlex.split(line)
    if command == "train":
        compose_run(parse_overrides(words))
    else:
        read_definition(find_sweep_file(words[0]), words[1:])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ranks.yaml"
    path.write_text(FILE)
    return path


def test_the_file_is_a_fair_sweep_with_a_confirm_stage_and_retained_data_sets(file):
    definition = read_definition(file)
    assert [arm.name for arm in definition.arms] == ["frozen", "full", "lora"]
    assert find_warnings(definition) == []
    assert len(draw_confirm_seeds(definition)) == max(definition.sweep_config.confirm.seeds)
    content = yaml.safe_load(FILE)
    content["settings"] |= yaml.safe_load(RETAIN)["settings"]
    definition = read_definition(content)
    assert {name: data.name for name, data in definition.retained.items()} == {"code": "stdlib_code", "old": "text"}


@pytest.mark.parametrize("line", OVERRIDES, ids=lambda line: line.split("#")[0].strip())
def test_each_override_is_taken(file, line):
    (override,) = shlex.split(line, comments=True)
    assert read_definition(file, [override]).raw["overrides"]


@pytest.mark.parametrize("line", GROWTH, ids=lambda line: line.split("outputs/ranks ")[1].split("#")[0].strip())
def test_each_way_to_grow_is_taken(file, line):
    words = shlex.split(line, comments=True)[4:]
    old = read_definition(file)
    assert grow_definition(old, changes=parse_overrides(words)).raw != old.raw
