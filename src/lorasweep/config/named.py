"""Functions of the user's own that a setting names as `package.module:function`: found, checked and called."""

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
"""Settings that let code in, and the package that has the code; transformers puts remote code into its own."""


def package_of(name: str) -> str:
    """Returns the package of a function (`package.module:function`)."""
    return name.partition(":")[0].partition(".")[0]


def call_named(name: str, *, key: str, offered: Mapping[str, Any]) -> Any:
    """Returns what a named function returns; it is given those of the offered arguments that it asks for by name.

    Args:
        name: `package.module:function`; modules in the current folder are found too.
        key: The setting that names it, for messages.
        offered: Arguments by name.

    Raises:
        ConfigError: There is no such function, it needs an argument that is not offered, or it fails.
    """
    function = find_named(name, key=key)
    arguments = _choose_arguments(function, name, key=key, offered=offered)
    try:
        return function(**arguments)
    except Exception as error:
        raise ConfigError(
            f"`{key}` must name a function that works, but {name!r} fails: {describe_error(error)}."
        ) from error


def find_named(name: str, *, key: str) -> Callable[..., Any]:
    """Returns the function that `package.module:function` names. Importing runs the module's code.

    Raises:
        ConfigError: The module is not there or fails when it is imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # a console script's path does not have it
    importlib.invalidate_caches()
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


def _choose_arguments(
    function: Callable[..., Any], name: str, *, key: str, offered: Mapping[str, Any]
) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(offered)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    named = [parameter for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_POSITIONAL]
    for parameter in named:
        unknown = parameter.name not in offered or parameter.kind in positional
        if unknown and parameter.default is inspect.Parameter.empty:
            raise ConfigError(
                f"`{key}` must name a function whose arguments are among {', '.join(offered)}, but {name!r} needs "
                f"{parameter.name!r}. Give that argument a default."
            )
    return {p.name: offered[p.name] for p in named if p.name in offered and p.kind not in positional}
