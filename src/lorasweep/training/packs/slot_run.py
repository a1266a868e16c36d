"""One run in a slot of a pack, with its step, random stream, batches, log and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import MicroBatch, StepBatchSampler
from lorasweep.errors import Diverged, RecordError
from lorasweep.record import RunRecord, RunStatus, read_run
from lorasweep.training.checkpoint import find_checkpoint, save_checkpoint
from lorasweep.training.components import finish_loggers, start_loggers
from lorasweep.training.environment import get_device
from lorasweep.training.inputs import RunInputs, describe_batching
from lorasweep.training.packs.optim import SlotOptimizer
from lorasweep.training.run_log import Metrics, RunFolder, RunLog, open_record
from lorasweep.training.telemetry import TrainingProgress


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRequest:
    """A run to train in a pack.

    A pack commits when it replaces its state file. If the run ends and the pack is killed before the next commit, the
    resumed pack calls `on_end` a second time.
    """

    config: RunConfig
    run_folder: RunFolder
    on_end: Callable[[RunRecord | Diverged], None]
    """Called when the run ends: with its record if it is complete or paused, or with the error if it failed."""
    start_step: int | None = None
    """In a resumed pack, the step of the checkpoint to load; 0 to start without a checkpoint. None loads the newest
    checkpoint, if any."""


class SlotEvaluation(NamedTuple):
    """Validation metrics of one run of a pack after `step` optimizer steps."""

    request: RunRequest
    step: int
    metrics: Metrics


OnPackEvaluation: TypeAlias = Callable[[Sequence[SlotEvaluation]], Sequence[bool]]
"""Takes the evaluations of all slots, and returns for each slot whether its run continues. If False, it is paused."""
NextRun: TypeAlias = Callable[[], RunRequest | None]
"""Returns the next run for a free slot, or None if no run is left."""


class SlotRun:
    """A run in a slot of a pack.

    Attributes:
        step: Optimizer steps done.
        saved_step: Step of the newest checkpoint; 0 if there is no checkpoint.
        sampler: The run's micro-batches by step, in the same order as in a solo run.
        stream: Random stream of the run's dropout.
        optimizer: Optimizer and schedule. The pack sets it when the run gets its slot.
        progress: Trained tokens, and the run's share of the pack's training time.
        wall_s: The run's share of the pack's wall-clock time since the run joined or resumed.
        resume_state: Content of the checkpoint to resume from; empty without a checkpoint.
    """

    optimizer: SlotOptimizer

    def __init__(self, request: RunRequest, *, inputs: RunInputs, slot: int, slots: int, accumulate: int) -> None:
        config, folder = request.config, request.run_folder.path
        self.request = request
        self.folder = folder
        self.inputs = inputs
        pack: dict[str, Any] = {"slot": slot, "slots": slots}
        # In a resumed pack, the record keeps the slot that the run first had. Dropped slots may have changed its index.
        if request.start_step is not None:
            with suppress(RecordError):
                pack = read_run(folder).pack or pack
        found = find_checkpoint(folder, kind="slot", step=request.start_step)
        self.resume_state = found.state
        self.step = self.saved_step = found.step
        self.progress = TrainingProgress.from_state(found.state["progress"]) if found.state else TrainingProgress()
        self.wall_s = 0.0
        self.record = open_record(config, request.run_folder, inputs, found=found)
        self.record.pack = pack
        self.record.batching = describe_batching(inputs, config.trainer, accumulate=accumulate)
        self.log = RunLog(self.record, folder, start_step=self.step)
        self.loggers = start_loggers(config, folder)
        # Dropout masks come from a stream of this slot, so that they do not depend on the other slots. The stream has
        # the seed of a solo run, is saved in the checkpoint, and must be on the device of the batches.
        self.stream = torch.Generator(get_device(config.trainer)).manual_seed(config.seeds.dropout)
        if found.state:
            self.stream.set_state(found.state["stream"])
        self.sampler = StepBatchSampler(
            inputs.splits.train,
            batch_size=config.trainer.batch_size,
            num_steps=config.trainer.max_steps,
            seed=config.seeds.data_order,
            accumulate=accumulate,
        )

    def count_tokens(self, micro: MicroBatch, *, positions: int) -> int:
        """Adds a micro-batch to the progress, and returns its number of tokens. `positions` includes padding."""
        tokens = int(self.inputs.splits.train.lengths[torch.tensor(micro.indices)].sum())
        self.progress.tokens += tokens
        self.progress.positions += positions
        return tokens

    def note_evaluation(self, values: Metrics, *, save: Callable[[Path], None]) -> None:
        """Writes this evaluation, and the steps since the last evaluation, to the run's log and loggers.

        Raises:
            Diverged: A loss or the score is NaN or infinite.
        """
        for row in self.log.flush(self.progress.tokens_per_s):
            metrics = {f"train/{name}": row[name] for name in ("loss", "lr", "tokens_per_s")}
            metrics["train/padding_fraction"] = self.progress.padding_fraction
            for logger in self.loggers:
                logger.log_metrics(metrics, step=row["step"])
        self.progress.write_to(self.record)
        self.log.write_evaluation(self.step, values, save=save)
        for logger in self.loggers:
            logger.log_metrics({f"validation/{name}": value for name, value in values.items()}, step=self.step)
            logger.save()

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint from which the run can resume in any pack. Earlier checkpoints are kept."""
        content = {**state, "progress": self.progress.state(), "stream": self.stream.get_state()}
        save_checkpoint(self.folder, kind="slot", step=self.step, save=lambda path: torch.save(content, path))
        self.saved_step = self.step

    def close(self, status: RunStatus, reason: str | None) -> None:
        """Writes the final record of this run and closes its loggers.

        The checkpoints are kept until the pack's next commit. A pack that is killed before this commit resumes from the
        commit before it, and needs the run's checkpoint again.
        """
        self.progress.write_to(self.record)
        self.log.close(status, reason, wall_s=self.wall_s)
        for logger in self.loggers:
            logger.finalize("failed" if status == "failed" else "success")
        finish_loggers(self.loggers)
