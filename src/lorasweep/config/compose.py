"""From `conf/` to settings: Hydra composes, `build` makes the frozen dataclasses. Nothing else sees a `DictConfig`.

A user's own `conf/` in the current folder is searched before the packaged one.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from hydra import compose, initialize_config_dir
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
from lorasweep.config.run import OptimizerComponent, RunConfig
from lorasweep.config.sweep import DriverConfig
from lorasweep.config.targets import TARGET, require_trusted
from lorasweep.errors import ConfigError, first_line
from lorasweep.redaction import redact
from lorasweep.wording import nearest

Primary = Literal["train", "sweep"]
PACKAGE = Path(__file__).parent.parent
MAX_INTERPOLATIONS = 16
"""In the settings of a sweep or a run. Each may name another, so a few dozen could stand for any amount of text."""
COMPONENTS: Mapping[str, frozenset[str]] = {
    "optim": frozenset(f.name for f in fields(OptimizerComponent)) - {"target", "arguments"},
    **dict.fromkeys(("schedule", "sampler", "pruner", "trainer.profiler", "trainer.strategy"), frozenset[str]()),
}
"""Settings that may be a class by `_target_`, with the keys beside its arguments that lorasweep reads itself."""
LIST_GROUPS = ("logger", "callbacks")
"""Groups of which several options may be chosen at once (`logger=[tensorboard,csv]`): components by a name each."""
SHOWING_FLAGS = {"--cfg", "-c", "--info", "-i", "--help", "-h"}
"""Flags of Hydra with which nothing is trained."""


def packaged_folder(name: Literal["conf", "sweeps"]) -> Path:
    """Returns the folder that came with lorasweep: inside an installed package, or beside `src` in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent.parent / name


class UserConfFirst(SearchPathPlugin):
    """Puts `conf/` of the current folder before the packaged one in Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra once per composition."""
        folder = Path.cwd() / "conf"
        if folder.is_dir() and folder.resolve() != packaged_folder("conf").resolve():
            search_path.prepend(provider="user", path=f"file://{folder}", anchor="main")


@cache
def register_search_path() -> None:
    """Tells Hydra of the user's `conf/`; once per process."""
    Plugins.instance().register(UserConfFirst)


def compose_run(settings: Mapping[str, Any], *, require_all: bool = True) -> RunConfig:
    """Returns the settings of one run.

    Args:
        settings: Dotted keys and values, and options of groups (`{"method": "lora", "method.rank": 4}`).
        require_all: Whether a setting without a default (a text, such as `model.path`) must be set; else it is `???`.

    Raises:
        ConfigError: A key or value is wrong; the message names the nearest valid one.
    """
    values = compose_values("train", settings, require_all=require_all)
    del values["output"], values["resume"]
    refuse_secrets(values)
    return build(RunConfig, values)


def refuse_secrets(values: Mapping[str, Any], *, prefix: str = "") -> None:
    """Makes sure that no setting of a run holds a secret: it would be wanted again from a record that does not have it.

    Raises:
        ConfigError: One does.
    """
    if (whole := str(values)) == redact(whole):
        return
    for name, value in values.items():
        if isinstance(value, Mapping):
            refuse_secrets(value, prefix=f"{prefix}{name}.")
        elif (shown := str(value)) != redact(shown):
            raise ConfigError(
                f"`{prefix}{name}` must be a setting without a password or token, which a record never keeps, but got "
                f"{redact(shown)!r}. Give it by an environment variable that the service reads, such as HF_TOKEN."
            )


def compose_driver(settings: Mapping[str, Any]) -> DriverConfig:
    """Returns how a sweep is driven; arguments and errors as in `compose_run`."""
    return build(DriverConfig, compose_values("sweep", settings))


def compose_values(primary: Primary, settings: Mapping[str, Any], *, require_all: bool = True) -> dict[str, Any]:
    """Returns a primary config with the settings applied and all interpolations resolved, as nested mappings."""
    groups = {key: value for key, value in settings.items() if key in group_names(primary)}
    check_interpolations(settings)
    try:
        composed = copy.deepcopy(
            _compose_groups(primary, tuple((k, _option(v)) for k, v in groups.items()), Path.cwd())
        )
        _make_room_for_components(composed, settings)
        known = set(_flatten(OmegaConf.to_container(composed, resolve=False)))
        known |= set(groups) | set(group_names(primary)) | {key for key in settings if names_component(key)}
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


def names_component(key: str) -> bool:
    """Whether a key gives the class of a component that is not inside of another one."""
    outer, _, last = key.rpartition(".")
    return last == TARGET and (outer in COMPONENTS or (outer.count(".") == 1 and outer.split(".")[0] in LIST_GROUPS))


def _make_room_for_components(composed: DictConfig, settings: Mapping[str, Any]) -> None:
    """Removes what is set of another class, or of an option of ours, where settings name the class themselves."""
    for key in filter(names_component, settings):
        component = key.removesuffix(f".{TARGET}")
        before = OmegaConf.select(composed, component)
        if isinstance(before, DictConfig) and before.get(TARGET) != settings[key]:
            kept = {name: before[name] for name in before if name in COMPONENTS.get(component, ())}
            OmegaConf.update(composed, component, kept, merge=False)


def check_interpolations(values: Any) -> None:
    """Makes sure that settings don't stand for more than a machine holds once every `${...}` is resolved.

    None may call a resolver either: a stranger's `${oc.env:TOKEN}` would put a secret into a record or a logger.

    Raises:
        ConfigError: There are too many of them, or one calls a resolver.
    """
    if (called := _find_resolver(str(values))) is not None:
        raise ConfigError(
            f"an interpolation must name a setting (`${{optim.lr}}`), but got {called!r}. Write the value instead."
        )
    if (count := str(values).count("${")) > MAX_INTERPOLATIONS:
        raise ConfigError(
            f"settings must have at most {MAX_INTERPOLATIONS} interpolations (`${{...}}`), but have {count}. "
            "Write the values instead."
        )


def _find_resolver(text: str) -> str | None:
    """Returns the first interpolation in a text that calls a resolver, as far as its colon."""
    depth, start = 0, 0
    for position, character in enumerate(text):
        if text.startswith("${", position):
            start = start if depth else position
            depth += 1
        elif character == "}" and depth:
            depth -= 1
        elif character == ":" and depth:
            return text[start : position + 1]
    return None


@cache
def _compose_groups(
    primary: Primary, groups: tuple[tuple[str, str | tuple[str, ...]], ...], folder: Path
) -> DictConfig:
    """Composes options of groups, as seen from the current folder; once, because Hydra takes its time."""
    with hydra_session():
        overrides = []
        for key, value in groups:
            several = key in LIST_GROUPS and not isinstance(value, str)
            for option in value if several else (value,):
                _check_option(key, option if isinstance(option, str) else str(list(option)))
            overrides.append(f"{key}=[{','.join(value)}]" if several else f"{key}={value}")
        return compose(primary, overrides=overrides)


def layer_settings(primary: Primary, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings given in layers, of which later ones win (a file, one of its arms, the command line).

    Where a layer chooses another option of a group than the ones before it, what those set inside the group goes:
    `pruner.min_steps` of a file is no setting of `pruner=none`. The same holds where it names another class.
    """
    layered: dict[str, Any] = {}
    for layer in layers:
        for group in group_names(primary):
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
    """Returns an option, or several as a tuple; what can't be one is a text that no option is called."""
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return value if isinstance(value, str) else repr(value)


def known_keys(settings: Mapping[str, Any]) -> set[str]:
    """Returns every dotted key of a run with these groups."""
    return set(_flatten(compose_values("train", settings, require_all=False)))


def check_key(key: str, known: set[str], *, primary: Primary) -> None:
    """Raises ConfigError unless the dotted key is a setting, or an argument of a component that is set by its class."""
    if names_component(key) or key in known:
        return
    if not any(f"{outer}.{TARGET}" in known for outer in _outer_keys(key)):
        raise ConfigError(
            f"`{key}` is not a setting.{nearest(key, sorted(known))} "
            f"`lorasweep {primary} --help` lists the groups, `lorasweep train --cfg job` every key."
        )


def _outer_keys(key: str) -> Iterator[str]:
    """Yields the dotted keys of what a setting lies in."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def group_names(primary: Primary) -> tuple[str, ...]:
    """Returns the groups of a primary config: the folders of `conf/` that its defaults list names."""
    return tuple(default_options(primary))


@cache
def default_options(primary: Primary) -> Mapping[str, str]:
    """Returns the option of each group that a primary config takes by itself."""
    defaults = OmegaConf.load(packaged_folder("conf") / f"{primary}.yaml").defaults
    pairs = [next(iter(entry.items())) for entry in defaults if entry != "_self_"]
    return {group: option for group, option in pairs if not group.startswith("override ")}


def group_options(group: str) -> list[str]:
    """Returns the options of a group, the user's included. Needs a `hydra_session`."""
    loader = GlobalHydra.instance().config_loader()
    return sorted(loader.get_group_options(group))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns command-line overrides as keys and values; a sweep in Hydra's words becomes a range as in a sweep file.

    Raises:
        ConfigError: One is not of the form `key=value`.
    """
    return dict(map(_read_override, _parse(overrides)))


def check_command_line(arguments: Sequence[str]) -> None:
    """Checks the command line of `lorasweep train` before Hydra sees it, so that every error is one sentence.

    Of a grid (`-m method.rank=1,4`) every run is checked, before the first one trains.

    Raises:
        ConfigError: A word is no override, or a key or value is wrong.
    """
    words = [word for n, word in enumerate(arguments) if not _is_flag(arguments, n)]
    parsed = [override for override in _parse(words) if not override.key_or_group.startswith("hydra")]
    values: dict[str, list[Any]] = {}
    for override in parsed:
        key, value = _read_override(override)
        if isinstance(override._value, RangeSweep | IntervalSweep):
            raise ConfigError(
                f"a range is for `lorasweep sweep`, but got {override.input_line!r}. "
                f"Give values: `{key}=1,2,4` with `-m`."
            )
        if override.is_sweep_override() and not {"-m", "--multirun"} & set(arguments):
            raise ConfigError(f"`{key}` must have one value, but got {value!r}. Add `-m` to run each of them.")
        values[key] = value if override.is_sweep_override() else [value]
    only_shows = not SHOWING_FLAGS.isdisjoint(word.partition("=")[0] for word in arguments)
    for combination in itertools.product(*values.values()):
        compose_run(dict(zip(values, combination, strict=True)), require_all=not only_shows)


def add_arguments(arguments: Sequence[str]) -> list[str]:
    """Returns a Hydra command line in which arguments of components are new keys (`++key=value`)."""
    components = tuple(f"{key}." for key in (*COMPONENTS, *LIST_GROUPS))
    return [
        f"++{word}" if word.startswith(components) and not _is_flag(arguments, position) else word
        for position, word in enumerate(arguments)
    ]


def _is_flag(arguments: Sequence[str], position: int) -> bool:
    """Whether a word is one of Hydra's flags or the value of one (`--cfg job`)."""
    with_value = (
        "--cfg",
        "-c",
        "--package",
        "-p",
        "--config-path",
        "-cp",
        "--config-name",
        "-cn",
        "--config-dir",
        "-cd",
    )
    return arguments[position].startswith("-") or (
        position > 0 and arguments[position - 1] in (*with_value, "--info", "-i")
    )


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"an override must read `key=value`, but got {first_line(error)}") from error


def _read_override(override: Override) -> tuple[str, Any]:
    if not override.key_or_group:
        raise ConfigError(f"an override must read `key=value`, but got {override.input_line!r}.")
    is_argument = any(
        str(override.key_or_group).startswith(f"{component}.") for component in (*COMPONENTS, *LIST_GROUPS)
    )
    if override.is_delete() or ((override.is_add() or override.is_force_add()) and not is_argument):
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
    """The largest value of Hydra's `range(start, stop, step)`, which leaves out `stop` as Python's does."""
    values = list(value.range())
    if not values:
        raise ConfigError(f"a range must not be empty, but got range({value.start}, {value.stop}, {value.step}).")
    return float(values[-1]) if isinstance(values[-1], float) else int(values[-1])


@contextmanager
def hydra_session() -> Iterator[None]:
    """Opens Hydra on `conf/` for composing, or joins the session that is open."""
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


def _flatten(values: Any, prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")


def _mapping(container: Any) -> dict[str, Any]:
    return {str(key): value for key, value in container.items()}
