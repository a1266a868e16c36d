"""A server's process: where its program is, which port is free, who runs it, and that it ends with the tests."""

import os
import shutil
import socket
import subprocess
import time

import pytest

REQUIRED = "LORASWEEP_TEST_SERVERS"
"""Set to `required` where a server that isn't installed is a failure."""
PATIENCE_S = 60.0  # for a machine that does much else
ELSEWHERE = ("/usr/sbin", "/usr/local/sbin")
"""Where Debian keeps servers that are not on a user's path."""


def find_program(name):
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *ELSEWHERE]))


def need(programs, *, packages):
    """Skips the test with a reason where a program isn't installed; fails it where servers are required."""
    missing = [name for name in ("setpriv", *programs) if find_program(name) is None]
    if not missing:
        return
    reason = f"not installed: {', '.join(missing)}. `apt-get install {packages}`"
    if os.environ.get(REQUIRED) == "required":
        pytest.fail(f"{reason} (skipped where {REQUIRED} is not `required`)")
    pytest.skip(reason)


def find_free_port():
    """Returns a port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_daemon(words, *, log, environment=None, folder=None):
    """Starts a server in the foreground; it gets SIGKILL when this process is gone, however that ends."""
    program, *rest = (str(word) for word in words)
    path = find_program(program)
    assert path is not None, program
    with log.open("ab") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", path, *rest],
            cwd=folder,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def wait_until(condition, what, *, seconds=PATIENCE_S, every=0.05):
    """Waits for something, or fails and says for what."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(every)
