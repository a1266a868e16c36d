"""Files that are written whole or not at all. What a run or a sweep replaces goes through `move_into_place`.

Only logs are appended to (`steps.jsonl`, the journal, TensorBoard's events); readers leave out an unfinished end.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lorasweep.errors import ConfigError

PROBE_BYTES = 2**20
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE})
"""What an operating system says of a disk, whatever was written."""
NETWORK_FILE_SYSTEMS = (
    *(
        "nfs",
        "cifs",
        "smb",
        "lustre",
        "gpfs",
        "beegfs",
        "ceph",
        "afs",
        "9p",
        "glusterfs",
        "fuse.sshfs",
        "fuse.glusterfs",
    ),
    *("fuse.ceph", "fuse.juicefs", "fuse.s3fs", "fuse.gcsfuse", "wekafs", "panfs", "orangefs", "ocfs2", "gfs2"),
)
"""How the names of network file systems begin, as Linux gives them."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: temporary file in the same folder, fsync, rename.

    Makes the folder, but not what it is in: a folder of results that is gone must not come back empty. Halves of
    surrogate pairs in a text, which UTF-8 has no form for, are written as their escapes.
    """
    path.parent.mkdir(exist_ok=True)
    temporary = temporary_name(path)
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        temporary.write_bytes(data)
        move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def csv_text(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """Returns a table as CSV; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def temporary_name(path: Path) -> Path:
    """Returns where to write what is to become `path`: beside it, hidden, of no other writer on any machine."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def move_into_place(temporary: Path, path: Path) -> None:
    """Flushes a file to the disk and gives it its name, so that after a power cut there is the old one or the new."""
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def free_folder(wanted: Path) -> Path:
    """Returns this folder, or the first of NAME-2, NAME-3, ... that is not there yet."""
    path, number = wanted, 1
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def require_new_folder(path: Path, *, key: str, remedy: str = "Leave it out for a new one.") -> Path:
    """Returns a path that is free for results: nothing is there, or a folder without files.

    Args:
        path: The folder that was asked for.
        key: The setting or option that names it, for the message.
        remedy: A sentence on what to do instead.

    Raises:
        ConfigError: Something is there.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"`{key}` must be a new or empty folder, but {str(path)!r} is not. {remedy}")
    return path


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process had not moved into place yet, in a folder that only this process writes to."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def why_unwritable(folder: Path, error: BaseException) -> str | None:
    """Returns what keeps a folder from being written to, where that is why something failed; else None.

    Args:
        folder: Where the results go.
        error: What was raised. Libraries wrap what the system said, so its causes and its words are looked at too.
    """
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in FULL:
            return os.strerror(cause.errno or 0)
        if os.strerror(errno.ENOSPC) in str(cause):
            return os.strerror(errno.ENOSPC)
    if not folder.is_dir():
        return os.strerror(errno.ENOENT)
    try:
        write_atomically(folder / ".probe", bytes(PROBE_BYTES))
        (folder / ".probe").unlink()
    except OSError as refused:
        return os.strerror(refused.errno or errno.EIO)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def network_file_system(path: Path) -> str | None:
    """Returns the kind of network file system that a path, or the nearest folder above it that is there, is on.

    None on a local one.
    """
    import psutil  # noqa: PLC0415 (`lorasweep.lora` writes files too, and needs torch only)

    found = path.absolute()
    while not found.exists():
        found = found.parent
    mounts = [part for part in psutil.disk_partitions(all=True) if found.resolve().is_relative_to(part.mountpoint)]
    # Of several file systems mounted at one point, the last one is seen.
    kind = max(reversed(mounts), key=lambda part: len(part.mountpoint)).fstype if mounts else ""
    return kind if kind.startswith(NETWORK_FILE_SYSTEMS) else None
