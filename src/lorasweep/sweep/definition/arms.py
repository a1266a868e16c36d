"""What a sweep is: a file of `sweeps/` with the command line's overrides, composed and checked arm by arm."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasweep.config.compose import (
    LIST_GROUPS,
    check_key,
    compose_driver,
    compose_run,
    group_names,
    known_keys,
    layer_settings,
    names_component,
    parse_overrides,
)
from lorasweep.config.run import RunConfig, ScheduleConfig
from lorasweep.config.sweep import ArmConfig, DriverConfig, SweepFile
from lorasweep.config.targets import Component
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.expand import expand_arms, own_overrides, refuse_expanded
from lorasweep.sweep.definition.scaling import (
    ALPHA,
    MULTIPLIER,
    compose_scaled,
    drop_rivals,
    lay_over,
    rival,
    spell_out,
)
from lorasweep.sweep.definition.space import Space, corner_values, count_values, parse_range
from lorasweep.sweep.definition.sweep_file import parse_file, read_content, require_whole
from lorasweep.wording import nearest

CONFIRM = "confirm"
MAX_COMBINATIONS = 100_000
"""Of a grid, which is laid out before its first trial."""
HOW = (CONFIRM, "worker", "storage")
"""Groups of settings that don't change what is searched."""

PATH_KEYS = ("data.train", "data.validation", "data.test", "model.path")
"""Settings that name files."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method, or one method at one rank, with its own search space, budget and study."""

    name: str
    settings: Mapping[str, Any]
    space: Space
    trials: int
    driver: DriverConfig
    expanded_from: str | None = None
    """The arm in the sweep file whose `expand` made this one."""
    expanded: Mapping[str, Any] = field(default_factory=dict)
    """Keys and values that tell it from the other arms of that `expand`."""

    def compose(self, params: Mapping[str, Any]) -> RunConfig:
        """Returns the settings of a trial with these values of the swept keys."""
        try:
            return compose_scaled({**lay_over(self.settings, params), "trainer.progress": False})
        except ConfigError as error:
            raise ConfigError(f"arm `{self.name}`: {error}") from error

    def corners(self) -> Iterator[RunConfig]:
        """Yields the settings at the ends of each range, one key at a time, and with all at their upper ends."""
        return iter(self._corners)

    @cached_property
    def _corners(self) -> tuple[RunConfig, ...]:
        return tuple(self._compose_corners())

    def _compose_corners(self) -> Iterator[RunConfig]:
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
        """SHA-256 of what was asked for; `--resume` goes on only with the same.

        A confirm stage may be added later, and who runs the trials is another matter.
        """
        overrides = {key: value for key, value in self.raw["overrides"].items() if key.split(".")[0] not in HOW}
        searched = {"file": self.raw["file"], "overrides": overrides}
        return hashlib.sha256(json.dumps(searched, sort_keys=True).encode()).hexdigest()


def read_definition(source: Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Definition:
    """Composes a sweep file, or the content of one, with overrides and checks every arm.

    Args:
        source: The file, or its content.
        overrides: Words of the command line, or dotted keys and values.

    Raises:
        ConfigError: The file can't be read, a key or range is wrong, or an arm does not compose.
    """
    typed = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    raw = _with_absolute_paths({"file": read_content(source), "overrides": typed})
    if isinstance(source, Mapping):
        return restore_definition(raw, source=None)
    try:
        return restore_definition(raw, source=source)
    except ConfigError as error:
        raise ConfigError(f"{source.name}: {error}") from error


def _with_absolute_paths(value: Any, key: str = "") -> Any:
    """Returns what was asked for with the paths of files absolute, so that the sweep can go on from any folder."""
    if isinstance(value, Mapping):
        return {name: _with_absolute_paths(item, str(name)) for name, item in value.items()}
    is_path = isinstance(value, str) and key.endswith(PATH_KEYS) and ("/" in value or "." in value)
    if is_path and not Path(value).is_absolute() and _is_there(value):
        return str(Path.cwd() / value)
    return value


def _is_there(pattern: str) -> bool:
    try:
        return any(Path().glob(pattern))
    except (ValueError, NotImplementedError, OSError):  # no pattern of files; who reads the data says so
        return False


def restore_definition(raw: Mapping[str, Any], *, source: Path | None) -> Definition:
    """Composes a sweep again from what its record holds; arguments and errors as in `read_definition`."""
    file = parse_file(raw["file"])
    overrides = spell_out(raw["overrides"], where="the command line")
    driver_overrides = split_driver(overrides)[1]
    _check_run_keys(file, split_driver(overrides)[0])
    used = set(driver_overrides)
    written = expand_arms(file, overrides, used=used)
    arms = tuple(_build_arm(arm, file.settings, overrides, used=used) for arm in written)
    for key in overrides:
        if key not in used:
            names = ", ".join(arm.name for arm in arms)
            raise ConfigError(
                f"`{key}` must be a setting of at least one arm ({names}), but is none. "
                "Write `arms.ARM.KEY=VALUE` for one arm only."
            )
    driver = compose_driver(layer_settings("sweep", split_driver(file.settings)[1], driver_overrides))
    _check_one_stage(arms, driver)
    return Definition(
        name=file.name,
        description=file.description,
        arms=arms,
        driver=driver,
        raw={"file": raw["file"], "overrides": dict(raw["overrides"])},
        source=source,
    )


def split_driver(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of runs, and those of the sweep's driver."""
    groups = (*group_names("sweep"), "sweep", "worker", "storage", CONFIRM)
    driver = {key: value for key, value in settings.items() if key.split(".")[0] in groups}
    return {key: value for key, value in settings.items() if key not in driver}, driver


def _build_arm(arm: ArmConfig, shared: Mapping[str, Any], overrides: Mapping[str, Any], *, used: set[str]) -> Arm:
    of_family, own = own_overrides(arm, overrides, used=used)
    trials = {**of_family, **own}.get("trials")
    typed = (_without_arms(overrides), _without_trials(of_family), _without_trials(own))
    layers = [split_driver(layer) for layer in (shared, arm.settings, arm.expanded, *typed)]
    driver = compose_driver(layer_settings("sweep", *(of_driver for _, of_driver in layers)))
    settings, space = _layer_run([of_run for of_run, _ in layers], arm=arm, used=used)
    if trials is None:
        trials = driver.sweep.trials if driver.sweep.trials is not None and arm.space else arm.trials
    trials = require_whole(f"arms.{arm.name}.trials", trials) if space else 1
    composed = dataclasses.replace(arm, settings=settings, space=space, trials=trials)
    built = Arm(
        name=arm.name,
        settings=settings,
        space=_parse_space(composed),
        trials=trials,
        driver=driver,
        expanded_from=arm.expanded_from,
        expanded=arm.expanded,
    )
    _check_arm(built)
    return built


def _layer_run(
    layers: Sequence[Mapping[str, Any]], *, arm: ArmConfig, used: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of an arm's runs, and what is swept.

    Args:
        layers: Settings of runs: the file's, the arm's, those of its expansion; then the command line's for all arms,
            for all of this expansion, and for this one. Of the last three, a value takes the place of a range and a
            range that of a value.
        arm: What the file says of the arm.
        used: Gets the command line's keys for all arms that reach this one.
    """
    of_file, of_arm, of_expansion, for_all, *for_this = layers
    method = _options(*layers).get("method", "lora")
    owned = {key for layer in for_this for key in layer}
    for_all = {k: v for k, v in for_all.items() if k not in owned and _reaches(k, v, method=method, space=arm.space)}
    used |= set(for_all)
    for key in for_all:
        refuse_expanded(arm, key, written=key)
    typed = (for_all, *for_this)
    ranges = {key: value for key, value in lay_over(*typed).items() if _is_range(key, value)}
    values = [{k: v for k, v in layer.items() if not _is_range(k, v)} for layer in typed]
    replaced = {either for layer in values for key in layer for either in (key, rival(key))}
    replaced |= {rival(key) for key in ranges} - set(ranges)
    settings = _layer(of_file, of_arm, of_expansion, *values)
    return (
        {key: value for key, value in settings.items() if key not in ranges and rival(key) not in ranges},
        {key: value for key, value in arm.space.items() if key not in replaced} | ranges,
    )


def _layer(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of runs given in layers, of which later ones win; α and its multiplier replace each other."""
    layered: dict[str, Any] = {}
    for layer in layers:
        layered = layer_settings("train", drop_rivals(layered, layer), layer)
    return layered


def _check_run_keys(file: SweepFile, overrides: Mapping[str, Any]) -> None:
    """Refuses a misspelt key with the nearest one of any arm, before an arm refuses it with the nearest of its own."""
    plain = _without_arms(overrides)
    expanded = [key for arm in file.arms for key in split_driver(arm.expand)[0]]
    if plain or expanded:
        of_file, *of_arms = (split_driver(layer)[0] for layer in (file.settings, *(a.settings for a in file.arms)))
        known = set().union(*(known_keys(_options(of_file, of_arm, plain)) for of_arm in of_arms))
        known |= {MULTIPLIER} if ALPHA in known else set()
        known |= {key for layer in (of_file, *of_arms, plain) for key in layer if names_component(key)}
        for key in [*plain, *expanded]:
            check_key(key, known, primary="train")


def _check_one_stage(arms: Sequence[Arm], driver: DriverConfig) -> None:
    for arm in arms:
        if arm.driver.confirm != driver.confirm:
            raise ConfigError(
                f"all arms must have one `confirm.seeds`, because their runs are compared in pairs, but arm "
                f"`{arm.name}` has {arm.driver.confirm.seeds!r}, not {driver.confirm.seeds!r}."
            )


def _options(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The option of each group that is chosen; one that is swept is left out."""
    layered = layer_settings("train", *layers)
    return {key: layered[key] for key in group_names("train") if key in layered and not _is_range(key, layered[key])}


def _without_arms(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if not key.startswith("arms.")}


def _without_trials(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if key != "trials"}


def _reaches(key: str, value: Any, *, method: str, space: Mapping[str, Any]) -> bool:
    """Whether an override without an arm's name is for this arm: its method has the key, and a range needs a space."""
    if _is_range(key, value) and not space:
        return False
    if not key.startswith("method."):
        return True
    config = compose_run({"method": method})
    name = ALPHA if key == MULTIPLIER else key
    return name.removeprefix("method.") in {f.name for f in dataclasses.fields(config.method)}


def _is_range(key: str, value: Any) -> bool:
    return isinstance(value, Mapping | list) and key not in LIST_GROUPS


def _parse_space(arm: ArmConfig) -> Space:
    fixed = {key: value for key, value in arm.settings.items() if key not in arm.space}
    try:
        config = compose_scaled(fixed)
    except ConfigError as error:
        raise ConfigError(f"arm `{arm.name}`: {error}") from error
    return {
        key: parse_range(f"arms.{arm.name}.space.{key}", value, whole=_is_whole(config, key, arm=arm))
        for key, value in arm.space.items()
    }


def _is_whole(config: RunConfig, key: str, *, arm: ArmConfig) -> bool:
    value: Any = config
    for name in (ALPHA if key == MULTIPLIER else key).split("."):
        if isinstance(value, Component | ScheduleConfig) and not hasattr(value, name):
            value = value.arguments
        if isinstance(value, Mapping) and name not in value:  # an argument of a class, which has its own default
            return _has_whole_bounds(arm.space[key])
        if not (hasattr(value, name) or isinstance(value, Mapping)):
            names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
            raise ConfigError(f"`arms.{arm.name}.space.{key}` is not a setting of its arm.{nearest(name, names)}")
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return isinstance(value, int) and not isinstance(value, bool)


def _has_whole_bounds(value: Any) -> bool:
    bounds = value.values() if isinstance(value, Mapping) else value
    return all(isinstance(bound, int) for bound in bounds)


def _check_arm(arm: Arm) -> None:
    for _ in arm.corners():
        pass
    if arm.driver.sampler.name == "grid" and arm.space:
        count = 1
        for key, distribution in arm.space.items():
            count *= count_values(key, distribution)
        if count > MAX_COMBINATIONS:
            raise ConfigError(
                f"`arms.{arm.name}.space` must have at most {MAX_COMBINATIONS:,} combinations under `sampler=grid`, "
                f"but has {count:,}. Use `sampler=qmc`."
            )
        if arm.trials > count:
            raise ConfigError(
                f"`arms.{arm.name}.trials <= {count}` must hold under `sampler=grid`, the number of combinations, "
                f"but got {arm.trials!r}."
            )
