"""Making a sweep's folder, and opening it again to resume the sweep where it stopped."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from lorasweep.data.tasks import goal_direction
from lorasweep.disk import free_folder, network_file_system, remove_leftovers, require_new_folder
from lorasweep.errors import ConfigError, RecordError
from lorasweep.record import SWEEP_FILE, SweepRecord, read_sweep, sha256_of, utc_now, write_record
from lorasweep.sweep.controller.folder import LOCK_FILE, SweepFolder
from lorasweep.sweep.controller.record_rows import RUNS_FOLDER, arm_row
from lorasweep.sweep.controller.storage import (
    CONFIRM_STUDY,
    DATABASE_ERRORS,
    JOURNAL_FILE,
    close_storage,
    open_storage,
    study_attributes,
    unusable_database,
)
from lorasweep.sweep.definition.arms import Definition, restore_definition
from lorasweep.sweep.definition.seeds import draw_seeds
from lorasweep.sweep.definition.warnings import find_warnings

FINGERPRINT = "lorasweep:definition"


def new_folder(name: str, wanted: str | None) -> Path:
    """Returns a folder for a new sweep: `outputs/NAME`, or `outputs/NAME-2` and so on where there is one already.

    Raises:
        ConfigError: The folder that was asked for is not empty.
    """
    if wanted is None:
        return free_folder(Path("outputs") / name)
    remedy = f"To resume a sweep type `lorasweep sweep --resume {wanted}`."
    return require_new_folder(Path(wanted), key="sweep.output", remedy=remedy)


def create_sweep(definition: Definition, path: Path, *, metric: str, notes: Sequence[str] = ()) -> SweepFolder:
    """Makes the folder, the record and the studies.

    Args:
        definition: The sweep.
        path: The new folder.
        metric: What every arm is scored by.
        notes: Sentences on how the data was made.

    Raises:
        ConfigError: The folder can't be made, or the database does not answer or refuses; no record was written.
    """
    seeds, warnings = draw_seeds(definition), find_warnings(definition)
    in_database = definition.driver.storage.url is not None
    with ExitStack() as undo:
        database = _open(definition, path, undo) if in_database else None  # before a folder is made
        try:
            (path / RUNS_FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"`sweep.output` must be a folder that can be made, but {str(path)!r} can't: {error.strerror}."
            ) from error
        lock = _lock(path)
        undo.callback(os.close, lock)
        record = SweepRecord(
            status="running",
            name=definition.name,
            description=definition.description,
            metric=metric,
            direction=goal_direction(metric),
            definition=definition.raw,
            study_prefix=f"{definition.name}-{secrets.token_hex(4)}/" if in_database else "",
            source=str(definition.source) if definition.source else None,
            source_sha256=sha256_of(definition.source) if definition.source else None,
            arms=[arm_row(arm, arm.corners[0]) for arm in definition.arms],
            confirm_seeds=seeds,
            notes=list(notes),
            warnings=[*warnings, *_storage_warnings(definition, path)],
            started_at=utc_now(),
        )
        storage = database or _open(definition, path, undo)
        opened = SweepFolder(path=path, definition=definition, record=record, storage=storage, lock=lock)
        try:
            for arm in definition.arms:
                opened.open_study(arm.name).set_user_attr(FINGERPRINT, definition.fingerprint)
        except DATABASE_ERRORS as error:
            raise unusable_database(definition.driver.storage, error) from error
        write_record(record, path)  # last: a folder that has it can be resumed
        undo.pop_all()
    return opened


def saved_definition(path: Path, *, changes: Mapping[str, Any] | None = None) -> Definition:
    """Returns what the sweep in a folder was made from; opens nothing.

    Args:
        path: The sweep's folder.
        changes: Other settings of the workers and of the confirm stage.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
    """
    record = read_sweep(path)
    if changes:
        record.definition = _with_changes(record.definition, changes)
    return _restore(record, path, source=Path(record.source) if record.source else None)


def load_study(path: Path, arm: str) -> optuna.Study:
    """Returns the study of an arm of the sweep in a folder, for reading.

    Raises:
        RecordError: The folder is not a sweep, or has no study of the arm.
        ConfigError: The sweep's database does not answer.
    """
    record, config = read_sweep(path), saved_definition(path).driver.storage
    try:
        # Optuna's own journal, not ours, which would cut off what another process is writing at its end
        journal = JournalFileBackend(str(path / JOURNAL_FILE)) if config.url is None else None
        storage = open_storage(config, path) if journal is None else JournalStorage(journal)
        return optuna.load_study(study_name=record.study_prefix + arm, storage=storage)
    except KeyError as error:
        raise RecordError(f"a sweep must have a study for each arm, but {str(path)!r} has none of `{arm}`.") from error


def reopen_sweep(path: Path, *, changes: Mapping[str, Any] | None = None) -> SweepFolder:
    """Opens a sweep to resume it; changes nothing in its record or its trials yet.

    Args:
        path: The sweep's folder.
        changes: Other settings of the workers and of the confirm stage (`{"confirm.seeds": 5}`).

    Raises:
        RecordError: The folder is not a sweep, its record or journal is damaged, or another process runs it.
        ConfigError: What was asked for has changed since the sweep began, or its database does not answer.
    """
    record = read_sweep(path)
    source = _check_source(record, path)
    if changes:
        record.definition = _with_changes(record.definition, changes)
    definition = _restore(record, path, source=source)
    seeds = draw_seeds(definition)
    lock = _lock(path)
    with ExitStack() as undo:
        undo.callback(os.close, lock)
        remove_leftovers(path)
        storage = _open_known_storage(definition, record, path, undo)
        _check_seeds(definition, record, storage)
        undo.pop_all()
    record.confirm_seeds = seeds
    record.warnings = [*find_warnings(definition), *_storage_warnings(definition, path)]
    # what a stage has to say it says again
    return SweepFolder(
        path=path,
        definition=definition,
        record=record,
        storage=storage,
        lock=lock,
    )


def is_running(path: Path) -> bool:
    """Whether a process has a sweep's folder open; False where the file system has no locks."""
    try:
        handle = os.open(path / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def _check_source(record: SweepRecord, path: Path) -> Path | None:
    source = Path(record.source) if record.source else None
    if source is not None and source.exists() and record.source_sha256 != sha256_of(source):
        raise ConfigError(
            f"the sweep file must be as it was when {str(path)!r} began, but {str(source)!r} has changed. "
            f"Restore it, or start a new sweep."
        )
    return source


def _with_changes(raw: Any, changes: Mapping[str, Any]) -> Any:
    """The definition with other overrides; what is damaged stays so, for `_restore` to refuse."""
    if not (isinstance(raw, dict) and isinstance(raw.get("overrides"), dict)):
        return raw
    before = raw["overrides"]
    if "worker" in changes:  # the settings of other workers don't belong to these
        before = {key: value for key, value in before.items() if key.split(".")[0] != "worker"}
    return {**raw, "overrides": {**before, **changes}}


def _restore(record: SweepRecord, path: Path, *, source: Path | None) -> Definition:
    try:
        return restore_definition(record.definition, source=source)
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"`definition` in {str(path / SWEEP_FILE)!r} must be what the sweep was made from, but is damaged."
        ) from error


def _open(definition: Definition, path: Path, undo: ExitStack) -> BaseStorage:
    storage = open_storage(definition.driver.storage, path)
    undo.callback(close_storage, storage)
    return storage


def _open_known_storage(definition: Definition, record: SweepRecord, path: Path, undo: ExitStack) -> BaseStorage:
    """Returns the storage of a sweep that is resumed, once it is clear that it holds this sweep's studies."""
    in_journal = definition.driver.storage.url is None
    if in_journal and not (path / JOURNAL_FILE).is_file():
        raise RecordError(f"a sweep's folder must contain {JOURNAL_FILE}, but {str(path)!r} does not.")
    try:
        storage = _open(definition, path, undo)
        known = study_attributes(storage, prefix=record.study_prefix)
    except ConfigError:
        raise
    except DATABASE_ERRORS as error:
        raise unusable_database(definition.driver.storage, error) from error
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise RecordError(f"{str(path / JOURNAL_FILE)!r} must be Optuna's journal, but is damaged.") from error
    has_studies = any(arm.name in known for arm in definition.arms)
    if in_journal and not has_studies:
        raise RecordError(
            f"{str(path / JOURNAL_FILE)!r} must be Optuna's journal of this sweep, but has none of its studies. "
            "Restore the file, or start a new sweep."
        )
    if not has_studies:
        raise ConfigError(
            f"`storage.url` must be the database of the sweep in {str(path)!r}, but it has no study whose name begins "
            f"with {record.study_prefix!r}."
        )
    if any(known.get(arm.name, {}).get(FINGERPRINT) != definition.fingerprint for arm in definition.arms):
        raise ConfigError(
            f"`definition` in {str(path / SWEEP_FILE)!r} must be as it was when the sweep began, but has changed. "
            f"Restore it, or start a new sweep."
        )
    return storage


def _check_seeds(definition: Definition, record: SweepRecord, storage: BaseStorage) -> None:
    """Refuses fewer seeds than the confirm stage began with: a result is not to be left out afterwards."""
    known = study_attributes(storage, prefix=record.study_prefix)
    begun = any(CONFIRM_STUDY.format(arm=arm.name) in known for arm in definition.arms)
    asked = definition.driver.confirm.seeds
    if begun and asked < len(record.confirm_seeds):
        raise ConfigError(
            f"`confirm.seeds >= {len(record.confirm_seeds)}` must hold, with which the confirm stage began, "
            f"but got {asked!r}."
        )


def _storage_warnings(definition: Definition, path: Path) -> list[str]:
    kind = network_file_system(path)
    if kind is None or definition.driver.storage.url is not None:
        return []
    return [
        f"The journal is kept in {str(path)!r}, which is on a network file system ({kind}), where a second machine "
        "could open the sweep too and damage it. Use a local disk, or `storage.url`."
    ]


def _lock(path: Path) -> int:
    """Takes the folder's lock, which the system lets go of when the process ends, however it ends."""
    try:
        handle = os.open(path / LOCK_FILE, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise RecordError(f"a sweep's folder must be writable, but {str(path)!r} is not: {error.strerror}.") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise RecordError(
            f"a sweep must be run by one process, but another one has {str(path)!r} open. Wait for it, or look with "
            f"`lorasweep status {path}`."
        ) from error
    except OSError as error:
        os.close(handle)
        raise RecordError(
            f"the file system of a sweep's folder must have locks, but that of {str(path)!r} has none: "
            f"{error.strerror}. Use a local disk."
        ) from error
    return handle
