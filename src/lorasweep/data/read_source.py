"""Where rows come from: `read_source` gives them for any `data=...`. Next: `splits` makes tokens of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from lorasweep.config.data import (
    GLUE_PATH,
    ChatConfig,
    DataConfig,
    GlueConfig,
    HubConfig,
    OwnDataConfig,
    StdlibConfig,
    TableConfig,
    TextConfig,
    resolve_data,
)
from lorasweep.data.own import read_own
from lorasweep.data.reading.conversations import read_conversations
from lorasweep.data.reading.documents import read_text_column, read_text_files
from lorasweep.data.reading.formats import ColumnChoice
from lorasweep.data.reading.hub import load_hub, take_table
from lorasweep.data.reading.labelled import Tables, read_labelled
from lorasweep.data.reading.splitting import content_key
from lorasweep.data.reading.tables import Table, find_tables, read_table
from lorasweep.data.source import DataSource, Documents, fingerprint_documents
from lorasweep.data.stdlib import Document, read_code, read_docs

DocumentReader = Callable[[str], list[Document]]
"""From the name of a split (`train`, `validation`, `test`) to its documents, always the same and in the same order."""

SOURCES: Mapping[str, DocumentReader] = {"stdlib_docs": read_docs, "stdlib_code": read_code}


def read_source(config: DataConfig) -> DataSource:
    """Returns the rows of a data set: checked, by split, with sentences on what was found.

    The test split is read at the first call of `test`; that its file is there is checked at once.

    Raises:
        ConfigError: A file, column, row or label can't be used; the message names the place. For the test split,
            when it is called for.
    """
    if isinstance(config, StdlibConfig):
        return _read_stdlib(config)
    if isinstance(config, TextConfig):
        return read_text_files(config)
    if isinstance(config, OwnDataConfig):
        return read_own(config)
    tables = _open_tables(config)
    if isinstance(config, HubConfig) and config.kind == "text":
        return read_text_column(config.text or "text", tables)
    form = resolve_data(config)
    if isinstance(form, ChatConfig):
        return read_conversations(form, tables)
    assert isinstance(form, TableConfig)
    return read_labelled(form, tables)


def _read_stdlib(config: StdlibConfig) -> DataSource:
    def read(split: str) -> Documents:
        documents = SOURCES[config.name](split)
        return Documents(name=split, documents=documents, fingerprint=fingerprint_documents(documents))

    return DataSource(
        kind="documents",
        label_names=(),
        train=read("train"),
        validation=read("validation"),
        test=functools.cache(lambda: read("test")),
        notes=(),
    )


def _open_tables(config: TableConfig | ChatConfig | GlueConfig | HubConfig) -> Tables:
    if isinstance(config, GlueConfig):
        return _open_glue(config)
    names = {"train": config.train, "validation": config.validation, "test": config.test}
    given = {split: name for split, name in names.items() if name is not None}
    if isinstance(config, HubConfig):
        splits = {f"data.{split}": name for split, name in given.items()}
        data = load_hub(config.path, subset=config.subset, revision=config.revision, splits=splits)

        def load_split(split: str, choose: ColumnChoice) -> Table:
            return take_table(data[given[split]], choose=choose, place=f"{config.path}, {given[split]}")

        return Tables(load=load_split, given=frozenset(given))
    files = {split: find_tables(name, key=f"data.{split}") for split, name in given.items()}
    return Tables(load=lambda split, choose: read_table(files[split], choose=choose), given=frozenset(given))


def _open_glue(config: GlueConfig) -> Tables:
    """GLUE keeps the labels of its test split to itself: its validation split is halved into validation and test."""
    table_config = resolve_data(config)
    assert isinstance(table_config, TableConfig)
    assert table_config.validation is not None
    splits = {"data.train": table_config.train, "data.validation": table_config.validation}
    data = load_hub(GLUE_PATH, subset=config.task, revision=None, splits=splits)
    held_out = data[table_config.validation]

    def load(split: str, choose: ColumnChoice) -> Table:
        place = f"{GLUE_PATH}, {config.task}, {table_config.train if split == 'train' else table_config.validation}"
        if split == "train":
            return take_table(data[table_config.train], choose=choose, place=place)
        return _take_half(take_table(held_out, choose=choose, place=place), config=table_config, split=split)

    return Tables(load=load, given=frozenset({"train", "validation", "test"}))


def _take_half(table: Table, *, config: TableConfig, split: str) -> Table:
    """Keeps the rows whose texts have an even hash (`validation`) or an odd one (`test`)."""
    names = [name for name in (config.text, config.text_pair) if name is not None]
    keys = (content_key(texts) for texts in zip(*(table.columns[name] for name in names), strict=True))
    rows = [row for row, key in enumerate(keys) if key % 2 == ("validation", "test").index(split)]
    note = (
        f"GLUE hides the labels of its test split: {split} is {len(rows)} of the {len(table)} rows of its "
        f"{config.validation} split, those whose texts have an {'even' if split == 'validation' else 'odd'} hash."
    )
    return table.take(rows, note=note)
