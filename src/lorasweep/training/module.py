"""The LightningModule of one run: the model that a method prepared, its loss, its metrics and its checkpoint.

It works under any `lightning.Trainer`. What only `lorasweep train` needs, such as the run's folder, is in `run.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorasweep.config.build import as_settings
from lorasweep.data.rows import Batch
from lorasweep.errors import ConfigError, RecordError
from lorasweep.objectives.objective import EXAMPLE_FIELDS, Evaluation, ExampleScores
from lorasweep.training.checkpoint import read_rng_state, restore_rng_state
from lorasweep.training.data_module import DataModule
from lorasweep.training.environment import fork_random_streams
from lorasweep.training.fsdp import average_gradients, copy_trained_weights, shard_model
from lorasweep.training.inputs import SHARED_INPUTS, RunSettings, read_settings
from lorasweep.training.optim import configure_optimizers
from lorasweep.training.prepare import check_run, prepare_model
from lorasweep.training.progress import TrainingProgress
from lorasweep.training.run_inputs import RunInputs
from lorasweep.training.step import add_slot_settings, compute_losses


class TrainingModule(lightning.LightningModule):
    """The model of one run, for any `lightning.Trainer`.

    Attributes:
        model: The model that a run trains. `configure_model` creates it.
        progress: Trained tokens of all processes and training time so far.
        step_losses: The last step's loss, split by micro-batch and summed over processes, of shape (micro_batches,).
    """

    model: nn.Module

    def __init__(
        self,
        config: RunSettings,
        *,
        inputs: RunInputs | None = None,
        accumulate: int | None = None,
        trust: bool = False,
    ) -> None:
        """Loads the base model and the data, unless `inputs` are given.

        Args:
            config: The arguments of `lorasweep train`, or the mapping in a checkpoint. In a user's own Trainer, the
                Trainer's steps, devices and precision replace the settings `trainer.*`.
            inputs: The base model, whose weights are never written, and the data.
            accumulate: Micro-batches into which the data cuts each batch. None: `trainer.accumulate`.
            trust: Whether code that a checkpoint names may run.

        Raises:
            ConfigError: A setting is wrong or names code without `trust`, or model or data can't be loaded.
        """
        super().__init__()
        self.config = read_settings(config, trust=trust)
        in_own_trainer = inputs is None
        self.inputs = inputs = inputs or SHARED_INPUTS.load(self.config)
        if in_own_trainer:
            self.config = replace(self.config, trainer=replace(self.config.trainer, precision=inputs.precision))
            check_run(self.config, inputs.base)
        self.base, self.objective = inputs.base, inputs.data.objective
        self.accumulate = accumulate or self.config.trainer.accumulate
        self.evaluation = Evaluation(self.objective)
        # in `lorasweep train`, `start_loggers` has already logged the settings
        self.save_hyperparameters({"config": as_settings(self.config)}, logger=in_own_trainer)
        self.progress = TrainingProgress()
        self.step_losses = torch.zeros(0)
        self._micro_losses: list[Tensor] = []
        self._micro_tokens = 0
        self._step_began = 0.0
        self.strict_loading = False  # a checkpoint has only the trained parameters

    def configure_model(self) -> None:
        """Prepares the model at the first call. With `ModelParallelStrategy`, each process keeps its shard."""
        if "model" in self._modules:
            return
        with torch.device("cpu"):  # Lightning makes the GPU the default device here, but initial values are CPU draws
            model = prepare_model(self.config, self.base)
        if self._device_mesh is not None:
            mesh = self._device_mesh["data_parallel"]
            shard_model(model, mesh, keep_trained_whole=self.config.method.has_rank)
        self.model = model
        # Each process draws the dropout masks of its own examples, so it needs its own random stream.
        torch.manual_seed(dropout_seed(self.config.seeds.dropout, rank=self.global_rank))

    def setup(self, stage: str) -> None:
        data = self._data_module()
        for key in ("model", "data"):
            if data is not None and getattr(data.config, key) != getattr(self.config, key):
                raise ConfigError(
                    f"`{key}` must be the same in TrainingModule and DataModule. Give both the same settings."
                )

    def _data_module(self) -> DataModule | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, DataModule) else None

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.model(*arguments, **named)

    def whole_model(self) -> nn.Module:
        """Returns the model with whole weights on the first process. All processes must call it."""
        if self._device_mesh is None:
            return self.model
        copy = None
        if self.global_rank == 0:
            with fork_random_streams(self.device):  # `prepare_model` sets the seed, and training continues
                copy = prepare_model(self.config, self.base)
        copy_trained_weights(self.model, copy)
        return copy or self.model

    def get_metrics(self) -> dict[str, float]:
        """Returns the metrics of the last evaluation on validation data."""
        prefix, metrics = "validation/", self.trainer.callback_metrics
        return {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name.startswith(prefix)}

    def configure_optimizers(self) -> Any:
        config, steps = self.config, self.trainer.max_steps
        if steps > 0:  # otherwise the Trainer has no `max_steps`, and the schedule has the length `trainer.max_steps`
            config = replace(config, trainer=replace(config.trainer, max_steps=steps))
        return configure_optimizers(config, self.model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._step_began = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        share: Tensor = compute_losses(self.model, batch, inputs=self.inputs, configs=[self.config])[0]
        self._micro_losses.append(share.detach())
        self._micro_tokens += int(batch["num_tokens"])
        # Each share is already divided by the weight of the whole step, so shares must be added up. Lightning averages
        # over micro-batches, and its strategies average over processes, which this factor reverses.
        return share * self.accumulate * self.trainer.world_size

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sums losses and tokens of the step over its micro-batches and over processes, and logs them."""
        if self._device_mesh is not None:
            average_gradients(self.model)  # before they are clipped
        losses, tokens = torch.stack(self._micro_losses), self._micro_tokens
        self._micro_losses, self._micro_tokens = [], 0
        if self.trainer.world_size > 1:
            # one message for all values, in float64, which represents counts exactly
            count = losses.new_tensor([tokens], dtype=torch.float64)
            totals = self.trainer.strategy.reduce(torch.cat([losses.double(), count]), reduce_op="sum")
            losses, tokens = totals[:-1], int(totals[-1])  # waits for the other processes
        self.progress.tokens += tokens
        self.step_losses = losses
        # With a user's `accumulate_grad_batches` a step has several batches. Lightning averages their gradients, so the
        # logged loss is their mean, too.
        loss = losses.sum().float() * (self.accumulate / len(losses))
        # Lightning reads the values of a progress bar from the GPU, even if there is no bar
        self.log("train/loss", loss, prog_bar=self.trainer.progress_bar_callback is not None)
        # tensors, because Lightning would copy a number to the GPU, and wait for it
        self.log("train/lr", torch.tensor(optimizer.param_groups[0]["lr"]))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.progress.train_s += time.perf_counter() - self._step_began
        self.log("train/tokens_per_s", torch.tensor(self.progress.tokens_per_s), prog_bar=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips to the Trainer's `gradient_clip_val`; without one, to `optim.clip_norm`."""
        limit = self.config.optim.clip_norm if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, gradient_clip_val=limit, gradient_clip_algorithm=gradient_clip_algorithm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        scores = self._score(batch)
        # If there are fewer examples than processes, some processes get an example that must not count.
        end = None if batch["num_tokens"] else 0
        self.evaluation.update(scores.map(lambda values: values[:end]))

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("validation")

    def on_test_epoch_start(self) -> None:
        # the metric bits per byte needs the bytes of the test text, not of the validation text
        if (data := self._data_module()) is not None:
            self.evaluation.objective = self.objective.for_split(data.splits.test())

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")
        self.evaluation.objective = self.objective

    def predict_step(self, batch: Batch) -> dict[str, Tensor]:
        """Returns each example's `loss` (a sum) and number of `items`; for labels also `prediction` and `target`."""
        rows = vars(self._score(batch))
        return {name: rows[name] for name in EXAMPLE_FIELDS if rows[name] is not None}

    def _score(self, batch: Batch) -> ExampleScores:
        return self.objective.score(self.model, add_slot_settings(batch, [self.config], self.objective))

    def _log_evaluation(self, split: str) -> None:
        values = self.evaluation.compute()
        self.evaluation.reset()
        # The values are equal on all processes. Lightning demands a reduction, and `max` leaves equal values unchanged.
        named = {f"{split}/{name}": value for name, value in values.items()}
        self.log_dict(named, sync_dist=True, reduce_fx="max")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trained parameters without the base, and the random state of every process."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        streams = [read_rng_state(self.trainer.strategy.root_device)] * self.trainer.world_size
        if len(streams) > 1:
            dist.all_gather_object(streams, streams[0])
        checkpoint["base"] = self.base.fingerprint
        checkpoint["progress"] = dict(vars(self.progress))
        # a resumed run must draw the masks that the run would have drawn, on every process
        checkpoint["dropout_streams"] = streams

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["base"] != self.base.fingerprint:
            raise RecordError(
                f"the base model must be the one that the checkpoint was trained on (fingerprint "
                f"{checkpoint['base']!r}), but {self.base.path!r} has {self.base.fingerprint!r}."
            )
        self.progress = TrainingProgress(**checkpoint["progress"])
        streams = checkpoint["dropout_streams"]
        if self._trainer is not None and self.global_rank < len(streams):  # the checkpoint may have fewer processes
            restore_rng_state(streams[self.global_rank], self.trainer.strategy.root_device)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: FBT001, FBT002
        # Not strict, because a checkpoint never has the base's weights.
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        wrong = sorted(trained.intersection(found.missing_keys)) + found.unexpected_keys
        if wrong:
            raise RecordError(
                f"a checkpoint must have exactly the parameters that these settings train, but {wrong[0]!r} differs."
            )
        return type(found)([], [])


def dropout_seed(seed: int, *, rank: int) -> int:
    """Returns the seed of the dropout stream of one process. The first process has the stream of a run alone."""
    # `seed + rank` would give rank 1 of seed 0 the same stream as rank 0 of seed 1.
    return seed if rank == 0 else int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
