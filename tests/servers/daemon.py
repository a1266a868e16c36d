"""A server's process: where its program is, which port is free, who runs it, and that it ends with the tests."""

import os
import pwd
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
    """Returns a program's path."""
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


def find_servant(*names):
    """Returns the user to run a server as that refuses to be run by root; None where the tests aren't root's."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in (*names, "nobody") if name in known)


def start_daemon(words, *, log, user=None, environment=None, folder=None):
    """Starts a server in the foreground; it gets SIGKILL when this process is gone, however that ends."""
    program, *rest = (str(word) for word in words)
    path = find_program(program)
    assert path is not None, program
    become = ["setpriv", "--pdeathsig", "KILL"]
    if user is not None:
        become += ["--reuid", user, "--regid", str(pwd.getpwnam(user).pw_gid), "--clear-groups"]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*become, path, *rest],
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
