"""PostgreSQL: one server for all tests of a process, one new database for each test."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

from .daemon import find_free_port, find_program, find_servant, need, start_daemon, wait_until

USER = "sweeper"
PASSWORD = "p@ss/w:rd%20 of tests"  # whatever a URL must quote


@dataclass
class Postgres:
    """A server of its own, reached by TCP at 127.0.0.1 with a password (scram-sha-256)."""

    folder: Path
    port: int = field(default_factory=find_free_port)
    max_connections: int = 300
    _process: subprocess.Popen[bytes] | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def start(self) -> None:
        """Starts it, and returns when it answers."""
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.folder,
            "max_connections": self.max_connections,
            "fsync": "off",  # no test cuts the power
        }
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        self._process = start_daemon(
            ["postgres", "-D", self._data, *words], log=self._log, user=find_servant("postgres")
        )
        wait_until(self._answers, f"PostgreSQL answers: {self._log}")

    def stop(self, *, immediately: bool = False) -> None:
        """Stops it: clients are cut off, and `immediately` is as a crash would be."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if immediately else signal.SIGINT)
            self._process.wait()
            self._process = None

    def restart(self, *, immediately: bool = False) -> None:
        """Stops and starts it on the same port with the same data."""
        self.stop(immediately=immediately)
        self.start()

    @property
    def running(self) -> bool:
        """Whether it has been started, and neither stopped nor ended by itself."""
        return self._process is not None and self._process.poll() is None

    def create_database(self) -> str:
        """Returns the URL of a new database."""
        name = f"sweeps_{next(self._numbers)}"
        self.query(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, database: str, *, password: str = PASSWORD) -> str:
        """Returns where a database is, with the password quoted."""
        return f"postgresql://{USER}:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def query(self, statement: str, database: str = "postgres") -> list[list[str]]:
        """Runs one statement and returns the rows."""
        psql = find_program("psql")
        assert psql is not None
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-d", database]
        done = subprocess.run(
            [psql, *where, "--no-psqlrc", "--tuples-only", "--no-align", "-v", "ON_ERROR_STOP=1", "-c", statement],
            env=os.environ | {"PGPASSWORD": PASSWORD},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [line.split("|") for line in done.stdout.splitlines()]

    def count_connections(self) -> int:
        """Returns how many sessions of clients there are, this one left out."""
        where = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
        return int(self.query(f"SELECT count(*) FROM pg_stat_activity WHERE {where}")[0][0])

    def initialise(self) -> None:
        """Makes its data: one user, who may do everything and has a password."""
        servant = find_servant("postgres")
        if servant is not None:
            shutil.chown(self.folder, servant)
        (self.folder / "password").write_text(PASSWORD)
        words = ["initdb", "-D", self._data, "--username", USER, "--pwfile", self.folder / "password"]
        words += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
        made = start_daemon(words, log=self._log, user=servant)
        assert made.wait() == 0, self._log.read_text()

    def _answers(self) -> bool:
        assert self.running, self._log.read_text()
        program = find_program("pg_isready")
        assert program is not None
        where = ["-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run([program, "-q", *where]).returncode == 0

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _log(self) -> Path:
        return self.folder / "log.txt"


@dataclass(frozen=True)
class Database:
    """A new database on a server that other tests use too."""

    url: str
    server: Postgres

    @property
    def url_with_wrong_password(self) -> str:
        """Where it is, said by one who doesn't know the password."""
        return self.server.url(self.name, password="wrong-one")

    @property
    def name(self) -> str:
        """Its name on the server."""
        return self.url.rsplit("/", 1)[1]

    def query(self, statement: str) -> list[list[str]]:
        """Runs one statement in it and returns the rows."""
        return self.server.query(statement, self.name)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL server; its folder is where another user may read it."""
    need(["initdb", "postgres", "psql", "pg_isready"], packages="postgresql")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    server = Postgres(folder)
    server.initialise()
    server.start()
    yield server
    server.stop(immediately=True)
    shutil.rmtree(folder)


@pytest.fixture
def postgres(postgres_server: Postgres) -> Database:
    """A new database on a server that runs; a test may stop it or start it again."""
    if not postgres_server.running:
        postgres_server.start()
    return Database(postgres_server.create_database(), postgres_server)
