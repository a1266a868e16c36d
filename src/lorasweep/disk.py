"""Writes whole files atomically, and finds folders for results.

Only logs are appended to: `steps.jsonl`, the journal and TensorBoard's events. Their readers ignore an incomplete last
line.
"""

from __future__ import annotations

import csv
import errno
import io
import itertools
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lorasweep.errors import ConfigError, LoraSweepError, RecordError, first_line
from lorasweep.wording import find_nearest

LOCK_FILE = ".lock"
"""The file in a sweep's or run's folder that is locked while a process trains."""


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: temporary file in the same folder, fsync, rename.

    `content` may be a function that writes the file to the path that it gets, so that it is not in memory as a whole.
    """
    path.parent.mkdir(exist_ok=True)  # no folder above it: a deleted sweep folder must not come back empty
    # a hidden path beside `path` that no other process on any machine uses
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)  # after a power cut either the old or the new file exists
    finally:
        temporary.unlink(missing_ok=True)


def csv_text(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """Returns a table as CSV; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def numbered_folders(wanted: Path) -> Iterator[Path]:
    """Yields NAME, NAME-2, NAME-3 and so on, without end."""
    yield wanted
    yield from (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))


def require_new_folder(path: Path, *, key: str, remedy: str = "Omit it for a new folder.") -> Path:
    """Returns the path if it is free or an empty folder; otherwise raises ConfigError with `key` and `remedy`."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"`{key}` must be a new or empty folder, but {str(path)!r} is not. {remedy}")
    return path


def suggest_path(path: Path, *folders: Path) -> str:
    """Returns ` Did you mean ...?` with the path of a similar name in the path's own folder, or in other folders."""
    places = [folder for folder in (*folders, path.parent) if folder.is_dir()]
    found = {entry.name: entry for folder in places for entry in folder.iterdir()}
    near = find_nearest(path.name, found)
    return f" Did you mean `{found[near]}`?" if near else ""


def require_no_links(folder: Path) -> None:
    """Raises RecordError if a folder inside results, or anything in it, is a symbolic link.

    Results may come from somebody else. Writing through a link would change files elsewhere.
    """
    if link := next((path for path in (folder, *folder.rglob("*")) if path.is_symlink()), None):
        raise RecordError(f"a folder of results must have no symbolic links, but {str(link)!r} is one. Remove it.")


def open_inside(folder: Path, path: Path) -> BinaryIO:
    """Opens a file in a stranger's folder for reading. Raises OSError if it is missing or a link out of the folder."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise OSError(errno.EINVAL, "a link leads out of its folder", str(path))
    return path.open("rb")


@contextmanager
def claim_folder(wanted: Path | None, *, otherwise: Iterable[Path], key: str) -> Iterator[Path]:
    """Creates a folder and yields it. It is removed again if the block raises before it has written anything.

    The folder is `wanted`, new or empty, or else the first path of `otherwise` that does not exist yet. Raises
    ConfigError if `wanted` is not empty or can't be created.
    """
    created: list[Path] = []
    for path in otherwise if wanted is None else [wanted]:
        missing = [parent for parent in path.parents if not parent.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # only one process can create a folder, so processes that start together get different ones
            with suppress(FileExistsError):
                path.mkdir()
                created = [path, *missing]
                break
        except OSError as error:
            raise ConfigError(
                f"`{key}` must be a folder that can be created, but {str(path)!r} can't: {error.strerror}."
            ) from error
    try:
        yield require_new_folder(path, key=key)  # a folder that exists may be taken if it is empty
    except BaseException:
        with suppress(OSError):  # raised by the first folder that is not empty
            for folder in created:
                folder.rmdir()
        raise


def is_running(path: Path) -> bool:
    """Returns whether a process has a sweep's folder open; False if the file system has no locks."""
    with suppress(OSError), open_inside(path, path / LOCK_FILE) as file:
        return not _try_lock(file.fileno(), shared=True)
    return False


def take_lock(path: Path, undo: ExitStack) -> int:
    """Takes the lock of a folder of results, which the system releases when the process ends. Returns its descriptor.

    Raises RecordError if another process holds the lock, or the folder's file system has no locks.
    """
    try:
        handle = os.open(path / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW)
        undo.callback(os.close, handle)
        is_free = _try_lock(handle)
    except OSError as error:
        raise RecordError(
            f"a folder of results must be writable and on a file system with locks, but {str(path)!r} is not: "
            f"{error.strerror}. Use a local disk."
        ) from error
    if not is_free:
        raise RecordError(
            f"a folder of results must be written by one process, but another one has {str(path)!r} open. Wait for it, "
            f"or look with `lorasweep status {path}`."
        )
    return handle


@contextmanager
def lock_run(path: Path) -> Iterator[Path]:
    """Yields a run's folder, which no other process can lock inside the block. Errors as in `take_lock`."""
    with ExitStack() as undo:
        take_lock(path, undo)
        undo.callback((path / LOCK_FILE).unlink, missing_ok=True)
        yield path


def _try_lock(handle: int, *, shared: bool = False) -> bool:
    """Locks an open file; returns False if another process has. Raises OSError on a file system without locks."""
    import fcntl  # noqa: PLC0415 (Windows lacks it, and `lorasweep.lora` imports this file)

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files that a killed process left. Only safe if no other process writes to this folder."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def explain_os_error(error: BaseException) -> str | None:
    """Returns what the system refused if an OSError caused the error; None for other errors and lorasweep's own.

    An OSError of a library, such as a server that refuses a connection, has no number. It belongs to the trial.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, LoraSweepError):
        if isinstance(cause, OSError) and cause.errno is not None:
            reason = cause.strerror or first_line(cause)
            return f"{reason} ({str(cause.filename)!r})" if cause.filename else reason
        if os.strerror(errno.ENOSPC) in str(cause):  # safetensors has an error of its own
            return os.strerror(errno.ENOSPC)
        cause = cause.__cause__ or cause.__context__
    return None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
