"""Third-party parts of a sweep that its settings name by `_target_`: imported, checked and made."""

from __future__ import annotations

from pkgutil import resolve_name

from hydra.utils import instantiate
from omegaconf import OmegaConf
from optuna.pruners import BasePruner

from lorasweep.config.sweep import OptunaPruner
from lorasweep.errors import ConfigError, describe_error


def build_pruner(config: OptunaPruner) -> BasePruner:
    """Returns the pruner that `pruner._target_` names, made with the other keys of `pruner`.

    Importing the class runs the code of its module.

    Raises:
        ConfigError: There is no such class, it is no pruner, or it does not take these arguments.
    """
    try:
        found = resolve_name(config.target)  # Hydra's own look-up also logs what goes wrong, on several lines
    except Exception as error:  # whatever the module raises while it is imported
        raise ConfigError(
            f"`pruner._target_` must be the import path of a class, but got {config.target!r}: {describe_error(error)}."
        ) from error
    if not (isinstance(found, type) and issubclass(found, BasePruner)):
        raise ConfigError(
            f"`pruner._target_` must be a subclass of `optuna.pruners.BasePruner`, but {config.target!r} is none."
        )
    try:
        nested = OmegaConf.create({"_target_": config.target, "_convert_": "all"})
        for key, value in config.arguments.items():  # a key with dots is of a pruner inside of this one
            OmegaConf.update(nested, key, value)
        pruner: BasePruner = instantiate(nested)
    except Exception as error:  # whatever the class raises
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ConfigError(
            f"`pruner` must have arguments that {config.target!r} takes, but got {dict(config.arguments)!r}: "
            f"{describe_error(cause)}."
        ) from error
    return pruner
