"""No setting of a sweep is out of range."""

import pytest

from lorasweep.config.components import Component
from lorasweep.config.compose import compose_sweep
from lorasweep.config.sweep import parse_margin
from lorasweep.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "cmaes"}, "`sampler` must be one of gp, grid, qmc, random, tpe, but got 'cmaes'."),
        ({"worker.num": 2}, "`worker.num` must be 1 .*, but got 2. .* `worker=ray worker.num=2`"),
        ({"confirm": "no"}, "`confirm` must be a group of settings, but got 'no'."),
        ({"confirm.seeds": "many"}, "`confirm.seeds` must be a whole number, but got 'many'.*'auto'"),
        *(({"confirm.looks": looks}, "`confirm.looks` must be ascending") for looks in ([], [6, 3], [3, 3], [3, 1001])),
        *(
            ({"confirm.pairs": pairs}, "`confirm.pairs` must be pairs of two different arms")
            for pairs in ([["lora"]], [["lora", "lora"]], [["lora", "full", "dora"]], [["a", "b"], []])
        ),
        *(
            ({"confirm.margin": margin}, f"`confirm.margin` must be a positive number.* but got {margin!r}")
            for margin in (0.0, -0.1, "0%", "100%", "five", "%")
        ),
        ({"confirm.seed": 3}, r"`confirm.seed` is not a setting. Did you mean `confirm.seeds`\?"),
        ({"sampler": "qmc", "sampler.startup_trials": 3}, "`sampler.startup_trials` is not a setting."),
    ],
)
def test_a_sweep_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        compose_sweep(settings)


@pytest.mark.parametrize(
    ("margin", "value", "is_share"), [("5%", 0.05, True), ("2.5 %", 0.025, True), (0.01, 0.01, False), (2, 2, False)]
)
def test_a_margin_is_a_share_of_the_gain_or_a_number(margin, value, is_share):
    found = parse_margin(compose_sweep({"confirm.margin": margin}).confirm.margin)
    assert (found.value, found.is_share_of_gain) == (pytest.approx(value), is_share)


def test_a_sampler_of_the_users_own_takes_any_argument_and_the_place_of_ours():
    nested = {"sampler.base_sampler._target_": "optuna.samplers.RandomSampler", "sampler.base_sampler.seed": 3}
    sweep_config = compose_sweep({"sampler._target_": "optuna.samplers.PartialFixedSampler", **nested})
    inner = {"_target_": "optuna.samplers.RandomSampler", "seed": 3}
    assert sweep_config.sampler == Component(
        target="optuna.samplers.PartialFixedSampler", arguments={"base_sampler": inner}
    )
