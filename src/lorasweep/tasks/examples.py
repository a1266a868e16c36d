"""Reads training examples as a run sees them, and which parts are scored."""

from __future__ import annotations

from dataclasses import dataclass

from lorasweep.config.run import RunConfig
from lorasweep.data.rows import list_passages
from lorasweep.errors import ConfigError
from lorasweep.models.load import load_tokenizer
from lorasweep.tasks.splits import check_model_kind
from lorasweep.tasks.task import find_task


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The first training examples of a run."""

    passages: tuple[tuple[tuple[str, bool], ...], ...]
    """For each example its text in parts, each with whether its tokens are scored."""
    num_train: int
    notes: tuple[str, ...]
    """Sentences on the data."""


def read_examples(config: RunConfig, *, number: int) -> Examples:
    """Reads the data and returns the first training examples. Trains nothing, and loads no weights.

    Raises ConfigError if the data can't be read or have no text.
    """
    if number < 1:
        raise ConfigError(f"`--show-examples >= 1` must hold, but got {number}.")
    if config.data.task_path is None:
        raise ConfigError(f"`--show-examples` must be left out with `data={config.data.name}`, which has no text.")
    check_model_kind(config.data, config.model.kind)
    tokenizer, task = load_tokenizer(config.model), find_task(config.data)
    source = task.read(config.data)
    train = task.build_rows(source.train, config=config.data, source=source, tokenizer=tokenizer)
    shown = range(min(number, len(train)))
    return Examples(
        passages=tuple(tuple(list_passages(train, index, tokenizer=tokenizer)) for index in shown),
        num_train=len(train),
        notes=(*source.notes, *train.notes),
    )
