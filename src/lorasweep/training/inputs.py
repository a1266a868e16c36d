"""Loads the base model and the data of runs, once per process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasweep.config.data import DataConfig
from lorasweep.config.run import RunConfig, TrainerConfig
from lorasweep.data.batching import EvaluationSampler, LengthBuckets, count_batch_bytes
from lorasweep.data.split import SplitFacts
from lorasweep.data.split import padding_fraction as measure_padding
from lorasweep.errors import ConfigError
from lorasweep.objectives.data_splits import DataSplits, build_data_splits
from lorasweep.training.loaded_parts import LoadedParts
from lorasweep.training.memory import free_memory_bytes
from lorasweep.training.own_module import OwnModule
from lorasweep.training.reference import add_reference
from lorasweep.training.run_inputs import RunInputs, cache_key, get_labels
from lorasweep.training.telemetry import Telemetry
from lorasweep.training.workload import ModelWorkload, Workload
from lorasweep.wording import format_bytes, join_words

MAX_LOADED_INPUTS = 8
"""Maximum number of bases and data sets that a process keeps in memory. Each value of a swept argument of a user's
module is another base."""


def get_workload(config: RunConfig) -> Workload:
    return ModelWorkload() if config.module is None else OwnModule()


def build_inputs(
    config: RunConfig, *, telemetry: Telemetry | None = None, parts: LoadedParts | None = None
) -> RunInputs:
    """Loads the base model and the data of a run. Raises `ConfigError` if they can't be loaded.

    `telemetry` counts the seconds and tokens of this process. `parts` has what this process has loaded already.
    """
    return get_workload(config).load(config, telemetry=telemetry or Telemetry(), parts=parts or LoadedParts())


class InputsCache:
    """Loads the inputs of a worker's runs. Runs with the same model and data share one `RunInputs`."""

    def __init__(self, parts: LoadedParts | None = None) -> None:
        """`parts` has the bases and data sets that an earlier cache loaded."""
        self.folder: Path | None = None
        """The folder of the sweep that trains. If it is set, the splits have the reference (`RunInputs.prepare`)."""
        self.telemetry = Telemetry()
        self._parts = parts or LoadedParts()
        self._loaded: dict[tuple[Any, ...], RunInputs] = {}
        self._other_splits: dict[tuple[DataConfig, tuple[Any, ...]], DataSplits] = {}

    def load(self, config: RunConfig) -> RunInputs:
        key = cache_key(config)
        if key not in self._loaded:
            if len(self._loaded) >= MAX_LOADED_INPUTS:
                self._loaded.clear()
            self._loaded[key] = self.build(config)
        if self.folder is not None:
            self._loaded[key] = self._loaded[key].prepare(config, folder=self.folder)
        return self._loaded[key]

    def build(self, config: RunConfig) -> RunInputs:
        """Returns new inputs of a run, which are not kept. Their base model and examples are kept, as under `load`."""
        return build_inputs(config, telemetry=self.telemetry, parts=self._parts)

    def load_splits(self, data: DataConfig, config: RunConfig) -> DataSplits:
        """Returns the splits of other data than a run's own, prepared for the run's base model.

        Raises:
            ConfigError: The data can't be read, or the model can't predict it.
        """
        key, base = (data, cache_key(config)), self.load(config).base
        if key not in self._other_splits:
            source = self._parts.read_source(data)
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


def check_batch_memory(config: TrainerConfig, split: SplitFacts) -> None:
    """Raises ConfigError if one step's examples do not fit the free memory, before anything of this size is allocated.

    Only the batch itself is counted. What the model needs for it is found by trying.
    """
    needed = count_batch_bytes(split, batch_size=config.batch_size, micro_batches=config.accumulate)
    free = free_memory_bytes()
    if needed > free:
        raise ConfigError(
            f"`trainer.batch_size` must fit the free memory of {format_bytes(free)}, but {config.batch_size} examples "
            f"take {format_bytes(needed)} or more. Training data has {len(split)} examples; use a smaller batch."
        )


def describe_batching(inputs: RunInputs, config: RunConfig, *, accumulate: int) -> dict[str, Any]:
    """Returns how the examples of a run become batches, for its record."""
    split, trainer = inputs.splits.validation, config.trainer
    batches = EvaluationSampler(split, batch_size=trainer.eval_batch_size).batches
    # `TrainingProgress.write_to` later replaces the 0
    padding = {"train": 0.0, "validation": round(measure_padding(split, batches), 4)}
    attention = None if inputs.attention is None else inputs.attention._asdict()
    lengths, group = inputs.splits.train.row_lengths, config.data.groups_by_length
    buckets = LengthBuckets(lengths, batch_size=trainer.batch_size, group_by_length=group)
    return {
        "micro_batches": accumulate,
        "bucket_lengths": buckets.lengths,
        "padding_fraction": padding,
        "attention": attention,
    }
