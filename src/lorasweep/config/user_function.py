"""Functions of the user that `model.factory` and `data.factory` name as `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from lorasweep.errors import ConfigError, describe_error


def check_function_name(key: str, name: str) -> None:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise ConfigError(f"`{key}` must have the form `package.module:function`, but got {name!r}.")


def call_user_function(name: str, *, key: str, offered: Mapping[str, Any]) -> Any:
    """Imports and calls a function of the user, with those of the offered arguments that the function takes.

    Args:
        name: `package.module:function`. Python also looks for the module in the current folder.
        key: Dotted key of the setting, for messages.
        offered: Arguments by name.

    Raises:
        ConfigError: The function can't be imported, needs an argument that is not offered, or fails.
    """
    add_current_folder()
    try:
        function = resolve_name(name)
        parameters = inspect.signature(function).parameters.values()
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        names = {parameter.name for parameter in parameters}
        return function(**{name: value for name, value in offered.items() if takes_any or name in names})
    except Exception as error:
        arguments = f"the arguments {', '.join(offered)}" if offered else "no arguments"
        raise ConfigError(
            f"`{key}` must name a function that works with {arguments}, but {name!r} fails: {describe_error(error)}."
        ) from error


def add_current_folder() -> None:
    """Lets Python import modules of the current folder, which the path of a console script does not include."""
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()  # a module may have been written since the last import
