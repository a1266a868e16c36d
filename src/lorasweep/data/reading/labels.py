"""From labels as they are written to what a model predicts: indices of named classes, or numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.config.data import LabelTask
from lorasweep.data.source import Label
from lorasweep.errors import ConfigError
from lorasweep.wording import nearest, shorten

SEPARATORS = ("|", ";", ",")
"""Separators of several labels in one text. The first of these that occurs in the training split is used."""
MAX_SINGLE_CLASSES = 20
"""More classes than this must have two examples each on average, unless `data.task` is set: else the column is hardly a
label but a number or a text."""


@dataclass(frozen=True, kw_only=True)
class LabelCode:
    """How labels become numbers: learnt from the training file, used for every split."""

    task: LabelTask
    names: tuple[str, ...]
    """Names of the classes in the order of their indices; empty under regression."""
    separator: str
    """Stands between several labels in one text."""
    reason: str
    """A sentence: what is predicted and why, and in which order the classes are."""

    def encode(self, value: Any) -> Label:
        """Returns the index, the number, or the rising indices of several labels.

        Raises:
            ValueError: The value is no finite number, or no label of training.
        """
        if self.task == "regression":
            return _read_number(value)
        indices = [self._index(name) for name in split_names(value, self.task, self.separator)]
        return indices[0] if self.task == "single_label" else sorted(set(indices))

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(
                f"must have a label that training has, {shorten(self.names, 400)}, but has {name!r}."
                f"{nearest(name, self.names)}"
            )
        return self.names.index(name)


def learn_labels(values: Sequence[Any], *, task: str, class_names: Sequence[str], key: str) -> LabelCode:
    """Returns how the labels of a training file become numbers.

    Args:
        values: The labels, none of them missing.
        task: `data.task`.
        class_names: Names of the classes in their own order, where the data set states them.
        key: The label's setting and column, for messages.

    Raises:
        ConfigError: There is only one class, nearly every example is its own class, or a label is no number.
    """
    decided, why = decide_task(values, task=task, class_names=class_names)
    if decided == "regression":
        return _learn_numbers(values, why=why, key=key)
    texts = [value for value in values if isinstance(value, str)]
    separator = next((s for s in SEPARATORS if any(s in text for text in texts)), SEPARATORS[0])
    found = [tuple(split_names(value, decided, separator)) for value in values]
    used = {name for names in found for name in names}
    if len(set(found)) < 2:
        raise ConfigError(f"{key} must have at least two different labels in training, but has only {sorted(used)}.")
    if task == "auto" and decided == "single_label" and len(used) > max(MAX_SINGLE_CLASSES, len(values) / 2):
        raise ConfigError(
            f"{key} must have classes of several examples each, but has {len(used)} different values in {len(values)} "
            "examples. Name another column, or set `data.task` (regression for numbers)."
        )
    names = tuple(class_names) or tuple(sorted(used, key=_order))
    order = "as the data set orders them" if class_names else "in sorted order"
    count = "one" if decided == "single_label" else "any number"
    reason = f"Predicted is {count} of {len(names)} classes ({why}), {order}: {shorten(names, 400)}."
    if lacking := [name for name in names if name not in used]:
        reason += f" Training has no example of {shorten(lacking, 400)}."
    return LabelCode(task=decided, names=names, separator=separator, reason=reason)


def _learn_numbers(values: Sequence[Any], *, why: str, key: str) -> LabelCode:
    try:
        numbers = [_read_number(value) for value in values]
    except ValueError as error:
        raise ConfigError(f"{key} {error} for `data.task=regression`.") from error
    low, high = min(numbers), max(numbers)
    if low == high:
        raise ConfigError(f"{key} must have at least two different labels in training, but has only {low:g}.")
    mean = math.fsum(numbers) / len(numbers)
    reason = f"Predicted is a number ({why}); in training from {low:g} to {high:g}, mean {mean:g}."
    return LabelCode(task="regression", names=(), separator="", reason=reason)


def decide_task(values: Sequence[Any], *, task: str, class_names: Sequence[str]) -> tuple[LabelTask, str]:
    """Returns what is predicted, and why."""
    if task in ("single_label", "multi_label", "regression"):
        return task, "as `data.task` says"  # type: ignore[return-value]
    if any(isinstance(value, list) for value in values):
        return "multi_label", "labels are lists"
    if class_names:
        return "single_label", "the data set names its classes"
    try:
        numbers = [_read_number(value) for value in values]
    except ValueError:
        return "single_label", "labels are names"
    if all(number.is_integer() for number in numbers):
        return "single_label", "labels are whole numbers; `data.task=regression` would predict them as numbers"
    return "regression", "labels are numbers with fractions"


def is_missing(value: Any, *, task: str) -> bool:
    """Returns whether a row has no label: null, NaN or a blank text, which means "none of them" under `multi_label`."""
    if isinstance(value, str):
        return task != "multi_label" and not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def split_names(value: Any, task: LabelTask, separator: str) -> list[str]:
    """Returns the names of the classes in a label; exactly one, unless the task is `multi_label`."""
    if task == "multi_label" and isinstance(value, str):
        value = [name for name in value.split(separator) if name.strip()]
    return [_name(item) for item in (value if task == "multi_label" and isinstance(value, list) else [value])]


def _name(value: Any) -> str:
    """Returns the name of a class: `1` for 1 and 1.0, `true` for True."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _order(name: str) -> tuple[float, str]:
    """Sorts whole numbers by value, so that 9 comes before 10, and names after them."""
    return (int(name) if name.removeprefix("-").isdecimal() else math.inf, name)


def _read_number(value: Any) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"must have a finite number as label, but has {shorten(value)}")
