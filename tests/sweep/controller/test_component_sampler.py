"""Samplers by `_target_`: any class of Optuna's proposes as it would in Optuna, and the same again from the journal."""

import json
from dataclasses import replace

import pytest
from tests.sweep.controller.conftest import ask_for_proposal, make_arm, make_trial

from lorasweep.config.components import Component
from lorasweep.config.data import ScoreMetric
from lorasweep.errors import ConfigError
from lorasweep.sweep.controller.encoding import History
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.definition.ranges import Range

SPACE = {
    "method.rank": Range(choices=[16, 1, 4]),
    "optim.lr": Range(low=1e-4, high=1e-2, log=True),
    "trainer.max_steps": Range(low=1, high=50, is_whole=True),
}


def named(target, **arguments):
    return Component(target=target, arguments=arguments)


def search(sampler, *, trials, space=SPACE, seed=0, arm="lora"):
    """Proposes trials one after another, each complete before the next, and returns their parameters and states."""
    found, states = [], []
    for number in range(trials):
        asked = make_arm(space, sampler, name=arm, seed=seed)
        params, kept = propose(
            asked, History(asked, found, metric=ScoreMetric(name="loss", direction="minimize")), number=number
        )
        states.append(json.loads(json.dumps(kept)))  # as the journal keeps it
        trial = make_trial(params, search_score=float(number % 3), sampler_state=states[-1])
        found.append(replace(trial, number=number))
    return [trial.params for trial in found], states


@pytest.mark.parametrize(
    "sampler",
    [
        named("optuna.samplers.TPESampler", multivariate=True, n_startup_trials=3),
        named("optuna.samplers.NSGAIISampler", population_size=4),
        named(
            "optuna.samplers.PartialFixedSampler",
            fixed_params={"trainer.max_steps": 7},
            base_sampler={"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 2},
        ),
    ],
    ids=lambda sampler: sampler.name,
)
@pytest.mark.filterwarnings("ignore:.*independent sampling")
def test_a_sampler_of_optunas_proposes_the_same_from_the_same_seed(sampler):
    first, again, other = (search(sampler, trials=9, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again != other
    assert len({tuple(params.values()) for params in first}) > 6
    assert all(params["method.rank"] in (1, 4, 16) and 1e-4 <= params["optim.lr"] <= 1e-2 for params in first)
    if sampler.name == "PartialFixedSampler":
        assert {params["trainer.max_steps"] for params in first} == {7}


def test_what_a_sampler_keeps_of_trials_is_handed_to_it_again():
    _, states = search(named("optuna.samplers.NSGAIISampler", population_size=4), trials=9)
    generations = [state["trial"]["NSGAIISampler:generation"] for state in states]
    assert generations == [0] * 4 + [1] * 4 + [2]


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (named("optuna.samplers.TPESampler", startup=3), "`sampler` must have arguments that 'optuna.samplers.TPESamp"),
        (named("optuna.samplers.GridSampler", search_space={"x": [1]}), "must be able to propose a trial for the spac"),
    ],
)
def test_what_is_no_sampler_is_refused_in_one_sentence(sampler, message):
    with pytest.raises(ConfigError, match=message) as refused:
        ask_for_proposal(make_arm(SPACE, sampler), [])
    assert "\n" not in str(refused.value)
