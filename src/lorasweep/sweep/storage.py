"""Where a sweep's studies are kept, and the lock that its workers share: a journal in its folder, or a database.

Workers meet here only. What reads first and then writes (asking while trials are left, taking over a lost worker's
trial, beginning the confirm stage) happens inside `exclusively`, so that it happens once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import optuna
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from lorasweep.config.sweep import DatabaseStorage, StorageConfig
from lorasweep.record import Direction
from lorasweep.sweep.database import DatabaseStudies
from lorasweep.sweep.journal import FileLock, JournalLock

JOURNAL_FILE = "journal.log"
EXCLUSIVE_FILE = ".exclusive"
CONFIRM_STUDY = "{arm}/confirm"
"""Name of the study of an arm's confirm stage; no arm's name has a slash."""
T = TypeVar("T")


class Studies(Protocol):
    """The storage of one sweep, as its workers use it."""

    storage: BaseStorage
    """Optuna's."""
    prefix: str
    """Before the name of each study: a database may hold many sweeps."""

    def exclusively(self, action: Callable[[], T]) -> T:
        """Does something that no other worker does at the same time; it must be able to begin again.

        Not within itself.

        Raises:
            WorkerError: The lock, or the database, can't be had within its limit.
        """

    def check_exclusive(self) -> None:
        """Makes sure, right before what must not happen twice, that the lock is still held."""

    def rest(self) -> None:
        """Lets go of connections until the next use."""

    def stop_waiting_when(self, stop_requested: Callable[[], bool]) -> None:
        """Says when to give up waiting for a storage that does not answer."""


class JournalStudies:
    """An append-only file in the sweep's folder, for any number of processes on one machine."""

    prefix = ""

    def __init__(self, folder: Path) -> None:
        journal = str(folder / JOURNAL_FILE)
        self.storage: BaseStorage = JournalStorage(JournalFileBackend(journal, lock_obj=JournalLock(journal)))
        self._lock = FileLock(str(folder / EXCLUSIVE_FILE))

    def exclusively(self, action: Callable[[], T]) -> T:
        """Holds a lock on a file, which the system lets go of when a process ends."""
        with self._lock:
            return action()

    def check_exclusive(self) -> None:
        """The system keeps the lock."""

    def rest(self) -> None:
        """A file is opened for each use."""

    def stop_waiting_when(self, stop_requested: Callable[[], bool]) -> None:
        """A file answers."""


def open_studies(config: StorageConfig, folder: Path, *, prefix: str) -> Studies:
    """Returns the storage of a sweep.

    Args:
        config: What kind it is.
        folder: The sweep's.
        prefix: Of its studies' names in a database.

    Raises:
        ConfigError: The database does not answer, or refuses.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the live table says what matters
    if isinstance(config, DatabaseStorage):
        return DatabaseStudies(config, prefix=prefix)
    return JournalStudies(folder)


def open_study(studies: Studies, arm: str, *, direction: Direction, pruner: BasePruner) -> optuna.Study:
    """Returns an arm's study, made if it is missing."""
    return optuna.create_study(
        study_name=studies.prefix + arm,
        storage=studies.storage,
        direction=direction,
        pruner=pruner,
        load_if_exists=True,
    )


def open_confirm_study(studies: Studies, arm: str, *, direction: Direction) -> optuna.Study:
    """Returns the study of an arm's confirm stage, made if it is missing: its trials are seeds; nothing is pruned."""
    study = open_study(studies, CONFIRM_STUDY.format(arm=arm), direction=direction, pruner=NopPruner())
    study.sampler = RandomSampler(seed=0)  # draws nothing: every trial is enqueued
    return study


def known_studies(studies: Studies) -> dict[str, dict[str, object]]:
    """Returns the attributes of each study of the sweep, by its name without prefix."""
    found = [study for study in studies.storage.get_all_studies() if study.study_name.startswith(studies.prefix)]
    return {study.study_name.removeprefix(studies.prefix): study.user_attrs for study in found}
