"""Reads texts with labels from a table, and converts the labels into class indices or numbers."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from lorasweep.config.data import LabelKind
from lorasweep.data.reading.tables import (
    choose_columns,
    open_tables,
    parse_rows,
    require_scalar,
    require_text,
)
from lorasweep.data.source import DataSource, build_source, content_key
from lorasweep.errors import ConfigError
from lorasweep.tasks.table.settings import TableConfig
from lorasweep.tasks.task import GivenTable, Recognised
from lorasweep.wording import join_words, shorten, suggest_nearest

MAX_UNCHECKED_CLASSES = 20
"""With more classes than this, each must have two examples on average, unless `data.task` is set. Otherwise the column
is probably a number or a text and not a label."""

MISSING_VALUES = ("nan", "null", "none", "na", "n/a", "-", "?")
"""Labels in lower case that may mean a missing value. They are classes, because "none" is one in many data sets."""
MAX_LISTED_CLASSES = 20
"""Maximum number of classes whose share of the training examples is printed."""


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
Label = int | float
"""A class index; for regression a number."""


class LabelledText(NamedTuple):
    """A text, or a pair of texts, with the label to predict."""

    text: str
    pair: str | None
    label: Label
    group: str | None = None
    """Value of the column `data.group`; None if each row is a group."""

    def list_texts(self) -> Iterator[str]:
        for value in (self.text, self.pair, self.label):
            yield value if isinstance(value, str) else repr(value)


def read_labelled(config: TableConfig) -> DataSource:
    """Returns the examples of a table, labels as class indices or numbers. Raises ConfigError for unusable rows."""
    wanted = (("text", config.text), ("text_pair", config.text_pair), ("label", config.label))
    tables = open_tables(config, functools.partial(choose_columns, wanted))
    class_names = tables["train"].tables[0].class_names.get(config.label, ())
    rows, notes = parse_rows(tables.pop("train"), functools.partial(_check_row, config=config))
    key = f"`data.label={config.label}`"
    encoder = learn_labels([label for _, _, label, _ in rows], task=config.task, class_names=class_names, key=key)
    names = encoder.names if config.labels is None else config.labels
    if len(names) != len(encoder.names):
        raise ConfigError(
            f"`data.labels` must name each of the {len(encoder.names)} classes of training, "
            f"{shorten(encoder.names, 400)}, but got {len(names)} names."
        )

    def encode(row: LabelledText) -> LabelledText:
        return row._replace(label=encoder.encode(row.label))

    if config.labels is not None:
        notes = [f"`data.labels` names the classes {shorten(names, 400)}.", *notes]
    return build_source(
        ([encode(row) for row in rows], [encoder.reason, *notes]),
        lambda split: parse_rows(
            tables.pop(split), lambda *values, group: encode(_check_row(*values, group=group, config=config))
        ),
        label_kind=encoder.kind,
        missing=config.choose_split_percents(len(rows)),
        key=_content_key,
        describe=functools.partial(_describe, names),
        label_names=names,
        shared="text" if config.text_pair is None else "pair of texts",
        max_examples=config.max_examples,
    )


def _content_key(item: LabelledText) -> int:
    return content_key((item.text,) if item.pair is None else (item.text, item.pair))


def _check_row(text: Any, *others: Any, group: str | None, config: TableConfig) -> LabelledText:
    """Returns a row with its label as it is written; raises ValueError if a text or the label is missing."""
    *pair, label = others
    is_blank = isinstance(label, str) and not label.strip()
    if label is None or is_blank or (isinstance(label, float) and math.isnan(label)):
        raise ValueError(f"must have a label in column {config.label!r}, but has {label!r}")
    require_scalar(label)
    return LabelledText(require_text(text), require_text(pair[0]) if pair else None, label, group)


def _describe(names: Sequence[str], train: list[LabelledText], validation: list[LabelledText]) -> list[str]:
    """Returns notes about contradicting labels and the share of each label."""
    notes = []
    first_label: dict[int, Label] = {}
    keyed = ((_content_key(item), item.label) for item in train)
    if conflicts := {key for key, label in keyed if first_label.setdefault(key, label) != label}:
        notes.append(f"{len(conflicts)} texts of train have several different labels.")
    if not names:
        return notes
    counts = Counter(item.label for item in train)
    doubtful = [name for index, name in enumerate(names) if counts[index] == 1 or name.lower() in MISSING_VALUES]
    if doubtful:
        notes.append(
            f"Check the labels {shorten(doubtful, 400)} of train: one example, or the name of a missing value."
        )
    listed = list(enumerate(names))[:MAX_LISTED_CLASSES]
    shares = [f"{name!r} {counts[index] / len(train):.1%}" for index, name in listed]
    others = f" and {len(names) - len(listed)} more" if len(names) > len(listed) else ""
    return [*notes, f"Labels of train: {', '.join(shares)}{others}."]


@dataclass(frozen=True, kw_only=True)
class LabelEncoder:
    """Encodes the labels of every split by the task and the classes of the training split."""

    kind: LabelKind
    names: tuple[str, ...]
    """The classes as they are written, in the order of their indices; empty under regression."""
    reason: str
    """A sentence for the user: what is predicted, why, and the order of the classes."""

    def encode(self, value: Any) -> Label:
        """Returns the class index or the number. Raises ValueError for a label that training does not have."""
        if self.kind == "regression":
            return _parse_number(value)
        name = _to_name(value)
        if name not in self.names:
            raise ValueError(
                f"must have a label that training has, {shorten(self.names, 400)}, but has {name!r}."
                f"{suggest_nearest(name, self.names)}"
            )
        return self.names.index(name)


def learn_labels(values: Sequence[Any], *, task: str, class_names: Sequence[str], key: str) -> LabelEncoder:
    """Returns the encoder of the labels of a training file, none of which is missing.

    `class_names` are in the order that the data set states; `key` names the setting and the column, for messages.

    Raises:
        ConfigError: There is only one class, nearly every example has its own class, or a label is not a number.
    """
    decided, why = _decide_task(values, task=task, class_names=class_names)
    try:
        labels: list[Any] = [_parse_number(value) if decided == "regression" else _to_name(value) for value in values]
    except ValueError as error:
        raise ConfigError(f"{key} {error} for `data.task=regression`.") from error
    used = sorted(set(labels))
    if len(used) < 2:
        raise ConfigError(f"{key} must have at least two different labels in training, but has only {used}.")
    if decided == "regression":
        mean = sum(labels) / len(labels)
        reason = f"The model predicts a number ({why}); in training from {used[0]:g} to {used[-1]:g}, mean {mean:g}."
        return LabelEncoder(kind=decided, names=(), reason=reason)
    if task == "auto" and len(used) > max(MAX_UNCHECKED_CLASSES, len(values) / 2):
        raise ConfigError(
            f"{key} must have classes of several examples each, but has {len(used)} different values in {len(values)} "
            "examples. Name another column, or set `data.task` (regression for numbers). Prompts with answers need "
            "`data=chat data.prompt=COLUMN data.completion=COLUMN`, pairs of texts for an embedder `data=embeddings`, "
            "pairs of answers `data.chosen` and `data.rejected`."
        )
    # whole numbers by value, so that 9 comes before 10, and names after them
    names = tuple(class_names) or tuple(
        sorted(used, key=lambda name: (float(name) if name.removeprefix("-").isdecimal() else math.inf, name))
    )
    order = "as the data set orders them" if class_names else "in sorted order"
    reason = f"The model predicts one of {len(names)} classes ({why}), {order}: {shorten(names, 400)}."
    if unused := [name for name in names if name not in used]:
        reason += f" Training has no example of {shorten(unused, 400)}."
    return LabelEncoder(kind=decided, names=names, reason=reason)


def _decide_task(values: Sequence[Any], *, task: str, class_names: Sequence[str]) -> tuple[LabelKind, str]:
    """Returns the task of the labels, and why it was chosen."""
    if task in ("single_label", "regression"):
        return task, "as `data.task` says"  # type: ignore[return-value]
    if class_names:
        return "single_label", "the data set names its classes"
    try:
        numbers = [_parse_number(value) for value in values]
    except ValueError:
        return "single_label", "labels are names"
    if all(number.is_integer() for number in numbers):
        return "single_label", "labels are whole numbers; `data.task=regression` would predict them as numbers"
    return "regression", "labels are numbers with fractions"


def _to_name(value: Any) -> str:
    """Returns the name of a class: `1` for 1 and 1.0, `true` for True."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _parse_number(value: Any) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with suppress(ValueError):
            if math.isfinite(number := float(value)):
                return number
    raise ValueError(f"must have a finite number, such as 0.5, as label, but has {shorten(value)}")


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
