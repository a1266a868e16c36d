"""The examples in the guides to sweeps and parts work: files are sweeps, overrides are taken, commands compose."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import compose_run
from lorasweep.sweep.controller.lifecycle import grow_definition
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.confirm import draw_confirm_seeds
from lorasweep.sweep.definition.sweep_file import find_sweep_file
from lorasweep.sweep.definition.warnings import find_warnings

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "sweeps.md").read_text(encoding="utf-8")
PARTS = (DOCS / "components.md").read_text(encoding="utf-8")
FILE, RETAIN = re.findall(r"^```yaml\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)
LINES = [line for line in GUIDE.splitlines() if line.startswith("    ")]
OVERRIDES = [line for line in LINES if "=" in line and "lorasweep" not in line]
GROWTH = [line for line in LINES if "sweep --resume outputs/ranks " in line]


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
    definition = read_definition(file, [])
    assert [arm.name for arm in definition.arms] == ["frozen", "full", "lora"]
    assert find_warnings(definition) == []
    assert len(draw_confirm_seeds(definition)) == max(definition.sweep_config.confirm.looks)
    content = yaml.safe_load(FILE)
    content["settings"] |= yaml.safe_load(RETAIN)["settings"]
    definition = read_definition(content, [])
    assert {name: data.name for name, data in definition.retained.items()} == {"code": "stdlib_code", "old": "text"}


@pytest.mark.parametrize("line", OVERRIDES, ids=lambda line: line.split("#")[0].strip())
def test_each_override_is_taken(file, line):
    (override,) = shlex.split(line, comments=True)
    assert read_definition(file, [override]).raw["overrides"]


@pytest.mark.parametrize("line", GROWTH, ids=lambda line: line.split("outputs/ranks ")[1].split("#")[0].strip())
def test_each_way_to_grow_is_taken(file, line):
    words = shlex.split(line, comments=True)[4:]
    old = read_definition(file, [])
    assert grow_definition(old, changes=parse_overrides(words)).raw != old.raw
