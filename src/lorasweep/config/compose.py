"""Settings from `conf/` and overrides: Hydra composes them, `build` makes the frozen dataclasses.

A user's own `conf/` in the current folder is searched before the packaged one.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lorasweep.config.build import build
from lorasweep.config.components import TARGET, require_trusted
from lorasweep.config.run import OptimizerComponent, RunConfig
from lorasweep.config.sweep import SweepConfig
from lorasweep.errors import ConfigError, first_line
from lorasweep.redaction import redact
from lorasweep.wording import nearest

Primary = Literal["train", "sweep"]
"""Name of a primary config (Hydra's term): the YAML file in `conf/` from which a composition starts."""
PACKAGE = Path(__file__).parent.parent
COMPONENTS: Mapping[str, frozenset[str]] = {
    "optim": frozenset(f.name for f in fields(OptimizerComponent)) - {"target", "arguments"},
    **dict.fromkeys(("schedule", "sampler", "pruner", "trainer.profiler", "trainer.strategy"), frozenset[str]()),
}
"""Settings that may name a class by `_target_`, each with the keys that lorasweep reads and the class does not get."""
LIST_GROUPS = ("logger", "callbacks")
"""Groups that hold several named components. Several options may be chosen: `logger=[tensorboard,csv]`."""


def packaged_folder(name: Literal["conf", "sweeps"]) -> Path:
    """Returns a folder of lorasweep's own files: inside an installed package, or beside `src` in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent.parent / name


class UserConfFirst(SearchPathPlugin):
    """Puts `conf/` of the current folder before the packaged one in Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Adds the folder; Hydra calls it for each composition."""
        folder = Path.cwd() / "conf"
        if folder.is_dir() and folder.resolve() != packaged_folder("conf").resolve():
            search_path.prepend(provider="user", path=f"file://{folder}", anchor="main")


@cache
def register_search_path() -> None:
    """Registers the user's `conf/` with Hydra, once per process."""
    Plugins.instance().register(UserConfFirst)


def compose_run(settings: Mapping[str, Any], *, require_all: bool = True) -> RunConfig:
    """Returns the settings of one run.

    Args:
        settings: Dotted keys and values, and options of groups (`{"method": "lora", "method.rank": 4}`).
        require_all: Whether a setting without a default, such as `model.path`, must be set. If not, it is `???`.

    Raises:
        ConfigError: A key or value is wrong; the message names the nearest valid one.
    """
    values = compose_values("train", settings, require_all=require_all)
    del values["output"], values["resume"]
    refuse_secrets(values)
    return build(RunConfig, values)


def refuse_secrets(values: Mapping[str, Any], *, prefix: str = "") -> None:
    """Raises ConfigError if a setting holds a secret: a record never keeps it, so the run could not be repeated."""
    if (whole := str(values)) == redact(whole):
        return
    for name, value in values.items():
        if isinstance(value, Mapping):
            refuse_secrets(value, prefix=f"{prefix}{name}.")
        elif (shown := str(value)) != redact(shown):
            raise ConfigError(
                f"`{prefix}{name}` must not contain a password or token, because a record never keeps one, but got "
                f"{redact(shown)!r}. Give it by an environment variable that the service reads, such as HF_TOKEN."
            )


def compose_sweep(settings: Mapping[str, Any]) -> SweepConfig:
    """Returns the settings that belong to a sweep and not to its runs; arguments and errors as in `compose_run`."""
    return build(SweepConfig, compose_values("sweep", settings))


def compose_values(primary: Primary, settings: Mapping[str, Any], *, require_all: bool = True) -> dict[str, Any]:
    """Returns a primary config with settings applied and interpolations resolved, as nested mappings.

    Arguments and errors as in `compose_run`.
    """
    # Options of groups are composed first, because they decide which other keys exist.
    groups = {key: value for key, value in settings.items() if key in group_names(primary)}
    refuse_resolvers(settings)
    try:
        # The composed settings are cached, so each call changes its own copy.
        composed = copy.deepcopy(
            _compose_groups(primary, tuple((k, _option(v)) for k, v in groups.items()), Path.cwd())
        )
        _drop_replaced_arguments(composed, settings)
        known = set(dotted_keys(_mapping(OmegaConf.to_container(composed, resolve=False))))
        known |= set(groups) | set(group_names(primary)) | {key for key in settings if is_component_target(key)}
        for key, value in settings.items():
            if key not in groups:
                check_key(key, known, primary=primary)
                OmegaConf.update(composed, key, value, merge=False, force_add=True)
        values = _mapping(OmegaConf.to_container(composed, resolve=True, throw_on_missing=require_all))
    except MissingMandatoryValue as error:
        raise ConfigError(f"`{error.full_key}` must be set, but is missing.") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from error
    require_trusted(values)
    return values


def is_component_target(key: str) -> bool:
    """Returns whether a key is the `_target_` of a component that is not nested in another one."""
    outer, _, last = key.rpartition(".")
    return last == TARGET and (outer in COMPONENTS or (outer.count(".") == 1 and outer.split(".")[0] in LIST_GROUPS))


def _drop_replaced_arguments(composed: DictConfig, settings: Mapping[str, Any]) -> None:
    """Removes the arguments of a group's option where the settings name another class by `_target_`."""
    for key in filter(is_component_target, settings):
        component = key.removesuffix(f".{TARGET}")
        before = OmegaConf.select(composed, component)
        if isinstance(before, DictConfig) and before.get(TARGET) != settings[key]:
            kept = {name: before[name] for name in before if name in COMPONENTS.get(component, ())}
            OmegaConf.update(composed, component, kept, merge=False)


def refuse_resolvers(values: Any) -> None:
    """Raises ConfigError if settings call a resolver: `${oc.env:TOKEN}` would put a secret into a record."""
    text = str(values)
    while (called := re.search(r"\$\{[^{}]*:", text)) is None:
        text, count = re.subn(r"\$\{[^{}]*\}", "", text)  # innermost `${name}`; the next round sees the outer ones
        if not count:
            return
    raise ConfigError(
        f"an interpolation must name a setting (`${{optim.lr}}`), but got {called[0]!r}. Write the value instead."
    )


@cache
def _compose_groups(
    primary: Primary, groups: tuple[tuple[str, str | tuple[str, ...]], ...], folder: Path
) -> DictConfig:
    """Composes options of groups. The result depends on the current folder and is cached, because Hydra is slow."""
    with hydra_session():
        overrides = []
        for key, value in groups:
            several = key in LIST_GROUPS and not isinstance(value, str)
            for option in value if several else (value,):
                _check_option(key, option if isinstance(option, str) else str(list(option)))
            overrides.append(f"{key}=[{','.join(value)}]" if several else f"{key}={value}")
        return compose(primary, overrides=overrides)


def layer_settings(primary: Primary, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings of several layers together; later layers win (a file, one of its arms, the command line).

    A layer that chooses another option or class for a group drops the settings that earlier layers made inside the
    group: `pruner.min_trials` of a file is no setting of `pruner=none`.
    """
    layered: dict[str, Any] = {}
    for layer in layers:
        for group in group_names(primary):
            # Another option brings its own arguments; another class keeps the keys that lorasweep itself reads.
            chosen = layered.get(group, default_options(primary)[group])
            target = f"{group}.{TARGET}"
            if group in layer and (layer[group] != chosen or target in layered):
                layered = {key: value for key, value in layered.items() if not key.startswith(f"{group}.")}
            elif target in layer and layer[target] != layered.get(target):
                kept = {f"{group}.{name}" for name in COMPONENTS.get(group, ())}
                layered = {k: v for k, v in layered.items() if not k.startswith(f"{group}.") or k in kept}
        layered |= layer
    return layered


def _option(value: Any) -> str | tuple[str, ...]:
    """Returns the option or options of a group as a hashable value for the cache; any other value as its text."""
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return value if isinstance(value, str) else repr(value)


def known_keys(settings: Mapping[str, Any]) -> set[str]:
    """Returns every dotted key of a run with these options of groups."""
    return set(dotted_keys(compose_values("train", settings, require_all=False)))


def check_key(key: str, known: set[str], *, primary: Primary) -> None:
    """Raises ConfigError unless a dotted key is a setting or an argument of a component."""
    names = key.split(".")
    outer = (".".join(names[:depth]) for depth in range(1, len(names)))
    if not (is_component_target(key) or key in known or any(f"{one}.{TARGET}" in known for one in outer)):
        raise ConfigError(
            f"`{key}` is not a setting.{nearest(key, sorted(known))} "
            f"`lorasweep {primary} --help` lists the groups, `lorasweep train --cfg job` every key."
        )


def group_names(primary: Primary) -> tuple[str, ...]:
    """Returns the groups of a primary config: the folders of `conf/` that its defaults list names."""
    return tuple(default_options(primary))


@cache
def default_options(primary: Primary) -> Mapping[str, str]:
    """Returns the default option of each group of a primary config."""
    defaults = OmegaConf.load(packaged_folder("conf") / f"{primary}.yaml").defaults
    pairs = [next(iter(entry.items())) for entry in defaults if entry != "_self_"]
    return {group: option for group, option in pairs if not group.startswith("override ")}


def group_options(group: str) -> list[str]:
    """Returns the options of a group, the user's included. Needs a `hydra_session`."""
    loader = GlobalHydra.instance().config_loader()
    return sorted(loader.get_group_options(group))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns command-line overrides as keys and values. Hydra's sweep syntax becomes a range as in a sweep file.

    Raises:
        ConfigError: One is not of the form `key=value`.
    """
    return dict(map(_read_override, _parse(overrides)))


def check_command_line(arguments: Sequence[str]) -> None:
    """Checks the command line of `lorasweep train` before Hydra does, so that every error is one sentence.

    Every run of a grid (`-m method.rank=1,4`) is checked before the first one trains.

    Raises:
        ConfigError: A word is no override, or a key or value is wrong.
    """
    flags, words = get_args_parser().parse_known_args(list(arguments))
    parsed = [word for word in _parse([*flags.overrides, *words]) if not word.key_or_group.startswith("hydra")]
    values: dict[str, list[Any]] = {}
    for override in parsed:
        key, value = _read_override(override)
        if isinstance(override._value, RangeSweep | IntervalSweep):
            raise ConfigError(
                f"a range is for `lorasweep sweep`, but got {override.input_line!r}. "
                f"Give values: `{key}=1,2,4` with `-m`."
            )
        if override.is_sweep_override() and not flags.multirun:
            raise ConfigError(f"`{key}` must have one value, but got {value!r}. Add `-m` to run each of them.")
        values[key] = value if override.is_sweep_override() else [value]
    trains = not (flags.help or flags.cfg or flags.info)
    for combination in itertools.product(*values.values()):
        compose_run(dict(zip(values, combination, strict=True)), require_all=trains)


def allow_new_arguments(words: Sequence[str]) -> list[str]:
    """Returns the overrides with `++` before each argument of a component, so that Hydra accepts new keys."""
    return [f"++{word}" if _is_component_key(word) else word for word in words]


def _is_component_key(key: str) -> bool:
    return key.startswith(tuple(f"{group}." for group in (*COMPONENTS, *LIST_GROUPS)))


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"an override must read `key=value`, but got {first_line(error)}") from error


def _read_override(override: Override) -> tuple[str, Any]:
    if not override.key_or_group:
        raise ConfigError(f"an override must read `key=value`, but got {override.input_line!r}.")
    adds = override.is_add() or override.is_force_add()
    if override.is_delete() or (adds and not _is_component_key(str(override.key_or_group))):
        raise ConfigError(
            f"an override must read `key=value`, but got {override.input_line!r}. Leave out the `+` or `~`."
        )
    key, value = str(override.key_or_group), override._value
    if isinstance(value, Glob):
        raise ConfigError(f"`{key}` must be a value, a list or a range, but got {override.input_line!r}.")
    if isinstance(value, ChoiceSweep):
        return key, list(override.sweep_iterator(transformer=Override._convert_value))
    if isinstance(value, RangeSweep):
        return key, {"low": value.start, "high": _last_of(value), "step": value.step}
    if isinstance(value, IntervalSweep):
        log = {"log": True} if "log" in value.tags else {}
        return key, {"low": value.start, "high": value.end, **log}
    return key, override.value()


def _last_of(value: RangeSweep) -> float:
    """Returns the largest value of Hydra's `range(start, stop, step)`, which leaves out `stop` as Python's does."""
    values = list(value.range())
    if not values:
        raise ConfigError(f"a range must not be empty, but got range({value.start}, {value.stop}, {value.step}).")
    return float(values[-1]) if isinstance(values[-1], float) else int(values[-1])


@contextmanager
def hydra_session() -> Iterator[None]:
    """Initialises Hydra on `conf/` for composing, unless it is initialised already."""
    register_search_path()
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with initialize_config_dir(str(packaged_folder("conf").resolve()), version_base="1.3"):
        yield


def _check_option(group: str, option: str) -> None:
    options = group_options(group)
    if option not in options:
        raise ConfigError(
            f"`{group}` must be one of {', '.join(options)}, but got {option!r}.{nearest(option, options)}"
        )


def dotted_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of nested mappings: `optim` and `optim.lr`, so a key of a mapping itself too."""
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from dotted_keys(value, f"{prefix}{name}.")


def _mapping(container: Any) -> dict[str, Any]:
    return {str(key): value for key, value in container.items()}
