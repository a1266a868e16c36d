"""Restores a finished run from its folder: its settings, base model and kept weights, checked against its record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasweep.config.build import as_settings, build
from lorasweep.config.run import RunConfig
from lorasweep.config.trust import PACKAGES_OF_FLAGS, is_trusted, package_of, require_trusted
from lorasweep.errors import ConfigError, RecordError
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.models.load import BaseModel, Labels, load_base
from lorasweep.record import RunRecord, sha256_of
from lorasweep.training.environment import DTYPES


def restore_config(record: RunRecord) -> RunConfig:
    """Returns the settings of a run.

    Raises:
        RecordError: The settings are not those of this version of lorasweep.
        ConfigError: They name a class of a package that is not trusted.
    """
    require_trusted(record.config)
    try:
        return build(RunConfig, record.config)
    except (ConfigError, TypeError, AttributeError) as error:
        raise RecordError(
            f"a run's record must hold settings of this version of lorasweep, but does not: {error} "
            "Use the version that `code` in the record names."
        ) from error


def named_code(config: RunConfig) -> Iterator[tuple[str, Any, str]]:
    """Yields the key and the value of each setting that names code or a pickle, and the package with the code."""
    for key, name in (("model.factory", config.model.factory), ("data.factory", getattr(config.data, "factory", None))):
        if name:
            yield key, name, package_of(name)
    for key, package in PACKAGES_OF_FLAGS.items():
        if getattr(config.model, key.removeprefix("model.")):
            yield key, True, package


def require_trusted_code(config: RunConfig, *, trust: bool = False, option: str | None = None) -> None:
    """Checks that code in the settings is trusted: a sweep file, a record or a checkpoint may come from anyone.

    Args:
        config: The settings.
        trust: Whether the user trusts all code in the settings.
        option: The option with which the user trusts it, for the message; None is `trust=[PACKAGE]`.

    Raises:
        ConfigError: The settings name code or a pickle that is not trusted.
    """
    for key, value, package in named_code(config):
        if not (trust or is_trusted(package)):
            remedy = f"give `{option}`" if option else f"add `trust=[{package}]` to the command line"
            raise ConfigError(
                f"`{key}` must be code that is trusted, but got {value!r}. It could do whatever you can on this "
                f"machine: if you know it, {remedy}."
            )


def check_same_run(record: RunRecord, config: RunConfig) -> None:
    """Checks that a run can be resumed with these settings. The number of its processes and its device may change.

    Raises:
        ConfigError: Another setting has changed.
    """
    free = {f"trainer.{name}" for name in ("strategy", "devices", "num_nodes", "device", "progress")}
    before, now = (_flatten(as_settings(settings)) for settings in (restore_config(record), config))
    for key, value in now.items():
        if key not in free and before.get(key) != value:
            raise ConfigError(
                f"`{key}` must be {before.get(key)!r} as when the run began, but got {value!r}. "
                "For another run leave `resume` out."
            )


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns nested settings by key, such as `trainer.max_steps`."""
    groups = {name: values if isinstance(values, dict) else {"": values} for name, values in settings.items()}
    return {f"{name}.{key}".rstrip("."): value for name, values in groups.items() for key, value in values.items()}


def restore_base(record: RunRecord, config: RunConfig) -> BaseModel:
    """Loads the base model of a run, in the precision of the run.

    Raises:
        ConfigError: It can't be loaded.
        RecordError: The record is damaged, or the weights are not those on which the run trained.
    """
    precision = record.platform.get("precision")
    if precision not in DTYPES:
        raise RecordError(f"`precision` in a run's record must be one of {', '.join(DTYPES)}, but is {precision!r}.")
    stored = record.base.get("labels")
    try:
        labels = None if stored is None else build(Labels, stored)
    except (ConfigError, TypeError, AttributeError) as error:
        raise RecordError(f"`base.labels` in a run's record must be those of a classifier, but: {error}") from error
    base = load_base(config.model, dtype=DTYPES[precision], labels=labels)
    trained_on = record.base.get("fingerprint")
    if base.fingerprint != trained_on:
        raise RecordError(
            f"the base model must be the one that the run was trained on (fingerprint {trained_on!r} in {precision}), "
            f"but {config.model.path!r} has {base.fingerprint!r}. Put that model back in its place."
        )
    return base


def restore_model(config: RunConfig, base: BaseModel, *, folder: Path) -> nn.Module:
    """Returns a copy of the base with the weights in `folder` (a run's `best` or `last`), in evaluation mode.

    Raises:
        RecordError: A file is missing or damaged, or belongs to another model.
    """
    method, model = METHODS[config.method.name], copy_sharing_weights(base.model)
    # An adapter is loaded without `prepare`: PiSSA would compute its start again, with other rounding on this machine.
    if config.method.name != "lora":
        method.prepare(
            model, config.method, generator=torch.Generator().manual_seed(config.seeds.init), new_head_names=base.head
        )
    method.load(model, folder)
    model.train(False)
    return model


def check_kept_files(record: RunRecord, run: Path, *, part: str) -> None:
    """Checks that a run has kept weights in `part` (`best` or `last`) of its folder, and that they are unchanged.

    Raises:
        RecordError: There are none, or a file is missing or has changed.
    """
    if not any(path.is_file() for path in (run / part).glob("*")):
        raise RecordError(
            f"a run must have kept weights in `{part}`, but {str(run)!r} (status {record.status}) has none. "
            "Name a run that was evaluated at least once."
        )
    for name, kept in record.files.items():
        if not name.startswith(f"{part}/"):
            continue
        file = run / name
        if not file.is_file() or sha256_of(file) != kept.get("sha256"):
            became = "has changed" if file.is_file() else "is missing"
            raise RecordError(f"{str(file)!r} must be as the run wrote it, but {became}. Run it again.")
