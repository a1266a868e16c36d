"""What a sweep is: a file of `sweeps/` with the command line's overrides, composed and checked arm by arm."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lorasweep.config.build import nearest
from lorasweep.config.compose import (
    check_key,
    compose_driver,
    compose_run,
    group_names,
    known_keys,
    layer_settings,
    packaged_folder,
    parse_overrides,
)
from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import ArmConfig, DriverConfig, SweepFile
from lorasweep.errors import ConfigError
from lorasweep.sweep.space import Space, corner_values, grid_values, parse_range

FILE_KEYS = ("name", "description", "settings", "arms")
ARM_KEYS = ("settings", "space", "trials")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method, or one method at one rank, with its own search space, budget and study."""

    name: str
    settings: Mapping[str, Any]
    space: Space
    trials: int
    driver: DriverConfig

    def compose(self, params: Mapping[str, Any]) -> RunConfig:
        """Returns the settings of a trial with these values of the swept keys."""
        try:
            return compose_run({**self.settings, **params, "trainer.progress": False})
        except ConfigError as error:
            raise ConfigError(f"arm `{self.name}`: {error}") from error

    def corners(self) -> Iterator[RunConfig]:
        """Yields the settings at the ends of each range, one key at a time, and with all at their upper ends."""
        lows = {key: corner_values(distribution)[0] for key, distribution in self.space.items()}
        highs = {key: corner_values(distribution)[-1] for key, distribution in self.space.items()}
        yield self.compose(lows)
        for key, distribution in self.space.items():
            for value in corner_values(distribution)[1:]:
                yield self.compose({**lows, key: value})
        if len(self.space) > 1:
            yield self.compose(highs)


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A whole sweep as composed."""

    name: str
    description: str
    arms: tuple[Arm, ...]
    driver: DriverConfig
    raw: dict[str, Any]
    """The sweep file and the overrides, as they were given: enough to compose it again."""
    source: Path | None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what was asked for; `--resume` goes on only with the same."""
        return hashlib.sha256(json.dumps(self.raw, sort_keys=True).encode()).hexdigest()


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


def read_definition(source: Path, overrides: Sequence[str]) -> Definition:
    """Composes a sweep file with the command line's overrides and checks every arm.

    Raises:
        ConfigError: The file can't be read, a key or range is wrong, or an arm does not compose.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(source), resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{str(source)!r} must be a YAML file, but can't be read: {reason}.") from error
    raw = {"file": content, "overrides": parse_overrides(overrides)}
    try:
        return restore_definition(raw, source=source)
    except ConfigError as error:
        raise ConfigError(f"{source.name}: {error}") from error


def restore_definition(raw: Mapping[str, Any], *, source: Path | None) -> Definition:
    """Composes a sweep again from what its record holds; arguments and errors as in `read_definition`."""
    file = _read_file(raw["file"])
    overrides = raw["overrides"]
    run_overrides, driver_overrides = _split_driver(overrides)
    _check_run_keys(file, run_overrides)
    used = set(driver_overrides)
    arms = tuple(_build_arm(arm, file.settings, overrides, used=used) for arm in file.arms)
    for key in overrides:
        if key not in used:
            raise ConfigError(
                f"`{key}` must be a setting of at least one arm ({_names(file)}), but is none. "
                "Write `arms.ARM.KEY=VALUE` for one arm only."
            )
    return Definition(
        name=file.name,
        description=file.description,
        arms=arms,
        driver=compose_driver(layer_settings("sweep", _split_driver(file.settings)[1], driver_overrides)),
        raw={"file": raw["file"], "overrides": dict(overrides)},
        source=source,
    )


def _read_file(content: Any) -> SweepFile:
    if not isinstance(content, Mapping):
        raise ConfigError("a sweep file must be a mapping with `name` and `arms`, but is not.")
    _check_keys(content, FILE_KEYS, "")
    arms = content.get("arms")
    if not isinstance(arms, Mapping) or not arms:
        raise ConfigError("`arms` must be a mapping with at least one arm, but got none.")
    for name, arm in arms.items():
        if not isinstance(arm, Mapping):
            raise ConfigError(f"`arms.{name}` must be a mapping with `settings`, but got {arm!r}.")
        _check_keys(arm, ARM_KEYS, f"arms.{name}.")
    return SweepFile(
        name=str(content.get("name") or "sweep"),
        description=str(content.get("description") or ""),
        settings=_mapping(content, "settings"),
        arms=tuple(
            ArmConfig(
                name=str(name),
                settings=_mapping(arm, "settings", f"arms.{name}."),
                space=_mapping(arm, "space", f"arms.{name}."),
                trials=_whole(arm.get("trials", 1), f"arms.{name}.trials"),
            )
            for name, arm in arms.items()
        ),
    )


def _split_driver(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of runs, and those of the sweep's driver."""
    groups = (*group_names("sweep"), "sweep")
    driver = {key: value for key, value in settings.items() if key.split(".")[0] in groups}
    return {key: value for key, value in settings.items() if key not in driver}, driver


def _build_arm(
    arm: ArmConfig,
    shared: Mapping[str, Any],
    overrides: Mapping[str, Any],
    *,
    used: set[str],
) -> Arm:
    prefix = f"arms.{arm.name}."
    own = {key.removeprefix(prefix): value for key, value in overrides.items() if key.startswith(prefix)}
    used |= {prefix + key for key in own}
    trials = own.pop("trials", None)
    layers = [_split_driver(layer) for layer in (shared, arm.settings, _without_arms(overrides), own)]
    driver = compose_driver(layer_settings("sweep", *(of_driver for _, of_driver in layers)))
    settings, space = _layer_run([of_run for of_run, _ in layers], space=arm.space, used=used)
    if trials is None:
        trials = driver.sweep.trials if driver.sweep.trials is not None and arm.space else arm.trials
    trials = _whole(trials, f"{prefix}trials") if space else 1
    composed = ArmConfig(name=arm.name, settings=settings, space=space, trials=trials)
    built = Arm(name=arm.name, settings=settings, space=_parse_space(composed), trials=trials, driver=driver)
    _check_arm(built)
    return built


def _layer_run(
    layers: Sequence[Mapping[str, Any]], *, space: Mapping[str, Any], used: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of an arm's runs, and what is swept.

    Args:
        layers: Settings of runs: the file's, the arm's, the command line's for all arms, and for this one. Of the last
            two, a value takes the place of a range and a range that of a value.
        space: What the file sweeps in this arm.
        used: Gets the command line's keys for all arms that reach this one.
    """
    of_file, of_arm, for_all, for_this = layers
    method = _options(*layers).get("method", "lora")
    for_all = {k: v for k, v in for_all.items() if k not in for_this and _reaches(k, v, method=method, space=space)}
    used |= set(for_all)
    ranges = {key: value for key, value in {**for_all, **for_this}.items() if _is_range(value)}
    values = [{k: v for k, v in layer.items() if not _is_range(v)} for layer in (for_all, for_this)]
    settings = layer_settings("train", of_file, of_arm, *values)
    return (
        {key: value for key, value in settings.items() if key not in ranges},
        {key: value for key, value in space.items() if not any(key in layer for layer in values)} | ranges,
    )


def _check_run_keys(file: SweepFile, overrides: Mapping[str, Any]) -> None:
    """Refuses a misspelt key with the nearest one of any arm, before an arm refuses it with the nearest of its own."""
    plain = _without_arms(overrides)
    if plain:
        of_file, *of_arms = (_split_driver(layer)[0] for layer in (file.settings, *(a.settings for a in file.arms)))
        known = set().union(*(known_keys(_options(of_file, of_arm, plain)) for of_arm in of_arms))
        for key in plain:
            check_key(key, known, primary="train")


def _options(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The option of each group that is chosen; one that is swept is left out."""
    layered = layer_settings("train", *layers)
    return {key: layered[key] for key in group_names("train") if key in layered and not _is_range(layered[key])}


def _without_arms(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if not key.startswith("arms.")}


def _reaches(key: str, value: Any, *, method: str, space: Mapping[str, Any]) -> bool:
    """Whether an override without an arm's name is for this arm: its method has the key, and a range needs a space."""
    if _is_range(value) and not space:
        return False
    if not key.startswith("method."):
        return True
    config = compose_run({"method": method})
    return key.removeprefix("method.") in {field.name for field in dataclasses.fields(config.method)}


def _is_range(value: Any) -> bool:
    return isinstance(value, Mapping | list)


def _parse_space(arm: ArmConfig) -> Space:
    fixed = {key: value for key, value in arm.settings.items() if key not in arm.space}
    try:
        config = compose_run(fixed)
    except ConfigError as error:
        raise ConfigError(f"arm `{arm.name}`: {error}") from error
    return {
        key: parse_range(f"arms.{arm.name}.space.{key}", value, whole=_is_whole(config, key, arm=arm))
        for key, value in arm.space.items()
    }


def _is_whole(config: RunConfig, key: str, *, arm: ArmConfig) -> bool:
    value: Any = config
    for name in key.split("."):
        if not hasattr(value, name):
            names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
            raise ConfigError(f"`arms.{arm.name}.space.{key}` is not a setting of its arm.{nearest(name, names)}")
        value = getattr(value, name)
    return isinstance(value, int) and not isinstance(value, bool)


def _check_arm(arm: Arm) -> None:
    for _ in arm.corners():
        pass
    if arm.driver.sampler.name == "grid" and arm.space:
        count = 1
        for key, distribution in arm.space.items():
            count *= len(grid_values(key, distribution))
        if arm.trials > count:
            raise ConfigError(
                f"`arms.{arm.name}.trials <= {count}` must hold under `sampler=grid`, the number of combinations, "
                f"but got {arm.trials!r}."
            )


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


def _whole(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"`{key}` must be a whole number, but got {value!r}.")
    return value


def _names(file: SweepFile) -> str:
    return ", ".join(arm.name for arm in file.arms)
