"""Optuna's pruners, made from a sweep's settings, and the importance of keys."""

from __future__ import annotations

import warnings

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner

from lorasweep.config.sweep import MedianPruner as MedianPrunerConfig
from lorasweep.config.sweep import PrunerConfig, RungPruner


def build_pruner(config: PrunerConfig, *, max_steps: int) -> BasePruner:
    """Returns the pruner of an arm whose runs have `max_steps` optimizer steps; Optuna's resource is the step."""
    if isinstance(config, RungPruner):
        if config.name == "hyperband":
            return HyperbandPruner(
                min_resource=config.min_steps, max_resource=max_steps, reduction_factor=config.reduction_factor
            )
        return SuccessiveHalvingPruner(min_resource=config.min_steps, reduction_factor=config.reduction_factor)
    if isinstance(config, MedianPrunerConfig):
        return MedianPruner(n_startup_trials=config.startup_trials, n_warmup_steps=config.min_steps)
    return NopPruner()


def measure_importance(study: optuna.Study) -> dict[str, float]:
    """Returns each swept key's share of the score's variance (PED-ANOVA, arXiv 2304.10255), if 4 trials ended."""
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < 4 or len({trial.value for trial in complete}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
