"""Settings of running text: the user's, and the packaged one."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from lorasweep.config.build import AtLeastTwo, Positive
from lorasweep.config.data import DataSettings, SplitSettings
from lorasweep.errors import ConfigError

TextMetric = Literal["bits_per_byte", "loss", "perplexity"]
"""Scores of predicted text, per token or byte; lower is better for each."""


@dataclass(frozen=True, kw_only=True)
class BlockSettings(DataSettings):
    """How running text is cut into blocks."""

    task_path = "lorasweep.tasks.text.task.TASK"
    limit_keys = ("max_validation_blocks", "max_test_blocks")

    block_length: AtLeastTwo
    """Tokens per training and evaluation sequence, >= 2."""
    max_train_documents: Positive | None
    """Maximum number of training documents, evenly spaced; null uses all."""
    max_validation_blocks: Positive | None
    """Maximum number of validation blocks, evenly spaced; null uses all."""
    max_test_blocks: Positive | None
    """Maximum number of test blocks, evenly spaced; null uses all."""
    metric: TextMetric
    """Metric that is the run's score. Lower is better."""

    @property
    def max_tokens(self) -> int:
        return self.block_length


@dataclass(frozen=True, kw_only=True)
class StdlibConfig(BlockSettings):
    """Packaged text of Python's standard library: `stdlib_docs` and `stdlib_code`."""

    is_built_in = True
    name: Literal["stdlib_docs", "stdlib_code"]


@dataclass(frozen=True, kw_only=True)
class TextConfig(BlockSettings, SplitSettings):
    """Plain text, cut into blocks that are predicted token by token."""

    name: Literal["text"]
    text: str
    """Column of the texts in a data set of the hub; files are read whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None and self.group is not None:
            raise ConfigError(
                f"`data.group` must be null for files of text, which have no columns, but got {self.group!r}. "
                "Each file is a group."
            )
