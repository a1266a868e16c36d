"""A run taken up again from its folder: its settings, its base model and the weights it kept, checked by its record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasweep.config.build import as_settings, build
from lorasweep.config.named import FLAGS_OF_CODE, package_of
from lorasweep.config.run import RunConfig
from lorasweep.config.targets import is_trusted, require_trusted
from lorasweep.errors import ConfigError, RecordError
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.models.load import BaseModel, Labels, load_base
from lorasweep.record import RunRecord, sha256_of
from lorasweep.training.environment import DTYPES


def restore_config(record: RunRecord) -> RunConfig:
    """Returns the settings of a run.

    Raises:
        RecordError: The record has none that this version knows.
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
    """Yields key and value of each setting by which a run runs code of its own, and the package that has that code."""
    for key, name in (("model.factory", config.model.factory), ("data.factory", getattr(config.data, "factory", None))):
        if name:
            yield key, name, package_of(name)
    for key, package in FLAGS_OF_CODE.items():
        if getattr(config.model, key.removeprefix("model.")):
            yield key, True, package


def require_trusted_code(config: RunConfig, *, trust: bool = False, option: str | None = None) -> None:
    """Makes sure that code which settings name is trusted: a sweep file, a record or a checkpoint may come from anyone.

    Args:
        config: The settings.
        trust: Whether the user trusts all code that they name.
        option: The option by which the user says so, for the message; None is `trust=[PACKAGE]`.

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
    """Makes sure that a run can be resumed with these settings: how many processes train it may change.

    Raises:
        ConfigError: A setting has changed.
    """
    began = restore_config(record)
    free = ("strategy", "devices", "num_nodes", "device", "progress")
    trainer = replace(began.trainer, **{name: getattr(config.trainer, name) for name in free})
    before, now = as_settings(replace(began, trainer=trainer)), as_settings(config)
    for group, values in now.items():
        pairs = values.items() if isinstance(values, dict) else [(None, values)]
        for name, value in pairs:
            was = before[group] if name is None else before[group].get(name)
            if was != value:
                key = group if name is None else f"{group}.{name}"
                raise ConfigError(
                    f"`{key}` must be {was!r} as when the run began, but got {value!r}. "
                    "For another run leave `resume` out."
                )


def restore_base(record: RunRecord, config: RunConfig) -> BaseModel:
    """Loads the base model of a run in the precision that it had there.

    Raises:
        ConfigError: It can't be had.
        RecordError: Its weights are not those that the run trained on.
    """
    precision = record.platform.get("precision")
    if precision not in DTYPES:
        raise RecordError(f"`precision` in a run's record must be one of {', '.join(DTYPES)}, but is {precision!r}.")
    base = load_base(config.model, dtype=DTYPES[precision], labels=_read_labels(record))
    trained_on = record.base.get("fingerprint")
    if base.fingerprint != trained_on:
        raise RecordError(
            f"the base model must be the one that the run was trained on (fingerprint {trained_on!r} in {precision}), "
            f"but {config.model.path!r} has {base.fingerprint!r}. Put that model back in its place."
        )
    return base


def restore_model(config: RunConfig, base: BaseModel, *, folder: Path) -> nn.Module:
    """Returns a copy of the base with the weights in `folder` (a run's `best` or `last`), in evaluation mode.

    An adapter is put on as it is stored, so that a start which was worked out from the base's weights (PiSSA) is not
    worked out again on another machine.

    Raises:
        RecordError: A file is missing or damaged, or belongs to another model.
    """
    method, model = METHODS[config.method.name], copy_sharing_weights(base.model)
    if config.method.name != "lora":
        method.prepare(model, config.method, generator=torch.Generator().manual_seed(config.seeds.init), head=base.head)
    method.load(model, folder)
    model.train(False)
    return model


def _read_labels(record: RunRecord) -> Labels | None:
    """The labels that a classifier told, from the record of its run.

    Raises:
        RecordError: They are not labels.
    """
    stored = record.base.get("labels")
    try:
        return None if stored is None else build(Labels, stored)
    except (ConfigError, TypeError, AttributeError) as error:
        raise RecordError(f"`base.labels` in a run's record must be those of a classifier, but: {error}") from error


def check_kept_files(record: RunRecord, run: Path, *, part: str) -> None:
    """Makes sure that a run has kept weights and that they are as it wrote them.

    Args:
        record: The run's record.
        run: Its folder.
        part: `best` or `last`.

    Raises:
        RecordError: There are none, or one has changed.
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
