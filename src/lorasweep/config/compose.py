"""Settings from `conf/` and overrides: Hydra composes them, `build` creates the frozen dataclasses.

Files of `conf/` in the current folder replace files of the packaged `conf/`. Folders of `add_search_path` add options
and groups to both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lorasweep.config.build import TARGET, build
from lorasweep.config.data import MetricComponent
from lorasweep.config.redaction import redact
from lorasweep.config.run import ModuleComponent, OptimSettings, RunConfig
from lorasweep.config.sweep import SweepConfig
from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import join_words, suggest_nearest

Primary = Literal["train", "sweep"]
"""Name of a primary config (Hydra's term): the YAML file in `conf/` from which a composition starts."""
PACKAGE_FOLDER = Path(__file__).parent.parent
MAX_EVALUATION_INTERVAL_STEPS = 500
"""Maximum number of steps between two evaluations by default. A killed run repeats the steps since its last one."""
COMPONENT_SETTINGS: Mapping[str, frozenset[str]] = {
    "optim": frozenset(f.name for f in fields(OptimSettings)),
    "module": frozenset(f.name for f in fields(ModuleComponent)) - {"target", "arguments"},
    "data.metric": frozenset(f.name for f in fields(MetricComponent)) - {"target", "arguments"},
    "data.answers.score": frozenset({"direction"}),
    **dict.fromkeys(("datamodule", "schedule", "sampler", "trainer.strategy"), frozenset[str]()),
}
"""Settings that may name a class by `_target_`, each with the keys that lorasweep reads and the class does not get."""
MAPPING_SETTINGS = ("method.rank_pattern", "method.alpha_pattern", "method.config", "worker.extra", "retain.data")
"""Settings that are mappings with the user's own keys, such as names of layers."""
LIST_SETTINGS = (
    *("data.columns", "data.labels", "method.exclude", "method.layers", "method.modules_to_save"),
    "module.new_modules",
    "method.targets",  # names of layers, as in PEFT
)
"""Settings that take a list. A list that is typed for one of them is its value, not a list of choices."""
PEFT_ALIASES: Mapping[str, str] = {
    "r": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "target_modules": "method.targets",
    "exclude_modules": "method.exclude",
    "use_dora": "method.variant=dora",
    "use_rslora": "method.scaling=alpha_over_sqrt_rank",
}
"""Fields of `peft.LoraConfig` that users type by habit, with the setting that does the same."""
LIST_GROUPS = ("logger", "callbacks")
"""Groups that hold several named components. Several options may be chosen: `logger=[tensorboard,csv]`."""


def packaged_folder(name: Literal["conf", "sweeps"]) -> Path:
    """Returns a folder of lorasweep's own files: inside an installed package, or beside `src` in a checkout."""
    inside = PACKAGE_FOLDER / name
    return inside if inside.is_dir() else PACKAGE_FOLDER.parent.parent / name


def find_user_conf() -> Path | None:
    """Returns `conf/` of the current folder; None if there is none or it is the packaged one."""
    folder = Path.cwd() / "conf"
    return folder if folder.is_dir() and folder.resolve() != packaged_folder("conf").resolve() else None


class SearchUserConf(SearchPathPlugin):
    """Makes Hydra search `conf/` of the current folder before the packaged `conf/`, and other folders after it."""

    folders: ClassVar[tuple[str, ...]] = ()
    """Other folders (`file://...`) and packages (`pkg://...`) with options of groups."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if folder := find_user_conf():
            search_path.prepend(provider="user", path=f"file://{folder}", anchor="main")
        for path in self.folders:
            search_path.append(provider="command line", path=path)


@contextmanager
def add_search_path(folders: Sequence[str]) -> Iterator[None]:
    """Makes Hydra search more folders inside the `with` block. Raises ConfigError if one does not exist."""
    SearchUserConf.folders = tuple(folders)
    try:
        with hydra_session():
            for source in GlobalHydra.instance().config_loader().get_sources():
                if not source.available():
                    raise ConfigError(
                        "`hydra.searchpath` must name folders that exist, or packages (`pkg://NAME`), but got "
                        f"{source.full_path()!r}."
                    )
        yield
    finally:
        SearchUserConf.folders = ()


@cache  # once per process
def register_search_path() -> None:
    Plugins.instance().register(SearchUserConf)


def choose_evaluation_interval(steps: Any) -> int:
    """Returns the default number of steps between two evaluations: half of a run, or less, and at most 500.

    A divisor of `steps` is preferred, because packs need an evaluation at the last step. An evaluation at half of the
    run is preferred, because trials are compared there.
    """
    if not isinstance(steps, int) or steps < 1:  # refused when the settings are checked
        return 1
    longest = min(steps / 2, MAX_EVALUATION_INTERVAL_STEPS)
    divisors = [n for n in range(math.ceil(longest / 5), int(longest) + 1) if steps % n == 0]
    # An even number of evaluations has one at half. With an odd number, a short interval has one nearest to half.
    return max(divisors, key=lambda n: (-(steps // n % 2) * n, n), default=math.ceil(longest))


OmegaConf.register_new_resolver("choose_evaluation_interval", choose_evaluation_interval, replace=True)


def compose_run(settings: Mapping[str, Any], *, require_all: bool = True) -> RunConfig:
    """Returns the settings of one run.

    Args:
        settings: Dotted keys and values, and options of groups (`{"method": "lora", "method.rank": 4}`). Keys that
            begin with `+` or `~` are overrides that Hydra applies (`{"+experiment=low_memory": None}`).
        require_all: Whether a setting without a default, such as `model.path`, must be set. If not, it is `???`.

    Raises:
        ConfigError: A key or value is wrong; the message names the nearest valid one.
    """
    return build_run(compose_values("train", settings, require_all=require_all))


def build_run(values: Mapping[str, Any]) -> RunConfig:
    """Returns the settings of one run from the values that `compose_values` composed; errors as in `compose_run`."""
    values = {key: value for key, value in values.items() if key not in ("output", "resume")}
    refuse_secrets(values)
    return build(RunConfig, values)


def compose_sweep(settings: Mapping[str, Any]) -> SweepConfig:
    """Returns the settings that belong to a sweep and not to its runs; arguments and errors as in `compose_run`."""
    return build(SweepConfig, compose_values("sweep", settings))


def refuse_secrets(values: Mapping[str, Any]) -> None:
    """Raises ConfigError if a setting holds a secret: a record never keeps it, so the run could not be repeated."""
    texts = {key: value for key, value in dotted_items(values) if isinstance(value, str)}
    for key, redacted in redact(texts).items():
        if redacted != texts[key]:
            raise ConfigError(
                f"`{key}` must not contain a password or token, because a record never keeps one, but got "
                f"{redacted!r}. Give it by an environment variable that the service reads, such as HF_TOKEN."
            )


def compose_values(primary: Primary, settings: Mapping[str, Any], *, require_all: bool = True) -> dict[str, Any]:
    """Returns a primary config with settings applied and interpolations resolved; see `compose_run`."""
    if any(key.split(".")[0] == "module" for key in settings):  # a module replaces model and data
        settings = {"model": "module", "data": "module", **settings}
    # Options of groups are composed first, because they decide which other keys exist.
    groups = {key: _hashable(value) for key, value in settings.items() if key in default_options(primary)}
    hydra_overrides = tuple(filter(is_hydra_override, settings))
    settings = {key: value for key, value in settings.items() if key not in hydra_overrides}
    search_path = (find_user_conf(), SearchUserConf.folders)
    try:
        # The composed settings are cached, so each call changes its own copy.
        composed = copy.deepcopy(_compose_groups(primary, tuple(sorted(groups.items())), hydra_overrides, search_path))
        _drop_replaced_arguments(composed, settings)
        known = {key for key, _ in dotted_items(_as_dict(composed, resolve=False))}
        known |= {*default_options(primary), *filter(is_component_target, settings)}
        components = {key for key, value in settings.items() if isinstance(value, Mapping) and TARGET in value}
        known |= {f"{key}.{TARGET}" for key in components}
        for key, value in settings.items():
            if key not in groups:
                mapping = find_mapping(key)
                _check_key(mapping or key, known, primary=primary)
                if mapping:  # the rest of the key is one name, such as `mlp.up_proj`
                    value = {**OmegaConf.select(composed, mapping), key.removeprefix(f"{mapping}."): value}
                OmegaConf.update(composed, mapping or key, value, merge=False, force_add=True)
        values = _as_dict(composed, resolve=True, throw_on_missing=require_all)
    except MissingMandatoryValue as error:
        raise ConfigError(f"`{error.full_key}` must be set, but is missing.") from error
    except HydraException as error:
        raise ConfigError(describe_hydra_error(error)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
    return values


def describe_hydra_error(error: HydraException) -> str:
    """Returns Hydra's whole message as one line, because its last lines name the options or say what to type."""
    return " ".join(str(error).split("\nConfig search path")[0].split()).rstrip(".:") + "."


def is_hydra_override(key: str) -> bool:
    """Returns whether the key of a setting is an override that Hydra applies: `+experiment=low_memory`, `~logger`."""
    return key.startswith(("+", "~"))


def is_component_target(key: str) -> bool:
    """Returns whether a key is the `_target_` of a component that is not nested in another component."""
    outer, _, last = key.rpartition(".")
    return last == TARGET and (
        outer in COMPONENT_SETTINGS or (outer.count(".") == 1 and outer.split(".")[0] in LIST_GROUPS)
    )


def find_mapping(key: str) -> str | None:
    """Returns the mapping in which a key is an entry: `method.rank_pattern` for `method.rank_pattern.q_proj`."""
    return next((mapping for mapping in MAPPING_SETTINGS if key.startswith(f"{mapping}.")), None)


def _drop_replaced_arguments(composed: DictConfig, settings: Mapping[str, Any]) -> None:
    """Removes the arguments of a group's option if the settings name another class by `_target_`."""
    for key in filter(is_component_target, settings):
        component = key.removesuffix(f".{TARGET}")
        before = OmegaConf.select(composed, component)
        if isinstance(before, DictConfig) and before.get(TARGET) != settings[key]:
            kept = {name: before[name] for name in before if name in COMPONENT_SETTINGS.get(component, ())}
            OmegaConf.update(composed, component, kept, merge=False)


@cache  # because Hydra is slow; the result depends on the search path too
def _compose_groups(
    primary: Primary, groups: tuple[tuple[str, Any], ...], hydra_overrides: tuple[str, ...], search_path: Any
) -> DictConfig:
    with hydra_session():
        overrides = list(hydra_overrides)
        for group, value in groups:
            several = isinstance(value, tuple) and group in LIST_GROUPS
            for option in value if several else (value,):
                _check_option(group, str(list(option) if isinstance(option, tuple) else option))
            overrides.append(f"{group}=[{','.join(value)}]" if several else f"{group}={value}")
        composed = compose(primary, overrides=overrides)
    for group in LIST_GROUPS:
        if group in default_options(primary) and group not in composed:  # removed by `~logger`
            OmegaConf.update(composed, group, {}, force_add=True)
    return composed


def layer_settings(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings of several layers as one mapping, in which later layers win (file, arm, command line).

    A layer that chooses another option or class for a group drops what earlier layers set inside the group:
    `sampler.startup_trials` of a file is no setting of `sampler=qmc`. A value for a key replaces all earlier values
    below the key.
    """
    layered: dict[str, Any] = {}
    defaults = {**default_options("train"), **default_options("sweep")}
    for layer in layers:
        for key, value in layer.items():
            group, _, last = key.rpartition(".")
            kept: Collection[str] = ()
            if key in defaults:
                if value == layered.get(key, defaults[key]) and f"{key}.{TARGET}" not in layered:
                    continue
                replaced = f"{key}."
            elif last == TARGET and group in defaults:
                if value == layered.get(key):
                    continue
                # another class keeps the keys that lorasweep itself reads
                replaced, kept = f"{group}.", {f"{group}.{name}" for name in COMPONENT_SETTINGS.get(group, ())}
            else:
                replaced = f"{key}."
            layered = {k: v for k, v in layered.items() if not k.startswith(replaced) or k in kept}
        layered |= layer
    return layered


def _hashable(option: Any) -> Any:
    """Returns the option of a group, or several options as a tuple, for the cache."""
    if isinstance(option, list | tuple):
        return tuple(map(str, option))
    return option if isinstance(option, str) else repr(option)


def known_keys(settings: Mapping[str, Any], *, primary: Primary = "train") -> set[str]:
    """Returns every dotted key that exists with the options of groups in `settings`."""
    return {key for key, _ in dotted_items(compose_values(primary, settings, require_all=False))}


def _check_key(key: str, known: set[str], *, primary: Primary) -> None:
    names = key.split(".")
    outer = (".".join(names[:depth]) for depth in range(1, len(names)))
    if key not in known and not any(f"{one}.{TARGET}" in known for one in outer):
        alias = PEFT_ALIASES.get(names[-1]) if len(names) == 1 or names[:-1] == ["method"] else None
        hint = f" PEFT's `{names[-1]}` is `{alias}` here." if alias else suggest_nearest(key, sorted(known))
        if not alias and len(names) > 1 and ".".join(names[:2]) not in known:
            files = sorted((packaged_folder("conf") / names[0]).glob("*.yaml"))
            options = [f"`{names[0]}={file.stem}`" for file in files if names[1] in OmegaConf.load(file)]
            hint = f" It is one of {join_words(options, last='and of')}." if options else hint
        raise ConfigError(
            f"`{key}` is not a setting.{hint} "
            f"`lorasweep {primary} --help` lists the groups, `lorasweep train --cfg job` every key."
        )


@cache
def default_options(primary: Primary) -> Mapping[str, str]:
    """Returns the groups of a primary config, which are folders of `conf/`, each with its default option."""
    defaults = OmegaConf.load(packaged_folder("conf") / f"{primary}.yaml").defaults
    pairs = [next(iter(entry.items())) for entry in defaults if entry != "_self_"]
    return {group: option for group, option in pairs if not group.startswith("override ")}


def group_options(group: str) -> list[str]:
    """Returns the options of a group, the user's included. Needs a `hydra_session`."""
    return sorted(GlobalHydra.instance().config_loader().get_group_options(group))


def list_groups_without_default() -> list[str]:
    """Returns the groups of `lorasweep train` without a default, such as `experiment`. Needs a `hydra_session`."""
    with_default = {*default_options("train"), *default_options("sweep"), "hydra"}
    return sorted(set(GlobalHydra.instance().config_loader().list_groups("")) - with_default)


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
            f"`{group}` must be one of {', '.join(options)}, but got {option!r}.{suggest_nearest(option, options)}"
        )


def dotted_items(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys and values of nested mappings. Inner mappings are values too: `optim`, then `optim.lr`."""
    for name, value in values.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from dotted_items(value, f"{prefix}{name}.")


def _as_dict(composed: DictConfig, *, resolve: bool, throw_on_missing: bool = False) -> dict[str, Any]:
    container: Any = OmegaConf.to_container(composed, resolve=resolve, throw_on_missing=throw_on_missing)
    return container  # type: ignore[no-any-return]
