"""Loads the base model and the data of runs, once per process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lorasweep.config.build import build
from lorasweep.config.data import DataConfig
from lorasweep.config.run import ModelConfig, RunConfig, refuse_code
from lorasweep.data.source import DataSource
from lorasweep.errors import ConfigError
from lorasweep.methods import copy_sharing_weights
from lorasweep.models.attention import choose_attention
from lorasweep.models.load import BaseModel, Labels, load_base
from lorasweep.tasks.splits import DataSplits, build_data_splits
from lorasweep.tasks.task import read_source
from lorasweep.training.environment import DTYPES, get_device, has_cpu_bf16, resolve_precision
from lorasweep.training.own_module import load_own_inputs
from lorasweep.training.reference import add_reference
from lorasweep.training.run_inputs import RunInputs
from lorasweep.wording import join_words

MAX_LOADED_INPUTS = 8
"""Maximum number of bases and data sets that a process keeps in memory. Each value of a swept argument of a user's
module is another base."""


ROW_SETTINGS = ("metric", "max_length", "group_by_length")
"""Settings of data that apply to examples after they were read. A draft chooses some of them when it knows the data."""


class InputsCache:
    """Loads the inputs of runs. Runs with the same model and data share one `RunInputs`.

    Each base model is loaded once and each data set is read once, also for runs that cut its rows differently.
    """

    def __init__(self, *, max_inputs: int = MAX_LOADED_INPUTS) -> None:
        self.folder: Path | None = None
        """The folder of the sweep that trains. If it is set, the splits have the reference (`RunInputs.prepare`)."""
        self.max_inputs = max_inputs
        self._inputs: dict[tuple[Any, ...], RunInputs] = {}
        self._bases: dict[tuple[ModelConfig, torch.dtype, Labels | None], BaseModel] = {}
        self._sources: dict[str, DataSource] = {}
        self._other_splits: dict[tuple[DataConfig, tuple[Any, ...]], DataSplits] = {}

    def load(self, config: RunConfig) -> RunInputs:
        """Returns the inputs of a run. Raises `ConfigError` if they can't be loaded."""
        key = inputs_key(config)
        if key not in self._inputs:
            if len(self._inputs) >= self.max_inputs:
                for kept in (self._inputs, self._bases, self._sources):
                    kept.clear()
            self._inputs[key] = load_inputs(config, self)
        if self.folder is not None:
            self._inputs[key] = self._inputs[key].prepare(config, folder=self.folder)
        return self._inputs[key]

    def load_splits(self, data: DataConfig, config: RunConfig) -> DataSplits:
        """Returns the splits of other data than a run's own, prepared for the run's base model.

        Raises:
            ConfigError: The data can't be read, or the model can't predict it.
        """
        key, base = (data, inputs_key(config)), self.load(config).base
        if key not in self._other_splits:
            source = self.read_source(data)
            splits = build_data_splits(data, source=source, base=base)
            labels, learned = get_labels(source), base.labels and replace(base.labels, constant=())
            if labels is not None and labels != learned:
                names, found = (join_words(one.names if one else []) for one in (learned, labels))
                raise ConfigError(f"labels must be those that the model learns ({names}), but are {found}.")
            self._other_splits[key] = splits
        if self.folder is not None:  # only the test split is scored
            splits = self._other_splits[key]
            splits = add_reference(splits, base=base, trainer=config.trainer, folder=self.folder, names=())
            self._other_splits[key] = splits
        return self._other_splits[key]

    def load_base(self, config: ModelConfig, *, dtype: torch.dtype, labels: Labels | None) -> BaseModel:
        """Returns a base model. Later calls return a copy that shares its weights. Errors as in `models.load_base`."""
        key = config, dtype, labels
        if key in self._bases:
            # a copy, because the choice of attention, which depends on the run's device, is set on the model
            return replace(self._bases[key], model=copy_sharing_weights(self._bases[key].model))
        base = self._bases[key] = load_base(config, dtype=dtype, labels=labels)
        return base

    def read_source(self, config: DataConfig) -> DataSource:
        """Returns the examples of a data set. Errors as in `Task.read`."""
        settings = {name: value for name, value in vars(config).items() if name not in ROW_SETTINGS}
        key = repr((type(config).__name__, settings))
        if key not in self._sources:
            self._sources[key] = read_source(config)
        return self._sources[key]


SHARED_INPUTS = InputsCache(max_inputs=1)
"""The inputs of a `TrainingModule` and a `DataModule` in a user's own Trainer. The newest stay in memory."""
RunSettings: TypeAlias = RunConfig | Sequence[str] | Mapping[str, Any]
"""Settings of a run: a `RunConfig`, the arguments of `lorasweep train` (`["method.rank=8"]`), or a nested mapping."""


def read_settings(given: RunSettings) -> RunConfig:
    """Returns the settings of a run. A nested mapping may come from a checkpoint of an unknown author.

    Raises:
        ConfigError: A key or value is wrong, or a nested mapping names code.
    """
    if isinstance(given, RunConfig):
        return given
    if isinstance(given, Mapping):
        config = build(RunConfig, given)
        groups = ("model", "module", "objective", "data")
        refuse_code(config, groups=groups, remedy="pass the arguments of `lorasweep train` as `config`")
        return config
    from lorasweep.config.command_line import parse_overrides  # noqa: PLC0415 (Hydra is slow to start)
    from lorasweep.config.compose import compose_run  # noqa: PLC0415 (Hydra is slow to start)

    return compose_run(parse_overrides(given))


def inputs_key(config: RunConfig) -> tuple[Any, ...]:
    """Returns a key that is equal for runs that can share their inputs."""
    trainer, objective = config.trainer, config.objective.shared
    return *config.loaded, objective, resolve_precision(trainer), trainer.device


def load_inputs(config: RunConfig, cache: InputsCache | None = None) -> RunInputs:
    """Loads the base model and the data of a run, unless the cache has them. Raises ConfigError if they can't load."""
    cache = cache or InputsCache()
    if config.module is not None:
        return load_own_inputs(config)
    precision = resolve_precision(config.trainer)
    source = cache.read_source(config.data)
    base = cache.load_base(config.model, dtype=DTYPES[precision], labels=get_labels(source))
    splits = build_data_splits(config.data, source=source, base=base, objective=config.objective)
    if base.labels is not None and (constant := splits.objective.fit_constant(splits.train)) is not None:
        base = replace(base, labels=replace(base.labels, constant=tuple(constant.tolist())))
    attention = None
    if config.model.attention == "auto":
        attention = choose_attention(
            base.model,
            device=get_device(config.trainer),
            dtype=DTYPES[precision],
            max_tokens=max(int(split.row_lengths.max()) for split in (splits.train, splits.validation)),
            has_cpu_bf16=has_cpu_bf16(),
        )
    return RunInputs(base=base, splits=splits, precision=precision, attention=attention)


def get_labels(source: DataSource) -> Labels | None:
    if source.label_kind is None:
        return None
    names = ("value",) if source.label_kind == "regression" else source.label_names
    return Labels(kind=source.label_kind, names=names)
