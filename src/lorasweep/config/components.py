"""Third-party components that settings configure by `_target_`: checked, then instantiated by Hydra.

A component runs code, and settings may come from a stranger's sweep file or record. So `_target_` must be a class of a
trusted package, and a subclass of the type that its setting needs. `torch.load` and `subprocess.Popen` are refused.
The user trusts more packages by `trust=[PACKAGE]` on the command line; a file can't.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any, TypeVar

from lorasweep.config.named import add_current_folder
from lorasweep.errors import ConfigError, describe_error

T = TypeVar("T")

TARGET = "_target_"
TRUSTED_PACKAGES = frozenset(
    {
        "lorasweep",
        *("torch", "torchao", "transformers", "bitsandbytes", "deepspeed"),  # optimizers, schedules, strategies
        *("lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"),  # loggers, callbacks, strategies
        *("optuna", "optuna_integration"),  # samplers and pruners
        *("wandb", "mlflow"),  # their own loggers and callbacks
    }
)
"""Packages whose classes need no `trust`: dependencies of lorasweep, and well-known ones that are installed by hand.
`optunahub` is not among them, because it downloads code and runs it."""
TIMEDELTA = "datetime.timedelta"
"""The only class outside the trusted packages that may be nested; a strategy's `timeout` needs it."""
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
        "optuna.pruners._base.BasePruner",
        "optuna.samplers._base.BaseSampler",
        "optuna.samplers.nsgaii._crossovers._base.BaseCrossover",
        TIMEDELTA,
    }
)
"""A nested component, such as the pruner that a `PatientPruner` wraps, must be a subclass of one of these: a trusted
package also has classes that run code when they are instantiated, such as `torch.package.PackageImporter`."""
EVERY_PACKAGE = "all"
"""Value of `trust` that trusts every package."""
IMPORT_PATH_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
PIP_INSTALL_PATTERN = re.compile(r"pip install (?:-U )?'?([\w.-]+)")

_trusted: set[str] = set()


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


def set_trusted(packages: Iterable[str]) -> None:
    """Sets the packages that this process trusts in addition to `TRUSTED_PACKAGES`; replaces those of earlier calls."""
    _trusted.clear()
    _trusted.update(packages)


def trusted_packages() -> tuple[str, ...]:
    """Returns the packages of the last `set_trusted`, for worker processes."""
    return tuple(sorted(_trusted))


def is_trusted(package: str) -> bool:
    """Returns whether classes of a package may be instantiated."""
    return package in TRUSTED_PACKAGES or package in _trusted or EVERY_PACKAGE in _trusted


def instantiate(component: Component, *, key: str, expected: type[T], **more: Any) -> T:
    """Returns the instance of a component. Importing its class runs the code of that module.

    Args:
        component: Class and arguments.
        key: Dotted key of the setting, for messages.
        expected: The type that the instance must have.
        more: Further arguments, which override the component's own.

    Raises:
        ConfigError: The class is not trusted, not installed or of another type, or does not take these arguments.
    """
    find_class(component.target, key=key, expected=expected)
    _check_arguments(component.arguments, key=key)
    from hydra.utils import instantiate as make  # noqa: PLC0415 (slow to start)

    taken = {name: value for name, value in component.arguments.items() if name not in more}
    try:
        made = make({TARGET: component.target, "_partial_": True, "_convert_": "all", **taken})(**more)
    except Exception as error:  # whatever the class raises
        raise ConfigError(_describe_refusal(error, component, key=key)) from error
    assert isinstance(made, expected)
    return made


def check_component(component: Component, *, key: str, expected: type, **more: Any) -> None:
    """Checks that a component's class takes arguments of these names, without making an instance.

    Arguments and errors as in `instantiate`.
    """
    found: type = find_class(component.target, key=key, expected=expected)
    _check_arguments(component.arguments, key=key)
    try:
        inspect.signature(found).bind(**{**component.arguments, **more})
    except TypeError as error:
        raise ConfigError(_describe_refusal(error, component, key=key)) from error


def find_class(target: str, *, key: str, expected: type[T]) -> type[T]:
    """Returns the class with an import path; importing it runs the code of its module.

    Raises:
        ConfigError: The class is not trusted, not installed, or no subclass of `expected`.
    """
    found = _import_class(target, key=key)
    if not issubclass(found, expected):
        raise ConfigError(
            f"`{key}.{TARGET}` must be a subclass of `{expected.__module__}.{expected.__qualname__}`, "
            f"but {target!r} is none."
        )
    return found


def untrusted_targets(value: Any, *, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields the dotted key and the import path of each component whose package is not trusted. Imports nothing."""
    if isinstance(value, Component):
        value = {TARGET: value.target, **value.arguments}
    if isinstance(value, Mapping):
        for name, item in value.items():
            inner = f"{key}.{name}" if key else str(name)
            if inner.rpartition(".")[2] == TARGET:  # a sweep may list several targets
                targets = item if isinstance(item, list | tuple) else [item]
                yield from ((inner, str(t)) for t in targets if not is_trusted(str(t).partition(".")[0]))
            yield from untrusted_targets(item, key=inner)
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from untrusted_targets(item, key=f"{key}.{position}")


def require_trusted(value: Any, *, key: str = "") -> None:
    """Raises ConfigError unless all components in nested settings belong to trusted packages. Imports nothing."""
    for inner, target in untrusted_targets(value, key=key):
        raise ConfigError(_describe_distrust(target, key=inner))


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
    wrong = f"`{key}.{TARGET}` must be the import path of a class, but got {target!r}"
    if not isinstance(target, str) or not IMPORT_PATH_PATTERN.fullmatch(target) or "__" in target:
        raise ConfigError(f"{wrong}. Write it like `torch.optim.AdamW`.")
    package = target.partition(".")[0]
    if not is_trusted(package):
        raise ConfigError(_describe_distrust(target, key=f"{key}.{TARGET}"))
    if package not in TRUSTED_PACKAGES:
        add_current_folder()
    try:
        if find_spec(package) is None:
            raise ConfigError(
                f"`{key}` needs the package {package!r}, which is not installed. Run `pip install {package}`."
            )
        found = resolve_name(target)  # Hydra's own function would also log an error on several lines
    except ConfigError:
        raise
    except Exception as error:  # whatever the module raises while it is imported
        raise ConfigError(f"{wrong}: {describe_error(error)}.") from error
    if not isinstance(found, type):
        raise ConfigError(f"{wrong}, which is none.")
    home = found.__module__.partition(".")[0]
    if not is_trusted(home) and f"{found.__module__}.{found.__qualname__}" not in NESTED_BASES:
        raise ConfigError(_describe_distrust(f"{found.__module__}.{found.__qualname__}", key=f"{key}.{TARGET}"))
    return found


def _check_arguments(value: Any, *, key: str) -> None:
    """Checks that nested components are subclasses of `NESTED_BASES`, and refuses Hydra's keys and interpolations."""
    if isinstance(value, Mapping):
        if TARGET in value:
            found = resolve_name(value[TARGET]) if value[TARGET] == TIMEDELTA else _import_class(value[TARGET], key=key)
            bases = {f"{base.__module__}.{base.__qualname__}" for base in found.__mro__}
            if not bases & NESTED_BASES:
                raise ConfigError(
                    f"`{key}.{TARGET}` must be a class such as an optimizer, a callback or a pruner, "
                    f"but {value[TARGET]!r} is none."
                )
        for name, item in value.items():
            if name != TARGET and str(name).startswith("_"):
                raise ConfigError(f"`{key}.{name}` must be an argument of a class, but starts with `_`. Leave it out.")
            _check_arguments(item, key=f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            _check_arguments(item, key=f"{key}.{position}")
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"`{key}` must be a value, but got the interpolation {value!r}. Write the value instead.")


def _describe_distrust(target: str, *, key: str) -> str:
    package = target.partition(".")[0]
    return (
        f"`{key}` must be a class of a package that is trusted, but got {target!r}. It could run any code: if you know "
        f"{package!r}, add `trust=[{package}]` to the command line of sweep, train or plan, `--trust` to others."
    )


def _describe_refusal(error: Exception, component: Component, *, key: str) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(cause, ConfigError):  # a class of lorasweep raised it, so the message is complete
        return str(cause)
    if isinstance(cause, ModuleNotFoundError):
        hint = PIP_INSTALL_PATTERN.search(str(cause))  # Lightning's errors have no `name`, but quote the pip command
        if package := hint[1] if hint else (cause.name or "").partition(".")[0]:
            return f"`{key}` needs the package {package!r}, which is not installed. Run `pip install {package}`."
    return (
        f"`{key}` must have arguments that {component.target!r} takes, but got {dict(component.arguments)!r}: "
        f"{describe_error(cause)}."
    )
