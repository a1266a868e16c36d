"""Reads files and hub data sets, checks their rows and assigns them to splits."""

from __future__ import annotations

from lorasweep.config.data import ChatConfig, DataConfig, PreferencesConfig, StdlibConfig, TableConfig, TextConfig
from lorasweep.data.reading.conversations import read_conversations
from lorasweep.data.reading.documents import read_texts
from lorasweep.data.reading.labels import read_labelled
from lorasweep.data.reading.preferences import read_preferences
from lorasweep.data.source import DataSource
from lorasweep.data.stdlib import read_stdlib


def read_source(config: DataConfig) -> DataSource:
    """Returns the checked examples of the data set that `data=...` selects.

    The rows of the test split are read at the first call of `DataSource.test`, but its file and columns must exist now.

    Raises:
        ConfigError: A file, column, row or label is missing or unusable.
    """
    if isinstance(config, StdlibConfig):
        return read_stdlib(config.name)
    if isinstance(config, TextConfig):
        return read_texts(config)
    if isinstance(config, ChatConfig):
        return read_conversations(config)
    if isinstance(config, PreferencesConfig):
        return read_preferences(config)
    assert isinstance(config, TableConfig)
    return read_labelled(config)
