"""Functions of the user that a setting names as `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorasweep.errors import ConfigError, describe_error
from lorasweep.wording import nearest

FLAGS_OF_CODE = {"model.trust_remote_code": "transformers_modules", "model.allow_pickle": "pickle"}
"""Settings that run code of others, and the package of that code: transformers imports remote code into its own."""


def package_of(name: str) -> str:
    """Returns the package of a function (`package.module:function`)."""
    return name.partition(":")[0].partition(".")[0]


def call_named(name: str, *, key: str, offered: Mapping[str, Any]) -> Any:
    """Calls a named function with those of the offered arguments that it takes, and returns its result.

    Args:
        name: `package.module:function`. Modules in the current folder are found too.
        key: Dotted key of the setting, for messages.
        offered: Arguments by name.

    Raises:
        ConfigError: There is no such function, it needs an argument that is not offered, or it fails.
    """
    function = find_named(name, key=key)
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for parameter in parameters:
        is_needed = parameter.default is parameter.empty and not parameter.kind.name.startswith("VAR_")
        if is_needed and parameter.name not in offered:
            raise ConfigError(
                f"`{key}` must name a function whose arguments are among {', '.join(offered)}, but {name!r} needs "
                f"{parameter.name!r}. Give that argument a default."
            )
    names = {parameter.name for parameter in parameters}
    try:
        return function(**{name: value for name, value in offered.items() if takes_any or name in names})
    except Exception as error:
        raise ConfigError(
            f"`{key}` must name a function that works, but {name!r} fails: {describe_error(error)}."
        ) from error


def find_named(name: str, *, key: str) -> Callable[..., Any]:
    """Returns the function that `package.module:function` names. Importing it runs the module's code.

    Raises:
        ConfigError: The module can't be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    add_current_folder()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"`{key}` must name a function that can be imported, but importing {module_name!r} fails: "
            f"{describe_error(error)}. Modules are looked for in the current folder and among the installed packages."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "no callable" if function is not None else "none of that name"
        near = nearest(function_name, [own for own, value in vars(module).items() if callable(value)])
        raise ConfigError(f"`{key}` must name a function in {module_name!r}, but {name!r} is {found}.{near}")
    return function  # type: ignore[no-any-return]


def add_current_folder() -> None:
    """Lets modules of the current folder be imported; the path of a console script does not have that folder."""
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()  # a module may have been written since the last import
