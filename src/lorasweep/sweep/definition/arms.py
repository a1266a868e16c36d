"""The definition of a sweep: a sweep file and the command line's overrides, composed and checked for each arm."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lorasweep.config.build import as_settings, build
from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import SWEEP_GROUPS, compose_options, compose_run, compose_sweep
from lorasweep.config.data import DataConfig
from lorasweep.config.other_names import suggest_setting
from lorasweep.config.run import DECLARED_TYPES, METHODS_ON_QUANTISED_BASE, RunConfig
from lorasweep.config.sweep import SweepConfig
from lorasweep.errors import ConfigError
from lorasweep.record import Subject, is_number
from lorasweep.sweep.definition.overrides import Layer, Overrides, merge_layers
from lorasweep.sweep.definition.ranges import Space, describe_space
from lorasweep.sweep.definition.sweep_file import (
    ArmConfig,
    SweepFile,
    make_paths_absolute,
    name_in_errors,
    read_content,
    require_folder_name,
)
from lorasweep.wording import join_words, suggest_nearest

CONFIRM_ENDING = "-confirm"
"""An ending that an arm's name must not have. The folder of a confirm run has the name of its arm, this ending and a
number."""
QUANTIZATION = "model.quantization"
DEFAULT_TRIALS = 16
"""Number of trials of an arm that searches several keys, if neither sweep file nor command line sets it."""
TRIAL_SETTINGS = {"trainer.progress": False}
"""Settings of every trial, because a sweep shows the progress of all its trials together."""


SLOT_GROUPS = ("method", "optim", "schedule", "logger", "seed", "seeds")
"""Groups of settings that each slot of a pack has for itself."""


@dataclass(frozen=True, kw_only=True)
class ArmPacking:
    """Whether the trials of one arm can share packs."""

    key: tuple[Any, ...] | None
    """Trials of arms with equal keys share packs; None means that each trial runs alone."""
    reason: str
    """Sentences that say what keeps the trials from sharing packs, and which setting would change that. Empty if they
    share packs."""
    largest: RunConfig
    """The arm's run with the highest rank, on which memory and time are measured."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method, or one method at one rank, with its own search space, budget and study."""

    name: str
    space: Space
    settings: Mapping[str, Any]
    """The settings of `base` that differ from the defaults and are not swept, by dotted key."""
    corner_configs: tuple[RunConfig, ...]
    """Settings of runs at the ends of the swept ranges, from `base` to the run with every key at its last end. Between
    them, one key of `base` is at another of its ends. The choices of a list are its ends."""
    trials: int
    sweep_config: SweepConfig
    confirm_each: str | None = None
    """The swept key whose choices are confirmed one by one."""

    @property
    def base(self) -> RunConfig:
        """Settings of a run with every swept key at its first end."""
        return self.corner_configs[0]

    @cached_property
    def subjects(self) -> tuple[Subject, ...]:
        """What the confirm stage compares: the arm itself, or each value of `confirm_each`, numbers ascending."""
        key = self.confirm_each
        values = [None] if key is None else self.space[key].ends
        if all(map(is_number, values)):
            values = sorted(values)
        return tuple(Subject(arm=self.name, key=key, value=value) for value in values)

    @cached_property
    def packing(self) -> ArmPacking:
        """Whether the trials can share packs.

        They do if they differ only in settings that each slot has for itself: `SLOT_GROUPS` and those that the
        objective names.
        """
        config, objective, own = self.base, self.base.objective, [*SLOT_GROUPS]
        own += [f"objective.{name}" for name in objective.slot_keys]
        obstacles = [
            f"`{key}` is swept, but all slots of a pack must have the same value. Write an arm for each value, and "
            "the trials of each arm share packs."
            for key in self.space
            if not {key, key.split(".")[0]} & {*own}
        ]
        capabilities = [corner.capabilities.packs for corner in self.corner_configs]
        obstacles += [sentence for sentence in capabilities if sentence is not True]
        callbacks = tuple(sorted(config.callbacks.items()))
        return ArmPacking(
            key=None if obstacles else (config.model, config.data, objective.shared, config.trainer, callbacks),
            reason=" ".join(dict.fromkeys(obstacles)),
            largest=max(self.corner_configs, key=lambda config: getattr(config.method, "rank", 0)),
        )

    def name_subject(self, params: Mapping[str, Any]) -> str:
        """Returns the name of the subject to which a trial with these values of the swept keys belongs."""
        key = self.confirm_each
        return Subject(arm=self.name, key=key, value=params[key] if key else None).name

    def compose(self, params: Mapping[str, Any]) -> RunConfig:
        """Returns the settings of a trial with these values of the swept keys."""
        with name_in_errors(f"arm `{self.name}`"):
            return compose_run({**self.settings, **params, **TRIAL_SETTINGS})


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A whole sweep, with its settings composed and checked for each arm."""

    name: str
    description: str
    arms: tuple[Arm, ...]
    sweep_config: SweepConfig
    raw: dict[str, Any]
    """The content of the sweep file (`file`) and the `overrides`. `restore_definition` composes the same sweep."""
    source: Path | None
    retained: Mapping[str, DataConfig] = field(init=False)
    """The data sets of `retain.data` by name."""

    def __post_init__(self) -> None:
        subjects = [subject.name for arm in self.arms if arm.confirm_each for subject in arm.subjects]
        (name, count), *_ = Counter([*subjects, *(arm.name for arm in self.arms)]).most_common(1)
        if count > 1:
            raise ConfigError(
                f"each value of `confirm_each` must have its own name, but {count} values or arms are named {name!r}. "
                "Choose values that differ in their first three digits, or rename the arm."
            )
        object.__setattr__(self, "retained", self._compose_retained())

    def _compose_retained(self) -> dict[str, DataConfig]:
        config = self.sweep_config
        frozen = [arm for arm in self.arms if arm.base.method.trains_nothing]
        if config.retain.data and not (frozen and config.confirm.list_looks()):
            raise ConfigError(
                "`retain.data` must be empty without a confirm stage and an arm with `method=frozen`, which are "
                f"compared, but names {join_words(list(config.retain.data))}. Set `confirm.seeds=[3,6,10]` and add "
                "such an arm to the sweep file, or set `retain.data={}`."
            )
        for arm in self.arms if config.retain.data else ():
            if (why := arm.base.capabilities.retains) is not True:
                raise ConfigError(
                    f"`retain.data` must be empty, but names {join_words(list(config.retain.data))}. {why}"
                )
        retained: dict[str, DataConfig] = {}
        for name, chosen in config.retain.data.items():
            require_folder_name("a name in `retain.data`", name)
            typed = {"data": chosen} if isinstance(chosen, str) else chosen
            with name_in_errors(f"`retain.data.{name}`"):
                if others := [key for key in typed if key.split(".")[0] != "data"]:
                    raise ConfigError(f"its settings must be `data` or begin with `data.`, but got `{others[0]}`.")
                model = {key: value for key, value in frozen[0].settings.items() if key.split(".")[0] != "data"}
                retained[name] = compose_run({**model, **typed}).data
        return retained

    @property
    def corner_configs(self) -> list[RunConfig]:
        """The `corner_configs` of all arms."""
        return [config for arm in self.arms for config in arm.corner_configs]

    def find_arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def with_overrides(self, changes: Mapping[str, Any]) -> Definition:
        """Returns the definition with further overrides: dotted keys with values, lists of choices or bounds.

        They replace earlier overrides of the same keys and of keys below them: `worker` also those of `worker.num`.
        Raises the errors of `read_definition`.
        """
        earlier = self.raw["overrides"].items()
        kept = {key: value for key, value in earlier if not any(key.startswith(f"{one}.") for one in changes)}
        raw = {**self.raw, "overrides": {**kept, **make_paths_absolute(changes)}}
        return restore_definition(raw, source=self.source)


def read_definition(source: Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Definition:
    """Returns the checked definition of a sweep, from its file or content and from overrides.

    Raises:
        ConfigError: The file can't be read, a key or range is wrong, or an arm does not compose.
    """
    path, typed = None if isinstance(source, Mapping) else source, make_paths_absolute(parse_overrides(overrides))
    raw = {"file": read_content(source), "overrides": typed}
    with name_in_errors(path.name) if path else nullcontext():
        return restore_definition(raw, source=path)


def restore_definition(raw: dict[str, Any], *, source: Path | None) -> Definition:
    """Returns the definition whose `raw` is given. Raises the errors of `read_definition`."""
    typed = Overrides.parse(raw["overrides"])
    file = typed.change_arms(build(SweepFile, raw["file"]))
    common = {name: _select_overrides(name, file, typed) for name in file.arms}
    given = [*typed.own.items(), *typed.fields.items()]
    unused = [key for key in typed.common if not any(key in layer for layer in common.values())]
    unused += [f"arms.{name}.{key}" for name, layer in given if name not in file.arms for key in layer]
    if unused:
        known: Collection[str] = DECLARED_TYPES
        if unused[0].startswith("arms."):
            known = [f"arms.{name}.{unused[0].split('.', 2)[2]}" for name in file.arms]
        raise ConfigError(
            f"`{unused[0]}` must be a setting of at least one arm ({', '.join(file.arms)}), but is not."
            f"{suggest_setting(unused[0], known)} Write `arms.ARM.KEY=VALUE` for one arm only."
        )
    sweep_config = compose_sweep(merge_layers([file.settings, typed.common])[0])
    arms = [fold(name, file, typed, common=common[name], sweep_config=sweep_config) for name in file.arms]
    return Definition(
        name=file.name,
        description=file.description,
        arms=tuple(arms),
        sweep_config=sweep_config,
        raw=raw,
        source=source,
    )


def _select_overrides(name: str, file: SweepFile, typed: Overrides) -> Layer:
    """Returns the overrides for all arms that an arm takes.

    An arm that searches nothing takes no range, and no arm takes a setting that its method lacks.
    """
    arm = file.arms[name]
    taken = typed.common if arm.space else typed.values
    of_method = [key for key in taken if key.startswith("method.")]
    if of_method:
        with name_in_errors(f"arm `{name}`"):
            settings, _ = merge_layers([file.settings, arm.layer, taken, typed.own.get(name, {})])
            method = compose_options("train", settings)["method"]
        taken = {key: one for key, one in taken.items() if key not in of_method or key.split(".")[1] in method}
    return taken


def fold(name: str, file: SweepFile, typed: Overrides, *, common: Layer, sweep_config: SweepConfig) -> Arm:
    """Returns an arm, composed and checked at the ends of its ranges.

    Later settings win: those of the file, of the arm, the typed ones for all arms (`common`: those that the arm takes),
    and the typed ones for this arm.
    """
    arm, own, fields = file.arms[name], typed.own.get(name, {}), typed.fields.get(name, {})
    require_folder_name("an arm's name", name)
    if name.endswith(CONFIRM_ENDING):
        raise ConfigError(f"an arm's name must not end in `{CONFIRM_ENDING}`, but got {name!r}. Rename the arm.")
    if of_sweep := [key for key in (*arm.settings, *own) if key.split(".")[0] in SWEEP_GROUPS]:
        raise ConfigError(
            f"`{of_sweep[0]}` must be set once for the whole sweep, but arm `{name}` sets it; `arms.{name}.trials` "
            "alone may differ."
        )
    with name_in_errors(f"arm `{name}`"):
        settings, space = merge_layers([file.settings, arm.layer, common, own])
        settings = {key: value for key, value in settings.items() if key.split(".")[0] not in SWEEP_GROUPS}
        if given := [key for key in ("output", "resume") if key in settings]:
            raise ConfigError(
                f"`{given[0]}` must be left out, because the sweep names the folders of its runs, but got "
                f"{settings[given[0]]!r}. `sweep.output=DIR` names the sweep's folder, `--resume DIR` resumes a sweep."
            )
        options = compose_options("train", settings)
        is_quantised = settings.get(QUANTIZATION, options["model"].get("quantization", "none")) != "none"
        # a quantisation that the arm itself sets stays, and is refused
        is_own = not {"model", QUANTIZATION}.isdisjoint([*arm.settings, *own])
        if is_quantised and not is_own and options["method"].get("name") not in METHODS_ON_QUANTISED_BASE:
            settings[QUANTIZATION] = "none"
        corners = tuple(compose_run({**settings, **params, **TRIAL_SETTINGS}) for params in _list_corners(space))
    typed_number, shared = typed.values.get("sweep.trials"), sweep_config.sweep.trials or DEFAULT_TRIALS
    num_trials = _count_trials(name, arm, fields, space, typed_number=typed_number, shared=shared)
    each = fields.get("confirm_each", arm.confirm_each)
    if each and (each not in space or len(space[each].choices) < 2):
        raise ConfigError(
            f"`arms.{name}.confirm_each` must be a swept key with a list of at least two choices, but got {each!r}."
            f"{suggest_nearest(each, space)} Write it in `space`, such as `method.rank: [1, 4, 16]`, or set "
            f"`arms.{name}.confirm_each=null`."
        )
    return Arm(
        name=name,
        space=space,
        settings=settings,
        corner_configs=corners,
        trials=num_trials,
        sweep_config=sweep_config,
        confirm_each=each,
    )


def _list_corners(space: Space) -> list[dict[str, Any]]:
    """Returns the values of the swept keys at the corners of a space, in the order of `Arm.corner_configs`."""
    ends = {key: range_.ends for key, range_ in space.items()}
    lows = {key: values[0] for key, values in ends.items()}
    corners = [lows, *({**lows, key: value} for key, values in ends.items() for value in values[1:])]
    return [*corners, {key: values[-1] for key, values in ends.items()}] if len(ends) > 1 else corners


def _count_trials(
    name: str, arm: ArmConfig, fields: Mapping[str, Any], space: Space, *, typed_number: int | None, shared: int
) -> int:
    """Returns the number of trials of an arm.

    A number that is typed for the arm (in `fields`) wins over a typed `sweep.trials` (`typed_number`), which wins over
    the arm's in the file, which wins over the sweep's there (`shared`).
    """
    trials: int | None = fields.get("trials", None if arm.space and not space else arm.trials)
    if not space and (trials or 1) != 1:
        raise ConfigError(
            f"`arms.{name}.trials` must be 1 for an arm without a space, but got {trials!r}. Add a `space`."
        )
    if not space:
        return 1
    if trials and (fields.get("trials") or not typed_number):
        return trials
    return math.ceil(shared / 2) if searches_one_key(space) else shared  # one dimension needs fewer trials


def describe_definition(definition: Definition) -> str:
    """Returns a sweep as YAML: its own settings, and all settings of each arm's runs.

    A swept key has its range as a value, in the form of a sweep file.
    """
    described = OmegaConf.create({"name": definition.name, **as_settings(definition.sweep_config), "arms": {}})
    for arm in definition.arms:
        settings = OmegaConf.create(as_settings(arm.base))
        for key, value in describe_space(arm.space).items():
            OmegaConf.update(settings, key, value, merge=False)
        described.arms[arm.name] = {"trials": arm.trials, **settings}
    return OmegaConf.to_yaml(described)


def searches_one_key(space: Space) -> bool:
    return sum(not range_.is_single for range_ in space.values()) == 1
