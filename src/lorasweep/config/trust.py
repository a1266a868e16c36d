"""Which packages a request trusts, beside the usual ones, to run code that settings name.

Only words that the user types, or arguments of the Python API, can add a package; no sweep file and no record can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lorasweep.config.compose import parse_overrides
from lorasweep.config.named import FLAGS_OF_CODE, package_of
from lorasweep.errors import ConfigError

TRUST = "trust"
"""The word of a command line that trusts packages (`trust=[optunahub]`). It is no setting of a run."""
FACTORY_KEYS = ("model.factory", "data.factory")
"""Settings that name a function of the user's."""


def split_trust(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the packages that a command line trusts, and its other words.

    Raises:
        ConfigError: `trust` does not hold names of packages.
    """
    typed = [word for word in words if word.startswith(f"{TRUST}=")]
    given = parse_overrides(typed).get(TRUST, [])
    packages = check_packages(given if isinstance(given, list) else [given])
    others = [word for word in words if word not in typed]
    return [*packages, *packages_of(word.partition("=")[::2] for word in others)], others


def check_packages(packages: Iterable[Any]) -> list[str]:
    """Returns names of packages.

    Raises:
        ConfigError: One is not the first word of an import path.
    """
    names = [str(package) for package in packages]
    for name in names:
        if not name.isidentifier():
            raise ConfigError(
                f"`{TRUST}` must be names of packages, such as `{TRUST}=[optunahub]`, but got {name!r}. "
                "Give the first word of the class's import path."
            )
    return names


def packages_of(overrides: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Yields the packages whose code overrides ask for by name: a factory, remote code, or a pickle."""
    for key, value in overrides:
        setting = ".".join(key.split(".")[-2:])  # also of one arm: `arms.NAME.model.factory`
        if setting in FACTORY_KEYS:
            yield package_of(str(value).strip("'\""))
        elif setting in FLAGS_OF_CODE and str(value).lower() == "true":
            yield FLAGS_OF_CODE[setting]
