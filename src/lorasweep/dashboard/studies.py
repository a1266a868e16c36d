"""optuna-dashboard on a sweep's storage, as a process: `python -m lorasweep.dashboard.studies DIR PORT`.

The page is to look at: its buttons that delete, rename or tell are refused, so that no page harms a sweep that runs. It
is given the storage rather than an address, for which it would lock the journal in another way than the workers do.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna_dashboard import wsgi

from lorasweep.config.sweep import DatabaseStorage
from lorasweep.dashboard.child import HOST, serve_until_left
from lorasweep.errors import LoraSweepError, RecordError
from lorasweep.record import read_sweep
from lorasweep.sweep.definition import restore_definition
from lorasweep.sweep.storage import JOURNAL_FILE, open_studies

READING = ("GET", "HEAD")
HOSTS = (HOST, "localhost")


class ReadOnlyJournal(BaseJournalBackend):
    """A journal that is read while others write it, with no lock."""

    def __init__(self, journal: Path) -> None:
        self._file = JournalFileBackend(str(journal))

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Returns the whole lines from a number on. Called by Optuna before each look."""
        return self._file.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Refuses what Optuna would write.

        Raises:
            RecordError: Always.
        """
        raise RecordError("a sweep's journal must stay as its workers write it, but a page was to change it.")


class Server(ThreadingMixIn, WSGIServer):
    """Answers each request in a thread: a browser keeps connections open that it does not use yet."""

    daemon_threads = True


class Handler(WSGIRequestHandler):
    """Says nothing of each request."""

    def log_message(self, format: str, *arguments: object) -> None:
        """Called by the server for each request."""


def open_read_only(folder: Path) -> BaseStorage:
    """Returns the storage of a sweep to look at; a database's is kept from writing by `read_only` alone.

    Raises:
        RecordError: The folder is no sweep, or its journal is missing.
        ConfigError: Its database does not answer.
    """
    record, journal = read_sweep(folder), folder / JOURNAL_FILE
    if journal.is_file():
        return JournalStorage(ReadOnlyJournal(journal))
    config = restore_definition(record.definition, source=None).driver.storage
    if isinstance(config, DatabaseStorage):
        return open_studies(config, folder, prefix=record.study_prefix).storage
    raise RecordError(f"a sweep's folder must contain {JOURNAL_FILE}, but {str(folder)!r} does not.")


def read_only(app: WSGIApplication) -> WSGIApplication:
    """Returns an application that refuses requests that write, and those meant for another host.

    The latter come from a page of somebody else's whose name was made to point at this machine.
    """

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        host = environ.get("HTTP_HOST", "").rpartition(":")[0] or environ.get("HTTP_HOST", "")
        if host not in HOSTS:
            return _refuse(start_response, "403 Forbidden", "This page is for this machine alone.")
        if environ["REQUEST_METHOD"] not in READING:
            return _refuse(start_response, "405 Method Not Allowed", "This page is to look at: it changes no sweep.")
        return app(environ, start_response)

    return answer


def _refuse(start_response: StartResponse, status: str, why: str) -> list[bytes]:
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Allow", ", ".join(READING))]
    start_response(status, headers)
    return [why.encode()]


def main(folder: str, port: str) -> None:
    """Serves the studies of a sweep."""
    try:
        app = read_only(wsgi(open_read_only(Path(folder))))
        server = make_server(HOST, int(port), app, server_class=Server, handler_class=Handler)
    except (LoraSweepError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    serve_until_left(f"http://{HOST}:{server.server_port}/")


if __name__ == "__main__":
    main(*sys.argv[1:])
