"""A sweep's studies in PostgreSQL or MySQL, where workers of many machines meet; a database that is away is waited for.

The password may stand in the address that was typed, in LORASWEEP_STORAGE_URL or LORASWEEP_STORAGE_PASSWORD, or where
the database's own client looks for it. It is never written down.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy import Connection, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from lorasweep.config.sweep import DatabaseStorage
from lorasweep.errors import ConfigError, WorkerError, first_line

URL_VARIABLE = "LORASWEEP_STORAGE_URL"
PASSWORD_VARIABLE = "LORASWEEP_STORAGE_PASSWORD"
DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql"}
EXTRAS = {"postgresql": "postgresql", "mariadb": "mysql", "mysql": "mysql"}
CONNECT_S = 10
LONGEST_HOLD_S = 60
"""After which a server ends the session of a worker that stopped while it held the lock."""
LONGEST_WAIT_S = 150
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
POOL = 2
"""Connections of one worker: Optuna's and the lock's. Between uses it has none, see `rest`."""
T = TypeVar("T")


class LostLockError(Exception):
    """The connection that held the lock is gone; what was being done begins again."""


class PatientStorage(RDBStorage):
    """Optuna's storage, in which what a lost connection cut off is done again; all of it can be done twice.

    Differs: a new trial is made only while the lock is held, also when Optuna tries again by itself.
    """

    patiently: Callable[[Callable[[], Any]], Any] = staticmethod(lambda attempt: attempt())
    check_exclusive: Callable[[], None] = staticmethod(lambda: None)

    def _get_prepared_new_trial(self, *arguments: Any, **named: Any) -> Any:
        self.check_exclusive()
        return super()._get_prepared_new_trial(*arguments, **named)


def _patient(name: str) -> Any:
    method = getattr(RDBStorage, name)

    @functools.wraps(method)
    def call(self: PatientStorage, *arguments: Any, **named: Any) -> Any:
        return self.patiently(lambda: method(self, *arguments, **named))

    return call


for _name in (
    *("get_all_studies", "get_study_id_from_name", "get_study_name_from_id", "get_study_directions"),
    *("get_study_user_attrs", "get_study_system_attrs", "set_study_user_attr", "set_study_system_attr"),
    *("get_trial", "_get_trials", "get_trial_id_from_study_id_trial_number", "_get_best_trial_id"),
    *("set_trial_state_values", "set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr"),
    "_set_trial_param",
):
    setattr(PatientStorage, _name, _patient(_name))


class DatabaseStudies:
    """Studies in a database, below a prefix that is this sweep's own."""

    def __init__(self, config: DatabaseStorage, *, prefix: str) -> None:
        """Connects.

        Raises:
            ConfigError: There is no address, its driver is missing, or the database does not answer or refuses.
        """
        self.prefix = prefix
        self.address = storage_address(config)
        """Without its password."""
        self._retry_s = config.retry_s
        self._stop_requested: Callable[[], bool] = lambda: False
        self._held: Connection | None = None
        self._used = threading.RLock()
        """A pool that is closed while one of its connections is in use would lose that one."""
        self._database = _connect(self.address)
        self._database.patiently = self._patiently
        self._database.check_exclusive = self.check_exclusive
        self.storage: BaseStorage = get_storage(self._database)

    def exclusively(self, action: Callable[[], T]) -> T:
        """Holds a lock of the database that goes with the connection; begins again where the connection is lost."""
        return self._patiently(lambda: self._once_exclusively(action))

    def check_exclusive(self) -> None:
        """Asks over the connection that holds the lock; a sweep that is being made holds none.

        Raises:
            LostLockError: It is gone, and with it the lock.
        """
        if self._held is None:
            return
        try:
            self._held.execute(text("SELECT 1"))
        except SQLAlchemyError as error:
            raise LostLockError from error

    def rest(self) -> None:
        """Closes connections that are not in use, so that workers that train leave the server alone."""
        if self._used.acquire(blocking=False):
            try:
                self._database.engine.dispose()
            finally:
                self._used.release()

    def stop_waiting_when(self, stop_requested: Callable[[], bool]) -> None:
        """A worker that is to stop does not wait for the database."""
        self._stop_requested = stop_requested

    def _once_exclusively(self, action: Callable[[], T]) -> T:
        assert self._held is None, "not within itself"
        with self._database.engine.connect() as connection:
            _lock(connection, self.prefix)
            self._held = connection
            try:
                return action()
            finally:
                self._held = None
                _unlock(connection, self.prefix)

    def _patiently(self, attempt: Callable[[], T]) -> T:
        """Tries until the database answers or `storage.retry_s` have passed; within the lock once, it begins again."""
        began, pause_s = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                with self._used:
                    return attempt()
            except (SQLAlchemyError, StorageInternalError, LostLockError) as error:
                if self._held is not None or not _is_away(error):
                    raise
                waited_s = time.monotonic() - began
                if waited_s + pause_s > self._retry_s or self._stop_requested():
                    raise WorkerError(
                        f"the database must answer within `storage.retry_s` = {self._retry_s:.0f} s, but "
                        f"{self.address} does not: {_reason(error)}. Nothing that ended is lost; when it is back, "
                        "type `lorasweep sweep --resume DIR` or `lorasweep worker DIR`."
                    ) from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def storage_address(config: DatabaseStorage) -> str:
    """Returns the address of a database without its password, which is kept for this process and those it starts.

    Raises:
        ConfigError: There is none, or it is not one of the storage's kind.
    """
    given = config.url or os.environ.get(URL_VARIABLE)
    if not given:
        raise ConfigError(
            f"`storage.url` must be {config.name}://USER@HOST/DATABASE, but is null and {URL_VARIABLE} is not set. "
            "Set one of them."
        )
    address = keep_password(given)
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        url = None
    if url is None or url.get_backend_name() not in (config.name, *(["mariadb"] if config.name == "mysql" else [])):
        raise ConfigError(f"`storage.url` must be {config.name}://USER@HOST/DATABASE, but got {address!r}.")
    return address


def keep_password(address: str) -> str:
    """Returns an address without its password, which goes into LORASWEEP_STORAGE_PASSWORD.

    The user's name goes into the query, since what stands before an `@` is taken for a secret wherever it is written.
    """
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        scheme, separator, rest = address.partition("://")
        return scheme + separator + rest.rpartition("@")[2]
    in_query = [name for name in url.query if "pass" in name.lower()]
    if password := url.password or next((str(url.query[name]) for name in in_query), None):
        os.environ[PASSWORD_VARIABLE] = password
    without = url._replace(username=None, password=None).difference_update_query(in_query)
    if url.username:
        without = without.update_query_dict({"user": url.username})
    return without.render_as_string(hide_password=False)


def without_passwords(value: Any, key: str = "") -> Any:
    """Returns what was asked for with `storage.url` as it may be written down."""
    if isinstance(value, Mapping):
        return {name: without_passwords(item, str(name)) for name, item in value.items()}
    is_address = isinstance(value, str) and key.endswith("storage.url") and "://" in value
    return keep_password(value) if is_address else value


def _connect(address: str) -> PatientStorage:
    url = make_url(address)
    if (user := url.query.get("user")) is not None:
        url = url.difference_update_query(["user"]).set(username=str(user))
    backend = url.get_backend_name()
    if url.drivername == backend and backend in DRIVERS:
        url = url.set(drivername=f"{backend}+{DRIVERS[backend]}")
    if password := os.environ.get(PASSWORD_VARIABLE):
        url = url.set(password=password)
    options: dict[str, Any] = {"connect_timeout": CONNECT_S}
    if backend == "postgresql":
        options["application_name"] = "lorasweep"
    engine = {"pool_size": POOL, "max_overflow": 1, "pool_pre_ping": True, "connect_args": options}
    try:
        return PatientStorage(url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"), engine)
    except ImportError as error:
        raise ConfigError(
            f"`storage={backend}` must have its driver, which is not installed: {first_line(error)}. "
            f"Type `pip install 'lorasweep[{EXTRAS.get(backend, backend)}]'`."
        ) from error
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        raise ConfigError(
            f"`storage.url` must be a database that answers, but {address} does not: {_reason(error)}. "
            f"Start it, or put `storage.url`, {PASSWORD_VARIABLE} or the rights of the user right."
        ) from error


def _lock(connection: Connection, prefix: str) -> None:
    try:
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{LONGEST_HOLD_S}s'"))
            connection.execute(text(f"SET LOCAL lock_timeout = '{LONGEST_WAIT_S}s'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _lock_key(prefix)})
        elif not connection.execute(
            text("SELECT GET_LOCK(:name, :wait)"), {"name": _lock_name(prefix), "wait": LONGEST_WAIT_S}
        ).scalar():
            raise _lock_is_kept()
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == "55P03":  # PostgreSQL's lock_not_available
            raise _lock_is_kept() from error
        raise


def _unlock(connection: Connection, prefix: str) -> None:
    try:
        if connection.dialect.name != "postgresql":
            connection.execute(text("SELECT RELEASE_LOCK(:name)"), {"name": _lock_name(prefix)})
        connection.rollback()
    except SQLAlchemyError:
        connection.invalidate()  # the lock went with the connection; what was done stays done


def _lock_is_kept() -> WorkerError:
    return WorkerError(
        f"the sweep's lock must be free within {LONGEST_WAIT_S} s, but another worker keeps it. End that worker, then "
        "go on with `lorasweep sweep --resume`."
    )


def _lock_key(prefix: str) -> int:
    return int.from_bytes(hashlib.sha256(prefix.encode()).digest()[:8], "big", signed=True)


def _lock_name(prefix: str) -> str:
    return f"lorasweep:{hashlib.sha256(prefix.encode()).hexdigest()[:32]}"


def _is_away(error: BaseException | None) -> bool:
    """Whether a lost connection, a server that is starting or stopping, or a deadlock is behind an error."""
    while error is not None:
        if isinstance(error, LostLockError | OperationalError | InterfaceError | PendingRollbackError):
            return True
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return True
        error = error.__cause__
    return False


def _reason(error: BaseException) -> str:
    """What the database's driver said, in a line."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, DBAPIError):
        cause = cause.__cause__
    said = first_line(cause.orig if isinstance(cause, DBAPIError) and cause.orig is not None else cause)
    return said.rpartition("FATAL: ")[2].strip()
