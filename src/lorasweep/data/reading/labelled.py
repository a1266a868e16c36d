"""Reads texts with labels from the columns of a table."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from lorasweep.config.data import TableConfig, check_label_settings
from lorasweep.data.reading.labels import LabelEncoder, check_label, learn_labels
from lorasweep.data.reading.splitting import build_source, content_key
from lorasweep.data.reading.tables import choose_columns, open_tables, parse_rows, require_text
from lorasweep.data.source import DataSource, Label, LabelledText

MAX_LISTED_CLASSES = 20
"""Maximum number of classes whose share of the training examples is printed."""


def read_labelled(config: TableConfig) -> DataSource:
    """Returns the examples of a table, with labels as class indices or numbers.

    Raises:
        ConfigError: A column is missing, a row can't be used, or the labels do not fit the task.
    """
    wanted = (("text", config.text), ("text_pair", config.text_pair), ("label", config.label))
    tables = open_tables(config, functools.partial(choose_columns, wanted))
    train = tables["train"]
    labels, _ = parse_rows(train, lambda *values, group: _check_row(values, config)[-1])
    key = f"`data.label={config.label}`"
    encoder = learn_labels(
        labels,
        task=config.task,
        class_names=train.get_class_names(config.label),
        shown_names=config.labels,
        key=key,
    )
    check_label_settings(config, encoder.task)

    def parse(*values: Any, group: str | None) -> LabelledText:
        *texts, label = _check_row(values, config)
        return LabelledText(texts[0], texts[1] if len(texts) > 1 else None, encoder.encode(label), group)

    items, notes = parse_rows(train, parse)
    return build_source(
        (items, [encoder.reason, *notes]),
        lambda split: parse_rows(tables[split], parse),
        kind=encoder.task,
        given=config.given,
        key=_content_key,
        describe=functools.partial(_describe, encoder),
        label_names=encoder.names,
        shared="text" if config.text_pair is None else "pair of texts",
        max_examples=config.max_examples,
    )


def _content_key(item: LabelledText) -> int:
    return content_key((item.text,) if item.pair is None else (item.text, item.pair))


def _check_row(values: tuple[Any, ...], config: TableConfig) -> tuple[Any, ...]:
    """Returns the text, the second text if there is one, and the label; raises ValueError if one of them is missing."""
    *texts, label = values
    check_label(label, column=config.label, task=config.task)
    return (*map(require_text, texts), label)


def _describe(encoder: LabelEncoder, train: list[LabelledText], validation: list[LabelledText]) -> list[str]:
    """Returns notes about contradicting labels and the share of each label."""
    notes = []
    first_label: dict[int, Label] = {}
    keyed = ((_content_key(item), item.label) for item in train)
    if conflicts := {key for key, label in keyed if first_label.setdefault(key, label) != label}:
        notes.append(f"{len(conflicts)} texts of train have several different labels.")
    labels: list[Any] = [item.label for item in train]
    if encoder.task == "regression":
        return notes
    counts = Counter(index for label in labels for index in (label if isinstance(label, list) else [label]))
    listed = list(enumerate(encoder.names))[:MAX_LISTED_CLASSES]
    shares = [f"{name!r} {counts[index] / len(labels):.1%}" for index, name in listed]
    others = f" and {len(encoder.names) - len(listed)} more" if len(encoder.names) > len(listed) else ""
    return [*notes, f"Labels of train: {', '.join(shares)}{others}."]
