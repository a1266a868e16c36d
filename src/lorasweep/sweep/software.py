"""Code and packages: what must be the same for all workers of a sweep, since they decide its numbers."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

from lorasweep.errors import ConfigError, RecordError
from lorasweep.sweep.folder import SweepFolder
from lorasweep.training import describe_code, describe_packages

SOFTWARE = "lorasweep:software"
"""Attribute of each arm's study."""


def describe_software() -> dict[str, str]:
    """Returns what must be the same for all workers: code and the versions of packages that can change numbers."""
    code = describe_code()
    commit = code.get("commit", "")[:12]
    patch = code.get("patch", {}).get("sha256", "")[:12]
    described = {"lorasweep": "+".join(filter(None, [code["version"], commit, patch]))}
    python = ".".join(platform.python_version_tuple()[:2])
    return described | {"python": python} | {k: v for k, v in describe_packages().items() if k != "lorasweep"}


def packages_fingerprint() -> str:
    """Returns a short name of the packages' versions, the same for workers with the same ones."""
    packages = {key: version for key, version in describe_software().items() if key != "lorasweep"}
    return hashlib.sha256(json.dumps(packages, sort_keys=True).encode()).hexdigest()[:12]


def adopt_software(opened: SweepFolder) -> None:
    """Makes the code and packages of this process those that workers must have from now on."""
    here = describe_software()
    for study in opened.studies.values():
        if study.user_attrs.get(SOFTWARE) != here:
            study.set_user_attr(SOFTWARE, here)


def check_software(opened: SweepFolder) -> None:
    """Makes sure that this process has the code and packages that the sweep was last started with.

    Raises:
        ConfigError: It has not.
        RecordError: What the sweep was started with is damaged.
    """
    here = describe_software()
    there: Any = next(iter(opened.studies.values())).user_attrs.get(SOFTWARE, here)
    if not isinstance(there, dict):
        raise RecordError(f"{SOFTWARE!r} of a sweep's studies must be a mapping, but is damaged.")
    for name in sorted({*here, *there}, key=lambda name: (name != "lorasweep", name)):
        if here.get(name) != there.get(name):
            raise ConfigError(
                f"all workers of a sweep must have the same code and packages, but {name} is "
                f"{here.get(name, 'missing')} here and was {there.get(name, 'missing')!s} where the sweep in "
                f"{str(opened.path)!r} was started. Install the same, or add `--allow-different`."
            )
