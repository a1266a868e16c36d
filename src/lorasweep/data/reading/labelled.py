"""Texts with labels, from the columns of a table."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from lorasweep.config.data import TableConfig, check_label_settings
from lorasweep.data.reading.labels import LabelCode, is_missing, learn_labels
from lorasweep.data.reading.splitting import Checked, build_source, content_key
from lorasweep.data.reading.tables import LoadTable, Table, choose_columns, parse_rows, require_text
from lorasweep.data.source import DataSource, Label, LabelledText


def read_labelled(config: TableConfig, load: LoadTable) -> DataSource:
    """Returns the examples of a table, with labels as indices or numbers.

    Raises:
        ConfigError: A column is missing, a row can't be used, or the labels do not fit the task.
    """
    wanted = (("text", config.text), ("text_pair", config.text_pair), ("label", config.label))
    table = load("train", lambda names, place: choose_columns(wanted, names, place))
    labels, _ = parse_rows(table, lambda *values: _read_row(values, config)[-1])
    key = f"`data.label={config.label}`"
    code = learn_labels(labels, task=config.task, class_names=table.class_names, key=key)
    check_label_settings(config, code.task)

    def parse(*values: Any) -> LabelledText:
        *texts, label = _read_row(values, config)
        return LabelledText(texts[0], texts[1] if len(texts) > 1 else None, code.encode(label))

    def check(table: Table) -> Checked[LabelledText]:
        items, notes = parse_rows(table, parse)
        keys = [content_key((item.text,) if item.pair is None else (item.text, item.pair)) for item in items]
        return Checked(items=items, keys=keys, notes=notes)

    train = check(table)
    return build_source(
        Checked(items=train.items, keys=train.keys, notes=(code.reason, *train.notes)),
        lambda split: check(load(split, lambda names, place: choose_columns(wanted, names, place))),
        kind=code.task,
        given=config.given,
        describe=lambda train, validation: _describe(code, train, validation),
        label_names=code.names,
        same="text" if config.text_pair is None else "pair of texts",
        max_examples=config.max_examples,
    )


def _read_row(values: tuple[Any, ...], config: TableConfig) -> tuple[Any, ...]:
    """Returns the text, the second text if there is one, and the label; raises ValueError if one of them is missing."""
    *texts, label = values
    if is_missing(label, task=config.task):
        raise ValueError(f"must have a label in column {config.label!r}, but has {label!r}")
    return (*map(require_text, texts), label)


def _describe(code: LabelCode, train: Checked[LabelledText], validation: Checked[LabelledText]) -> list[str]:
    """Returns sentences: how frequent each label is, and what a constant answer scores."""
    notes = []
    first: dict[int, Label] = {}
    keyed = zip(train.keys, train.items, strict=True)
    if conflicts := {key for key, item in keyed if first.setdefault(key, item.label) != item.label}:
        notes.append(f"{len(conflicts)} texts of train are there with different labels.")
    labels: list[Any] = [item.label for item in train.items]
    held_out: list[Any] = [item.label for item in validation.items]
    if code.task == "regression":
        mean = math.fsum(labels) / len(labels)
        error = math.fsum((label - mean) ** 2 for label in held_out) / len(held_out)
        told = f"Always answering {mean:.4g}, the mean of train, has a squared error of {error:.4f} on validation."
        return [*notes, told]
    counts = Counter(index for label in labels for index in (label if isinstance(label, list) else [label]))
    shares = [f"{name!r} {counts[index] / len(labels):.1%}" for index, name in enumerate(code.names[:20])]
    more = f" and {len(code.names) - 20} more" if len(code.names) > 20 else ""
    notes.append(f"Labels of train: {', '.join(shares)}{more}.")
    if code.task == "single_label":
        most = min(counts, key=lambda index: (-counts[index], index))
        accuracy = held_out.count(most) / len(held_out)
        notes.append(
            f"Always answering {code.names[most]!r}, the most frequent label of train, has an accuracy of "
            f"{accuracy:.4f} on validation."
        )
    return notes
