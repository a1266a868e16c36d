"""One run in a slot of a pack: where it stands, its own random streams and order, its log and its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import MicroBatch, StepBatchSampler
from lorasweep.errors import RecordError
from lorasweep.record import RunRecord, RunStatus, read_run
from lorasweep.training.checkpoint import Found, find_checkpoint, save_checkpoint
from lorasweep.training.components import finish_loggers, start_loggers
from lorasweep.training.environment import device_of
from lorasweep.training.inputs import RunInputs, describe_batching
from lorasweep.training.run_log import RunLog, RunPlace, Values, new_record, reopen_record


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A run that is to be trained in a pack."""

    config: RunConfig
    place: RunPlace
    ended: Callable[[RunRecord], None]
    """Called with the record of a run that is complete or paused; again where the pack was killed before its commit."""
    failed: Callable[[Exception], None]
    """Called where it failed; again as `ended`."""
    start_step: int | None = None
    """Step of the checkpoint to resume from, 0 for the beginning. None: the newest one, or the beginning where there is
    none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluated:
    """One run's evaluation."""

    job: Job
    step: int
    """Optimizer steps done."""
    values: Values
    """Every metric on the validation split, by name."""


OnEvaluation = Callable[[Sequence[Evaluated]], Sequence[bool]]
"""Takes the evaluations of all slots at once and returns for each whether its run goes on (False: it is paused)."""


class Supply(Protocol):
    """Where a pack gets its runs from."""

    def __call__(self) -> Job | None:
        """The next run, or None when none is left."""


class SlotRun:
    """A job in a slot.

    Attributes:
        step: Optimizer steps done.
        stream: Random stream of its dropout, as a run alone has it.
        train_s: Its share of the seconds spent in training steps.
        wall_s: Its share of all seconds of this session.
        checkpoint: What it resumes from, or None.
        saved_step: Step of its newest checkpoint; 0, the beginning, needs none.
    """

    def __init__(self, job: Job, *, inputs: RunInputs, slot: int, slots: int, accumulate: int) -> None:
        config, folder = job.config, job.place.folder
        self.job = job
        self.inputs = inputs
        found = find_checkpoint(folder, kind="slot", step=job.start_step)
        resumed = found.state
        self.checkpoint: dict[str, Any] | None = resumed or None
        self.step = int(resumed.get("step", 0))
        self.tokens_trained = int(resumed.get("tokens_trained", 0))
        self.positions_trained = int(resumed.get("positions_trained", 0))
        self.train_s = float(resumed.get("train_s", 0.0))
        self.wall_s = 0.0
        self.saved_step = self.step
        self.record = _open_record(job, found, inputs=inputs, slot=slot, slots=slots)
        self.record.batching = describe_batching(inputs, config.trainer, accumulate=accumulate, padding_fraction=0.0)
        self.log = RunLog(self.record, folder, start_step=self.step)
        self.loggers = start_loggers(config, folder)
        device = device_of(config.trainer)  # masks are drawn where the rows are
        self.stream = torch.Generator(device).manual_seed(config.seeds.dropout)
        if resumed:
            self.stream.set_state(resumed["stream"])
        self.order = StepBatchSampler(
            inputs.splits.train,
            batch_size=config.trainer.batch_size,
            num_steps=config.trainer.max_steps,
            seed=config.seeds.data_order,
            accumulate=accumulate,
        )
        self._micros: tuple[int, list[MicroBatch]] = (-1, [])

    @property
    def tokens_per_s(self) -> float:
        """Training tokens of this run per second of its share of the training time."""
        return self.tokens_trained / self.train_s if self.train_s else 0.0

    @property
    def padding_fraction(self) -> float:
        """Share of its training positions so far that was padding."""
        return 1.0 - self.tokens_trained / self.positions_trained if self.positions_trained else 0.0

    def micro_batch(self, micro: int) -> MicroBatch:
        """Returns the rows of one micro-batch of its next step."""
        if self._micros[0] != self.step:
            self._micros = self.step, self.order.step(self.step)
        return self._micros[1][micro]

    def note_batch(self, micro: MicroBatch, *, positions: int) -> int:
        """Counts the tokens of a batch, which it returns, and the positions that they took, padding included."""
        tokens = int(self.inputs.splits.train.lengths[torch.tensor(micro.indices)].sum())
        self.tokens_trained += tokens
        self.positions_trained += positions
        return tokens

    def note_evaluation(self, values: Values, *, save: Callable[[Path], None]) -> float:
        """Writes the steps so far and an evaluation to the run's log and its loggers; returns the value of the metric.

        Args:
            values: Every metric.
            save: Writes the present weights into a folder.

        Raises:
            Diverged: A loss or the value is NaN or infinite.
        """
        for row in self.log.flush(self.tokens_per_s):
            metrics = {f"train/{name}": row[name] for name in ("loss", "lr", "tokens_per_s")}
            metrics["train/padding_fraction"] = self.padding_fraction
            for logger in self.loggers:
                logger.log_metrics(metrics, step=row["step"])
        self._note_progress()
        value = self.log.note_evaluation(self.step, values, save=save)
        for logger in self.loggers:
            logger.log_metrics({f"validation/{name}": number for name, number in values.items()}, step=self.step)
            logger.save()
        return value

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Writes what the run needs to resume in any pack, whole or not at all, beside its earlier checkpoints."""
        own: dict[str, Any] = {"step": self.step, "tokens_trained": self.tokens_trained, "train_s": self.train_s}
        own |= {"positions_trained": self.positions_trained, "stream": self.stream.get_state()}
        save_checkpoint(
            self.job.place.folder, kind="slot", step=self.step, save=lambda path: torch.save({**state, **own}, path)
        )
        self.saved_step = self.step

    def close(self, status: RunStatus, reason: str | None) -> None:
        """Writes the record of the session's end; the checkpoints are the pack's to remove."""
        self._note_progress()
        self.log.close(status, reason, wall_s=self.wall_s, keep_checkpoints=True)
        for logger in self.loggers:
            logger.finalize("failed" if status == "failed" else "success")
        finish_loggers(self.loggers)

    def _note_progress(self) -> None:
        self.record.tokens_trained, self.record.tokens_per_s = self.tokens_trained, self.tokens_per_s
        self.record.batching["padding_fraction"]["train"] = round(self.padding_fraction, 4)


def _open_record(job: Job, found: Found, *, inputs: RunInputs, slot: int, slots: int) -> RunRecord:
    """Returns the record of a run that begins, or resumes from what was found, in a slot."""
    joined: dict[str, Any] = {"slot": slot, "slots": slots}
    if job.start_step is not None:  # it was in this pack before the kill, maybe in another slot of more
        with suppress(RecordError):
            joined = read_run(job.place.folder).pack or joined
    if found.path is None:
        record = new_record(job.config, job.place, inputs, notes=found.notes)
    else:
        record = reopen_record(job.place.folder, step=found.step, notes=found.notes)
    record.pack = joined
    return record
