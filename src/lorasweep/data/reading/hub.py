"""Loads data sets of the hub, or of its cache if there is no network, and names their splits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # lacks a type stub

from lorasweep.errors import ConfigError, first_line


def find_hub_settings(path: str, *, subset: str | None = None, revision: str | None = None) -> dict[str, str]:
    """Returns the settings that name the splits of a data set of the hub and the commit that was read.

    Raises ConfigError if it is neither on the hub nor in its cache.
    """
    splits = load_hub(path, subset=subset, revision=revision)
    names = {"data.train": ("train",), "data.validation": ("validation", "valid", "val", "dev"), "data.test": ("test",)}
    found = {key: next((name for name in usual if name in splits), None) for key, usual in names.items()}
    settings = {"data.path": path, **found, "data.train": found["data.train"] or next(iter(splits))}
    commits = set().union(*map(_find_commits, splits.values()))
    if len(commits) == 1 and not Path(path).expanduser().is_dir():
        settings["data.revision"] = commits.pop()
    return {key: value for key, value in settings.items() if value is not None}


def load_hub(path: str, *, subset: str | None, revision: str | None, split: str | None = None, key: str = "") -> Any:
    """Returns a split of a data set of the hub, or all splits by name."""
    folder = Path(path).expanduser()
    source = str(folder.absolute()) if folder.is_dir() else path
    was_offline = datasets.config.HF_HUB_OFFLINE
    fault = None
    try:
        if not folder.is_dir() and not was_offline:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (OSError, HTTPError) as error:
        fault = f"{constants.ENDPOINT} can't be reached ({first_line(error)})"
    try:
        datasets.config.HF_HUB_OFFLINE = was_offline or fault is not None  # its client would retry for half a minute
        dataset = datasets.load_dataset(source, subset, split=split, revision=revision)
    except Exception as error:  # each client and file format raises its own class of error
        named = (f", and `{key}` one of its splits,", f" with {split!r}") if split else (",", "")
        raise ConfigError(
            f"`data.path` must be a data set on the hub or in its cache, or a folder{named[0]} but {path!r}{named[1]} "
            f"can't be loaded: {fault or first_line(error)}. Check the spelling, `data.subset`, `data.revision` and "
            "the connection."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    # Without a network `datasets` ignores `revision` and takes the latest version in its cache. The cache keeps each
    # version in a folder that is named after the commit.
    commits = set().union(*map(_find_commits, [dataset] if split else dataset.values()))
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision) and commits != {revision}:
        raise ConfigError(
            f"`data.revision` must be a commit that is in the cache or can be downloaded, but got {revision!r}. "
            f"The cache has {', '.join(sorted(commits))}. Check the connection."
        )
    return dataset


def _find_commits(dataset: datasets.Dataset) -> set[str]:
    return {Path(file["filename"]).parent.name for file in dataset.cache_files}
