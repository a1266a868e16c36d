"""MariaDB, which speaks MySQL's protocol: one server for all tests of a process, one new database for each test."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .daemon import find_free_port, find_program, find_servant, need, start_daemon, wait_until

USER = "sweeper"
PASSWORD = "of-tests"


@dataclass
class MariaDB:
    """A server of its own, reached by TCP at 127.0.0.1 with a password."""

    folder: Path
    port: int = field(default_factory=find_free_port)
    _process: subprocess.Popen[bytes] | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def initialise(self) -> None:
        """Makes its data, which root owns."""
        if self._servant is not None:
            shutil.chown(self.folder, self._servant)
        words = [
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={self._data}",
            "--auth-root-authentication-method=normal",
        ]
        made = start_daemon(words, log=self._log, user=self._servant)
        assert made.wait() == 0, self._log.read_text()

    def start(self) -> None:
        """Starts it, and returns when it answers."""
        words = ["mariadbd", "--no-defaults", f"--datadir={self._data}", f"--socket={self._socket}"]
        words += [
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--innodb-flush-log-at-trx-commit=0",
            "--skip-name-resolve",
        ]
        self._process = start_daemon([*words, f"--pid-file={self.folder / 'pid'}"], log=self._log, user=self._servant)
        wait_until(self._socket.exists, f"MariaDB answers: {self._log}")

    def stop(self) -> None:
        """Stops it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def create_database(self) -> str:
        """Returns the URL of a new database, which one user with a password may use."""
        name = f"sweeps_{next(self._numbers)}"
        self._query(
            f"CREATE DATABASE {name};"
            f"CREATE USER IF NOT EXISTS '{USER}'@'%' IDENTIFIED BY '{PASSWORD}';"
            f"GRANT ALL ON {name}.* TO '{USER}'@'%'"
        )
        return f"mysql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def _query(self, statement: str) -> None:
        client = find_program("mariadb")
        assert client is not None
        words = [client, "--no-defaults", f"--socket={self._socket}", "--user=root", f"--execute={statement}"]
        subprocess.run(words, check=True)

    @property
    def _servant(self) -> str | None:
        return find_servant("mysql")

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def _socket(self) -> Path:
        return self.folder / "socket"


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariaDB]:
    """A MariaDB server; its folder is where another user may read it."""
    need(["mariadbd", "mariadb-install-db", "mariadb"], packages="mariadb-server")
    server = MariaDB(Path(tempfile.mkdtemp(prefix="mariadb-")))
    server.initialise()
    server.start()
    yield server
    server.stop()
    shutil.rmtree(server.folder)


@pytest.fixture
def mariadb(mariadb_server: MariaDB) -> str:
    """The URL of a new database."""
    return mariadb_server.create_database()
