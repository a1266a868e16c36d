"""Third-party parts of a sweep that its settings name by `_target_`: imported, checked and made."""

from __future__ import annotations

from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from optuna.pruners import BasePruner

from lorasweep.config.named import describe_error
from lorasweep.config.sweep import OptunaPruner
from lorasweep.errors import ConfigError, first_line


def build_pruner(config: OptunaPruner) -> BasePruner:
    """Returns the pruner that `pruner._target_` names, made with the other keys of `pruner`.

    Importing the class runs the code of its module.

    Raises:
        ConfigError: There is no such class, it is no pruner, or it does not take these arguments.
    """
    try:
        found = get_class(config.target)
    except (HydraException, ImportError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"`pruner._target_` must be the import path of a class, but got {config.target!r}: {first_line(error)}."
        ) from error
    if not issubclass(found, BasePruner):
        raise ConfigError(
            f"`pruner._target_` must be a subclass of `optuna.pruners.BasePruner`, but {config.target!r} is none."
        )
    try:
        pruner: BasePruner = instantiate({"_target_": config.target, **config.arguments})
    except Exception as error:  # whatever the class raises
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ConfigError(
            f"`pruner` must have arguments that {config.target!r} takes, but got {dict(config.arguments)!r}: "
            f"{describe_error(cause)}."
        ) from error
    return pruner
