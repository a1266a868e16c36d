"""Texts with labels, from the columns of a table. Comes after `tables`, `labels` and `assembly`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from lorasweep.config.data import ChatConfig, TableConfig, check_label_settings
from lorasweep.data.reading.assembly import Checked, Form, Usable, assemble, keep_usable
from lorasweep.data.reading.formats import ColumnChoice
from lorasweep.data.reading.labels import Label, LabelCode, is_missing, learn_labels
from lorasweep.data.reading.splitting import content_key
from lorasweep.data.reading.tables import Table, require_column
from lorasweep.data.source import DataSource, LabelledExamples, fingerprint_labelled


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """The tables of a data set, each read when it is asked for."""

    load: Callable[[str, ColumnChoice], Table]
    """From a split's name and the choice of its columns to its table."""
    given: frozenset[str]
    """The splits that there are."""


LabelledRow = tuple[str, str | None, Label]


def read_labelled(config: TableConfig, tables: Tables) -> DataSource:
    """Returns the rows of a table, with labels as indices or numbers.

    Raises:
        ConfigError: A column is missing, a row can't be used, or the labels do not fit the task.
    """
    table = tables.load("train", lambda names, place: _choose_columns(config, names, place))
    usable = _check(config, table)
    code = learn_labels(
        [table.columns[config.label][row] for row in usable.rows],
        task=config.task,
        class_names=table.class_names,
        place=_place_labels(config, table, usable.rows),
        key=f"`data.label={config.label}`",
    )
    check_label_settings(config, code.task)

    def read(split: str) -> Checked[LabelledRow]:
        table = tables.load(split, lambda names, place: _choose_columns(config, names, place))
        return _encode(config, code, table, _check(config, table))

    train = _encode(config, code, table, usable)
    return assemble(
        Form(
            kind=code.task,
            label_names=code.names,
            train=replace(train, notes=(code.reason, *train.notes)),
            read=read,
            given=tables.given,
            pieces={},
            same="text" if config.text_pair is None else "pair of texts",
            limits=row_limits(config),
            build=_build,
            describe=lambda train, validation: _describe(code, train, validation),
        )
    )


def row_limits(config: TableConfig | ChatConfig) -> Mapping[str, int | None]:
    """Returns the most rows of each split."""
    return {
        "train": config.max_train_examples,
        "validation": config.max_validation_examples,
        "test": config.max_test_examples,
    }


def find_text_problem(value: Any, *, column: str) -> str | None:
    """Returns what is wrong with a text, or None."""
    if isinstance(value, str):
        return None if value.strip() else f"must have a text in column {column!r}, but it is empty."
    return f"must have a text in column {column!r}, but has {repr(value)[:40]}."


def _choose_columns(config: TableConfig, names: Sequence[str], place: str) -> list[str]:
    wanted = [("text", config.text), ("text_pair", config.text_pair), ("label", config.label)]
    return [require_column(name, names, key=f"data.{key}", place=place) for key, name in wanted if name is not None]


def _check(config: TableConfig, table: Table) -> Usable:
    texts = [name for name in (config.text, config.text_pair) if name is not None]
    rows = zip(*(table.columns[name] for name in texts), table.columns[config.label], strict=True)
    return keep_usable(table, (_find_problem(config, texts, values[:-1], values[-1]) for values in rows))


def _find_problem(config: TableConfig, names: Sequence[str], texts: Sequence[Any], label: Any) -> str | None:
    for name, text in zip(names, texts, strict=True):
        if found := find_text_problem(text, column=name):
            return found
    if is_missing(label, task=config.task):
        return f"must have a label in column {config.label!r}, but has {label!r}."
    return None


def _encode(config: TableConfig, code: LabelCode, table: Table, usable: Usable) -> Checked[LabelledRow]:
    place = _place_labels(config, table, usable.rows)
    labels = code.encode([table.columns[config.label][row] for row in usable.rows], place=place)
    texts = table.columns[config.text]
    pairs = None if config.text_pair is None else table.columns[config.text_pair]
    rows = [
        (texts[row], None if pairs is None else pairs[row], label)
        for row, label in zip(usable.rows, labels, strict=True)
    ]
    keys = [content_key((text,) if pair is None else (text, pair)) for text, pair, _ in rows]
    return Checked(rows=rows, keys=keys, notes=usable.notes)


def _place_labels(config: TableConfig, table: Table, rows: Sequence[int]) -> Callable[[int], str]:
    return lambda number: f"{table.place(rows[number])}, column {config.label!r},"


def _build(name: str, rows: list[LabelledRow], notes: tuple[str, ...]) -> LabelledExamples:
    texts = [text for text, _, _ in rows]
    pairs = [pair for _, pair, _ in rows if pair is not None] or None
    labels = cast("list[int]", [label for _, _, label in rows])
    return LabelledExamples(
        name=name,
        texts=texts,
        pairs=pairs,
        labels=labels,
        fingerprint=fingerprint_labelled(texts, pairs, labels),
        notes=notes,
    )


def _describe(code: LabelCode, train: Checked[LabelledRow], validation: Checked[LabelledRow]) -> list[str]:
    """Says how often each label is, and what an answer scores that looks at no text."""
    notes = _describe_conflicts(train)
    labels, held_out = [row[2] for row in train.rows], [row[2] for row in validation.rows]
    if code.task == "regression":
        return [*notes, _describe_mean(cast("list[float]", labels), cast("list[float]", held_out))]
    if code.task == "multi_label":
        counts = Counter(index for indices in cast("list[list[int]]", labels) for index in indices)
        return [*notes, _describe_shares(code, counts, len(labels))]
    counts = Counter(cast("list[int]", labels))
    most, _ = min(counts.items(), key=lambda item: (-item[1], item[0]))
    score = held_out.count(most) / len(held_out)
    return [
        *notes,
        _describe_shares(code, counts, len(labels)),
        f"Always answering {code.names[most]!r}, the most frequent label of train, has an accuracy of {score:.4f} on "
        "validation.",
    ]


def _describe_conflicts(train: Checked[LabelledRow]) -> list[str]:
    first: dict[int, Label] = {}
    keyed = zip(train.keys, train.rows, strict=True)
    conflicts = {key for key, (_, _, label) in keyed if first.setdefault(key, label) != label}
    return [f"{len(conflicts)} texts of train are there with different labels."] if conflicts else []


def _describe_shares(code: LabelCode, counts: Counter[int], rows: int) -> str:
    shares = [f"{name!r} {counts[index] / rows:.1%}" for index, name in enumerate(code.names[:20])]
    more = f" and {len(code.names) - 20} more" if len(code.names) > 20 else ""
    return f"Labels of train: {', '.join(shares)}{more}."


def _describe_mean(labels: Sequence[float], held_out: Sequence[float]) -> str:
    mean = math.fsum(labels) / len(labels)
    error = math.fsum((label - mean) ** 2 for label in held_out) / len(held_out)
    return f"Always answering {mean:.4g}, the mean of train, has a squared error of {error:.4g} on validation."
