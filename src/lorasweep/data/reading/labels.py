"""From labels as they are written to what a model predicts: indices of named classes, or numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.config.data import LabelTask
from lorasweep.errors import ConfigError
from lorasweep.wording import nearest

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)
SEPARATORS = ("|", ";", ",")
"""What may stand between several labels in one text: the first of these that training has anywhere."""
MANY_CLASSES = 20
"""More classes than this are believed only if they have two rows or more on average, unless `data.task` says so."""

Label = int | float | list[int]
Place = Callable[[int], str]
"""From a row to where it came from, for messages."""


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

    def encode(self, values: Sequence[Any], *, place: Place) -> list[Label]:
        """Returns an index, a number or the rising indices of several for each label.

        Raises:
            ConfigError: One is not a number, or no label of training.
        """
        if self.task == "regression":
            return [read_number(value, place=place, row=row) for row, value in enumerate(values)]
        index = {name: number for number, name in enumerate(self.names)}
        found = split_labels(values, task=self.task, separator=self.separator, place=place)
        for row, names in enumerate(found):
            for name in names:
                if name not in index:
                    raise ConfigError(_unknown(name, self.names, place=place(row)))
        if self.task == "single_label":
            return [index[name] for (name,) in found]
        return [sorted({index[name] for name in names}) for names in found]


def learn_labels(values: Sequence[Any], *, task: str, class_names: Sequence[str], place: Place, key: str) -> LabelCode:
    """Returns how the labels of a training file become numbers.

    Args:
        values: Its labels, none of them missing.
        task: `data.task`.
        class_names: Names of the classes in their own order, where the data set states them.
        place: From a row to its place, for messages.
        key: The label's setting and column, for messages.

    Raises:
        ConfigError: A label does not fit the task, there is only one class, or nearly every row is its own class.
    """
    decided, why = decide_task(values, task=task, class_names=class_names)
    if decided == "regression":
        return _learn_numbers([read_number(v, place=place, row=row) for row, v in enumerate(values)], why=why, key=key)
    separator = next((s for s in SEPARATORS if any(isinstance(v, str) and s in v for v in values)), SEPARATORS[0])
    found = split_labels(values, task=decided, separator=separator, place=place)
    distinct = {tuple(names) for names in found}
    used = {name for names in distinct for name in names}
    if len(distinct) < 2:
        raise ConfigError(
            f"{key} must have at least two different labels in training, but every row has {_shown(sorted(used))}."
        )
    if task == "auto" and decided == "single_label" and len(used) > max(MANY_CLASSES, len(values) / 2):
        raise ConfigError(
            f"{key} must have classes of several rows each, but has {len(used)} different values in "
            f"{len(values)} rows. Name another column, or set `data.task` if it is meant (regression for numbers)."
        )
    names = tuple(class_names) or _sort_names(used)
    order = "as the data set orders them" if class_names else "in sorted order"
    reason = f"Predicted is {_WORDS[decided]} of {len(names)} classes ({why}), {order}: {_shown(names)}."
    if missing := [name for name in names if name not in used]:
        reason += f" No training row has {_shown(missing)}."
    return LabelCode(task=decided, names=names, separator=separator, reason=reason)


_WORDS = {"single_label": "one label per row", "multi_label": "any number of labels per row"}


def _learn_numbers(numbers: Sequence[float], *, why: str, key: str) -> LabelCode:
    low, high = min(numbers), max(numbers)
    if low == high:
        raise ConfigError(f"{key} must have at least two different labels in training, but every row has {low:g}.")
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
    numbers = [as_number(value) for value in values]
    if None in numbers:
        return "single_label", "labels are names"
    if all(number is not None and number.is_integer() for number in numbers):
        return "single_label", "labels are whole numbers; `data.task=regression` would predict them as numbers"
    return "regression", "labels are numbers with fractions"


def is_missing(value: Any, *, task: str) -> bool:
    """Returns whether a row has no label: null, NaN or an empty text, which under `multi_label` is no label at all."""
    if isinstance(value, str):
        return value.strip().lower() == "nan" or (task != "multi_label" and not value.strip())
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_number(value: Any) -> float | None:
    """Returns a number, or a text that reads as one, as a float; None for everything else."""
    if isinstance(value, str):
        return float(value) if NUMBER.fullmatch(value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def read_number(value: Any, *, place: Place, row: int) -> float:
    """Returns a label of a regression.

    Raises:
        ConfigError: It is not a finite number.
    """
    number = as_number(value)
    if number is None or not math.isfinite(number):
        raise ConfigError(f"{place(row)} must be a finite number, but is {_short(value)}.")
    return number


def split_labels(values: Sequence[Any], *, task: LabelTask, separator: str, place: Place) -> list[list[str]]:
    """Returns the names of classes that each label has; exactly one each, unless the task is `multi_label`."""
    names: dict[tuple[type, Any], str] = {}  # labels are few, rows many

    def read(value: Any, row: int) -> str:
        if isinstance(value, list | dict):
            return read_name(value, place=place, row=row)
        if (key := (type(value), value)) not in names:
            names[key] = read_name(value, place=place, row=row)
        return names[key]

    if task == "single_label":
        return [[read(value, row)] for row, value in enumerate(values)]
    return [[read(item, row) for item in _split(value, separator=separator)] for row, value in enumerate(values)]


def _split(value: Any, *, separator: str) -> list[Any]:
    if isinstance(value, str):
        return [item for item in value.split(separator) if item.strip()]
    return value if isinstance(value, list) else [value]


def read_name(value: Any, *, place: Place, row: int) -> str:
    """Returns the name of a class: of a whole number its digits (`1` of 1, 1.0 and `1.0`), of a truth `true`, `false`.

    Raises:
        ConfigError: It is a number with a fraction, missing, or something else than a name.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.strip() and value.strip().lower() != "nan":
        name = value.strip()
        if name.isdecimal() or not NUMBER.fullmatch(name):
            return name
    number = as_number(value)
    if number is None:
        raise ConfigError(f"{place(row)} must be the name or number of a class, but is {_short(value)}.")
    if not number.is_integer():
        raise ConfigError(
            f"{place(row)} must be the name or whole number of a class, but is {_short(value)}. "
            "Use `data.task=regression` to predict numbers."
        )
    return str(int(number))


def _sort_names(names: set[str]) -> tuple[str, ...]:
    if all(WHOLE.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _unknown(name: str, names: Sequence[str], *, place: str) -> str:
    return f"{place} must be a label that training has, {_shown(names)}, but is {_short(name)}.{nearest(name, names)}"


def _shown(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return ", ".join(map(_short, names[:12])) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
