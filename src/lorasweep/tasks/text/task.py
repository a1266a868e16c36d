"""The task of running text."""

from __future__ import annotations

from lorasweep.data.source import DataSource
from lorasweep.objectives.next_tokens import NextTokens
from lorasweep.tasks.task import Task
from lorasweep.tasks.text.read import read_texts
from lorasweep.tasks.text.rows import build_blocks
from lorasweep.tasks.text.settings import StdlibConfig, TextConfig
from lorasweep.tasks.text.stdlib import read_stdlib


def _read(config: StdlibConfig | TextConfig) -> DataSource:
    return read_stdlib(config.name) if isinstance(config, StdlibConfig) else read_texts(config)


TASK = Task(read=_read, build_rows=build_blocks, list_objectives=lambda source: [NextTokens])
