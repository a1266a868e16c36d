"""A sweep's folder: making it, taking it up again, and keeping its record in step with Optuna's storage.

DIR/sweep.json     the record: what was asked for, each trial and its run
DIR/journal.log    Optuna's storage: one study per arm
DIR/runs/ARM-0003  one folder per run
DIR/report         what `lorasweep compare` writes
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.compose import compose_run
from lorasweep.config.run import RunConfig
from lorasweep.data.tasks import goal_direction
from lorasweep.errors import ConfigError, RecordError, WorkerError
from lorasweep.record import (
    SWEEP_FILE,
    ArmRow,
    SweepRecord,
    TrialRow,
    read_sweep,
    sha256_of,
    utc_now,
    write_record,
)
from lorasweep.record import TrialState as RowState
from lorasweep.sweep.definition import Arm, Definition, restore_definition
from lorasweep.sweep.search import JOURNAL_FILE, build_pruner, measure_importance, open_storage, open_study
from lorasweep.sweep.space import describe_space

FINGERPRINT = "lorasweep:definition"
RUN_ATTRIBUTE = "lorasweep:run"
REASON_ATTRIBUTE = "lorasweep:reason"
INFEASIBLE_ATTRIBUTE = "lorasweep:infeasible"
SCORE_ATTRIBUTE = "lorasweep:score"


@dataclass(kw_only=True)
class SweepFolder:
    """An open sweep: its folder, record and studies. At most one process has it open."""

    path: Path
    definition: Definition
    record: SweepRecord
    studies: dict[str, optuna.Study]
    lock: int
    opened: float = field(default_factory=time.monotonic)
    makespan_before_s: float = 0.0

    def run_name(self, arm: str, number: int) -> str:
        """Returns a run's folder relative to the sweep's."""
        return f"runs/{arm}-{number:04d}"

    def finished(self, arm: Arm) -> int:
        """Returns how many trials of an arm are finished, whatever became of them."""
        return sum(trial.state.is_finished() for trial in self.studies[arm.name].get_trials(deepcopy=False))

    def unfinished_trials(self, arm: Arm) -> list[FrozenTrial]:
        """Returns the trials that an earlier session left running, in order."""
        return self.studies[arm.name].get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def save(self, status: Any = None) -> None:
        """Writes the record with every trial as the storage has it."""
        self.record.makespan_s = self.makespan_before_s + time.monotonic() - self.opened
        self.record.trials = [
            _trial_row(arm.name, trial)
            for arm in self.definition.arms
            for trial in self.studies[arm.name].get_trials(deepcopy=False)
        ]
        if status is not None:
            self.record.status = status
            self.record.ended_at = utc_now() if status != "running" else None
        if status == "complete":
            for row in self.record.arms:
                row.importance = measure_importance(self.studies[row.name])
        write_record(self.record, self.path)

    def close(self) -> None:
        """Lets another process open the sweep."""
        os.close(self.lock)


def new_folder(name: str, wanted: str | None) -> Path:
    """Returns a folder for a new sweep: `outputs/NAME`, or `outputs/NAME-2` and so on where there is one already.

    Raises:
        ConfigError: The folder that was asked for is not empty.
    """
    if wanted is not None:
        path = Path(wanted)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"`sweep.output` must be a new or empty folder, but {wanted!r} is not. "
                f"To go on with a sweep type `lorasweep sweep --resume {wanted}`."
            )
        return path
    path, number = Path("outputs") / name, 1
    while path.exists():
        number += 1
        path = Path("outputs") / f"{name}-{number}"
    return path


def create_sweep(definition: Definition, path: Path, *, configs: dict[str, RunConfig], metric: str) -> SweepFolder:
    """Makes the folder, the record and the studies.

    Args:
        definition: The sweep.
        path: The new folder.
        configs: One composed run per arm.
        metric: What every arm is scored by.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    record = SweepRecord(
        status="running",
        name=definition.name,
        description=definition.description,
        metric=metric,
        direction=goal_direction(metric),
        definition=definition.raw,
        source=str(definition.source) if definition.source else None,
        source_sha256=sha256_of(definition.source) if definition.source else None,
        arms=[_arm_row(arm, configs[arm.name]) for arm in definition.arms],
        started_at=utc_now(),
    )
    write_record(record, path)
    studies = _open_studies(definition, open_storage(path), record)
    for study in studies.values():
        study.set_user_attr(FINGERPRINT, definition.fingerprint)
    return SweepFolder(path=path, definition=definition, record=record, studies=studies, lock=lock)


def reopen_sweep(path: Path) -> SweepFolder:
    """Takes up a sweep where it stopped; changes nothing on disk yet.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
        ConfigError: What was asked for has changed since the sweep began.
        WorkerError: Another process is running it.
    """
    record = read_sweep(path)
    source = Path(record.source) if record.source else None
    if source is not None and source.exists() and record.source_sha256 != sha256_of(source):
        raise ConfigError(
            f"the sweep file must be as it was when {str(path)!r} began, but {str(source)!r} has changed. "
            f"Restore it, or start a new sweep."
        )
    definition = _restore(record, path, source=source)
    lock = _lock(path)
    try:
        studies = _reopen_studies(definition, path, record)
    except BaseException:
        os.close(lock)
        raise
    return SweepFolder(
        path=path,
        definition=definition,
        record=record,
        studies=studies,
        lock=lock,
        makespan_before_s=record.makespan_s,
    )


def _restore(record: SweepRecord, path: Path, *, source: Path | None) -> Definition:
    try:
        return restore_definition(record.definition, source=source)
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"`definition` in {str(path / SWEEP_FILE)!r} must be what the sweep was made from, but is damaged."
        ) from error


def _reopen_studies(definition: Definition, path: Path, record: SweepRecord) -> dict[str, optuna.Study]:
    """Returns the studies of a sweep that goes on, after a look that changes nothing: opening would make what lacks."""
    if not (path / JOURNAL_FILE).is_file():
        raise RecordError(f"a sweep's folder must contain {JOURNAL_FILE}, but {str(path)!r} does not.")
    try:
        storage = open_storage(path)
        known = {study.study_name: study.user_attrs for study in storage.get_all_studies()}
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise RecordError(f"{str(path / JOURNAL_FILE)!r} must be Optuna's journal, but is damaged.") from error
    if any(known.get(arm.name, {}).get(FINGERPRINT) != definition.fingerprint for arm in definition.arms):
        raise ConfigError(
            f"`definition` in {str(path / SWEEP_FILE)!r} must be as it was when the sweep began, but has changed. "
            f"Restore it, or start a new sweep."
        )
    return _open_studies(definition, storage, record)


def _open_studies(definition: Definition, storage: JournalStorage, record: SweepRecord) -> dict[str, optuna.Study]:
    studies = {}
    for arm in definition.arms:
        max_steps = compose_run(arm.settings).trainer.max_steps
        pruner = build_pruner(arm.driver.pruner, max_steps=max_steps)
        studies[arm.name] = open_study(storage, arm.name, direction=record.direction, pruner=pruner)
    return studies


def _arm_row(arm: Arm, config: RunConfig) -> ArmRow:
    return ArmRow(
        name=arm.name,
        method=config.method.name,
        trials=arm.trials,
        settings=dict(arm.settings),
        space=describe_space(arm.space),
        sampler=arm.driver.sampler.name,
        pruner=arm.driver.pruner.name,
    )


def _trial_row(arm: str, trial: FrozenTrial) -> TrialRow:
    states: dict[TrialState, RowState] = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
    }
    state = states.get(trial.state, "running")
    if trial.user_attrs.get(INFEASIBLE_ATTRIBUTE):
        state = "infeasible"
    return TrialRow(
        arm=arm,
        number=trial.number,
        state=state,
        params=dict(trial.params),
        value=trial.user_attrs.get(SCORE_ATTRIBUTE, trial.value),
        run=trial.user_attrs.get(RUN_ATTRIBUTE, ""),
        reason=trial.user_attrs.get(REASON_ATTRIBUTE),
    )


def _lock(path: Path) -> int:
    """Takes the folder's lock, which the system lets go of when the process ends, however it ends."""
    try:
        handle = os.open(path / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise RecordError(f"a sweep's folder must be writable, but {str(path)!r} is not: {error.strerror}.") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise WorkerError(
            f"only one process may run a sweep, but another one has {str(path)!r} open. Wait for it."
        ) from error
    return handle
