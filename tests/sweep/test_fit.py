"""`--minutes`: what a time that is too short gives up, and in which order."""

from __future__ import annotations

import pytest

import lorasweep.sweep.fit as fit_file
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition, restore_definition
from lorasweep.sweep.definition.sweep_file import find_sweep_file
from lorasweep.sweep.fit import fit_minutes
from lorasweep.sweep.plan import GroupPlan


@pytest.fixture
def definition(monkeypatch):
    """The quickstart with 240 steps, of which each takes a tenth of a second."""

    def measure(definition, inputs_cache, **_):
        zeros = {"loading_s": 0.0, "evaluation_s": 0.0, "test_ratio": 0.0, "record": None, "kept_bytes": 0}
        return [
            GroupPlan(arms=(arm,), slots=1, reason="", step_s=0.1, trained_params={}, **zeros)
            for arm in definition.arms
        ]

    monkeypatch.setattr(fit_file, "plan_sweep", measure)
    return read_definition(find_sweep_file("quickstart"), ["trainer.max_steps=240"])


def fit(definition, minutes):
    fitted, groups, given_up = fit_minutes(definition, minutes, None, on_progress=print)
    assert [group.arms[0] for group in groups] == list(fitted.arms)
    arm = fitted.find_arm("lora")
    return (arm.trials, arm.corner_configs[0].num_steps, fitted.sweep_config.confirm.looks), given_up


def test_seeds_go_first_then_trials_then_steps(definition):
    # 2 arms of 16 trials and 5 subjects of 10 seeds, 24 s each: 32.8 minutes
    assert fit(definition, 33)[0] == (16, 240, (3, 6, 10))
    assert fit(definition, 32)[0] == (16, 240, (3, 6))
    assert fit(definition, 16.5)[0] == (12, 240, (3,))
    found, given_up = fit(definition, 12)
    assert found == (16, 120, (3,))
    assert "3 of 10 seeds" in given_up
    assert "120 of 240 steps" in given_up


def test_a_time_that_is_too_short_is_refused_with_the_shortest(definition):
    with pytest.raises(ConfigError, match=r"`--minutes` must be at least \d+ .* but got 0.5") as raised:
        fit(definition, 0.5)
    helps = ("`arms.full=null`", "`method.rank`", "`confirm.seeds`", "`data.block_length`")
    assert [name for name in helps if name not in str(raised.value)] == []
    without_full = restore_definition({**definition.raw, "overrides": {"arms.full": None}}, source=definition.source)
    with pytest.raises(ConfigError) as raised:
        fit(without_full, 0.5)
    assert "arms.full" not in str(raised.value)
