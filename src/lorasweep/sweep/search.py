"""Optuna's samplers and pruners, made from a sweep's settings."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, GridSampler, QMCSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.sweep import MedianPruner as MedianPrunerConfig
from lorasweep.config.sweep import ModelBasedSampler, PrunerConfig, RungPruner, SamplerConfig
from lorasweep.sweep.space import Space, grid_values
from lorasweep.sweep.window import WindowedTPE


class Grid(GridSampler):
    """Every combination once. It does not stop the study after the last, as Optuna's does: the worker counts trials."""

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Called by Optuna when a trial ended; outside of its own loop there is nothing to stop."""


def proposal_seed(seed: int, arm: str, number: int) -> int:
    """Returns the sampler's seed for one trial, so that what is proposed depends on the history alone.

    A resumed sweep then asks for the same trials as one that was never interrupted.
    """
    return zlib.crc32(f"{seed}/{arm}/{number}".encode())


def build_sampler(config: SamplerConfig, space: Space, *, seed: int, number: int, arm: str) -> BaseSampler:
    """Returns the sampler for trial `number` of an arm. QMC and grid keep one seed: their points form one set."""
    each, whole = proposal_seed(seed, arm, number), proposal_seed(seed, arm, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if isinstance(config, ModelBasedSampler):
            if config.name == "tpe":
                return WindowedTPE(n_startup_trials=config.startup_trials, seed=each)
            if config.name == "gp":
                return GPSampler(n_startup_trials=config.startup_trials, seed=each, warn_independent_sampling=False)
            return CmaEsSampler(n_startup_trials=config.startup_trials, seed=each, warn_independent_sampling=False)
        if config.name == "qmc":
            return QMCSampler(scramble=True, seed=whole, warn_independent_sampling=False)
        if config.name == "grid":
            return Grid({key: grid_values(key, d) for key, d in space.items()}, seed=whole)
        return RandomSampler(seed=each)


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
