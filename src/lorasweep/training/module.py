"""The LightningModule of one run: a model that a method prepared, its loss, its metrics, its checkpoint.

It works under any `lightning.Trainer`. What only our own run needs (its log, pausing, telemetry) is in `callbacks`.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig
from lorasweep.data.part import Batch
from lorasweep.data.tasks import Evaluation, Task
from lorasweep.methods import METHODS
from lorasweep.models.load import BaseModel
from lorasweep.training.fsdp import average_gradients, copy_trained, shard_model
from lorasweep.training.optim import build_optimizer, build_schedule, refine_groups
from lorasweep.training.prepare import prepare_model
from lorasweep.training.processes import seed_of_rank


class TrainingModule(lightning.LightningModule):
    """One model under one method.

    Attributes:
        model: What trains, from `configure_model` on.
        train_s: Seconds spent in training steps, evaluation left out.
        tokens_trained: Tokens of all optimizer steps so far, on all processes, padding left out.
        positions_trained: The same with padding.
        step_losses: Each micro-batch's share of the loss of the optimizer step that was made last, on all processes.
    """

    model: nn.Module

    def __init__(self, config: RunConfig, *, base: BaseModel, task: Task, accumulate: int = 1) -> None:
        """Takes what to train.

        Args:
            config: The run's settings; of `trainer` only those of the model.
            base: The base model, which is not changed.
            task: What is learned.
            accumulate: Micro-batches into which the data cuts the batch of each optimizer step.
        """
        super().__init__()
        self.config = config
        self.base = base
        self.task = task
        self.accumulate = accumulate
        self.method = METHODS[config.method.name]
        self.evaluation = Evaluation(task)
        self.train_s = 0.0
        self.positions_trained = 0
        self.step_losses = torch.zeros(0)
        self._tokens = torch.zeros((), dtype=torch.int64)
        self._micro_losses: list[Tensor] = []
        self._micro_tokens: list[Tensor] = []
        self._micro_positions = 0
        self._started = 0.0
        self.strict_loading = False  # a checkpoint has only what trains

    @property
    def tokens_trained(self) -> int:
        """Tokens of all optimizer steps so far, padding left out. Waits for the device."""
        return int(self._tokens)

    def configure_model(self) -> None:
        """Prepares the model, once; under `ModelParallelStrategy` each process then keeps its share of the weights."""
        if "model" in self._modules:
            return
        with torch.device("cpu"):  # Lightning makes the device the default here, but random streams are the CPU's
            model = prepare_model(self.config, self.base)
        if self._device_mesh is not None:
            leave_trained = isinstance(self.config.method, LoraConfig)
            shard_model(model, self._device_mesh["data_parallel"], leave_trained=leave_trained)
        self.model = model
        torch.manual_seed(seed_of_rank(self.config.seeds.dropout, self.global_rank))

    def whole_model(self) -> nn.Module:
        """Returns the model with whole weights on the first process. All processes must call it."""
        if self._device_mesh is None:
            return self.model
        copy = None
        if self.global_rank == 0:
            with torch.random.fork_rng(devices=[]):  # preparing sets the seed, and training goes on
                copy = prepare_model(self.config, self.base)
        copy_trained(self.model, copy)
        return copy or self.model

    def configure_optimizers(self) -> Any:
        """Returns the optimizer and its schedule, stepped once per optimizer step."""
        groups = self.method.trainable_groups(self.model, lr_ratio_b=self.config.optim.lr_ratio_b)
        groups = refine_groups(self.model, groups, self.config.optim, head=self.base.head)
        optimizer = build_optimizer(self.config.optim, groups)
        schedule = build_schedule(self.config, optimizer)
        stepped: dict[str, Any] = {"scheduler": schedule, "interval": "step"}
        if isinstance(schedule, ReduceLROnPlateau):
            # Lightning would step it after our checkpoint of the evaluation is written, so never; see below
            stepped |= {"monitor": "validation/loss", "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": stepped}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Starts the step's clock."""
        self._started = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns a micro-batch's share of the step's loss, times what Lightning divides it by.

        It divides by the number of micro-batches, and strategies by the number of processes.
        """
        share = self.task.losses(self.model, batch).sum() / batch["step_weight"]
        self._micro_losses.append(share.detach())
        self._micro_tokens.append(batch["num_tokens"])
        self._micro_positions += num_positions(batch)
        return share * self.accumulate * self.trainer.world_size

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Adds up the step over its micro-batches and over processes, and logs it."""
        if self._device_mesh is not None:
            average_gradients(self.model)  # before they are clipped
        losses, tokens = torch.stack(self._micro_losses), torch.stack(self._micro_tokens).sum()
        positions = self._micro_positions
        self._micro_losses, self._micro_tokens, self._micro_positions = [], [], 0
        if self.trainer.world_size > 1:
            counts = torch.stack([tokens, torch.full_like(tokens, positions)])
            totals = self.trainer.strategy.reduce(torch.cat([losses.double(), counts.double()]), reduce_op="sum")
            losses, tokens, positions = totals[:-2], totals[-2].long(), int(totals[-1])
        self._tokens = self._tokens.to(tokens.device) + tokens
        self.positions_trained += positions
        self.step_losses = losses
        # more micro-batches than `accumulate` are steps of their own, of which Lightning takes the mean
        self.log("train/loss", losses.sum().float() * (self.accumulate / len(losses)), prog_bar=True)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Stops the step's clock."""
        self.train_s += time.perf_counter() - self._started
        self.log("train/tokens_per_s", self.tokens_per_s, prog_bar=True)
        self.log("train/padding_fraction", self.padding_fraction)

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second of training time so far."""
        return self.tokens_trained / self.train_s if self.train_s else 0.0

    @property
    def padding_fraction(self) -> float:
        """Share of the training positions so far that was padding."""
        return 1.0 - self.tokens_trained / self.positions_trained if self.positions_trained else 0.0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the evaluation, without rows that only keep this process in step with the others."""
        rows = self.task.score(self.model, batch)
        self.evaluation.update(rows.of_rows(batch["step_weight"].isfinite().expand(len(rows.loss))))

    def on_validation_epoch_end(self) -> None:
        """Logs each metric of the whole validation part, from the rows of all processes."""
        values = self.evaluation.compute()
        self.evaluation.reset()
        self.log_dict({f"validation/{name}": value for name, value in values.items()})
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(values["loss"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps only what trains (never the base), and the state of every process's dropout stream."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        streams = [torch.get_rng_state()] * self.trainer.world_size
        if len(streams) > 1:
            dist.all_gather_object(streams, streams[0])
        checkpoint["progress"] = {
            "tokens_trained": self.tokens_trained,
            "positions_trained": self.positions_trained,
            "train_s": self.train_s,
            "dropout_streams": streams,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on where the checkpoint was written."""
        progress = checkpoint["progress"]
        self._tokens = torch.tensor(progress["tokens_trained"])
        self.positions_trained, self.train_s = progress["positions_trained"], progress["train_s"]
        streams = progress["dropout_streams"]
        if self.global_rank < len(streams):  # it may have been written by fewer
            torch.set_rng_state(streams[self.global_rank])


def num_positions(batch: Batch) -> int:
    """Returns the positions of a batch, padding included."""
    inputs = batch.get("input_ids")
    return int(batch["num_tokens"]) if inputs is None else inputs.numel()
