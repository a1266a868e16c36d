"""A setting that makes a comparison less fair gets a warning before the first trial; a fair one gets none."""

import pytest

from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.warnings import find_warnings

RATES = {"low": 1e-3, "high": 1e-1, "log": True}


@pytest.fixture
def warnings(write_file, content):
    """Returns the warnings of a sweep with one LoRA arm beside `full`, both with 3 trials."""

    def of(lora, *overrides, settings=None):
        content["arms"]["lora"] = {"settings": {"method": "lora"}, "space": {"optim.lr": RATES}, "trials": 3} | lora
        content["settings"] |= settings or {}
        return find_warnings(read_definition(write_file(content), overrides))

    return of


def test_a_fair_sweep_is_not_warned_of(warnings):
    assert warnings({}) == []


def test_unequal_numbers_of_trials_are_warned_of(warnings):
    (warning,) = warnings({"trials": 6})
    assert warning.startswith("Arms have unequal numbers of trials (full 3, lora 6): ")
    assert warnings({"trials": 6}, "sweep.trials=4") == []


def test_unequal_tokens_per_trial_are_warned_of(warnings):
    (warning,) = warnings({"settings": {"trainer.max_steps": 16}})
    assert warning.startswith("Arms train on unequal numbers of tokens per trial (full 4,096, lora 8,192): ")


def test_fewer_than_three_seeds_are_warned_of(warnings):
    for count in (1, 2):
        (warning,) = warnings({}, f"confirm.seeds={count}")
        assert warning.startswith(f"`confirm.seeds` is {count}")
    assert warnings({}, "confirm.seeds=3") == []


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
    folder = begin(content, "arms.lora.trials=9", "arms.full.trainer.max_steps=16")
    folder.close()
    assert folder.record.warnings == find_warnings(folder.definition)
    assert len(folder.record.warnings) == 2
