"""Decides which packages' code settings may run, because a sweep file, `conf/` or record may come from a stranger.

Classes of `TRUSTED_PACKAGES` may always be instantiated. The user trusts more packages on the command line
(`trust=[PACKAGE]`) or by an argument of the Python API, but never in a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lorasweep.errors import ConfigError

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
"""Dependencies of lorasweep, and well-known packages that users install themselves. `optunahub` is missing, because
it downloads code and runs it."""
TRUSTED_CLASS = "datetime.timedelta"
"""A class of another package that needs no `trust`: the argument `timeout` of Lightning's strategies is one."""
EVERY_PACKAGE = "all"
"""Value of `trust` that trusts every package."""
PACKAGES_OF_FLAGS = {"model.trust_remote_code": "transformers_modules", "model.allow_pickle": "pickle"}
"""Settings that run code of others, each with the package of that code. transformers imports remote code into
`transformers_modules`."""
FACTORY_KEYS = ("model.factory", "data.factory")
"""Settings that name a function of the user."""

_trusted: set[str] = set()


def set_trusted(packages: Iterable[str]) -> None:
    """Replaces the packages that this process trusts in addition to `TRUSTED_PACKAGES`."""
    _trusted.clear()
    _trusted.update(packages)


def trusted_packages() -> tuple[str, ...]:
    """Returns the packages of the last `set_trusted`, for worker processes."""
    return tuple(sorted(_trusted))


def get_package(path: str) -> str:
    """Returns the package of an import path, `package.module:function` or `package.Class`."""
    return path.partition(":")[0].partition(".")[0]


def is_trusted(package: str) -> bool:
    return package in TRUSTED_PACKAGES or package in _trusted or EVERY_PACKAGE in _trusted


def require_trusted(value: Any, *, key: str = "") -> None:
    """Raises ConfigError unless each `_target_` in nested settings is of a trusted package. Imports nothing."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            inner = f"{key}.{name}" if key else str(name)
            if inner.rpartition(".")[2] == TARGET:
                for target in item if isinstance(item, list | tuple) else [item]:  # a sweep may list several
                    require_trusted_target(str(target), key=inner)
            require_trusted(item, key=inner)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            require_trusted(item, key=f"{key}.{index}")


def require_trusted_target(target: str, *, key: str) -> None:
    package = get_package(target)
    if target != TRUSTED_CLASS and not is_trusted(package):
        raise ConfigError(
            f"`{key}` must be a class of a package that is trusted, but got {target!r}. It could run any code. If you "
            f"know {package!r}, add `trust=[{package}]` to the command line of sweep, train or plan, `--trust` to "
            "others."
        )


def split_trust(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the packages that a command line trusts, and the other arguments.

    Raises:
        ConfigError: A value of `trust=` is not the name of a package.
    """
    values = [argument.removeprefix("trust=") for argument in arguments if argument.startswith("trust=")]
    packages = [package.strip() for value in values for package in value.strip("[]").split(",")]
    others = [argument for argument in arguments if not argument.startswith("trust=")]
    return [*check_packages(packages), *find_packages(other.partition("=")[::2] for other in others)], others


def check_packages(packages: Iterable[str]) -> list[str]:
    """Returns names of packages; raises ConfigError if one is not a Python identifier."""
    names = list(packages)
    for name in names:
        if not str(name).isidentifier():
            raise ConfigError(
                f"`trust` must be names of packages, such as `trust=[optunahub]`, but got {name!r}. "
                "Give the first part of the class's import path."
            )
    return names


def find_packages(overrides: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Yields the packages of factories, remote code and pickles in overrides.

    These are trusted, because the user typed the settings: they do not come from a file.
    """
    for key, value in overrides:
        setting = ".".join(key.split(".")[-2:])  # an override of one arm has a prefix: `arms.NAME.model.factory`
        if setting in FACTORY_KEYS:
            yield get_package(str(value).strip("'\""))
        elif setting in PACKAGES_OF_FLAGS and str(value).lower() == "true":
            yield PACKAGES_OF_FLAGS[setting]
