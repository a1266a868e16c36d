"""Tables of a data set on the hub, loaded and cached by `datasets`. Comes before the forms, as `tables` does for files.

What is in the cache is used without asking the hub. Its loading scripts are not run: `datasets` has none any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, List, load_dataset
from huggingface_hub import HfApi

from lorasweep.data.reading.formats import ColumnChoice
from lorasweep.data.reading.tables import Table
from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import nearest

HUB_TIMEOUT_S = 10


def load_hub(path: str, *, subset: str | None, revision: str | None, splits: Mapping[str, str]) -> DatasetDict:
    """Returns a data set of the hub; its rows stay on disk until they are asked for.

    Args:
        path: Its id, or a folder.
        subset: One of its configurations.
        revision: Commit, branch or tag.
        splits: The splits that will be wanted, by the setting that names them.

    Raises:
        ConfigError: It can't be had, or has no such split.
    """
    if Path(path).expanduser().is_dir():
        found = _load_folder(Path(path).expanduser(), subset=subset, revision=revision)
    else:
        found = _load_cached(path, subset=subset, revision=revision) or _download(
            path, subset=subset, revision=revision
        )
    for key, split in splits.items():
        if split not in found:
            hint = nearest(split, found)
            raise ConfigError(f"`{key}` must be a split of {path!r}, {', '.join(found)}, but got {split!r}.{hint}")
    return found


def take_table(dataset: Dataset, *, choose: ColumnChoice, place: str) -> Table:
    """Returns the wanted columns of a split; classes by their names, and a class below 0 as missing."""
    names = list(choose(dataset.column_names, repr(place)))
    values: dict[str, list[Any]] = dataset.select_columns(names)[:]
    classes = {name: found for name in names if (found := _class_names(dataset.features[name]))}
    return Table(
        columns={name: [_name_class(v, classes.get(name)) for v in values[name]] for name in names},
        numbers=range(1, len(dataset) + 1),
        sources=[(0, place)],
        unit="row",
        may_drop=True,
        class_names=next(reversed(classes.values()), ()),
    )


def _load_folder(folder: Path, *, subset: str | None, revision: str | None) -> DatasetDict:
    if revision is not None:
        raise ConfigError(f"`data.revision` must be null for a folder, but got {revision!r}, which has no effect.")
    try:
        return _require_splits(load_dataset(str(folder.absolute()), subset))
    except Exception as error:  # whatever a loader of one of a dozen formats raises
        raise ConfigError(
            f"`data.path` must be a folder that `datasets` can load, but {str(folder)!r} can't be: {first_line(error)}."
        ) from error


def _load_cached(path: str, *, subset: str | None, revision: str | None) -> DatasetDict | None:
    """Returns what is in the cache, if it is of that revision; None where it is not."""
    try:
        with _cache_only():
            found = _require_splits(load_dataset(path, subset))
    except Exception:  # not cached, another configuration, or broken: the hub decides
        return None
    commits = {Path(file["filename"]).parent.name for dataset in found.values() for file in dataset.cache_files}
    return found if revision is None or {revision} == commits else None


@contextmanager
def _cache_only() -> Iterator[None]:
    """As HF_DATASETS_OFFLINE does, but only here; `datasets` has no argument for it."""
    offline, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    datasets.config.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()  # which says each time that it uses the cache
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
        datasets.logging.set_verbosity(verbosity)


def _download(path: str, *, subset: str | None, revision: str | None) -> DatasetDict:
    """Asks the hub once whether it has the data set: `load_dataset` would try for half a minute without a network."""
    if datasets.config.HF_HUB_OFFLINE:
        raise ConfigError(
            f"the data set {path!r} must be in the cache while HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set. "
            "Unset it, or use a local file by `data=table`, `chat` or `text`."
        )
    try:
        commit = HfApi().dataset_info(path, revision=revision, timeout=HUB_TIMEOUT_S).sha
        return _require_splits(load_dataset(path, subset, revision=commit))
    except Exception as error:  # whatever the hub, its client and a loader of one of a dozen formats raise
        raise ConfigError(
            f"the data set {path!r} must be in the cache or on the hub, but can't be loaded: {first_line(error)}. "
            "Check its spelling and the connection, or use a local file by `data=table`, `chat` or `text`."
        ) from error


def _require_splits(found: Any) -> DatasetDict:
    assert isinstance(found, DatasetDict)  # as no split and no streaming was asked for
    return found


def _class_names(feature: Any) -> tuple[str, ...]:
    feature = feature.feature if isinstance(feature, List) else feature
    return tuple(feature.names) if isinstance(feature, ClassLabel) and feature.names else ()


def _name_class(value: Any, names: Sequence[str] | None) -> Any:
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_name_class(item, names) for item in value]
    return names[value] if value >= 0 else None
