"""Making a sweep's folder, taking a sweep up again where it stopped, and joining one that others run."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna

from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import DatabaseStorage
from lorasweep.data.tasks import goal_direction
from lorasweep.disk import free_folder, network_file_system, remove_leftovers
from lorasweep.errors import ConfigError, RecordError, WorkerError
from lorasweep.record import (
    SWEEP_FILE,
    WORKERS_FOLDER,
    SweepRecord,
    read_sweep,
    read_workers,
    sha256_of,
    utc_now,
    write_record,
)
from lorasweep.sweep.confirm import draw_seeds
from lorasweep.sweep.definition import Definition, restore_definition
from lorasweep.sweep.fairness import find_warnings
from lorasweep.sweep.folder import LOCK_FILE, SweepFolder
from lorasweep.sweep.journal import try_lock
from lorasweep.sweep.rows import RUNS_FOLDER, arm_row
from lorasweep.sweep.search import build_pruner
from lorasweep.sweep.software import adopt_software, check_software
from lorasweep.sweep.storage import (
    CONFIRM_STUDY,
    JOURNAL_FILE,
    Studies,
    known_studies,
    open_confirm_study,
    open_studies,
    open_study,
)
from lorasweep.sweep.workers import Colleagues, this_process

FINGERPRINT = "lorasweep:definition"
LONGEST_OPENING_S = 60.0
"""Another process that takes the sweep up does so in seconds."""


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

    Raises:
        ConfigError: The folder can't be made, or the database does not answer; nothing was written.
    """
    seeds, warnings = draw_seeds(definition), find_warnings(definition)
    in_database = isinstance(definition.driver.storage, DatabaseStorage)
    prefix = f"{definition.name}-{secrets.token_hex(4)}/" if in_database else ""
    storage = open_studies(definition.driver.storage, path, prefix=prefix) if in_database else None
    try:
        (path / RUNS_FOLDER).mkdir(parents=True, exist_ok=True)
        (path / WORKERS_FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"`sweep.output` must be a folder that can be made, but {str(path)!r} can't: {error.strerror}."
        ) from error
    lock = _lock(path, "alone", needed=not in_database)
    record = SweepRecord(
        status="running",
        name=definition.name,
        description=definition.description,
        metric=metric,
        direction=goal_direction(metric),
        definition=definition.raw,
        study_prefix=prefix,
        source=str(definition.source) if definition.source else None,
        source_sha256=sha256_of(definition.source) if definition.source else None,
        arms=[arm_row(arm, configs[arm.name]) for arm in definition.arms],
        confirm_seeds=seeds,
        notes=list(notes),
        warnings=[*warnings, *_storage_warnings(definition, path)],
        started_at=utc_now(),
    )
    if storage is None:
        storage = open_studies(definition.driver.storage, path, prefix=prefix)
    studies = _open_arms(definition, storage, record)
    for study in studies.values():
        study.set_user_attr(FINGERPRINT, definition.fingerprint)
    opened = SweepFolder(path=path, definition=definition, record=record, storage=storage, studies=studies, lock=lock)
    adopt_software(opened)
    write_record(record, path)  # last: a folder that has it can be gone on with
    _share(lock)
    return opened


def saved_definition(path: Path) -> Definition:
    """Returns what the sweep in a folder was made from; opens nothing.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
    """
    record = read_sweep(path)
    return _restore(record, path, source=Path(record.source) if record.source else None)


def reopen_sweep(path: Path, *, confirm: Mapping[str, Any] | None = None) -> SweepFolder:
    """Takes up a sweep where it stopped; changes nothing in its record or its trials yet.

    Args:
        path: The sweep's folder.
        confirm: Other settings of the confirm stage (`{"confirm.seeds": 5}`), which may be added to a search.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
        ConfigError: What was asked for has changed since the sweep began, or its database does not answer.
        WorkerError: A worker is running it.
    """
    record = read_sweep(path)
    source = _check_source(record, path)
    if confirm:
        record.definition = _with_confirm(record.definition, confirm)
    definition = _restore(record, path, source=source)
    seeds = draw_seeds(definition)
    lock = _lock(path, "alone", needed=not isinstance(definition.driver.storage, DatabaseStorage))
    try:
        for folder in (path, path / WORKERS_FOLDER):
            remove_leftovers(folder)
        opened = _open(path, record, definition, lock=lock)
        adopt_software(opened)
        _share(lock)
    except BaseException:
        os.close(lock)
        raise
    record.confirm_seeds = seeds
    record.warnings = [*find_warnings(definition), *_storage_warnings(definition, path)]
    # what a stage has to say it says again
    return opened


def join_sweep(path: Path, *, allow_different: bool = False) -> SweepFolder:
    """Opens a sweep as one more worker, whether others run it or not.

    Args:
        path: The sweep's folder, as this machine sees it.
        allow_different: Whether code and packages may differ from those that the sweep was started with.

    Raises:
        RecordError: The folder is not a sweep, or can't be seen or written to from here.
        ConfigError: Code or packages differ, its database does not answer, or its journal belongs to another machine.
    """
    record = read_sweep(path)
    source = Path(record.source) if record.source else None
    definition = _restore(record, path, source=source)
    in_database = isinstance(definition.driver.storage, DatabaseStorage)
    lock = _lock(path, "shared", needed=not in_database)
    try:
        opened = _open(path, record, definition, lock=lock)
    except BaseException:
        os.close(lock)
        raise
    try:
        if not allow_different:
            check_software(opened)
        if not in_database:
            _check_one_machine(opened)
    except BaseException:
        opened.close()
        raise
    return opened


def _open(path: Path, record: SweepRecord, definition: Definition, *, lock: int) -> SweepFolder:
    storage = _check_storage(definition, path, prefix=record.study_prefix)
    confirm_studies = _open_confirm_studies(definition, storage, record)
    studies = _open_arms(definition, storage, record)
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


def _check_source(record: SweepRecord, path: Path) -> Path | None:
    source = Path(record.source) if record.source else None
    if source is not None and source.exists() and record.source_sha256 != sha256_of(source):
        raise ConfigError(
            f"the sweep file must be as it was when {str(path)!r} began, but {str(source)!r} has changed. "
            f"Restore it, or start a new sweep."
        )
    return source


def _with_confirm(raw: Any, confirm: Mapping[str, Any]) -> Any:
    """The definition with other settings of the confirm stage; what is damaged stays so, for `_restore` to refuse."""
    if isinstance(raw, dict) and isinstance(raw.get("overrides"), dict):
        return {**raw, "overrides": {**raw["overrides"], **confirm}}
    return raw


def _open_confirm_studies(definition: Definition, storage: Studies, record: SweepRecord) -> dict[str, optuna.Study]:
    """Returns the studies of a confirm stage that has begun.

    Raises:
        ConfigError: Fewer seeds are asked for than it began with: a result is not to be left out afterwards.
    """
    names = known_studies(storage)
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


def _check_storage(definition: Definition, path: Path, *, prefix: str) -> Studies:
    """Returns the storage of a sweep that goes on, after a look that changes nothing: opening would make what lacks."""
    in_database = isinstance(definition.driver.storage, DatabaseStorage)
    if not in_database and not (path / JOURNAL_FILE).is_file():
        raise RecordError(f"a sweep's folder must contain {JOURNAL_FILE}, but {str(path)!r} does not.")
    storage: Studies | None = None
    try:
        storage = open_studies(definition.driver.storage, path, prefix=prefix)
        _check_known(known_studies(storage), definition, path, prefix=prefix)
    except BaseException as error:
        if storage is not None:
            storage.rest()
        damaged = (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError)
        if isinstance(error, damaged) and not isinstance(error, ConfigError):
            raise RecordError(f"{str(path / JOURNAL_FILE)!r} must be Optuna's journal, but is damaged.") from error
        raise
    return storage


def _check_known(known: Mapping[str, Mapping[str, object]], definition: Definition, path: Path, *, prefix: str) -> None:
    in_database = isinstance(definition.driver.storage, DatabaseStorage)
    if in_database and not any(arm.name in known for arm in definition.arms):
        raise ConfigError(
            f"`storage.url` must be the database of the sweep in {str(path)!r}, but it has no study whose name begins "
            f"with {prefix!r}."
        )
    if any(known.get(arm.name, {}).get(FINGERPRINT) != definition.fingerprint for arm in definition.arms):
        raise ConfigError(
            f"`definition` in {str(path / SWEEP_FILE)!r} must be as it was when the sweep began, but has changed. "
            f"Restore it, or start a new sweep."
        )


def _open_arms(definition: Definition, storage: Studies, record: SweepRecord) -> dict[str, optuna.Study]:
    studies = {}
    for arm in definition.arms:
        max_steps = max(config.trainer.max_steps for config in arm.corners())
        pruner = build_pruner(arm.driver.pruner, max_steps=max_steps)
        studies[arm.name] = open_study(storage, arm.name, direction=record.direction, pruner=pruner)
    return studies


def _check_one_machine(opened: SweepFolder) -> None:
    """A journal's lock holds between processes of one machine only."""
    here = this_process()
    lease_s = opened.definition.driver.worker.lease_s
    for row in Colleagues(opened.path, lease_s=lease_s).live():
        if row.host != here.host:
            raise ConfigError(
                f"`storage=journal` must be used from one machine, but worker {row.id} serves {str(opened.path)!r} "
                f"from {row.host!r} and this is {here.host!r}. Start the sweep with `storage=postgresql`."
            )


def _storage_warnings(definition: Definition, path: Path) -> list[str]:
    kind = network_file_system(path)
    if kind is None or isinstance(definition.driver.storage, DatabaseStorage):
        return []
    return [
        f"`storage=journal` is kept in {str(path)!r}, which is on a network file system ({kind}), where locks may not "
        "hold and the journal may be damaged. Use a local disk, or `storage=postgresql`."
    ]


def _lock(path: Path, how: Literal["alone", "shared"], *, needed: bool) -> int:
    """Takes the folder's lock, which the system lets go of when the process ends, however it ends.

    Args:
        path: The sweep's folder.
        how: Without others, or with those that have it open.
        needed: Whether a file system that has no locks is an error; a database has a lock of its own.
    """
    try:
        handle = os.open(path / LOCK_FILE, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise RecordError(f"a sweep's folder must be writable, but {str(path)!r} is not: {error.strerror}.") from error
    deadline = time.monotonic() + (LONGEST_OPENING_S if how == "shared" else 0)
    try:
        while not try_lock(handle, shared=how == "shared"):
            if time.monotonic() >= deadline:
                os.close(handle)
                raise WorkerError(_who_has_it(path))
            time.sleep(0.05)
    except OSError as error:
        if needed:
            os.close(handle)
            raise RecordError(
                f"the file system of a sweep's folder must have locks, but that of {str(path)!r} has none: "
                f"{error.strerror}. Use a local disk, or `storage=postgresql`."
            ) from error
    return handle


def _who_has_it(path: Path) -> str:
    rows = [row for row in read_workers(path) if row.status == "running"]
    who = f"worker {rows[-1].id}" if rows else "another process"
    return (
        f"a sweep is taken up when no worker runs it, but {who} has {str(path)!r} open. Wait for it, look with "
        f"`lorasweep status {path}`, or join with `lorasweep worker {path}`."
    )


def _share(lock: int) -> None:
    """Lets other workers open the sweep too."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
    except OSError:  # a file system without locks
        return
