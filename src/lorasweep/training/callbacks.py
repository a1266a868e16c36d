"""What happens beside the steps of a run: its step log, its best and last weights, pruning, stopping, divergence."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lorasweep.errors import Diverged
from lorasweep.record import STEPS_FILE, Direction, RunRecord, write_record
from lorasweep.training.module import TrainingModule

CHECKPOINT_FILE = "last.ckpt"

ShouldStop = Callable[[int, int, float], bool]
"""`should_stop(slot, step, value)`: whether the run in a slot is to be pruned after this evaluation."""


class StepLog(lightning.Callback):
    """Writes `steps.jsonl`: the loss and learning rate of every step, and each evaluation.

    Losses stay on the device until an evaluation, so that a GPU is not held up at every step.
    """

    def __init__(self, folder: Path, *, start_step: int) -> None:
        self.path = folder / STEPS_FILE
        self.pending: list[tuple[int, list[Tensor], float]] = []
        self.micro_losses: list[Tensor] = []
        self.lr = 0.0
        self.logged_step = start_step
        _keep_steps_up_to(self.path, start_step)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notes the learning rate, which the schedule moves right after the step."""
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes a micro-batch; with the last one of a step, the step."""
        self.micro_losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        if trainer.global_step > self.logged_step:
            self.logged_step = trainer.global_step
            self.pending.append((trainer.global_step, self.micro_losses, self.lr))
            self.micro_losses = []

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the steps since the last evaluation.

        Raises:
            Diverged: One of their losses is NaN or infinite.
        """
        self.flush(pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes what is left."""
        self.flush(pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Writes the steps of a run that is stopped or fails."""
        if not isinstance(exception, Diverged):
            self.flush(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the evaluation."""
        self._append([{"step": trainer.global_step, "validation": validation_values(trainer)}])

    def flush(self, module: lightning.LightningModule) -> None:
        """Writes the pending steps and checks their losses."""
        speed = round(module.tokens_per_s, 1) if isinstance(module, TrainingModule) else 0.0
        rows: list[dict[str, Any]] = []
        for step, losses, lr in self.pending:
            loss = torch.stack(losses).mean().item()
            rows.append({"step": step, "loss": loss if math.isfinite(loss) else None, "lr": lr, "tokens_per_s": speed})
        self.pending = []
        self._append(rows)
        for row in rows:
            if row["loss"] is None:
                raise Diverged(f"the training loss became NaN or infinite at step {row['step']}. Lower `optim.lr`.")

    def _append(self, rows: list[dict[str, Any]]) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


class Keeper(lightning.Callback):
    """At each evaluation: keeps the best and the last weights, a checkpoint to resume from, and the record.

    `save` writes the kept weights of a model into a folder.
    """

    def __init__(self, record: RunRecord, folder: Path, *, save: Callable[[Path], None]) -> None:
        self.record = record
        self.folder = folder
        self.save = save

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compares with the best so far, and writes."""
        values = validation_values(trainer)
        value = values[self.record.metric]
        if not math.isfinite(value):
            raise Diverged(
                f"the validation {self.record.metric} became {value!r} at step {trainer.global_step}. Lower `optim.lr`."
            )
        self.record.last = {"step": trainer.global_step, **values}
        self.record.steps_done = trainer.global_step
        if self.record.score is None or is_better(value, self.record.score, direction=self.record.direction):
            self.record.best = dict(self.record.last)
            self.save(self.folder / "best")
        if self.record.steps_planned:
            self.save(self.folder / "last")
        write_record(self.record, self.folder)
        if (
            trainer.state.fn == TrainerFn.FITTING
        ):  # after the record, so that a run that resumes here knows this evaluation
            save_checkpoint(trainer, self.folder / CHECKPOINT_FILE)


class Pruning(lightning.Callback):
    """Ends the run where `should_stop` says so. It never asks after the last step."""

    def __init__(self, should_stop: ShouldStop, *, metric: str, max_steps: int) -> None:
        self.should_stop = should_stop
        self.metric = metric
        self.max_steps = max_steps
        self.pruned_at: int | None = None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Reports the evaluation and asks."""
        step, value = trainer.global_step, validation_values(trainer)[self.metric]
        if self.should_stop(0, step, value) and step < self.max_steps:
            self.pruned_at = step
            trainer.should_stop = True


class RunStopped(BaseException):
    """Leaves Lightning's loop at once (`trainer.should_stop` would evaluate first)."""


class Stopping(lightning.Callback):
    """Ends the run, with a checkpoint at the present step, once `stop_requested` says so."""

    def __init__(self, stop_requested: Callable[[], bool], folder: Path, *, eval_every_steps: int) -> None:
        self.stop_requested = stop_requested
        self.folder = folder
        self.eval_every_steps = eval_every_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks after each optimizer step that no evaluation follows.

        Raises:
            RunStopped: The run is to end here.
        """
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if ends_step and trainer.global_step % self.eval_every_steps and self.stop_requested():
            save_checkpoint(trainer, self.folder / CHECKPOINT_FILE)
            raise RunStopped

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Asks after each evaluation, which left a checkpoint.

        Raises:
            RunStopped: The run is to end here.
        """
        if trainer.global_step < trainer.max_steps and self.stop_requested():
            raise RunStopped


def validation_values(trainer: lightning.Trainer) -> dict[str, float]:
    """Returns the metrics of the evaluation that just ended, by their names."""
    prefix = "validation/"
    metrics = trainer.callback_metrics
    return {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name.startswith(prefix)}


def is_better(value: float, other: float, *, direction: Direction) -> bool:
    """Whether a score beats another."""
    return value < other if direction == "minimize" else value > other


def save_checkpoint(trainer: lightning.Trainer, path: Path) -> None:
    """Writes Lightning's checkpoint (only what trains, see `TrainingModule`) whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    trainer.save_checkpoint(temporary)
    os.replace(temporary, path)


def _keep_steps_up_to(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True) if step else []
    kept = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # cut off by a killed process
        if row["step"] <= step:
            kept.append(line)
    path.write_text("".join(kept))
