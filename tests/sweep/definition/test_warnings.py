"""A setting that makes a comparison less fair gets a warning before the first trial; a fair one gets none."""

import pytest

from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.confirm import find_warnings

RATES = {"low": 1e-3, "high": 1e-1, "log": True}


@pytest.fixture
def warnings(write_file, content):
    """Returns the warnings of a sweep with one LoRA arm beside `full`, both with 3 trials."""

    def of(lora, *overrides, settings=None):
        content["arms"]["lora"] = {"settings": {"method": "lora"}, "space": {"optim.lr": RATES}, "trials": 3} | lora
        content["settings"] |= settings or {}
        return find_warnings(read_definition(write_file(content), overrides))

    return of


@pytest.mark.parametrize(
    ("lora", "words", "start"),
    [
        (
            {"settings": {"trainer.max_steps": 16}},
            [],
            "Arms train on unequal numbers of tokens per trial (full 4,096, lora 8,192): ",
        ),
        ({}, ["confirm.seeds=1"], "`confirm.seeds` is 1"),
        ({}, ["confirm.seeds=2"], "`confirm.seeds` is 2"),
    ],
)
def test_what_is_not_fair_is_warned_of(warnings, lora, words, start):
    (warning,) = warnings(lora, *words)
    assert warning.startswith(start)
    assert warnings({"trials": 6}, "confirm.seeds=3") == []  # an arm with more dimensions needs more trials


@pytest.mark.parametrize("method", ["full", "frozen"])
def test_a_margin_that_no_arm_can_measure_is_warned_of(warnings, content, method):
    assert warnings({}, "confirm.seeds=3") == []
    del content["arms"][method]
    (warning,) = warnings({}, "confirm.seeds=3")
    assert warning.startswith("`confirm.margin` is 5%")
    assert f"no arm with `method={method}`" in warning
    assert warnings({}, "confirm.seeds=3", "confirm.margin=0.01") == []
    assert warnings({}, "confirm.seeds=0") == []


def test_warnings_are_in_the_record(begin, content):
    folder = begin(content, "confirm.seeds=2", "arms.full.trainer.max_steps=16")
    folder.close()
    assert folder.record.warnings == find_warnings(folder.definition)
    assert len(folder.record.warnings) == 2
