"""Opens the storage of a sweep's studies: a journal in its folder, or a database. One process uses it at a time."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner, NopPruner
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend
from sqlalchemy.exc import SQLAlchemyError

from lorasweep.config.data import Direction
from lorasweep.config.sweep import StorageConfig
from lorasweep.errors import ConfigError, WorkerError, first_line

JOURNAL_FILE = "journal.log"
FIRST_SEARCH = "search"
"""Name of the stage that is the first search."""
DATABASE_ERRORS = (StorageInternalError, SQLAlchemyError)
"""The errors that Optuna raises if a database does not answer or refuses an operation."""


class Journal(BaseJournalBackend):
    """A journal file in Optuna's format that no other process writes to.

    *Differs* from Optuna's `JournalFileBackend`: the file is opened and read once, because the lock of the sweep's
    folder admits only one controller. There is no lock file, which a killed process would leave behind. All operations
    of one call to the controller are flushed to the disk together.
    """

    def __init__(self, path: Path) -> None:
        """Opens or creates the file, and removes a line that a killed process left unfinished."""
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        content = path.read_bytes()
        self._size = content.rfind(b"\n") + 1
        os.ftruncate(self._file, self._size)
        self._unread = deque(content[: self._size].splitlines())
        self._is_flushed = True

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yields the operations that Optuna has not read yet."""
        while self._unread:
            yield json.loads(self._unread.popleft())

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Writes all operations. If the disk is full, it writes no operation and raises OSError."""
        lines = [json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs]
        data = b"".join(lines)
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)
        self._unread += lines
        self._is_flushed = False

    def flush(self) -> None:
        """Makes sure that a power cut loses no operation."""
        if not self._is_flushed:
            os.fsync(self._file)
            self._is_flushed = True

    def close(self) -> None:
        self.flush()
        os.close(self._file)


class _FileJournalStorage(JournalStorage):
    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        super().__init__(journal)


def flush_storage(storage: BaseStorage) -> None:
    """Makes sure that a power cut loses no write; a database does this itself."""
    if isinstance(storage, _FileJournalStorage):
        storage.journal.flush()


def open_storage(config: StorageConfig, folder: Path) -> BaseStorage:
    """Returns Optuna's storage of a sweep: a journal in its folder, whose lock this process holds, or a database.

    Raises:
        ConfigError: The database does not answer, or its driver is not installed.
    """
    if config.url is None:
        return _FileJournalStorage(Journal(folder / JOURNAL_FILE))
    try:
        return RDBStorage(config.url)
    except (*DATABASE_ERRORS, ImportError, ValueError, RuntimeError) as error:
        raise unusable_database(config, error) from error


def close_storage(storage: BaseStorage) -> None:
    storage.remove_session()
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()
    elif isinstance(storage, _FileJournalStorage):
        storage.journal.close()


def unusable_database(config: StorageConfig, error: Exception) -> ConfigError:
    return ConfigError(
        f"`storage.url` must be a database that answers and whose driver is installed, but {config.url!r} is not: "
        f"{_reason(error)}. Start it, install the driver, or remove the key to use a journal in the folder."
    )


@contextmanager
def database_must_answer(folder: Path) -> Iterator[None]:
    """Raises `WorkerError` if the database does not answer, so that no trial counts as failed because of it."""
    try:
        yield
    except DATABASE_ERRORS as error:
        raise WorkerError(
            f"the database of a sweep must answer, but the database of {str(folder)!r} does not: {_reason(error)}. "
            f"No finished run is lost. Once it answers, type `lorasweep sweep --resume {folder}`."
        ) from error


def name_search(number: int) -> str:
    """Returns the name of the stage that is an arm's search of this number: `search`, `search-2` and so on."""
    return FIRST_SEARCH if number == 1 else f"{FIRST_SEARCH}-{number}"


def name_study(arm: str, stage: str) -> str:
    """Returns the name of an arm's study in a stage. An arm's name has no slash, so names are unique."""
    return arm if stage == FIRST_SEARCH else f"{arm}/{stage}"


def open_study(
    storage: BaseStorage, name: str, *, direction: Direction, pruner: BasePruner | None = None
) -> optuna.Study:
    """Returns a study, and creates it if it is missing. Its sampler is never used: `propose` asks a study in memory."""
    return optuna.create_study(
        study_name=name, storage=storage, direction=direction, pruner=pruner or NopPruner(), load_if_exists=True
    )


def _reason(error: Exception) -> str:
    # Optuna wraps the database's message in a sentence about possible causes.
    cause = error.__cause__ if isinstance(error, StorageInternalError) else None
    return first_line(cause or error)
