"""Restores the settings, the base model and the weights of a recorded run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasweep.config.build import as_settings, build
from lorasweep.config.run import RunConfig
from lorasweep.disk import open_inside
from lorasweep.errors import ConfigError, RecordError
from lorasweep.methods import bind, copy_sharing_weights
from lorasweep.models.load import BaseModel, Labels, load_base
from lorasweep.record import RunRecord, compute_sha256, restore_config
from lorasweep.training.environment import DTYPES
from lorasweep.training.own_module import load_own_base

CHANGEABLE_SETTINGS = {f"trainer.{name}" for name in ("strategy", "devices", "num_nodes", "device", "progress")}
"""Settings that may change when a run resumes, because they do not change what it learns."""


def check_same_run(record: RunRecord, config: RunConfig) -> None:
    """Refuses to resume a run with settings that change what it learns."""

    def flatten(config: RunConfig) -> dict[str, Any]:
        """Returns settings by keys of at most two names: `optim.lr`, `seed`. Deeper values stay nested."""
        flat = {}
        for name, values in as_settings(config).items():
            for key, value in (values if isinstance(values, dict) else {"": values}).items():
                flat[f"{name}.{key}".rstrip(".")] = value
        return flat

    recorded = flatten(restore_config(record))
    for key, value in flatten(config).items():
        if key not in CHANGEABLE_SETTINGS and recorded.get(key) != value:
            raise ConfigError(
                f"`{key}` must be {recorded.get(key)!r} as when the run began, but got {value!r}. "
                "For another run remove `resume`."
            )


def restore_base(record: RunRecord, config: RunConfig) -> BaseModel:
    """Loads the base model of a run, in the run's precision.

    Raises:
        RecordError: The model's fingerprint differs from the recorded fingerprint, or the record is damaged.
    """
    base = _load_recorded_base(record, config)
    trained_on = record.base.get("fingerprint")
    if base.fingerprint != trained_on:
        raise RecordError(
            f"`model.path` must be the base model of the run (fingerprint {trained_on!r} in "
            f"{record.platform.get('precision')}), but {config.model.path!r} has {base.fingerprint!r}. Restore the "
            "model that the run trained on."
        )
    return base


def restore_unquantised_base(record: RunRecord, config: RunConfig) -> tuple[RunConfig, BaseModel]:
    """Returns a run's base, loaded as in `restore_base` but never quantised, and its settings without quantisation."""
    base = restore_base(record, config)  # also for its check: the record has the fingerprint of the quantised weights
    if config.model.quantization == "none":
        return config, base
    unquantised = replace(config, model=replace(config.model, quantization="none"))
    return unquantised, _load_recorded_base(record, unquantised)


def _load_recorded_base(record: RunRecord, config: RunConfig) -> BaseModel:
    precision: Any = record.platform.get("precision")
    stored = record.base.get("labels")
    try:
        dtype, labels = DTYPES[precision], None if stored is None else build(Labels, stored)
    except (KeyError, ConfigError, TypeError, AttributeError) as error:
        raise RecordError(
            f"`platform.precision` and `base.labels` in a run's record must be as the run wrote them, but: {error!r}. "
            "Restore the file."
        ) from error
    return load_base(config.model, dtype=dtype, labels=labels) if config.module is None else load_own_base(config)


def restore_model(config: RunConfig, base: BaseModel, *, folder: Path) -> nn.Module:
    """Returns a copy of the base with the weights in `folder` (a run's `best` or `last`), in evaluation mode."""
    method = bind(config.method)
    if method.loads_onto_base:
        model = copy_sharing_weights(base.model)
    else:
        model = method.prepare(base, generator=torch.Generator().manual_seed(config.seeds.init))
    method.load(model, folder)
    model.train(False)
    return model


def check_kept_files(record: RunRecord, run_folder: Path, *, part: str) -> None:
    """Checks that a run's folder has weights in `part` (`best` or `last`): unchanged files."""
    paths, found = list((run_folder / part).glob("*")), "none"
    try:
        for path in paths:
            open_inside(run_folder, path).close()
    except OSError as error:
        paths, found = [], f"other files ({error})"
    if not paths:
        raise RecordError(
            f"a run must have kept weights in `{part}`, but {str(run_folder)!r} (status {record.status}) has {found}. "
            "Name a run that was evaluated at least once."
        )
    for name, kept in record.files.items():
        file = run_folder / name
        if not name.startswith(f"{part}/"):
            continue
        is_same_size = file.is_file() and file.stat().st_size == kept.get("bytes")  # a hash of 5 GB takes 10 s
        if not (is_same_size and compute_sha256(file) == kept.get("sha256")):
            raise RecordError(
                f"{str(file)!r} must be as the run wrote it, but is missing or has changed. Train the run again."
            )
