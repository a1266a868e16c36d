"""Components: classes that settings name by `_target_`, which Hydra instantiates."""

from __future__ import annotations

import importlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import field
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

from pydantic.dataclasses import dataclass

from lorasweep.config.build import TARGET, Settings, dotted_items
from lorasweep.errors import ConfigError, describe_error

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Component(Settings):
    """An object of another package: the import path of its class, and the arguments of that class."""

    target: str
    """Import path of the class."""
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Arguments by the names of the class's parameters. An argument with `_target_` is a nested component."""

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.target.rpartition(".")[2]


def instantiate(component: Component, *, key: str, expected: type[T], **more_arguments: Any) -> T:
    """Creates the object of a component. Importing its class runs the code of that module.

    `more_arguments` override the component's own, and `key` is the component's setting, for messages.

    Raises:
        ConfigError: The class is not installed, or not of type `expected`, or does not take these arguments.
    """
    find_class(component.target, key=key, expected=expected)
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
    """Raises ConfigError, as `instantiate`, if a class does not take arguments of these names. Creates no object."""
    imported: type = find_class(component.target, key=key, expected=expected)
    try:
        inspect.signature(imported).bind(**{**component.arguments, **more_arguments})
    except TypeError as error:
        raise ConfigError(_describe_failure(error, component, key=key)) from error


def require_package(package: str, *, key: str, extra: str | None = None) -> None:
    """Raises ConfigError if a package is not installed. `extra` is the extra of lorasweep that installs it."""
    if find_spec(package) is None:
        installed = f"'lorasweep[{extra}]'" if extra else package
        raise ConfigError(
            f"`{key}` needs the package {package!r}, which is not installed. Run `pip install {installed}`."
        )


def find_class(target: Any, *, key: str, expected: type[T]) -> type[T]:
    """Imports a class, which runs the code of its module. Python also looks for the module in the current folder.

    Raises ConfigError if the class is not installed, or no subclass of `expected`.
    """
    imported = _import(target, key=key, kind="class", example="torch.optim.AdamW")
    if not isinstance(imported, type):
        raise ConfigError(f"`{key}.{TARGET}` must be the import path of a class, but {target!r} is none.")
    if not issubclass(imported, expected):
        raise ConfigError(
            f"`{key}.{TARGET}` must be a subclass of `{expected.__module__}.{expected.__qualname__}`, "
            f"but got {target!r}."
        )
    return imported


def find_function(target: Any, *, key: str) -> Callable[..., Any]:
    """Imports a function as `find_class` imports a class. Raises ConfigError if it can't be imported or called."""
    imported = _import(target, key=key, kind="function", example="my_scores.count_words")
    if not callable(imported):
        raise ConfigError(f"`{key}.{TARGET}` must be the import path of a function, but {target!r} can't be called.")
    function: Callable[..., Any] = imported
    return function


def _import(target: Any, *, key: str, kind: str, example: str) -> Any:
    message = f"`{key}.{TARGET}` must be the import path of a {kind}, such as `{example}`, but got {target!r}"
    if not isinstance(target, str):
        raise ConfigError(f"{message}.")
    add_current_folder()
    try:
        return resolve_name(target)  # Hydra's own function would also log an error on several lines
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may raise any error while Python imports it, or call `sys.exit`
        raise ConfigError(f"{message}: {describe_error(error)}.") from error


def find_own_files(settings: Mapping[str, Any]) -> dict[str, Path]:
    """Returns the file of each class or function that nested settings name by `_target_`, by its dotted key.

    Those of lorasweep, of Python and of installed packages are left out: records have their versions.
    """
    installed = sysconfig.get_paths()["stdlib"], str(Path(__file__).parent.parent)
    files = {}
    for key, target in dotted_items(settings):
        if key.endswith(f".{TARGET}") and target is not None:
            with suppress(TypeError):  # a class that is written in C has no file
                file = Path(
                    inspect.getfile(_import(target, key=key.removesuffix(f".{TARGET}"), kind="class", example="m.C"))
                )
                if not str(file).startswith(installed) and not {"site-packages", "dist-packages"} & {*file.parts}:
                    files[key] = file
    return files


def list_argument_names(target: Any, *, key: str, expected: type = object) -> tuple[list[str], bool]:
    """Returns the names of a class's parameters, and whether the class also takes arbitrary keyword arguments."""
    parameters = inspect.signature(find_class(target, key=key, expected=expected)).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters if parameter.kind in named], takes_any


def _describe_failure(error: Exception, component: Component, *, key: str) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(cause, ConfigError):  # a class of lorasweep raised it, so the message is complete
        return str(cause)
    return (
        f"`{key}` must have arguments that {component.target!r} takes, but got {dict(component.arguments)!r}: "
        f"{describe_error(cause)}."
    )


def add_current_folder() -> None:
    """Lets Python import modules of the current folder, which the path of a console script does not include."""
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()  # a module may have been written since the last import
