"""Lists, reads and changes files."""

import fcntl
import functools
import json
import os
import re


def list_names(folder):
    """Returns the names of all files and folders below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def read_files(folder):
    """Returns the content of all files below a folder, by their names."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path, change):
    """Reads a JSON file, lets `change` change it, writes it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DELETED = object()


def set_values(path, values):
    """Sets values of a JSON file by their places, such as `arms/0/name`. `DELETED` removes one, a function changes it.

    A text of the form `<<JSON>>` is written as this JSON, which Python may not be able to write.
    """
    content = json.loads(path.read_text())
    for place, value in values.items():
        *parents, key = [int(part) if part.isdecimal() else part for part in place.split("/")]
        container = functools.reduce(lambda inner, part: inner[part], parents, content)
        if value is DELETED:
            del container[key]
        else:
            container[key] = value(container[key]) if callable(value) else value
    path.write_text(re.sub(r'"<<(.*?)>>"', r"\1", json.dumps(content)))


def fill_once(tmp_path_factory, name, fill):
    """Returns a folder that `fill` fills in one process of xdist; the others wait for it. No test may change it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            folder.mkdir()
            fill(folder)
            lock.write("filled")
    return folder
