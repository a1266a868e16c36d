"""Reads which data another tool's file names, and how their columns are read here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasweep.errors import first_line
from lorasweep.recipes.keys import MappedKeys, sort_keys
from lorasweep.tasks import PLAIN_TEXT

INFO_FILE = "dataset_info.json"
"""LLaMA-Factory's file that describes each data set by its name."""
LEVELS_ABOVE = 3
"""Number of folders above a file of LLaMA-Factory in which its folder of data is looked for."""
FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
BUILDERS = ("json", "csv", "parquet", "text")
"""Names that `datasets` takes as a path, if `data_files` has the file."""


def read_data_sets(values: Mapping[str, Any], table: Mapping[str, Any], *, stage: str, folder: Path) -> MappedKeys:
    """Returns the keys that name data, followed or refused, with our settings `data` and `data.*`.

    The keys that it refuses do not matter if the user names other data.

    Args:
        values: The keys of the file.
        table: The table of the tool.
        stage: `sft`, `dpo`, or `pt` for plain text.
        folder: The folder of the file, above which LLaMA-Factory's descriptions are.
    """
    keys, found = table["data_keys"], MappedKeys()
    name = next((key for key in keys[:2] if values.get(key)), keys[0])  # the first two may name data sets
    beside = {key: values[key] for key in keys[1:] if key in values and key != name}
    prefix = "" if name == "dataset_name" else f"{name}."
    try:
        entries = _list_entries(name, values, folder)
    except ValueError as error:
        found.refused[name] = str(error)
        return found
    found.followed[name] = "data"
    if len(entries) > 1:
        found.refuse(name, f"lorasweep reads one data set, and these are {len(entries)}; merge them into one")
    entry = {**table.get("data_defaults", {}), **beside, **entries[0]}
    if isinstance(entry.get("type"), Mapping):  # the entry describes its prompts in axolotl's own form
        entry = {**entry, **entry["type"], "type": "custom"}
    found.add(sort_keys(entry, table["data_set"], prefix=prefix))
    facts = found.pop_facts()
    if "types" in table:
        kind = "pretrain" if stage == "pt" or name == "pretraining_dataset" else str(facts.get("type", "alpaca"))
        types = table["pair_types" if stage == "dpo" else "types"]
        rules = [types[form] for form in (kind, kind.split(".")[-1], kind.split(":")[0]) if form in types]
        rule = dict(rules[0]) if rules else {}
        differs = rule.pop("differs", None)
        for key, value in rule.items():
            (theirs, default), *_ = value.items() if isinstance(value, Mapping) else [("", value)]
            if (column := facts.get(theirs) or default) is not None:
                found.settings[key] = column
        if not rules:
            found.refuse(f"{prefix}type", f"it is {kind!r}, whose columns can't be read here; name other data")
        elif differs:
            found.followed.pop(f"{prefix}type", None)
            found.not_followed[f"{prefix}type"] = f"{kind}: {differs}"
    _read_source(found, facts, prefix=prefix)
    return found


def _list_entries(name: str, values: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Returns the descriptions of the data sets that a key names. Raises ValueError if there are none."""
    given = values.get(name)
    if not given:
        raise ValueError("it is missing; name the data by `data.train=FILE`")
    if name == "dataset_name":
        return [{name: given}]
    if name == "dataset":
        return _find_descriptions(given, str(values.get("dataset_dir") or "data"), folder)
    entries = given if isinstance(given, list) else [given]
    entries = [{"path": entry} if isinstance(entry, str) else entry for entry in entries]
    if not all(isinstance(entry, dict) and entry for entry in entries):
        raise ValueError("it must be a list of data sets")
    return entries


def _find_descriptions(given: Any, data_folder: str, folder: Path) -> list[dict[str, Any]]:
    """Returns LLaMA-Factory's descriptions of data sets by their names. Raises ValueError if one is missing."""
    names = [str(name).strip() for name in (given if isinstance(given, list) else str(given).split(","))]
    # LLaMA-Factory reads its folder from where it is started, usually some levels above its files
    above = [folder, Path.cwd(), *folder.absolute().parents[:LEVELS_ABOVE]]
    place = next((path / data_folder for path in above if (path / data_folder / INFO_FILE).is_file()), None)
    if place is None:
        raise ValueError(f"{INFO_FILE}, which describes {names[0]!r}, is not in `dataset_dir` {data_folder!r}")
    try:
        described = json.loads((place / INFO_FILE).read_bytes())
        entries = [dict(described[name]) for name in names]
        entries = [{**entry, **entry.pop("columns", {}), **entry.pop("tags", {})} for entry in entries]
        entries = [{key: value for key, value in entry.items() if key not in ("columns", "tags")} for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(place / INFO_FILE)!r} must describe {', '.join(names)}: {first_line(error)}") from error
    files = [{"file_name": str(place / str(entry["file_name"]))} if "file_name" in entry else {} for entry in entries]
    return [{**entry, **file} for entry, file in zip(entries, files, strict=True)]


def _read_source(found: MappedKeys, facts: Mapping[str, Any], *, prefix: str) -> None:
    """Adds the file, or the data set of the hub with its split."""
    path, files = str(facts.get("path", "")), facts.get("files") or []
    files = files if isinstance(files, list) else [files]
    source = Path(path).expanduser()
    if len(files) == 1 and (source.is_dir() or path in BUILDERS):
        source, files = (source if source.is_dir() else Path()) / str(files[0]), []
    is_file = not source.is_dir() and (path.startswith((".", "/", "~")) or source.suffix in FILE_SUFFIXES)
    if not path or files:
        why = "it names several files, or files inside a data set" if files else "it is missing"
        found.refuse(f"{prefix}{'data_files' if files else 'path'}", f"{why}; name the data by `data.train=FILE`")
    elif is_file and found.settings.get("data") == PLAIN_TEXT and source.suffix != ".txt":
        found.refuse(f"{prefix}path", "a column of texts must be on the hub or in a folder; or write a .txt file")
    elif is_file:
        found.settings["data.train"] = str(source)
    else:
        found.settings.update({"data.path": path, "data.train": facts.get("split") or "train"})
