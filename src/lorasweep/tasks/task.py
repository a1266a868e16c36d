"""A task: a kind of example, as the rest of lorasweep sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from lorasweep.config.data import DataSettings
from lorasweep.data.rows import Rows
from lorasweep.data.source import DataSource
from lorasweep.objectives.objective import Objective

FULL_RATE_TIMES_WIDTH = 0.05
"""The middle of the two decades of learning rates for full fine-tuning, times the model's width: Adam's best rate is
proportional to 1 / width (Yang et al. 2022, arXiv 2203.03466). So the middle is 3e-4 at a width of 160, 6.5e-5 at 768
and 1.2e-5 at 4,096, and the best recorded rates, 7e-4 at 160 and 1.6e-4 at 384, lie inside. LoRA's rates are ten times
as high, which is the ratio of "LoRA Without Regret" (2025)."""


@dataclass(frozen=True, kw_only=True)
class GivenTable:
    """A table for which `lorasweep new` has to choose a task."""

    columns: Mapping[str, Sequence[Any]]
    """The values of each column."""
    settings: Mapping[str, Any]
    """The settings that the user typed, by dotted key."""
    unsure_header: str | None = None
    """The file whose first line may be a row of data instead of the names of the columns."""

    def has_texts(self, column: str) -> bool:
        """Returns whether most values of a column are texts of several words."""
        values = self.columns[column]
        return sum(isinstance(value, str) and " " in value.strip() for value in values) > len(values) / 2

    def has_different_texts(self, column: str) -> bool:
        """Returns whether most values of a column are texts of several words that differ, unlike labels."""
        values = self.columns[column]
        return self.has_texts(column) and len(set(map(str, values))) > len(values) / 2


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """The settings that a task chooses for a table."""

    columns: Sequence[str | None]
    """The columns that are read, perhaps with None and with columns that the table lacks."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings that the user did not type, by dotted key."""
    texts: Sequence[str] = ()
    """Columns that have texts or lists of messages; only texts can be joined without a chat template."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of example and what is learned from it. Its settings name it in `DataSettings.task_path`."""

    read: Callable[[Any], DataSource]
    """Returns the checked examples that settings name. Raises ConfigError if a file, column or row is unusable."""
    build_rows: Callable[..., Rows]
    """Called with examples, and `config`, `source` and `tokenizer` by name; returns the rows of one split."""
    list_objectives: Callable[[DataSource], Sequence[type[Objective]]]
    """Returns the objectives that can learn from the examples; the first one is `objective=default`."""

    recognise: Callable[[GivenTable], Recognised | None] = lambda table: None
    """For `lorasweep new`: returns what the task reads in a table; None if the table is of another task."""
    hint: tuple[str, str] | None = None
    """A key of settings, and what `lorasweep new` says about it if it is not set."""
    searched: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the objective that a drafted sweep searches, each with its range as in a sweep file."""
    full_rate_times_width: float = FULL_RATE_TIMES_WIDTH


def find_task(config: DataSettings | type[DataSettings]) -> Task:
    """Returns the task of settings. Imports its modules."""
    assert config.task_path is not None
    task = resolve_name(config.task_path)
    assert isinstance(task, Task)
    return task


def read_source(config: DataSettings) -> DataSource:
    """Returns the checked examples that settings name, as `Task.read`.

    The rows of the test split are read at the first call of `DataSource.test`, but its file and columns must exist now.
    """
    return find_task(config).read(config)
