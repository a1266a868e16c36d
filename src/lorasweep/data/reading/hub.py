"""Loads data sets of the hub, or from a folder, with `datasets`, which caches them for work without a network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, List, load_dataset

from lorasweep.config.data import SplitSettings
from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import nearest


def load_hub(config: SplitSettings) -> dict[str, Dataset]:
    """Returns the splits that `data.train`, `data.validation` and `data.test` name. Rows stay on disk until used.

    Raises:
        ConfigError: The data set can't be loaded, is cached at another revision only, or has no such split.
    """
    path = str(config.path)
    source = str(Path(path).expanduser().absolute()) if Path(path).expanduser().is_dir() else path
    try:
        loaded = load_dataset(source, config.subset, revision=config.revision)
    except Exception as error:  # each client and file format raises its own class of error
        raise ConfigError(
            f"`data.path` must be a data set on the hub or in its cache, or a folder, but {path!r} can't be loaded: "
            f"{first_line(error)}. Check its spelling, `data.subset`, `data.revision` and the connection."
        ) from error
    assert isinstance(loaded, DatasetDict)  # load_dataset returns other classes only for a single split or a stream
    _check_commit(loaded, config)
    for split, name in config.given.items():
        if name not in loaded:
            raise ConfigError(
                f"`data.{split}` must be one of the splits {', '.join(loaded)} of {path!r}, but got {name!r}."
                f"{nearest(name, loaded)}"
            )
    return {split: loaded[name] for split, name in config.given.items()}


def _check_commit(loaded: DatasetDict, config: SplitSettings) -> None:
    """Raises ConfigError if `data.revision` is a commit and the cache returned another one.

    Without a network `datasets` ignores `revision` and takes the latest version in its cache. The cache keeps each
    version in a folder that is named after the commit.
    """
    commits = {Path(file["filename"]).parent.name for dataset in loaded.values() for file in dataset.cache_files}
    if config.revision is not None and re.fullmatch("[0-9a-f]{40}", config.revision) and commits != {config.revision}:
        raise ConfigError(
            f"`data.revision` must be a commit that is in the cache or can be downloaded, but got {config.revision!r}. "
            f"The cache has {', '.join(sorted(commits))}. Check the connection."
        )


def select_columns(dataset: Dataset, names: Sequence[str]) -> dict[str, list[Any]]:
    """Returns the values of columns by column name. A class index becomes the name of the class.

    A negative class index becomes None, because hub data sets use it for hidden labels.
    """
    values: dict[str, list[Any]] = dataset.select_columns(list(names))[:]
    return {name: [_to_class_name(v, _class_names(dataset, name)) for v in values[name]] for name in names}


def find_class_names(dataset: Dataset, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns by column the names of its classes; without the columns that have none."""
    return {name: found for name in names if (found := _class_names(dataset, name))}


def _class_names(dataset: Dataset, name: str) -> tuple[str, ...]:
    feature = dataset.features[name]
    feature = feature.feature if isinstance(feature, List) else feature
    return tuple(feature.names) if isinstance(feature, ClassLabel) and feature.names else ()


def _to_class_name(value: Any, names: Sequence[str]) -> Any:
    if not names or value is None:
        return value
    if isinstance(value, list):
        return [_to_class_name(item, names) for item in value]
    return names[value] if value >= 0 else None
