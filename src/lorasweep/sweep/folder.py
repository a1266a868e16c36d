"""A sweep's folder: making it, taking it up again, and keeping its record in step with Optuna's storage.

DIR/sweep.json     the record: what was asked for, each trial and its run
DIR/journal.log    Optuna's storage: one study per arm, and ARM/confirm for its confirm stage
DIR/runs/ARM-0003  one folder per run of the search
DIR/runs/ARM-confirm-0003  and per run of the confirm stage
DIR/report         what `lorasweep compare` writes
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.run import RunConfig
from lorasweep.data.tasks import goal_direction
from lorasweep.disk import free_folder, remove_leftovers, why_unwritable
from lorasweep.errors import ConfigError, RecordError, WorkerError
from lorasweep.record import SWEEP_FILE, SweepRecord, read_sweep, sha256_of, utc_now, write_record
from lorasweep.sweep.confirm import draw_seeds
from lorasweep.sweep.definition import Arm, Definition, restore_definition
from lorasweep.sweep.fairness import find_warnings
from lorasweep.sweep.rows import RUNS_FOLDER, WINNER_ATTRIBUTE, arm_row, confirm_row, trial_row
from lorasweep.sweep.search import (
    CONFIRM_STUDY,
    JOURNAL_FILE,
    build_pruner,
    measure_importance,
    open_confirm_study,
    open_storage,
    open_study,
)

FINGERPRINT = "lorasweep:definition"
LOCK_FILE = ".lock"


@dataclass(kw_only=True)
class SweepFolder:
    """An open sweep: its folder, record and studies. At most one process has it open."""

    path: Path
    definition: Definition
    record: SweepRecord
    storage: JournalStorage
    studies: dict[str, optuna.Study]
    """The search of each arm."""
    confirm_studies: dict[str, optuna.Study] = field(default_factory=dict)
    """The confirm stage of each arm, once it has begun."""
    lock: int
    opened: float = field(default_factory=time.monotonic)
    makespan_before_s: float = 0.0
    saved: float = -math.inf
    save_s: float = 0.0
    """When the record was last written, and how long that took."""

    def finished(self, arm: Arm) -> int:
        """Returns how many trials of an arm are finished, whatever became of them."""
        return sum(trial.state.is_finished() for trial in self.studies[arm.name].get_trials(deepcopy=False))

    def unfinished_trials(self, arm: Arm) -> list[FrozenTrial]:
        """Returns the trials that an earlier session left running, in order."""
        return self.studies[arm.name].get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def save(self, status: Any = None) -> None:
        """Writes the record with every trial as the storage has it.

        What is left out while it would take more than a tenth of the time is written later: the storage has it.

        Raises:
            WorkerError: The folder is gone.
        """
        began = time.monotonic()
        if status is None and began - self.saved < 9 * self.save_s:
            return
        self.check_disk()
        self._save(status)
        self.saved = time.monotonic()
        self.save_s = self.saved - began

    def check_disk(self, error: BaseException | None = None) -> None:
        """Makes sure that the folder is there and, where something failed, that it can be written to.

        Raises:
            WorkerError: It is not, so no trial is to blame and the sweep must end here.
        """
        reason = None if self._is_here() else "it was moved or removed"
        if reason is None and error is not None:
            reason = why_unwritable(self.path, error)
        if reason is not None:
            raise WorkerError(
                f"a sweep's folder must stay in place and have room, but {str(self.path)!r} can't be written to: "
                f"{reason}. Nothing that ended is lost; put that right, then type "
                f"`lorasweep sweep --resume {self.path}`."
            ) from error

    def _is_here(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path / LOCK_FILE), os.fstat(self.lock))
        except OSError:
            return False

    def _save(self, status: Any) -> None:
        self.record.makespan_s = self.makespan_before_s + time.monotonic() - self.opened
        self.record.trials = [
            trial_row(arm.name, trial)
            for arm in self.definition.arms
            for trial in self.studies[arm.name].get_trials(deepcopy=False)
        ]
        self.record.confirm = [
            confirm_row(arm, trial, winner=study.user_attrs[WINNER_ATTRIBUTE])
            for arm, study in self.confirm_studies.items()
            for trial in study.get_trials(deepcopy=False)
            if trial.state != TrialState.WAITING
        ]
        if status is not None:
            self.record.status = status
            self.record.ended_at = utc_now() if status != "running" else None
        if status == "complete":
            for row in self.record.arms:
                row.importance = measure_importance(self.studies[row.name])
        write_record(self.record, self.path)

    def note(self, sentences: Sequence[str]) -> None:
        """Keeps sentences on the data in the record, each once; `save` writes them."""
        self.record.notes += [sentence for sentence in sentences if sentence not in self.record.notes]

    def warn(self, sentence: str) -> None:
        """Keeps a sentence in the record, once; `save` writes it."""
        if sentence not in self.record.warnings:
            self.record.warnings.append(sentence)

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
    return free_folder(Path("outputs") / name)


def create_sweep(
    definition: Definition, path: Path, *, configs: dict[str, RunConfig], metric: str, notes: Sequence[str] = ()
) -> SweepFolder:
    """Makes the folder, the record and the studies.

    Args:
        definition: The sweep.
        path: The new folder.
        configs: One composed run per arm.
        metric: What every arm is scored by.
        notes: Sentences on how the data was made.
    """
    seeds, warnings = draw_seeds(definition), find_warnings(definition)
    try:
        (path / RUNS_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"`sweep.output` must be a folder that can be made, but {str(path)!r} can't: {error.strerror}."
        ) from error
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
        arms=[arm_row(arm, configs[arm.name]) for arm in definition.arms],
        confirm_seeds=seeds,
        notes=list(notes),
        warnings=warnings,
        started_at=utc_now(),
    )
    storage = open_storage(path)
    studies = _open_studies(definition, storage, record)
    for study in studies.values():
        study.set_user_attr(FINGERPRINT, definition.fingerprint)
    write_record(record, path)  # last: a folder that has it can be gone on with
    return SweepFolder(path=path, definition=definition, record=record, storage=storage, studies=studies, lock=lock)


def reopen_sweep(path: Path, *, confirm: Mapping[str, Any] | None = None) -> SweepFolder:
    """Takes up a sweep where it stopped; changes nothing on disk yet.

    Args:
        path: The sweep's folder.
        confirm: Other settings of the confirm stage (`{"confirm.seeds": 5}`), which may be added to a search.

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
    if confirm:
        record.definition = _with_confirm(record.definition, confirm)
    definition = _restore(record, path, source=source)
    seeds = draw_seeds(definition)
    lock = _lock(path)
    remove_leftovers(path)
    try:
        storage = _check_storage(definition, path)
        confirm_studies = _open_confirm_studies(definition, storage, record)
        studies = _open_studies(definition, storage, record)
    except BaseException:
        os.close(lock)
        raise
    record.confirm_seeds = seeds
    record.warnings = find_warnings(definition)  # what a stage has to say it says again
    return SweepFolder(
        path=path,
        definition=definition,
        record=record,
        storage=storage,
        studies=studies,
        confirm_studies=confirm_studies,
        lock=lock,
        makespan_before_s=record.makespan_s,
    )


def _with_confirm(raw: Any, confirm: Mapping[str, Any]) -> Any:
    """The definition with other settings of the confirm stage; what is damaged stays so, for `_restore` to refuse."""
    if isinstance(raw, dict) and isinstance(raw.get("overrides"), dict):
        return {**raw, "overrides": {**raw["overrides"], **confirm}}
    return raw


def _open_confirm_studies(
    definition: Definition, storage: JournalStorage, record: SweepRecord
) -> dict[str, optuna.Study]:
    """Returns the studies of a confirm stage that has begun.

    Raises:
        ConfigError: Fewer seeds are asked for than it began with: a result is not to be left out afterwards.
    """
    names = {study.study_name for study in storage.get_all_studies()}
    begun = [arm.name for arm in definition.arms if CONFIRM_STUDY.format(arm=arm.name) in names]
    asked = definition.driver.confirm.seeds
    if begun and asked < len(record.confirm_seeds):
        raise ConfigError(
            f"`confirm.seeds >= {len(record.confirm_seeds)}` must hold, with which the confirm stage began, "
            f"but got {asked!r}."
        )
    return {arm: open_confirm_study(storage, arm, direction=record.direction) for arm in begun}


def _restore(record: SweepRecord, path: Path, *, source: Path | None) -> Definition:
    try:
        return restore_definition(record.definition, source=source)
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"`definition` in {str(path / SWEEP_FILE)!r} must be what the sweep was made from, but is damaged."
        ) from error


def _check_storage(definition: Definition, path: Path) -> JournalStorage:
    """Returns the storage of a sweep that goes on, after a look that changes nothing: opening would make what lacks."""
    if not (path / JOURNAL_FILE).is_file():
        raise RecordError(f"a sweep's folder must contain {JOURNAL_FILE}, but {str(path)!r} does not.")
    try:
        storage = open_storage(path)
        known = {study.study_name: study.user_attrs for study in storage.get_all_studies()}
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise RecordError(f"{str(path / JOURNAL_FILE)!r} must be Optuna's journal, but is damaged.") from error
    if any(known.get(arm.name, {}).get(FINGERPRINT) != definition.fingerprint for arm in definition.arms):
        raise ConfigError(
            f"`definition` in {str(path / SWEEP_FILE)!r} must be as it was when the sweep began, but has changed. "
            f"Restore it, or start a new sweep."
        )
    return storage


def _open_studies(definition: Definition, storage: JournalStorage, record: SweepRecord) -> dict[str, optuna.Study]:
    studies = {}
    for arm in definition.arms:
        max_steps = max(config.trainer.max_steps for config in arm.corners())
        pruner = build_pruner(arm.driver.pruner, max_steps=max_steps)
        studies[arm.name] = open_study(storage, arm.name, direction=record.direction, pruner=pruner)
    return studies


def _lock(path: Path) -> int:
    """Takes the folder's lock, which the system lets go of when the process ends, however it ends."""
    try:
        handle = os.open(path / LOCK_FILE, os.O_CREAT | os.O_RDWR)
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
