"""What a run trains: a base model, data and an objective (`ModelWorkload`), or a user's module (`own_module`).

A workload has no state. `RunInputs` has what it loaded for a run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import lightning
import torch
from torch import Tensor, nn

from lorasweep.config.run import RunConfig
from lorasweep.models.load import BaseModel, Labels, load_base
from lorasweep.training.data_module import DataModule
from lorasweep.training.evaluation import ScoresOnTest, score_split
from lorasweep.training.loaded_parts import LoadedParts
from lorasweep.training.module import TrainingModule
from lorasweep.training.run_inputs import RunInputs, load_model_inputs
from lorasweep.training.run_log import Metrics
from lorasweep.training.telemetry import Telemetry, TrainingProgress


class Training(Protocol):
    """What a run's log, report and files need of the training."""

    progress: TrainingProgress
    step_losses: Tensor
    """The last step's loss, split by micro-batch and summed over processes, (micro_batches,)."""

    def get_metrics(self) -> Metrics:
        """Returns the metrics of the last evaluation on validation data."""

    def whole_model(self) -> nn.Module:
        """Returns the model with whole weights on the first process. All processes must call it."""

    def save_weights(self, model: nn.Module, folder: Path) -> None:
        """Writes the weights of `whole_model` that a run keeps."""


class TrainerParts(NamedTuple):
    """What a `lightning.Trainer` gets for a run."""

    module: lightning.LightningModule
    data: lightning.LightningDataModule
    training: Training
    callbacks: tuple[lightning.Callback, ...] = ()


class Workload(ABC):
    """What a run trains, from its settings to its score on test data."""

    cuts_batches: ClassVar[bool]
    """Whether a batch can be cut into smaller micro-batches if memory runs out."""
    num_epochs: ClassVar[int]
    """Lightning's `max_epochs`; -1 is no limit."""

    @abstractmethod
    def load_base(self, config: RunConfig, *, dtype: torch.dtype, labels: Labels | None) -> BaseModel:
        """Loads the base. Raises ConfigError if it can't be loaded."""

    @abstractmethod
    def load(self, config: RunConfig, *, telemetry: Telemetry, parts: LoadedParts) -> RunInputs:
        """Loads the base and the splits, unless `parts` has them.

        Raises ConfigError if they can't be loaded or a run can't train on them.
        """

    @abstractmethod
    def build_parts(self, config: RunConfig, inputs: RunInputs, *, accumulate: int) -> TrainerParts:
        """Returns the module that trains and its batches, each cut into `accumulate` micro-batches."""

    @abstractmethod
    def score_test(self, model: nn.Module, *, config: RunConfig, inputs: RunInputs) -> ScoresOnTest:
        """Scores a model of `restore_model` on test data."""


class ModelWorkload(Workload):
    """A base model, data and an objective."""

    cuts_batches = True
    num_epochs = 1  # the data module has the whole run in one epoch

    def load_base(self, config: RunConfig, *, dtype: torch.dtype, labels: Labels | None) -> BaseModel:
        return load_base(config.model, dtype=dtype, labels=labels)

    def load(self, config: RunConfig, *, telemetry: Telemetry, parts: LoadedParts) -> RunInputs:
        return load_model_inputs(config, telemetry=telemetry, parts=parts)

    def build_parts(self, config: RunConfig, inputs: RunInputs, *, accumulate: int) -> TrainerParts:
        module = TrainingModule(config, inputs=inputs, accumulate=accumulate)
        return TrainerParts(module, DataModule(config, splits=inputs.data, accumulate=accumulate), module)

    def score_test(self, model: nn.Module, *, config: RunConfig, inputs: RunInputs) -> ScoresOnTest:
        return score_split(model, inputs.data, config=config, inputs=inputs)
