"""The LightningModule of one run: a model that a method prepared, its loss, its metrics, its checkpoint."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lorasweep.config.run import RunConfig
from lorasweep.data.part import Batch
from lorasweep.data.tasks import Evaluation, Task, join_rows
from lorasweep.methods import Method
from lorasweep.training.optim import build_optimizer, build_schedule, refine_groups
from lorasweep.training.ranks import Ranks


class TrainingModule(lightning.LightningModule):
    """One model under one method.

    Attributes:
        train_s: Seconds spent in training steps, evaluation left out.
        positions_trained: Positions of all training batches so far, padding included.
        summed_losses: Of the step that ended last, each micro-batch's share of its loss over all ranks; None alone.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: Method,
        config: RunConfig,
        task: Task,
        accumulate: int,
        head: tuple[str, ...] = (),
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.ranks = ranks or Ranks()
        self.summed_losses: list[Tensor] | None = None
        self._shares: list[Tensor] = []
        self._counted: list[Tensor] = []
        self.head = head
        self.model = model
        self.method = method
        self.config = config
        self.task = task
        self.accumulate = accumulate
        self.evaluation = Evaluation(task)
        self.train_s = 0.0
        self.positions_trained = 0
        self._tokens = torch.zeros((), dtype=torch.int64)
        self._step_loss = torch.zeros(())
        self._started = 0.0
        self.strict_loading = False  # a checkpoint has only what trains

    @property
    def tokens_trained(self) -> int:
        """Tokens of all training batches so far, padding left out."""
        return int(self._tokens)

    def configure_optimizers(self) -> Any:
        """Returns the optimizer and its schedule, stepped once per optimizer step."""
        groups = self.method.trainable_groups(self.model, lr_ratio_b=self.config.optim.lr_ratio_b)
        groups = refine_groups(self.model, groups, self.config.optim, head=self.head)
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
        """Returns a micro-batch's share of the step's loss, times their number, by which Lightning divides it."""
        share = self.task.losses(self.model, batch).sum() / batch["step_weight"]
        if self.ranks.size > 1:
            counts = [batch["num_tokens"].double(), share.new_tensor(num_positions(batch), dtype=torch.float64)]
            self._shares.append(torch.stack([share.detach().double(), *counts]))
            return share * self.accumulate
        self._tokens = self._tokens.to(share.device) + batch["num_tokens"]
        self.positions_trained += num_positions(batch)
        self._step_loss = share.detach() + (self._step_loss if batch_idx % self.accumulate else 0.0)
        self.log("train/loss", self._step_loss, prog_bar=True)
        return share * self.accumulate

    def step_stats(self) -> Tensor:
        """Returns this rank's share of a step's losses, its tokens and its positions by micro-batch, (micro, 3)."""
        stats, self._shares = torch.stack(self._shares), []
        return stats

    def note_totals(self, stats: Tensor) -> None:
        """Takes `step_stats` summed over ranks."""
        losses, tokens, positions = stats.unbind(1)
        self._tokens = self._tokens.to(tokens.device) + tokens.sum().long()
        self.positions_trained += int(positions.sum())
        self.summed_losses = list(losses.unbind())
        self.log("train/loss", losses.sum().float(), prog_bar=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the learning rate of the step that is about to be made."""
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
        """Adds a batch to the evaluation."""
        scores = self.task.score(self.model, batch)
        self.evaluation.update(scores)
        if self.ranks.size > 1:
            self._counted.append(batch["step_weight"].isfinite().expand(len(scores.loss)))

    def on_validation_epoch_end(self) -> None:
        """Logs each metric of the whole validation part, from the rows of all ranks."""
        if self.ranks.size == 1:
            values = self.evaluation.compute()
        else:
            counted, self._counted = torch.cat(self._counted), []
            rows = self.ranks.gather(self.evaluation.rows.of_rows(counted).cpu())
            values = self.task.compute(join_rows(rows))
        self.evaluation.reset()
        self.log_dict({f"validation/{name}": value for name, value in values.items()})
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(values["loss"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps only what trains (never the base), and the state of every rank's dropout stream."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint["progress"] = {
            "tokens_trained": self.tokens_trained,
            "positions_trained": self.positions_trained,
            "train_s": self.train_s,
            "dropout_streams": self.ranks.gather(torch.get_rng_state()),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on where the checkpoint was written."""
        progress = checkpoint["progress"]
        self._tokens = torch.tensor(progress["tokens_trained"])
        self.positions_trained, self.train_s = progress["positions_trained"], progress["train_s"]
        streams = progress.get("dropout_streams") or [progress["dropout_stream"]]
        if self.ranks.rank < len(streams):  # it may have been written by fewer
            torch.set_rng_state(streams[self.ranks.rank])


def num_positions(batch: Batch) -> int:
    """Returns the positions of a batch, padding included."""
    inputs = batch.get("input_ids")
    return int(batch["num_tokens"]) if inputs is None else inputs.numel()
