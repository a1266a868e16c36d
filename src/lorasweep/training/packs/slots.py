"""One run in a slot of a pack: its step, its random stream, its data order, its log and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import MicroBatch, StepBatchSampler
from lorasweep.errors import RecordError
from lorasweep.record import RunRecord, RunStatus, read_run
from lorasweep.training.checkpoint import find_checkpoint, save_checkpoint
from lorasweep.training.components import finish_loggers, start_loggers
from lorasweep.training.environment import device_of
from lorasweep.training.inputs import RunInputs, describe_batching
from lorasweep.training.run_log import RunLog, RunPlace, Values, open_record
from lorasweep.training.telemetry import TrainingProgress


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRequest:
    """A run that is to train in a pack."""

    config: RunConfig
    place: RunPlace
    on_end: Callable[[RunRecord], None]
    """Takes the record of the run when it is complete or paused; again if the pack is killed before its next commit."""
    on_failure: Callable[[Exception], None]
    """Takes the error of the run when it failed; again as `on_end`."""
    start_step: int | None = None
    """Step of the checkpoint to resume from, 0 for the beginning. None: the newest checkpoint, if there is one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotEvaluation:
    """The evaluation of one run of a pack."""

    request: RunRequest
    step: int
    """Optimizer steps done."""
    values: Values
    """Every metric on the validation split, by name."""


OnPackEvaluation: TypeAlias = Callable[[Sequence[SlotEvaluation]], Sequence[bool]]
"""Takes the evaluations of all slots at once, and returns for each whether its run continues (False: it is paused)."""
NextRun: TypeAlias = Callable[[], RunRequest | None]
"""Returns the next run for a free slot, or None if none is left."""


class SlotRun:
    """A run in a slot.

    Attributes:
        step: Optimizer steps done.
        stream: Random stream of its dropout, seeded as that of a run alone.
        progress: Its trained tokens and its share of the training time.
        wall_s: Its share of all seconds of this session.
        checkpoint: The state that it resumes from; empty if it begins.
        saved_step: Step of its newest checkpoint; 0, the beginning, needs none.
    """

    def __init__(self, request: RunRequest, *, inputs: RunInputs, slot: int, slots: int, accumulate: int) -> None:
        """Opens the run's record, log, loggers and streams, at its beginning or at the checkpoint that it resumes."""
        config, folder = request.config, request.place.folder
        self.request = request
        self.inputs = inputs
        joined: dict[str, Any] = {"slot": slot, "slots": slots}
        if request.start_step is not None:  # a killed pack resumes: the run may have joined it in another slot
            with suppress(RecordError):
                joined = read_run(folder).pack or joined
        found = find_checkpoint(folder, kind="slot", step=request.start_step)
        self.checkpoint = found.state
        self.step = self.saved_step = found.step
        self.progress = TrainingProgress.from_state(found.state["progress"]) if found.state else TrainingProgress()
        self.wall_s = 0.0
        self.record = open_record(config, request.place, inputs, found=found)
        self.record.pack = joined
        self.record.batching = describe_batching(inputs, config.trainer, accumulate=accumulate)
        self.log = RunLog(self.record, folder, start_step=self.step)
        self.loggers = start_loggers(config, folder)
        # The masks are drawn where the batches are. Each slot has its own stream, which goes into its checkpoint, so
        # that its masks are those of the run alone whoever shares the pack.
        self.stream = torch.Generator(device_of(config.trainer)).manual_seed(config.seeds.dropout)
        if found.state:
            self.stream.set_state(found.state["stream"])
        self.order = StepBatchSampler(
            inputs.splits.train,
            batch_size=config.trainer.batch_size,
            num_steps=config.trainer.max_steps,
            seed=config.seeds.data_order,
            accumulate=accumulate,
        )

    def count_tokens(self, micro: MicroBatch, *, positions: int) -> int:
        """Adds a micro-batch, which took these positions with padding, to the progress, and returns its tokens."""
        tokens = int(self.inputs.splits.train.lengths[torch.tensor(micro.indices)].sum())
        self.progress.tokens += tokens
        self.progress.positions += positions
        return tokens

    def note_evaluation(self, values: Values, *, save: Callable[[Path], None]) -> None:
        """Writes the steps so far and an evaluation to the run's log and to its loggers.

        Args:
            values: Every metric.
            save: Writes the present weights into a folder.

        Raises:
            Diverged: A loss or the score is NaN or infinite.
        """
        for row in self.log.flush(self.progress.tokens_per_s):
            metrics = {f"train/{name}": row[name] for name in ("loss", "lr", "tokens_per_s")}
            metrics["train/padding_fraction"] = self.progress.padding_fraction
            for logger in self.loggers:
                logger.log_metrics(metrics, step=row["step"])
        self.progress.note_in(self.record)
        self.log.note_evaluation(self.step, values, save=save)
        for logger in self.loggers:
            logger.log_metrics({f"validation/{name}": value for name, value in values.items()}, step=self.step)
            logger.save()

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Writes what the run needs to resume in any pack, beside its earlier checkpoints."""
        content = {**state, "progress": self.progress.state(), "stream": self.stream.get_state()}
        folder = self.request.place.folder
        save_checkpoint(folder, kind="slot", step=self.step, save=lambda path: torch.save(content, path))
        self.saved_step = self.step

    def close(self, status: RunStatus, reason: str | None) -> None:
        """Writes the record of the session's end. The pack removes the checkpoints, after its next commit."""
        self.progress.note_in(self.record)
        self.log.close(status, reason, wall_s=self.wall_s)
        for logger in self.loggers:
            logger.finalize("failed" if status == "failed" else "success")
        finish_loggers(self.loggers)
