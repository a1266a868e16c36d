"""Runs commands on a stranger's folder."""

from lorasweep.cli import run
from lorasweep.outcome import DONE, FAILED, WRONG_REQUEST


def feed(*words, capsys=None):
    """Runs a command. It must end with exit code 0, or with another one and one sentence."""
    code = run([str(word) for word in words])
    written = capsys.readouterr() if capsys else None
    if written and code != DONE:
        assert code in (FAILED, WRONG_REQUEST)
        assert [line[:10] for line in written.err.splitlines() if line.strip()] == ["lorasweep:"], written.err
    return code


def list_files(folder):
    """Returns size and time of the last change of each file and folder below a folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}
