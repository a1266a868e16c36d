"""How much each swept key explains of the score."""

from __future__ import annotations

import optuna
import pytest

from lorasweep.sweep.controller.record_rows import measure_importance


def test_importance_is_not_guessed_from_a_few_trials_or_equal_scores():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("optim.lr", 0, 1), n_trials=19)
    assert measure_importance(study.get_trials()) == {}
    same = optuna.create_study()
    same.optimize(lambda trial: trial.suggest_float("optim.lr", 0, 1) * 0, n_trials=20)
    assert measure_importance(same.get_trials()) == {}


def test_importance_is_high_for_the_key_that_matters():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(
        lambda trial: trial.suggest_float("optim.lr", 0, 1) + 1e-6 * trial.suggest_float("method.alpha", 0, 1),
        n_trials=40,
    )
    importance = measure_importance(study.get_trials())
    assert set(importance) == {"optim.lr", "method.alpha"}
    assert importance["optim.lr"] > 0.8
    assert sum(importance.values()) == pytest.approx(1.0)
