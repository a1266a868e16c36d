"""From the checked rows of each split to a `DataSource`: splits off what is missing, limits, counts what splits share.

The same for every form of rows; `labelled`, `conversations` and `documents` say what differs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from lorasweep.data.reading.splitting import choose_evenly, split_rows
from lorasweep.data.reading.tables import Table
from lorasweep.data.source import DataSource, Kind, Rows
from lorasweep.errors import ConfigError

Row = TypeVar("Row")

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True, eq=False)
class Usable:
    """Which rows of a table can be used, and sentences on what was left out."""

    rows: list[int]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Checked(Generic[Row]):
    """Rows that can be used."""

    rows: list[Row]
    keys: list[int]
    """Content key of each row: rows with the same one stay together, and count as duplicates."""
    notes: tuple[str, ...] = ()
    """Sentences on what was left out."""

    def take(self, indices: Sequence[int], *notes: str) -> Checked[Row]:
        """Returns some of the rows, with sentences on why these."""
        return Checked(
            rows=[self.rows[n] for n in indices], keys=[self.keys[n] for n in indices], notes=(*self.notes, *notes)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Form(Generic[Row]):
    """What one form of rows does its own way."""

    kind: Kind
    label_names: tuple[str, ...]
    train: Checked[Row]
    """All rows of the training file, before anything is split off."""
    read: Callable[[str], Checked[Row]]
    """Reads a split that is given."""
    given: Collection[str]
    """The splits that are there; the others are split off."""
    pieces: Mapping[str, Checked[Row]]
    """`train` and the splits that are split off, where the form has cut them itself; else empty."""
    same: str
    """What rows with the same key share: `text`."""
    limits: Mapping[str, int | None]
    """Most rows by split."""
    build: Callable[[str, list[Row], tuple[str, ...]], Rows]
    """Makes a split of its name, rows and notes."""
    describe: Callable[[Checked[Row], Checked[Row]], list[str]]
    """Sentences on the rows of training and validation."""


def assemble(form: Form[Row]) -> DataSource:
    """Returns the splits of a data set; the test split waits until it is called for.

    Raises:
        ConfigError: A split that is given can't be used, or there is too little to split off. For the test split, when
            it is called for.
    """
    splits = form.pieces or _split(form)
    train = _limit(form, "train", splits["train"])
    validation = _limit(form, "validation", splits.get("validation") or form.read("validation"))
    seen = frozenset(train.keys)

    @functools.cache
    def test() -> Rows:
        split = _limit(form, "test", splits.get("test") or form.read("test"))
        return form.build("test", split.rows, (*split.notes, *_count_duplicates(form, "test", split, seen)))

    return DataSource(
        kind=form.kind,
        label_names=form.label_names,
        train=form.build("train", train.rows, ()),
        validation=form.build("validation", validation.rows, ()),
        test=test,
        notes=(
            *train.notes,
            *validation.notes,
            f"{len(train.keys) - len(seen)} of {len(train.keys)} rows of train repeat the {form.same} of another one.",
            *_count_duplicates(form, "validation", validation, seen),
            *form.describe(train, validation),
        ),
    )


def keep_usable(table: Table, found: Iterable[str | None]) -> Usable:
    """Returns the numbers of the rows that have no problem.

    Args:
        table: Columns as they were read.
        found: For each row what it must have and doesn't, or None.

    Raises:
        ConfigError: A row of a file has a problem, or no row is left of a data set whose rows may be left out.
    """
    problems = {row: problem for row, problem in enumerate(found) if problem is not None}
    kept = [row for row in range(len(table)) if row not in problems]
    if not problems:
        return Usable(rows=kept, notes=table.notes)
    row, problem = next(iter(problems.items()))
    first = f"{table.place(row)} {problem}"
    if not table.may_drop:
        more = f" {len(problems) - 1} more rows have a problem." if len(problems) > 1 else ""
        raise ConfigError(f"{first} Mend the row or remove it.{more}")
    if not kept:
        raise ConfigError(f"{table.sources[0][1]!r} must have rows that can be used, but has none: {first}")
    note = f"{len(problems)} of {len(table)} rows of {table.sources[0][1]!r} are left out. The first: {first}"
    return Usable(rows=kept, notes=(*table.notes, note))


def _limit(form: Form[Row], name: str, split: Checked[Row]) -> Checked[Row]:
    most, size = form.limits.get(name), len(split.rows)
    if most is None or most >= size:
        return split
    return split.take(choose_evenly(size, most=most), f"{name} uses {most} of {size} rows, evenly spaced.")


def _split(form: Form[Row]) -> Mapping[str, Checked[Row]]:
    """Splits the splits that are missing off the training file."""
    off = [split for split in SPLITS[1:] if split not in form.given]
    if not off:
        return {"train": form.train}
    assigned = split_rows(form.train.keys, off=off)
    rules = {"validation": "0 to 9", "test": "10 to 19"}
    notes = [
        f"{split} is split off from train: {len(assigned[split])} of {len(form.train.rows)} rows, whose {form.same} "
        f"has a hash that is {rules[split]} modulo 100. Rows with the same {form.same} stay together."
        for split in off
    ]
    plain = replace(form.train, notes=())
    splits = {split: plain.take(rows) for split, rows in assigned.items()}
    return {**splits, "train": form.train.take(assigned["train"], *notes)}


def _count_duplicates(form: Form[Row], name: str, split: Checked[Row], seen: Collection[int]) -> list[str]:
    if name not in form.given:
        return []  # split off, so that there are none
    shared = sum(key in seen for key in split.keys)
    same = f"the {form.same} of a row of train, apart from case and white space"
    return [f"{shared} of {len(split.keys)} rows of {name} have {same}."]
