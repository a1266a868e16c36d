"""A sweep file of a few lines can't take a machine's memory or time, and nothing that it names is run."""

from __future__ import annotations

import random
import resource

import pytest

from lorasweep.config.compose import packaged_folder
from lorasweep.errors import ConfigError
from lorasweep.sweep import read_definition
from lorasweep.sweep.yaml_bounds import MOST_BYTES

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
FRAGMENTS = (
    *(b"*a", b"&a ", b"[", b"{", b"!!python/name:os.system ", b"!!binary x", b"${", b"}", b"\0", b"\xff", b": ", b"- "),
    *(b"<<: ", b"9" * 5000, b"1e999", b"\n", b"---\n", b"? ", b"|\n", b"%YAML 9\n", b"\t", b".nan", b"0x" + b"f" * 400),
)
NUM_MUTANTS = 200


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "it stands for more"),
        ("name: " + "[" * 5000, "it is deeper"),
        ("name: " + "{a: " * 5000 + "1" + "}" * 5000, "it is deeper"),
        ("name: &a [*a]", "`*a` contains itself"),
        ("name: &a {b: *a}", "`*a` contains itself"),
        ("x: [" + "1," * 100_000 + "]", "it stands for more"),
    ],
    ids=["laughs", "deep lists", "deep mappings", "list in itself", "mapping in itself", "long"],
)
def test_a_file_that_stands_for_too_much_is_refused_before_it_is_built(write_file, text, reason):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = write_file(text)
    with pytest.raises(
        ConfigError, match="must be a sweep file with at most 100,000 values, 32 levels deep"
    ) as refused:
        read_definition(path, [])
    assert f"but {reason}. Write it out without aliases." in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10  # KiB


def test_a_file_that_is_too_large_is_refused(write_file):
    path = write_file("name: x" + " " * MOST_BYTES)
    with pytest.raises(ConfigError, match="must be a sweep file of at most 1 MiB, but is larger"):
        read_definition(path, [])


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


def test_interpolations_that_multiply_are_refused(write_file):
    path = write_file("a0: x\n" + "".join(f"a{n}: '{f'${{a{n - 1}}}' * 10}'\n" for n in range(1, 12)))
    with pytest.raises(ConfigError, match="settings must have at most 16 interpolations"):
        read_definition(path, [])


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
