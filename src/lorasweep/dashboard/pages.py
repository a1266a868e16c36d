"""Starts a sweep's pages, says where they are and ends them: none outlives this process, however it ends."""

from __future__ import annotations

import importlib.util
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lorasweep.dashboard.child import HOST
from lorasweep.errors import ConfigError, WorkerError, first_line
from lorasweep.record import read_sweep

TENSORBOARD, OPTUNA = "TensorBoard", "optuna-dashboard"
MODULES = {TENSORBOARD: "lorasweep.dashboard.board", OPTUNA: "lorasweep.dashboard.studies"}
LOOK_S = 0.2
END_S = 5.0
"""After which a page that was told to end is killed."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page and the process that serves it."""

    name: str
    process: subprocess.Popen[str]
    output: IO[str]
    errors: IO[str]
    """What the process says on standard error."""

    def read_address(self) -> str:
        """Returns the address that it says on its output once it is served; nothing where it has ended."""
        return self.output.readline().strip()

    def why_ended(self) -> str:
        """Returns the last line that it said."""
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return lines[-1] if lines else f"exit code {self.process.returncode}."


def serve_pages(
    folder: Path,
    *,
    port: int | None,
    optuna_port: int | None,
    say: Callable[[str], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Serves the pages of a sweep until it is asked to stop.

    Args:
        folder: The sweep's; nothing in it is changed.
        port: TensorBoard's; None: any free one.
        optuna_port: optuna-dashboard's.
        say: Told a sentence when a page is there, missing or gone.
        stop_requested: Whether to end.

    Raises:
        RecordError: The folder is no sweep.
        ConfigError: A port can't be had, or is given for a page that is not installed.
        WorkerError: Every page ended by itself.
    """
    read_sweep(folder)
    ports = {TENSORBOARD: check_port(port, key="--port")}
    if importlib.util.find_spec("optuna_dashboard") is not None:
        ports[OPTUNA] = check_port(optuna_port, key="--optuna-port")
    elif optuna_port is not None:
        raise ConfigError(
            f"`--optuna-port` must be left out where optuna-dashboard is not installed, but got {optuna_port}. "
            "Type `pip install 'lorasweep[dashboard]'`."
        )
    else:
        say("optuna-dashboard is not installed; for it, type `pip install 'lorasweep[dashboard]'`")
    say("starting; Ctrl-C ends it")
    pages: list[Page] = []
    try:
        for name, number in ports.items():
            pages.append(_start(name, folder, port=number))
        why = _watch(pages, say=say, stop_requested=stop_requested)
    finally:
        _end(pages)
    if not stop_requested():
        raise WorkerError(f"a page must be served until Ctrl-C, but each ended by itself, the last saying: {why}")


def check_port(port: int | None, *, key: str) -> int:
    """Returns a port that can be had on this machine; 0 stands for any free one.

    Raises:
        ConfigError: It is no port's number, in use, or not for this user.
    """
    if port is None:
        return 0
    if not 0 < port < 2**16:
        raise ConfigError(f"`{key}` must be from 1 to 65535, but got {port}. Leave it out for any free one.")
    try:
        with socket.create_server((HOST, port)):
            return port
    except OSError as error:
        raise ConfigError(
            f"`{key}` must be a port that can be had on {HOST}, but got {port}: {error.strerror or first_line(error)}. "
            "Leave it out for any free one."
        ) from error


def _start(name: str, folder: Path, *, port: int) -> Page:
    """Starts a page in a session of its own, so that Ctrl-C reaches this process alone."""
    errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 closed by `_end`
    process = subprocess.Popen(
        [sys.executable, "-m", MODULES[name], str(folder.resolve()), str(port)],
        stdin=subprocess.PIPE,  # its end is how the page hears that this process is gone
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    return Page(name=name, process=process, output=process.stdout, errors=errors)


def _watch(pages: list[Page], *, say: Callable[[str], None], stop_requested: Callable[[], bool]) -> str:
    """Passes on what pages say until they are to stop or have all ended; returns what the last one said."""
    left = {page.output: page for page in pages}
    why = ""
    while left and not stop_requested():
        for output in select.select(list(left), [], [], LOOK_S)[0]:
            page = left[output]
            if address := page.read_address():
                say(f"{page.name}: {address}")
                continue
            del left[output]
            why = page.why_ended()
            if left:
                say(f"{page.name} ended by itself: {why}")
    return why


def _end(pages: list[Page]) -> None:
    for page in pages:
        page.process.terminate()
    for page in pages:
        try:
            page.process.wait(END_S)
        except subprocess.TimeoutExpired:
            page.process.kill()
            page.process.wait()
        for stream in (page.process.stdin, page.output, page.errors):
            if stream is not None:
                stream.close()
