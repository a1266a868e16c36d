"""A sweep's file is found by path or name and read; nothing that it names is run, and a damaged one is one sentence."""

from __future__ import annotations

import random

import pytest

from lorasweep.config.compose import packaged_folder
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.sweep_file import find_sweep_file

FRAGMENTS = (
    *(b"*a", b"&a ", b"[", b"{", b"!!python/name:os.system ", b"!!binary x", b"${", b"}", b"\0", b"\xff", b": ", b"- "),
    *(b"<<: ", b"9" * 5000, b"1e999", b"\n", b"---\n", b"? ", b"|\n", b"%YAML 9\n", b"\t", b".nan", b"0x" + b"f" * 400),
)
NUM_MUTANTS = 200


def test_a_sweep_is_found_by_path_or_name(write_file, content, tmp_path, monkeypatch):
    path = write_file(content)
    assert find_sweep_file(str(path)) == path
    assert find_sweep_file("quickstart").name == "quickstart.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "quickstart.yaml").write_text("name: mine\n")
    assert find_sweep_file("quickstart") == tmp_path / "sweeps" / "quickstart.yaml"


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


def test_aliases_that_a_person_writes_are_read(write_file):
    arm = "settings: {method: lora}, space: {optim.lr: &lr {low: 1.0e-3, high: 1.0e-1, log: true}}"
    path = write_file(
        f"name: x\narms:\n  a: {{{arm}}}\n  b: {{settings: {{method: full}}, space: {{optim.lr: *lr}}}}\n"
    )
    assert [arm.name for arm in read_definition(path, []).arms] == ["a", "b"]


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"]
)
def test_a_file_that_names_code_runs_none(write_file, tmp_path, tag):
    path = write_file(f"name: !!{tag} ['touch {tmp_path}/ran']\narms: {{a: {{settings: {{method: frozen}}}}}}\n")
    with pytest.raises(ConfigError, match="must be a YAML file, but can't be read: could not determine a constructor"):
        read_definition(path, [])
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_is_one_sentence_or_a_sweep(write_file):
    whole, rng = (packaged_folder("sweeps") / "quickstart.yaml").read_bytes(), random.Random(0)
    path, refused = write_file(""), []
    for _ in range(NUM_MUTANTS):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content))
            content[place : place + rng.choice((0, 0, 1, 20))] = rng.choice(FRAGMENTS)
        path.write_bytes(content)
        try:
            read_definition(path, [])
        except ConfigError as error:
            refused.append(str(error))
    assert len(refused) > NUM_MUTANTS / 2
    assert not [message for message in refused if "\n" in message]
