"""The LightningModule of one run: a model that a method prepared, its loss, its metrics, its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from lorasweep.config.run import RunConfig
from lorasweep.data.tasks import LanguageModelMetrics
from lorasweep.methods import Method
from lorasweep.training.optim import build_optimizer, build_schedule


class TrainingModule(lightning.LightningModule):
    """One model under one method.

    Attributes:
        tokens_trained: Target tokens of all training steps so far.
        train_s: Seconds spent in training steps, evaluation left out.
    """

    def __init__(self, model: nn.Module, *, method: Method, config: RunConfig, metrics: LanguageModelMetrics) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.config = config
        self.validation_metrics = metrics
        self.tokens_trained = 0
        self.train_s = 0.0
        self._started = 0.0
        self.strict_loading = False  # a checkpoint has only what trains

    def configure_optimizers(self) -> Any:
        """Returns AdamW and its schedule, stepped once per optimizer step."""
        groups = self.method.trainable_groups(self.model, lr_ratio_b=self.config.optim.lr_ratio_b)
        optimizer = build_optimizer(self.config.optim, groups)
        schedule = build_schedule(self.config.schedule, optimizer, max_steps=self.config.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Starts the step's clock."""
        self._started = time.perf_counter()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean loss per token in nats; logs it with the learning rate and the speed."""
        loss = token_losses(self.model, batch).mean()
        self.tokens_trained += batch["targets"].numel()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the learning rate of the step that is about to be made."""
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Stops the step's clock."""
        self.train_s += time.perf_counter() - self._started
        self.log("train/tokens_per_s", self.tokens_per_s, prog_bar=True)

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second of training time so far."""
        return self.tokens_trained / self.train_s if self.train_s else 0.0

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        losses = token_losses(self.model, batch)
        self.validation_metrics.update(nats=losses.sum(), tokens=losses.numel())

    def on_validation_epoch_end(self) -> None:
        """Logs each metric of the whole validation part."""
        values = self.validation_metrics.compute()
        self.validation_metrics.reset()
        self.log_dict({f"validation/{name}": value for name, value in values.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps only what trains (never the base), and the state of the dropout stream."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint["progress"] = {
            "tokens_trained": self.tokens_trained,
            "train_s": self.train_s,
            "dropout_stream": torch.get_rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on where the checkpoint was written."""
        progress = checkpoint["progress"]
        self.tokens_trained, self.train_s = progress["tokens_trained"], progress["train_s"]
        torch.set_rng_state(progress["dropout_stream"])


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns the cross-entropy in nats of every scored target token of a batch, in fp32, shape (tokens,)."""
    logits = model(input_ids=batch["input_ids"]).logits  # (batch, block, vocabulary)
    targets = batch["targets"].flatten()
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none", ignore_index=-100)
    return losses[targets != -100]
