"""Lists, reads and changes files."""

import json


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
