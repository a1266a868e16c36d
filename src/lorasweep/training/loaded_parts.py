"""Keeps the base models and data sets that a process has loaded, for runs that cut the data differently."""

from __future__ import annotations

from dataclasses import replace

import torch

from lorasweep.config.data import DataConfig
from lorasweep.config.run import ModelConfig
from lorasweep.data.reading import read_source
from lorasweep.data.source import DataSource
from lorasweep.methods import copy_sharing_weights
from lorasweep.models.load import BaseModel, Labels, load_base

TOKENISING_SETTINGS = frozenset(
    (
        *("max_length", "block_length", "max_train_documents", "max_validation_blocks", "max_test_blocks"),
        *("class_weights", "metric"),
    )
)
"""Settings of data that are applied to its examples after they were read and assigned to splits."""


class LoadedParts:
    """Loads each base model and reads each data set once."""

    def __init__(self) -> None:
        self._bases: dict[tuple[ModelConfig, torch.dtype, Labels | None], BaseModel] = {}
        self._sources: list[tuple[DataConfig, DataSource]] = []

    def load_base(self, config: ModelConfig, *, dtype: torch.dtype, labels: Labels | None) -> BaseModel:
        """Returns a base model. Later calls return a copy that shares its weights. Errors as in `models.load_base`."""
        key = config, dtype, labels
        if key in self._bases:
            # a copy, because the choice of attention, which depends on the run's device, is set on the model
            return replace(self._bases[key], model=copy_sharing_weights(self._bases[key].model))
        base = self._bases[key] = load_base(config, dtype=dtype, labels=labels)
        return base

    def read_source(self, config: DataConfig) -> DataSource:
        """Returns the examples of a data set. Errors as in `data.reading.read_source`."""
        for known, source in self._sources:
            differences = {name for name, value in vars(config).items() if vars(known).get(name) != value}
            if differences <= TOKENISING_SETTINGS:
                return source
        source = read_source(config)
        self._sources.append((config, source))
        return source
