"""Which of Optuna's pruners each option of `conf/` is, and the importance of keys."""

from __future__ import annotations

import optuna
import pytest

from lorasweep.config.compose import compose_driver
from lorasweep.sweep.search import build_pruner, measure_importance


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
