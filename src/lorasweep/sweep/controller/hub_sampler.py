"""A sampler of OptunaHub (https://hub.optuna.org), for `sampler=optunahub`. Making one downloads code and runs it."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.targets import is_trusted
from lorasweep.errors import ConfigError
from lorasweep.wording import nearest

HUB = "optunahub"


class HubSampler(BaseSampler):
    """Hands every question on to a sampler from OptunaHub."""

    def __init__(self, package: str, sampler: str, *, ref: str = "main", seed: int | None = None, **arguments: Any):
        """Downloads the package, unless it is in OptunaHub's cache, and makes the sampler.

        Args:
            package: Its name in the registry, such as `samplers/auto_sampler`.
            sampler: The class in it, such as `AutoSampler`.
            ref: Branch, tag or commit of the registry. Only a commit makes a sweep that can be repeated later.
            seed: For the class, where it takes one.
            arguments: Further arguments of the class.

        Raises:
            ConfigError: OptunaHub is not trusted or not installed, or has no such sampler.
        """
        if not is_trusted(HUB):
            raise ConfigError(
                f"`sampler` must be of a package that is trusted, but {package!r} is code that OptunaHub downloads and "
                f"runs. If you know it, add `trust=[{HUB}]` to the command line."
            )
        if find_spec(HUB) is None:
            raise ConfigError(f"`sampler` needs the package {HUB!r}, which is not installed. Run `pip install {HUB}`.")
        module = import_module(HUB).load_module(package, ref=ref)
        found = getattr(module, sampler, None)
        if not (isinstance(found, type) and issubclass(found, BaseSampler)):
            near = nearest(sampler, vars(module))
            raise ConfigError(f"`sampler.sampler` must be a sampler in {package!r}, but got {sampler!r}.{near}")
        if "seed" in inspect.signature(found).parameters:
            arguments = {**arguments, "seed": seed}
        self._sampler = found(**arguments)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns what is drawn together."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Returns what is drawn together, by key."""
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Returns the value of a key that is drawn by itself."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Tells it that a trial begins."""
        self._sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """Tells it that a trial has ended."""
        self._sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Leaves the seed as it is: each proposal has its own."""
