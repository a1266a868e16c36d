"""Guesses the columns of texts and labels for `lorasweep new`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from lorasweep.errors import ConfigError
from lorasweep.tasks.task import GivenTable, Recognised
from lorasweep.wording import join_words

LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment", "score", "rating", "stars")
"""Usual names of the column of labels, in the order in which they are tried."""
TEXT_COLUMNS: Mapping[str, str | None] = {
    "text": "text_pair",
    "sentence": None,
    "sentence1": "sentence2",
    "question": "answer",
    "question1": "question2",
    "premise": "hypothesis",
    **dict.fromkeys(("review", "content", "body")),
}
"""Usual names of the column of texts, in the order in which they are tried, each with the column of second texts."""


def recognise_labelled(table: GivenTable) -> Recognised:
    """Returns the columns that the user did not name.

    Raises ConfigError if there are none, or if the first line of a file looks like a row: its label occurs again below.
    """
    guessed = _guess_columns(table.columns, table.settings)
    label = guessed.get("data.label")
    if table.unsure_header and label and label not in LABEL_COLUMNS and label in table.columns[label]:
        named = {label: "label", guessed.get("data.text"): "text"}
        shown = ",".join(named.get(name, f"column{number}") for number, name in enumerate(table.columns, 1))
        raise ConfigError(
            f"the first line of {table.unsure_header!r} must name its columns, but looks like data, because {label!r} "
            f"occurs again in its column. Name the columns in their order, such as `'data.columns=[{shown}]'`."
        )
    used = {**guessed, **table.settings}
    columns = [used.get(f"data.{key}") for key in ("label", "text", "text_pair", "group")]
    return Recognised(columns=columns, settings=guessed)


def _guess_columns(columns: Mapping[str, Sequence[Any]], settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns `data.label`, `data.text` and for pairs `data.text_pair`, as far as the user did not name them."""
    named = [settings.get(key) for key in ("data.label", "data.text", "data.text_pair", "data.group")]
    free = [name for name in columns if name not in named]
    guessed: dict[str, str] = {}

    def guess(key: str, kind: str, usual: Iterable[str], others: Sequence[str]) -> str:
        name = next(iter([*(name for name in usual if name in free), *others]), None)
        if name is None:
            raise ConfigError(f"`{key}` must name a column of {kind}, but the columns are {join_words(list(columns))}.")
        free.remove(name)
        guessed[key] = name
        return name

    if "data.label" not in settings:
        counts = {name: len(set(map(str, columns[name]))) for name in free}
        several = [name for name in free if counts[name] > 1]
        guess("data.label", "labels", LABEL_COLUMNS, sorted(several, key=counts.__getitem__))
    if "data.text" not in settings:
        free = [name for name in free if columns[name] and all(isinstance(value, str) for value in columns[name])]
        lengths = {name: fmean(map(len, columns[name])) for name in free}
        text = guess("data.text", "texts", TEXT_COLUMNS, sorted(free, key=lengths.__getitem__, reverse=True))
        if "data.text_pair" not in settings and TEXT_COLUMNS.get(text) in free:
            guess("data.text_pair", "second texts", [str(TEXT_COLUMNS[text])], ())
    return guessed
