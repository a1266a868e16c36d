"""Finds the packages that the user trusts to run code, in addition to `targets.TRUSTED_PACKAGES`.

Only the command line and arguments of the Python API can add a package; a sweep file or a record can't.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lorasweep.config.compose import parse_overrides
from lorasweep.config.named import FLAGS_OF_CODE, package_of
from lorasweep.errors import ConfigError

TRUST = "trust"
"""Key on the command line that trusts packages (`trust=[optunahub]`). It is not a setting of a run."""
FACTORY_KEYS = ("model.factory", "data.factory")
"""Settings that name a function of the user."""


def split_trust(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the packages that a command line trusts, and the other words of the command line.

    Raises:
        ConfigError: A value of `trust` is not the name of a package.
    """
    typed = [word for word in words if word.startswith(f"{TRUST}=")]
    given = parse_overrides(typed).get(TRUST, [])
    packages = check_packages(given if isinstance(given, list) else [given])
    others = [word for word in words if word not in typed]
    return [*packages, *packages_of(word.partition("=")[::2] for word in others)], others


def check_packages(packages: Iterable[Any]) -> list[str]:
    """Returns the names of packages as a list of strings.

    Raises:
        ConfigError: A name is not a Python identifier, as the first word of an import path must be.
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
    """Yields the packages whose code the overrides run: that of a factory, of remote code, or of a pickle."""
    for key, value in overrides:
        setting = ".".join(key.split(".")[-2:])  # an override of one arm has a prefix: `arms.NAME.model.factory`
        if setting in FACTORY_KEYS:
            yield package_of(str(value).strip("'\""))
        elif setting in FLAGS_OF_CODE and str(value).lower() == "true":
            yield FLAGS_OF_CODE[setting]
