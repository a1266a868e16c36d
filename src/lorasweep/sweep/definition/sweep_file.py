"""A file of `sweeps/`: found by name, read, every key of it known. Next: `expand`, then `definition`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lorasweep.config.compose import packaged_folder, refuse_resolvers
from lorasweep.config.sweep import ArmConfig, SweepFile
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.scaling import spell_out
from lorasweep.wording import nearest

FILE_KEYS = ("name", "description", "settings", "arms")
DEFAULT_TRIALS = 16
"""Trials of an arm with a space whose file gives no number, so that arms get the same number by default."""
ARM_KEYS = ("settings", "space", "trials", "expand")


def find_sweep_file(name: str) -> Path:
    """Returns the file of a sweep: a path, or a name in `sweeps/` of the current folder, then among the packaged ones.

    Raises:
        ConfigError: There is none; the message lists the names there are.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"a sweep file must exist, but {name!r} does not.")
        return path
    folders = [Path.cwd() / "sweeps", packaged_folder("sweeps")]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ConfigError(
        f"a sweep must be one of {', '.join(names)} or a YAML file, but got {name!r}.{nearest(name, names)}"
    )


def read_content(source: Path | Mapping[str, Any]) -> Any:
    """Returns the content of a sweep file as nested mappings and lists, with its interpolations resolved.

    Raises:
        ConfigError: It is no YAML file, or the content holds what YAML can't.
    """
    try:
        loaded = OmegaConf.create(dict(source)) if isinstance(source, Mapping) else OmegaConf.load(source)
        refuse_resolvers(OmegaConf.to_container(loaded, resolve=False))
        return OmegaConf.to_container(loaded, resolve=True)
    except ConfigError:
        raise
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        name = "a sweep" if isinstance(source, Mapping) else repr(str(source))
        raise ConfigError(f"{name} must be a YAML file or what one holds, but can't be read: {reason}.") from error


def parse_file(content: Any) -> SweepFile:
    """Returns a sweep file's content with its arms as written, none expanded yet.

    Raises:
        ConfigError: A key is not known or a value has another form.
    """
    if not isinstance(content, Mapping):
        raise ConfigError("a sweep file must be a mapping with `name` and `arms`, but is not.")
    _check_keys(content, FILE_KEYS, "")
    arms = content.get("arms")
    if not isinstance(arms, Mapping) or not arms:
        raise ConfigError("`arms` must be a mapping with at least one arm, but got none.")
    return SweepFile(
        name=str(content.get("name") or "sweep"),
        description=str(content.get("description") or ""),
        settings=spell_out(_mapping(content, "settings"), where="settings"),
        arms=tuple(_parse_arm(str(name), arm) for name, arm in arms.items()),
    )


def _parse_arm(name: str, arm: Any) -> ArmConfig:
    if not isinstance(arm, Mapping):
        raise ConfigError(f"`arms.{name}` must be a mapping with `settings`, but got {arm!r}.")
    prefix = f"arms.{name}."
    _check_keys(arm, ARM_KEYS, prefix)
    return ArmConfig(
        name=name,
        settings=spell_out(_mapping(arm, "settings", prefix), where=f"{prefix}settings"),
        space=spell_out(_mapping(arm, "space", prefix), where=f"{prefix}space"),
        trials=require_whole(f"{prefix}trials", arm.get("trials", DEFAULT_TRIALS if arm.get("space") else 1)),
        expand=spell_out(_mapping(arm, "expand", prefix), where=f"{prefix}expand"),
    )


def require_whole(key: str, value: Any) -> int:
    """Returns a whole number.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"`{key}` must be a whole number, but got {value!r}.")
    return value


def _check_keys(content: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    for key in content:
        if key not in known:
            raise ConfigError(
                f"`{prefix}{key}` is not a key of a sweep file.{nearest(str(key), known)} Known are {', '.join(known)}."
            )


def _mapping(content: Mapping[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"`{prefix}{key}` must be a mapping of dotted keys, but got {value!r}.")
    return {str(name): item for name, item in value.items()}
