"""Writes the folders of the runs that train in a `lightning.Trainer`, reports their evaluations, and ends them.

Each evaluation is a boundary. A killed training resumes at the last checkpoint, and then computes the same bits as if
it had not been killed. This requires the following order of actions at a boundary:

1. Write the log rows, the weights and the record of every run.
2. Report the evaluations in one call. Decide for each run: it is complete, is stopped, diverged, or continues.
3. Replace the checkpoint. It has the states of the runs that continue, and how the other runs ended. This is the
   commit. A training that is killed before it resumes from the previous boundary, with all of its runs.
4. If runs ended: leave the Trainer, and close them. The others continue from the checkpoint as a smaller pack.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import lightning
import torch
from lightning.fabric import Fabric
from lightning.pytorch.trainer.states import TrainerFn

from lorasweep.disk import write_atomically
from lorasweep.methods import bind
from lorasweep.record import RunStatus
from lorasweep.training.checkpoint import write_checkpoint
from lorasweep.training.module import TrainingModule
from lorasweep.training.open_run import OpenRun, RunEvaluation, RunRequest, find_run_end
from lorasweep.training.own_module import OwnModuleRun
from lorasweep.training.processes import run_on_first
from lorasweep.training.progress import OnPhase, Phase
from lorasweep.training.run_inputs import RunInputs

OnEvaluation: TypeAlias = Callable[[Sequence[RunEvaluation]], Sequence[str | None]]
"""Takes the evaluations of all runs, and returns for each why it must stop, or None."""


class RunEnd(NamedTuple):
    """How a run ended."""

    status: RunStatus
    reason: str | None


class RunStopped(BaseException):
    """Leaves Lightning's training loop immediately. `trainer.should_stop` would first run an evaluation."""


@dataclass(kw_only=True, eq=False)
class RunWriter(lightning.Callback):
    """The callback that writes the runs' folders.

    If several processes train the runs, each has such an object. Only the first process writes and reports, and the
    others follow its decisions.
    """

    requests: Sequence[RunRequest]
    inputs: RunInputs
    group: Fabric
    on_evaluation: OnEvaluation
    stop_requested: Callable[[], bool]
    on_phase: OnPhase
    checkpoint_file: Path
    training: TrainingModule | OwnModuleRun
    """Trains the runs. It has the progress and the losses of the last step."""
    opened: list[OpenRun] = field(default_factory=list)
    """The runs' folders, in slot order. Only the first process has them."""
    ends: dict[int, RunEnd] = field(default_factory=dict)
    """How runs ended, by slot."""
    logged_step: int = 0
    """Last logged step. Initially the step at which the training begins or resumes."""
    evaluated_step: int = -1
    """Step of the last evaluation."""
    has_begun: bool = False
    """Whether this process has prepared the first batch."""
    has_shared_draws: bool | None = None
    """Whether a step draws from torch's global stream, which all slots share; None before the first step."""

    def __post_init__(self) -> None:
        self._rates = [0.0] * len(self.requests)
        self._shared_at = time.monotonic()
        self._rng_state: torch.Tensor | None = None
        self._config = self.requests[0].config
        self._steps_between_logs = max(1, self._config.trainer.max_steps // 200)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._follow_progress()
        for run, count in zip(self.opened, self.training.count_trained(), strict=False):
            run.note_trained(count)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begin_phase("training", trainer.global_step)
        if not self.has_begun and self._should_stop(trainer):  # the first batch may have taken minutes
            raise RunStopped
        self.has_begun = True
        if self.has_shared_draws is None:  # detected in the first step only
            self._rng_state = torch.get_rng_state()

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._rates = self.training.read_rates()  # the schedule changes them right after the step
        if self._rng_state is not None:
            self.has_shared_draws = not torch.equal(self._rng_state, torch.get_rng_state())
            self._rng_state = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self.logged_step:
            self.logged_step = step
            for run, loss, rate in zip(self.opened, self.training.step_losses, self._rates, strict=False):
                run.note_step(step, loss, rate)
            if step % self._steps_between_logs == 0:
                self._flush()
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # A run can't stop between a step and its evaluation: a resumed run assumes that a checkpoint of this step was
        # written after the evaluation. `on_validation_end` then checks for the stop request.
        if ends_step and step % self._config.trainer.eval_every_steps and self._should_stop(trainer):
            run_on_first(trainer.strategy, self._flush)
            self._begin_phase("saving", step)
            self._commit(trainer)
            raise RunStopped

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        run_on_first(trainer.strategy, self._flush)
        self._begin_phase("evaluating", trainer.global_step)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Does the actions of a boundary, numbered as in the list at the top of this file."""
        self._begin_phase("saving", trainer.global_step)
        self.evaluated_step = trainer.global_step
        models, metrics = self.training.whole_models(), self.training.metrics
        # 1 and 2
        self.ends = run_on_first(trainer.strategy, lambda: self._write_and_report(trainer.global_step, metrics, models))
        # 3
        self._commit(trainer)
        self.share_time()
        # 4: Lightning ends after the last step by itself
        if self.ends and trainer.global_step < trainer.max_steps:
            trainer.should_stop = True
        elif trainer.global_step < trainer.max_steps and self._should_stop(trainer):
            raise RunStopped

    def _write_and_report(
        self, step: int, metrics: Sequence[Mapping[str, float]], models: Sequence[torch.nn.Module]
    ) -> dict[int, RunEnd]:
        self._follow_progress()
        for run, values, model in zip(self.opened, metrics, models, strict=True):
            if run.record.pack is not None:
                run.record.pack["shared_draws"] = bool(self.has_shared_draws)
            save = functools.partial(bind(run.config.method).save, model, base=self.inputs.base)
            run.write_evaluation(step, dict(values), save=save)
        alive = [slot for slot, run in enumerate(self.opened) if run.error is None]
        evaluations = [RunEvaluation(self.requests[slot], step, dict(metrics[slot])) for slot in alive]
        reasons = self.on_evaluation(evaluations) if alive else []
        ends: dict[int, RunEnd] = {
            slot: RunEnd("failed", str(run.error)) for slot, run in enumerate(self.opened) if run.error is not None
        }
        for slot, reason in zip(alive, reasons, strict=True):
            run = self.opened[slot]
            end = find_run_end(run.record, run.config.trainer, stop_reason=reason)
            if end is not None:
                ends[slot] = RunEnd(*end)
        return ends

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        run_on_first(trainer.strategy, self._flush)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        # `run_on_first` would wait for the other processes, which may be gone
        self._flush()

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint |= self._describe_runs()

    def _describe_runs(self) -> dict[str, Any]:
        names = [request.run_folder.path.name for request in self.requests]
        return {
            "runs": [name for slot, name in enumerate(names) if slot not in self.ends],
            "ends": {names[slot]: list(end) for slot, end in self.ends.items()},
        }

    def _commit(self, trainer: lightning.Trainer) -> None:
        """Replaces the checkpoint. Every process takes part, and the first writes."""
        kept = [slot for slot in range(len(self.requests)) if slot not in self.ends]
        path = self.checkpoint_file
        if not kept or trainer.state.fn != TrainerFn.FITTING:
            if trainer.is_global_zero:
                write_checkpoint(self._describe_runs(), path)
            return
        self.training.kept_slots = kept
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, trainer.save_checkpoint)
        else:
            trainer.save_checkpoint(path)

    def share_time(self) -> None:
        """Adds an equal share of the seconds since the last call to each run."""
        now = time.monotonic()
        for run in self.opened:
            run.wall_s += (now - self._shared_at) / len(self.opened)
        self._shared_at = now

    def _follow_progress(self) -> None:
        for run, progress in zip(self.opened, self.training.progress_by_slot, strict=False):
            run.progress = progress

    def _flush(self) -> None:
        """Writes the steps since the last flush on the first process."""
        began = time.perf_counter()
        self.training.step_losses.cpu()  # waits for the device, which still counts as training
        seconds = (time.perf_counter() - began) / len(self.requests)
        for progress in self.training.progress_by_slot:
            progress.train_s += seconds
        for run in self.opened:
            run.flush()

    def _begin_phase(self, phase: Phase, step: int) -> None:
        self.on_phase(phase, step, self._config.num_steps)

    def _should_stop(self, trainer: lightning.Trainer) -> bool:
        """Returns whether any process was asked to stop. Every process must call it at the same step."""
        return bool(trainer.strategy.reduce_boolean_decision(self.stop_requested(), all=False))
