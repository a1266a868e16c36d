"""How much of the score's variance each swept key explains, by Optuna."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

MIN_TRIALS = 4


def measure_importance(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Returns each swept key's share of the score's variance (PED-ANOVA, arXiv 2304.10255).

    Empty where fewer than `MIN_TRIALS` trials are complete, or all of them have the same score.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(complete) < MIN_TRIALS or len({trial.value for trial in complete}) < 2:
        return {}
    study = optuna.create_study()
    study.add_trials(complete)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
