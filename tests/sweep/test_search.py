"""What Optuna is given: seeds that depend on the history alone, and what each option of `conf/` means."""

from __future__ import annotations

import itertools

import optuna
import pytest
from optuna.distributions import FloatDistribution

from lorasweep.config.compose import compose_driver
from lorasweep.sweep.search import build_pruner, build_sampler, measure_importance, proposal_seed


def test_each_trial_of_each_arm_and_sweep_has_its_own_seed():
    seeds = [proposal_seed(*key) for key in itertools.product(range(5), ("lora", "full"), range(20))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_proposal_seed_stays_what_it_was():
    """A sweep begun by one version goes on with the next."""
    assert proposal_seed(0, "lora", 3) == 2560719527


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ("tpe", optuna.samplers.TPESampler),
        ("gp", optuna.samplers.GPSampler),
        ("cmaes", optuna.samplers.CmaEsSampler),
        ("qmc", optuna.samplers.QMCSampler),
        ("random", optuna.samplers.RandomSampler),
        ("grid", optuna.samplers.GridSampler),
    ],
)
def test_an_option_is_that_sampler(option, kind):
    config = compose_driver({"sampler": option}).sampler
    space = {"optim.lr": FloatDistribution(0.0, 1.0, step=0.5)}
    assert isinstance(build_sampler(config, space, seed=0, number=3, arm="lora"), kind)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"pruner": "hyperband"}, optuna.pruners.HyperbandPruner),
        ({"pruner": "successive_halving"}, optuna.pruners.SuccessiveHalvingPruner),
        ({"pruner": "median"}, optuna.pruners.MedianPruner),
        ({"pruner": "none"}, optuna.pruners.NopPruner),
    ],
)
def test_an_option_is_that_pruner(settings, kind):
    assert type(build_pruner(compose_driver(settings).pruner, max_steps=100)) is kind


def test_importance_is_not_guessed_from_a_few_trials_or_equal_scores():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("optim.lr", 0, 1), n_trials=3)
    assert measure_importance(study) == {}
    same = optuna.create_study()
    same.optimize(lambda trial: trial.suggest_float("optim.lr", 0, 1) * 0, n_trials=5)
    assert measure_importance(same) == {}


def test_importance_is_high_for_the_key_that_matters():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(
        lambda trial: trial.suggest_float("optim.lr", 0, 1) + 1e-6 * trial.suggest_float("method.alpha", 0, 1),
        n_trials=40,
    )
    importance = measure_importance(study)
    assert set(importance) == {"optim.lr", "method.alpha"}
    assert importance["optim.lr"] > 0.8
    assert sum(importance.values()) == pytest.approx(1.0)
