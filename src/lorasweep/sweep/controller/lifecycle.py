"""Creates a sweep's folder, and opens the folder again to resume the sweep."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from lorasweep.config.data import METRIC_RANGES, ScoreMetric
from lorasweep.config.sweep import StorageConfig
from lorasweep.disk import network_file_system, remove_leftovers
from lorasweep.errors import ConfigError, LoraSweepError, RecordError
from lorasweep.record import (
    SWEEP_FILE,
    SweepChange,
    SweepRecord,
    compute_sha256,
    read_sweep,
    utc_now,
    write_record,
)
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.record_rows import RUNS_FOLDER, arm_row
from lorasweep.sweep.controller.storage import (
    DATABASE_ERRORS,
    JOURNAL_FILE,
    check_journal,
    close_storage,
    damaged_journal,
    name_study,
    open_storage,
    unusable_database,
)
from lorasweep.sweep.definition.arms import Definition, restore_definition
from lorasweep.sweep.definition.grow import (
    add_round,
    describe_growth,
    grow_definition,
    list_grown_arms,
    warn_of_late_growth,
)
from lorasweep.sweep.definition.seeds import draw_confirm_seeds
from lorasweep.sweep.definition.sweep_file import read_content
from lorasweep.sweep.definition.warnings import find_warnings
from lorasweep.sweep.lock import take_lock


def create_sweep(
    definition: Definition,
    path: Path,
    *,
    metric: ScoreMetric,
    constant_answer: float | None = None,
    notes: Sequence[str] = (),
) -> SweepFolder:
    """Creates the folder, the record and the studies of a sweep, and returns the open sweep.

    Args:
        definition: The sweep.
        path: The new folder.
        metric: The metric that every arm is scored by.
        constant_answer: The metric of the constant answer on validation data; None if there is none.
        notes: Sentences on how the data was made.

    Raises:
        ConfigError: The folder can't be created, or the database does not work; no record was written.
    """
    record = SweepRecord(
        status="running",
        name=definition.name,
        description=definition.description,
        metric=metric.name,
        metric_range=[] if metric.name in METRIC_RANGES else list(metric.range),
        direction=metric.direction,
        constant_answer=constant_answer,
        definition=definition.raw,
        source=str(definition.source) if definition.source else None,
        source_sha256=compute_sha256(definition.source) if definition.source else None,
        arms=[arm_row(arm) for arm in definition.arms],
        confirm_seeds=draw_confirm_seeds(definition),
        margin=definition.sweep_config.confirm.margin,
        notes=list(notes),
        warnings=[*find_warnings(definition), *_storage_warnings(definition, path)],
        started_at=utc_now(),
    )
    config = definition.sweep_config.storage
    with ExitStack() as undo:
        if config.url is not None:  # first, so that no folder stays behind if the database does not answer
            record.study_prefix = f"{definition.name}-{secrets.token_hex(4)}/"
            storage = _open(definition, path, undo)
        try:
            (path / RUNS_FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"`sweep.output` must be a folder that can be created, but {str(path)!r} can't: {error.strerror}."
            ) from error
        lock = take_lock(path, undo)
        if config.url is None:
            storage = _open(definition, path, undo)
        opened = SweepFolder(path=path, definition=definition, record=record, storage=storage, lock=lock)
        try:
            for arm in definition.arms:
                opened.open_study(arm.name)
        except DATABASE_ERRORS as error:
            raise unusable_database(config, error) from error
        write_record(record, path)  # last: a folder that has it can be resumed
        undo.pop_all()
    return opened


def saved_definition(path: Path, *, changes: Mapping[str, Any] | None = None) -> Definition:
    """Returns the definition of the sweep in a folder, with `changes` such as `{"arms.lora.trials": 20}` applied.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
        ConfigError: A trial that has begun would change.
    """
    record = read_sweep(path)
    overrides, rounds = record.definition.get("overrides"), record.definition.get("rounds", [])
    is_whole = isinstance(overrides, dict) and "file" in record.definition and isinstance(rounds, list)
    if not is_whole or not all(isinstance(values, dict) for values in rounds):
        raise RecordError(
            f"`definition` in {str(path / SWEEP_FILE)!r} must have `file`, `overrides` and `rounds`. Restore it."
        )
    source = Path(record.source) if record.source else None
    return grow_definition(restore_definition(record.definition, source=source), changes=changes or {})


def load_study(path: Path, arm: str) -> optuna.Study:
    """Returns the study of an arm's search in the sweep in a folder, for reading.

    Raises:
        RecordError: The folder is not a sweep, has no study of this arm, or its journal is damaged.
        ConfigError: The sweep's database does not answer.
    """
    record, config = read_sweep(path), saved_definition(path).sweep_config.storage
    name = name_study(arm, "search")
    _require_journal(config, path)
    try:
        # Optuna's journal, because ours would cut off a line that another process is writing at the end
        journal = JournalFileBackend(str(path / JOURNAL_FILE)) if config.url is None else None
        if journal is not None:
            check_journal(path / JOURNAL_FILE)
        storage = open_storage(config, path) if journal is None else JournalStorage(journal)
        return optuna.load_study(study_name=record.study_prefix + name, storage=storage)
    except KeyError as error:
        raise RecordError(
            f"the storage of a sweep must have a study of each arm, but that of {str(path)!r} has no study `{name}`. "
            "Restore it, or start a new sweep."
        ) from error
    except LoraSweepError:
        raise
    except Exception as error:  # a wrong operation raises errors of many classes in Optuna
        raise (damaged_journal(path, error) if config.url is None else unusable_database(config, error)) from error


def reopen_sweep(path: Path, *, changes: Mapping[str, Any] | None = None, file: Path | None = None) -> SweepFolder:
    """Opens a sweep to resume it. Its files are not changed yet.

    Args:
        path: The sweep's folder.
        changes: Overrides: other settings of the workers and of the confirm stage, more trials or arms.
        file: The sweep file again, with more arms or trials. None: the file must be as it was.

    Raises:
        RecordError: The folder is not a sweep, its record or journal is damaged, or another process runs it.
        ConfigError: A trial that has begun would change, or the sweep's database does not answer.
    """
    record, old = read_sweep(path), saved_definition(path)
    if file is None:
        _require_same_file(old.source, record, path)
    definition = grow_definition(
        old, changes=changes or {}, content=None if file is None else read_content(file), source=file
    )
    if [row.name for row in record.arms] != [arm.name for arm in old.arms]:
        raise RecordError(f"`arms` in {str(path / SWEEP_FILE)!r} must be those of its `definition`. Restore it.")
    margin = definition.sweep_config.confirm.margin
    if record.margin != margin:
        raise ConfigError(
            f"`confirm.margin` must stay {record.margin!r}, which was stated before the first result, but got "
            f"{margin!r}. Start a new sweep."
        )
    with ExitStack() as undo:
        lock = take_lock(path, undo)
        remove_leftovers(path)
        _require_journal(definition.sweep_config.storage, path)
        try:
            storage = _open(definition, path, undo)
            names = [n for n in optuna.get_all_study_names(storage) if n.startswith(record.study_prefix)]
        except DATABASE_ERRORS as error:
            raise unusable_database(definition.sweep_config.storage, error) from error
        if not names:
            url = definition.sweep_config.storage.url
            kept_in = repr(str(path / JOURNAL_FILE)) if url is None else f"`storage.url={url}`"
            raise RecordError(
                f"{kept_in} must have the studies of the sweep in {str(path)!r}, but has none of them. "
                "Restore it, or start a new sweep."
            )
        _require_all_trials(record, storage)
        has_confirm = any(record.study_prefix + name_study(arm.name, "confirm") in names for arm in definition.arms)
        if has_confirm:
            _check_confirm_seeds(record, draw_confirm_seeds(definition))
        undo.pop_all()
    if grown := list_grown_arms(old, definition):
        definition = add_round(
            definition,
            trials={arm.name: arm.trials for arm in old.arms},
            confirm_seeds=len(record.confirm_seeds) if has_confirm else 0,
        )
    if definition.raw != record.definition:
        change = SweepChange(
            at=utc_now(),
            stage="confirm" if has_confirm else "search",
            settings=dict(changes or {}),
            file=None if file is None else str(file),
            trials=grown,
        )
        record.changes.append(change)
        record.status = "interrupted"  # until a controller has found that nothing is left to do
        record.notes += describe_growth(change)
    record.definition = definition.raw
    if file is not None:
        record.source, record.source_sha256 = str(file), compute_sha256(file)
    record.confirm_seeds = draw_confirm_seeds(definition)
    record.arms = [arm_row(arm) for arm in definition.arms]
    # the confirm stage adds its own warnings again
    record.warnings = [
        *find_warnings(definition),
        *_storage_warnings(definition, path),
        *(warning for change in record.changes for warning in warn_of_late_growth(change)),
    ]
    return SweepFolder(path=path, definition=definition, record=record, storage=storage, lock=lock)


def _check_confirm_seeds(record: SweepRecord, seeds: Sequence[int]) -> None:
    """Raises ConfigError if the new seeds of the confirm stage, which has begun, lack a seed that it has already."""
    if len(seeds) < len(record.confirm_seeds):
        raise ConfigError(
            f"`confirm.seeds >= {len(record.confirm_seeds)}` must hold, since the confirm stage began with these, "
            f"but got {len(seeds)}."
        )
    if taken := [seed for seed in record.confirm_seeds if seed not in seeds]:
        raise ConfigError(
            f"`seed` of an arm that is added must not be {taken[0]}, because winners run again on it. Choose another "
            "seed."
        )


def _require_all_trials(record: SweepRecord, storage: BaseStorage) -> None:
    """Raises RecordError if the storage lacks trials that the record has: it is always written before the record."""
    counts = {summary.study_name: summary.n_trials for summary in optuna.get_all_study_summaries(storage)}
    for arm, number in Counter(row.arm for row in record.trials).items():
        found = counts.get(record.study_prefix + name_study(arm, "search"), 0)
        if found < number:
            raise RecordError(
                f"the storage of a sweep must have the {number} trials of `{arm}` in {SWEEP_FILE}, but has {found}. "
                "Its end was cut off. Restore it, or start a new sweep."
            )


def _require_same_file(source: Path | None, record: SweepRecord, path: Path) -> None:
    if source is not None and source.is_file() and record.source_sha256 != compute_sha256(source):
        raise ConfigError(
            f"the sweep file must be as it was when {str(path)!r} began, but {str(source)!r} has changed. Restore it. "
            f"If it only has more arms or trials, type `lorasweep sweep {source} --resume {path}`."
        )


def _open(definition: Definition, path: Path, undo: ExitStack) -> BaseStorage:
    storage = open_storage(definition.sweep_config.storage, path)
    undo.callback(close_storage, storage)
    return storage


def _require_journal(config: StorageConfig, path: Path) -> None:
    if config.url is None and not (path / JOURNAL_FILE).is_file():
        raise RecordError(f"a sweep's folder must contain {JOURNAL_FILE}, but {str(path)!r} does not.")


def _storage_warnings(definition: Definition, path: Path) -> list[str]:
    kind = network_file_system(path) if definition.sweep_config.storage.url is None else None
    if kind is None:
        return []
    return [
        f"The journal is in {str(path)!r} on a network file system ({kind}). A second machine could open the sweep too "
        "and damage it. Use a local disk, or `storage.url`."
    ]
