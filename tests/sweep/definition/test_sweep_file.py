"""A sweep file is found by path or name and read. No code that it names is run."""

import json
import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzzing import FUZZ, damage_bytes, damage_json, refusal_allowed

from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.sweep_file import find_sweep_file


def test_a_sweep_is_found_by_path_or_name(write_file, content, tmp_path, monkeypatch):
    path = write_file(content)
    assert find_sweep_file(str(path)) == path
    assert find_sweep_file("quickstart").name == "quickstart.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "quickstart.yaml").write_text("name: mine\n")
    assert find_sweep_file("quickstart") == tmp_path / "sweeps" / "quickstart.yaml"
    os.mkfifo(tmp_path / "sweeps" / "mine.yaml")
    with pytest.raises(ConfigError, match="a sweep must be one of"):
        find_sweep_file("mine")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.yaml", "a sweep file must exist, but 'nothing.yaml' does not."),
        ("some/where", "a sweep file must exist, but 'some/where' does not."),
        ("quickstat", r"a sweep must be one of .*quickstart.*, but got 'quickstat'. Did you mean `quickstart`\?"),
    ],
)
def test_a_sweep_that_is_not_there_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        find_sweep_file(name)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "[" * 100_000,
        "name: " + "9" * 5000,
        "name: !!timestamp x",
        "name: !!bool x",
        "name: !!binary aGk=",
        "a: ${b}\nb: ${a}",
        "name: !!python/object/apply:os.system ['touch ran']\narms: {a: {settings: {method: frozen}}}",
    ],
)
def test_a_file_made_to_do_harm_is_refused_and_no_code_runs(write_file, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="must be YAML, but can't be read"):
        read_definition(write_file(text), [])
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_damaged_sweep_file_is_read_or_refused(write_file, content, tmp_path, data):
    if data.draw(st.booleans()):  # JSON is YAML, too
        text = data.draw(damage_json(content))
    else:
        text = data.draw(damage_bytes(yaml.safe_dump(content).encode())).decode(errors="replace")
    path = write_file(text)
    with refusal_allowed(unchanged=tmp_path):
        json.dumps(read_definition(path, []).raw)
