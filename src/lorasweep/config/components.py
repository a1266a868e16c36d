"""Third-party components that settings configure by `_target_`: checked, then instantiated by Hydra.

A component runs code, and settings may come from a stranger. So `_target_` must be a class of a trusted package, and a
subclass of the type that its setting needs: `torch.load` and `subprocess.Popen` are refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any, TypeVar

from lorasweep.config.trust import TARGET, TRUSTED_PACKAGES, get_package, require_trusted_target
from lorasweep.config.user_function import add_current_folder
from lorasweep.errors import ConfigError, describe_error

T = TypeVar("T")

NESTED_BASES = frozenset(
    {
        "torch.optim.optimizer.Optimizer",
        "torch.optim.lr_scheduler.LRScheduler",
        "torch.distributed.fsdp.MixedPrecisionPolicy",
        "torch.distributed.fsdp.OffloadPolicy",
        "lightning.fabric.loggers.logger.Logger",
        "lightning.fabric.plugins.environments.cluster_environment.ClusterEnvironment",
        "lightning.fabric.plugins.io.checkpoint_io.CheckpointIO",
        "lightning.fabric.plugins.precision.precision.Precision",
        "lightning.pytorch.callbacks.callback.Callback",
        "lightning.pytorch.profilers.profiler.Profiler",
        "lightning.pytorch.strategies.strategy.Strategy",
        "torchmetrics.metric.Metric",
        "optuna.pruners._base.BasePruner",
        "optuna.samplers._base.BaseSampler",
        "optuna.samplers.nsgaii._crossovers._base.BaseCrossover",
        "datetime.timedelta",
    }
)
"""A nested component, such as the pruner that a `PatientPruner` wraps, must be a subclass of one of these. A trusted
package also has classes that run code when they are instantiated, such as `torch.package.PackageImporter`."""
IMPORT_PATH_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
PIP_INSTALL_PATTERN = re.compile(r"pip install (?:-U )?'?([\w.-]+)")


@dataclass(frozen=True, kw_only=True)
class Component:
    """An object of another package: the import path of its class, and the arguments of that class."""

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Arguments by the names of the class's parameters. An argument with `_target_` is a nested component."""

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.target.rpartition(".")[2]


def instantiate(component: Component, *, key: str, expected: type[T], **more_arguments: Any) -> T:
    """Creates the object of a component. Importing its class runs the code of that module.

    Args:
        component: Class and arguments.
        key: Dotted key of the setting, for messages.
        expected: The type that the object must have.
        more_arguments: Further arguments, which override the component's own.

    Raises:
        ConfigError: The class is not trusted, not installed or of another type, or does not take these arguments.
    """
    find_class(component.target, key=key, expected=expected)
    _check_arguments(component.arguments, key=key)
    from hydra.utils import instantiate as hydra_instantiate  # noqa: PLC0415 (slow to start)

    arguments = {name: value for name, value in component.arguments.items() if name not in more_arguments}
    try:
        # Hydra would convert `more_arguments`, such as the parameters of a model, so only the partial gets them.
        build = hydra_instantiate({TARGET: component.target, "_partial_": True, "_convert_": "all", **arguments})
        created = build(**more_arguments)
    except Exception as error:
        raise ConfigError(_describe_failure(error, component, key=key)) from error
    assert isinstance(created, expected)
    return created


def check_component(component: Component, *, key: str, expected: type, **more_arguments: Any) -> None:
    """Checks that a component's class takes arguments of these names, without creating the object.

    Arguments and errors as in `instantiate`.
    """
    imported: type = find_class(component.target, key=key, expected=expected)
    _check_arguments(component.arguments, key=key)
    try:
        inspect.signature(imported).bind(**{**component.arguments, **more_arguments})
    except TypeError as error:
        raise ConfigError(_describe_failure(error, component, key=key)) from error


def require_package(package: str, *, key: str, extra: str | None = None) -> None:
    """Raises ConfigError if a package is not installed. `extra` is the extra of lorasweep that installs it."""
    if find_spec(package) is None:
        raise ConfigError(_describe_package(package, key=key, extra=extra))


def find_class(target: str, *, key: str, expected: type[T]) -> type[T]:
    """Imports a class, which runs the code of its module.

    Raises:
        ConfigError: The class is not trusted, not installed, or no subclass of `expected`.
    """
    imported = _import_class(target, key=key)
    if not issubclass(imported, expected):
        raise ConfigError(
            f"`{key}.{TARGET}` must be a subclass of `{expected.__module__}.{expected.__qualname__}`, "
            f"but got {target!r}."
        )
    return imported


def argument_names(target: str, *, key: str) -> tuple[list[str], bool]:
    """Returns the names of a class's parameters, and whether the class also takes arbitrary keyword arguments.

    Raises:
        ConfigError: The class is not trusted or not installed.
    """
    parameters = inspect.signature(_import_class(target, key=key)).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters if parameter.kind in named], takes_any


def _import_class(target: Any, *, key: str) -> type:
    message = f"`{key}.{TARGET}` must be the import path of a class, such as `torch.optim.AdamW`, but got {target!r}"
    if not isinstance(target, str) or not IMPORT_PATH_PATTERN.fullmatch(target) or "__" in target:
        raise ConfigError(f"{message}.")
    require_trusted_target(target, key=f"{key}.{TARGET}")
    if get_package(target) not in TRUSTED_PACKAGES:
        add_current_folder()
    try:
        imported = resolve_name(target)  # Hydra's own function would also log an error on several lines
    except Exception as error:  # a module may raise any error while Python imports it
        raise ConfigError(_describe_missing(error, key=key) or f"{message}: {describe_error(error)}.") from error
    if not isinstance(imported, type):
        raise ConfigError(f"{message}, which is no class.")
    # A trusted module may import a class of another package: `torch.os.system`.
    require_trusted_target(f"{imported.__module__}.{imported.__qualname__}", key=f"{key}.{TARGET}")
    return imported


def _check_arguments(value: Any, *, key: str) -> None:
    """Checks that nested components are subclasses of `NESTED_BASES`, and refuses Hydra's keys and interpolations."""
    if isinstance(value, Mapping):
        if TARGET in value:
            imported = _import_class(value[TARGET], key=key)
            if not {f"{base.__module__}.{base.__qualname__}" for base in imported.__mro__} & NESTED_BASES:
                raise ConfigError(
                    f"`{key}.{TARGET}` must be a class such as an optimizer, a callback or a pruner, "
                    f"but got {value[TARGET]!r}."
                )
        for name, item in value.items():
            if name != TARGET and str(name).startswith("_"):
                raise ConfigError(f"`{key}.{name}` must be an argument of a class, but starts with `_`. Leave it out.")
            _check_arguments(item, key=f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_arguments(item, key=f"{key}.{index}")
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"`{key}` must be a value, but got the interpolation {value!r}. Write the value instead.")


def _describe_failure(error: Exception, component: Component, *, key: str) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(cause, ConfigError):  # a class of lorasweep raised it, so the message is complete
        return str(cause)
    return _describe_missing(cause, key=key) or (
        f"`{key}` must have arguments that {component.target!r} takes, but got {dict(component.arguments)!r}: "
        f"{describe_error(cause)}."
    )


def _describe_missing(error: Exception, *, key: str) -> str | None:
    """Returns a sentence that names the package that is not installed, if this caused the error."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    quoted = PIP_INSTALL_PATTERN.search(str(error))  # Lightning's errors have no `name`, but quote the pip command
    package = quoted[1] if quoted else (error.name or "").partition(".")[0]
    return _describe_package(package, key=key)


def _describe_package(package: str, *, key: str, extra: str | None = None) -> str:
    installed = f"'lorasweep[{extra}]'" if extra else package
    return f"`{key}` needs the package {package!r}, which is not installed. Run `pip install {installed}`."
