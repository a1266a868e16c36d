"""Creates the record of a run, reopens it at a checkpoint, and decides how the run ends at an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasweep.config.build import as_settings
from lorasweep.config.run import RunConfig, TrainerConfig
from lorasweep.data.tasks import goal_direction
from lorasweep.errors import RecordError
from lorasweep.record import RunRecord, RunStatus, read_run, read_steps, utc_now, write_record
from lorasweep.training.checkpoint import FoundCheckpoint, remove_checkpoints
from lorasweep.training.environment import (
    describe_code,
    describe_command,
    describe_environment,
    describe_packages,
    describe_platform,
    resolve_device,
)
from lorasweep.training.inputs import RunInputs
from lorasweep.training.run_log import RunPlace, note_score


def open_record(
    config: RunConfig, place: RunPlace, inputs: RunInputs, *, found: FoundCheckpoint, num_processes: int = 1
) -> RunRecord:
    """Returns a new record, or the record in the folder as it was at the checkpoint that was found."""
    if found.path is None:
        return _new_record(config, place, inputs, num_processes=num_processes, notes=found.notes)
    return _reopen_record(place.folder, step=found.step, notes=found.notes)


def _new_record(
    config: RunConfig, place: RunPlace, inputs: RunInputs, *, num_processes: int, notes: Sequence[str]
) -> RunRecord:
    splits = {"train": inputs.splits.train, "validation": inputs.splits.validation}
    platform = describe_platform(inputs.precision, resolve_device(config.trainer))
    if num_processes > 1:
        platform |= {"processes": num_processes, "strategy": config.trainer.strategy_name}
    return RunRecord(
        status="running",
        config=as_settings(config),
        arm=place.arm,
        trial=place.trial,
        metric=inputs.splits.metric,
        direction=goal_direction(inputs.splits.metric),
        command=describe_command(),
        code=describe_code(),
        packages=describe_packages(),
        platform=platform,
        environment=describe_environment(),
        notes=[*inputs.notes, *notes],
        data={name: split.describe() for name, split in splits.items()},
        base=inputs.base.describe(),
        started_at=utc_now(),
        steps_planned=0 if config.method.name == "frozen" else config.trainer.max_steps,
        total_params=inputs.base.num_parameters,
    )


def _reopen_record(folder: Path, *, step: int, notes: Sequence[str]) -> RunRecord:
    record = read_run(folder)
    record.notes += [note for note in notes if note not in record.notes]
    record.status, record.reason, record.ended_at = "running", None, None
    record.test = {}
    if record.last.get("step", 0) > step:
        # A killed run writes an evaluation before the checkpoint of that step, so its record may be ahead.
        record.best, record.last, record.steps_done = {}, {}, 0
        for row in read_steps(folder, having='"validation"'):
            if row["step"] <= step:
                note_score(record, row["step"], row["validation"])
    return record


def end_at_evaluation(record: RunRecord, config: TrainerConfig, *, pauses: bool) -> tuple[RunStatus, str | None] | None:
    """Returns the status and reason with which a run ends at its last evaluation; None if it continues.

    A run that has no steps left, or that early stopping ends, is complete, even if `pauses` asks to pause it.
    """
    step = record.last.get("step", 0)  # not `steps_done`, which is later in a run that was interrupted
    if step >= record.steps_planned:
        return "complete", None
    if config.early_stop_evaluations is not None and record.best:
        best_step = record.best["step"]
        if step - best_step >= config.early_stop_evaluations * config.eval_every_steps:
            return "complete", f"no better score since step {best_step:.0f}: stopped early at step {step}"
    return ("paused", f"paused at step {step} of {record.steps_planned}") if pauses else None


def prune_paused_run(folder: Path, *, reason: str) -> RunRecord:
    """Marks a paused run as pruned, so that it can't resume, and returns its record. Repeated calls change nothing."""
    record = read_run(folder)
    if record.status not in ("paused", "pruned"):
        raise RecordError(f"a run must be paused before it is pruned, but {str(folder)!r} is {record.status}.")
    if record.status == "paused":
        record.status, record.reason = "pruned", reason
        write_record(record, folder)
    remove_checkpoints(folder)  # again for a pruned run: its process may have been killed before it removed them
    return record
