"""The examples in the guide to sweeps work: its file is a sweep, and its overrides are taken."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lorasweep.config.command_line import parse_overrides
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.confirm import draw_confirm_seeds
from lorasweep.sweep.definition.grow import grow_definition
from lorasweep.sweep.definition.warnings import find_warnings

GUIDE = (Path(__file__).parent.parent.parent / "docs" / "sweeps.md").read_text(encoding="utf-8")
FILE, RETAIN = re.findall(r"^```yaml\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)
LINES = [line for line in GUIDE.splitlines() if line.startswith("    ")]
OVERRIDES = [line for line in LINES if "=" in line and "lorasweep" not in line]
GROWTH = [line for line in LINES if "sweep --resume outputs/ranks " in line]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ranks.yaml"
    path.write_text(FILE)
    return path


def test_the_file_is_a_fair_sweep_with_a_confirm_stage(file):
    definition = read_definition(file, [])
    assert [arm.name for arm in definition.arms] == ["frozen", "full", "lora"]
    assert find_warnings(definition) == []
    assert len(draw_confirm_seeds(definition)) == max(definition.sweep_config.confirm.looks)


def test_the_retained_data_sets_are_taken(file):
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
