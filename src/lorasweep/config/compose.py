"""Settings from `conf/` and overrides: Hydra composes options, values are set on the result, and pydantic checks it.

Files of `conf/` in the current folder replace files of the packaged `conf/`. Folders of `hydra.searchpath` add options
and groups to both.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigTypeError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from lorasweep.config.build import TARGET, UnknownSettingError, build, dotted_items
from lorasweep.config.data import MetricComponent
from lorasweep.config.redaction import redact
from lorasweep.config.run import ModuleComponent, OptimSettings, RunConfig
from lorasweep.config.sweep import SweepConfig
from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import join_words, suggest_nearest

T = TypeVar("T")
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
}
"""Keys beside a `_target_` that lorasweep reads and the class does not get, for each component that has any."""
SWEEP_GROUPS = frozenset(f.name for f in fields(SweepConfig))
"""Groups of settings that belong to a sweep and not to its runs: the first parts of their keys."""
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
    """Makes Hydra search `conf/` of the current folder before the packaged `conf/`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if folder := find_user_conf():
            search_path.prepend(provider="user", path=f"file://{folder}", anchor="main")


@cache  # once per process
def register_search_path() -> None:
    Plugins.instance().register(SearchUserConf)


@contextmanager
def hydra_session() -> Iterator[None]:
    """Initialises Hydra on `conf/` for composing, unless it is initialised already."""
    register_search_path()
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with initialize_config_dir(str(packaged_folder("conf").resolve()), version_base="1.3"):
        yield


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
    composed = compose_options("train", settings)
    return build_run(apply_settings("train", composed, settings, require_all=require_all))


def compose_sweep(settings: Mapping[str, Any]) -> SweepConfig:
    """Returns the settings that belong to a sweep, and ignores those of its runs; errors as in `compose_run`."""
    of_sweep = {key: value for key, value in settings.items() if key.split(".")[0] in SWEEP_GROUPS}
    return _build(SweepConfig, apply_settings("sweep", compose_options("sweep", of_sweep), of_sweep))


def build_run(values: Mapping[str, Any]) -> RunConfig:
    """Returns the settings of one run from the values that `apply_settings` returned; errors as in `compose_run`."""
    values = {key: value for key, value in values.items() if key not in ("output", "resume")}
    refuse_secrets(values)
    return _build(RunConfig, values)


def _build(kind: type[T], values: Mapping[str, Any]) -> T:
    for key, value in dotted_items(values):
        if isinstance(value, str) and "\0" in value:  # no file can have such a name
            raise ConfigError(f"`{key}` must not contain a NUL character, but got {value!r}.")
    try:
        return build(kind, values)
    except UnknownSettingError as error:
        group, _, name = error.key.rpartition(".")
        files = sorted((packaged_folder("conf") / group).glob("*.yaml")) if group else []
        options = [f"`{group}={file.stem}`" for file in files if name in OmegaConf.load(file).keys()]  # noqa: SIM118 (`in` skips keys that are `???`)
        known = f"`{error.key}` is a setting of {join_words(options, last='and of')} only."
        raise ConfigError(known if options else str(error), key=error.key) from error


def refuse_secrets(values: Mapping[str, Any]) -> None:
    """Raises ConfigError if a setting holds a secret: a record never keeps it, so the run could not be repeated."""
    texts = {key: value for key, value in dotted_items(values) if isinstance(value, str)}
    for key, redacted in redact(texts).items():
        if redacted != texts[key]:
            raise ConfigError(
                f"`{key}` must not contain a password or token, because a record never keeps one, but got "
                f"{redacted!r}. Give it by an environment variable that the service reads, such as HF_TOKEN."
            )


def merge_settings(settings: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with later ones, which win.

    Later settings that choose another option or class drop earlier ones inside it: `worker.num` of a file is no setting
    of `worker=slurm`. A later value of any other key replaces all earlier values below the key.
    """
    merged = dict(settings)
    defaults = {**default_options("train"), **default_options("sweep")}
    for key, value in later.items():
        place = key.removesuffix(f".{TARGET}")
        is_choice, has_class = key in defaults or place != key, f"{key}.{TARGET}" in merged
        if is_choice and value == merged.get(key, defaults.get(key)) and not has_class:
            continue  # the same option or class
        kept = COMPONENT_SETTINGS.get(place, frozenset()) if place != key else frozenset()
        for name in [name for name in merged if name.startswith(f"{place}.")]:
            if name.removeprefix(f"{place}.") not in kept:
                del merged[name]
    return {**merged, **later}


def compose_options(primary: Primary, settings: Mapping[str, Any]) -> DictConfig:
    """Returns a primary config with the options of groups that the settings choose, composed by Hydra.

    Raises:
        ConfigError: An option does not exist, or Hydra refuses an override that begins with `+` or `~`.
    """
    words = [*choose_options(primary, settings), *filter(is_hydra_override, settings)]
    return copy.deepcopy(_compose(primary, tuple(words), find_user_conf()))


@cache  # because Hydra is slow; the result depends on the user's `conf/` too
def _compose(primary: Primary, words: tuple[str, ...], user_conf: Path | None) -> DictConfig:
    with one_line_errors(), hydra_session():
        return compose(primary, overrides=list(words))


def choose_options(primary: Primary, settings: Mapping[str, Any]) -> list[str]:
    """Returns the overrides that choose options of groups: `["logger=[tensorboard,csv]", "method=lora"]`."""
    if any(key.split(".")[0] == "module" for key in settings):  # a module replaces model and data
        settings = {"model": "module", "data": "module", **settings}
    words = []
    for group in sorted(default_options(primary) & settings.keys()):
        option = settings[group]
        several = isinstance(option, list | tuple) and group in LIST_GROUPS
        words.append(f"{group}={json.dumps(option if several else str(option))}")
    return words


def is_hydra_override(key: str) -> bool:
    """Returns whether the key of a setting is an override that Hydra applies: `+experiment=low_memory`, `~logger`."""
    return key.startswith(("+", "~"))


def apply_settings(
    primary: Primary, composed: DictConfig, settings: Mapping[str, Any], *, require_all: bool = True
) -> dict[str, Any]:
    """Sets values in a composed primary config, and returns all its values with interpolations resolved.

    Unknown keys are added, because classes take any argument; the typed settings refuse all others. A `_target_`
    replaces the arguments of the option's class.

    Raises:
        ConfigError: A value is missing that must be set, or an interpolation can't be resolved.
    """
    settings = {k: v for k, v in settings.items() if k not in default_options(primary) and not is_hydra_override(k)}
    with one_line_errors():
        for key in settings:
            place = key.removesuffix(f".{TARGET}")
            if place != key and isinstance(component := OmegaConf.select(composed, place), DictConfig):
                kept = {name: component[name] for name in component if name in COMPONENT_SETTINGS.get(place, ())}
                OmegaConf.update(composed, place, kept, merge=False)
        for key, value in settings.items():
            OmegaConf.update(composed, key, value, merge=False, force_add=True)
        values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=require_all)
    return values  # type: ignore[no-any-return]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Raises errors of Hydra and OmegaConf as ConfigError, whose message is one line."""
    try:
        yield
    except MissingMandatoryValue as error:
        raise ConfigError(f"`{error.full_key}` must be set, but is missing.") from error
    except MissingConfigException as error:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        # Hydra names no options if one of several is wrong, as in `logger=[csv,wand]`
        options = error.options or [path.stem for path in sorted((packaged_folder("conf") / group).glob("*.yaml"))]
        near = suggest_nearest(option, options)
        raise ConfigError(f"`{group}` must be one of {', '.join(options)}, but got {option!r}.{near}") from error
    except HydraException as error:  # its last lines name the options or say what to type
        message = " ".join(str(error).split("\nConfig search path")[0].split())
        # Hydra's message has the override, and does not say what is wrong
        wrong = ": the setting must be a mapping" if isinstance(error.__cause__, ConfigTypeError) else ""
        raise ConfigError(f"{message.rstrip('.:')}{wrong}.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
    except (YAMLError, UnicodeDecodeError) as error:  # its text has the file and the line
        raise ConfigError(
            f"a file in `conf/` must be YAML, but can't be read: {' '.join(str(error).split())}."
        ) from error
    except ValueError as error:
        if not str(error).startswith("Invalid defaults list"):
            raise
        raise ConfigError(f"a file in `conf/` must have a list as `defaults`, but: {first_line(error)}.") from error


@cache
def default_options(primary: Primary) -> Mapping[str, str]:
    """Returns the groups of a primary config, which are folders of `conf/`, each with its default option."""
    defaults = OmegaConf.load(packaged_folder("conf") / f"{primary}.yaml").defaults
    pairs = [next(iter(entry.items())) for entry in defaults if entry != "_self_"]
    return {group: option for group, option in pairs if not group.startswith("override ")}
