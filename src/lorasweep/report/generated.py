"""Reads the generated answers of a sweep's confirm runs, and chooses those that the page shows side by side."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasweep.record import ANSWERS_FILE
from lorasweep.report.sweep_data import SweepData

MAX_SHOWN_EXAMPLES = 5
"""Maximum number of test examples whose answers the page shows."""


@dataclass(frozen=True, kw_only=True)
class AnsweredExample:
    """A test example with the answer of each subject."""

    prompt: str
    reference: str
    answers: Mapping[str, tuple[str, str]]
    """Answer and score by subject, the base first. A score is empty if the function gave none."""


def list_answered_examples(data: SweepData) -> list[AnsweredExample]:
    """Returns test examples that the base and a confirm run of each subject answered; empty if there are none."""
    tables = {name: table for name, path in _list_files(data) if (table := _read(path))}
    rows = [row for row in next(iter(tables.values()), {}) if all(row in table for table in tables.values())]
    step = max(1, len(rows) // MAX_SHOWN_EXAMPLES)
    examples = []
    for row in rows[::step][:MAX_SHOWN_EXAMPLES]:
        found = {name: table[row] for name, table in tables.items()}
        first = next(iter(found.values()))
        answers = {name: (line["answer"], line["score"]) for name, line in found.items()}
        examples.append(AnsweredExample(prompt=first["prompt"], reference=first["reference"], answers=answers))
    return examples


def _list_files(data: SweepData) -> Iterator[tuple[str, Path]]:
    """Yields the name of each subject and the file of its first complete confirm run, beginning with the base."""
    yield "base", data.folder / ANSWERS_FILE.format("base")
    for arm in sorted(data.arms, key=lambda arm: arm.row.method != "frozen"):
        if run := next((run for run in arm.confirm_runs if run.is_complete), None):
            yield arm.name, data.folder / run.run / ANSWERS_FILE.format("test")


def _read(path: Path) -> dict[str, dict[str, str]]:
    """Returns the lines of a file of answers by row; empty if the file is missing or damaged."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = {line["row"]: line for line in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, csv.Error):
        return {}
    wanted = ("prompt", "reference", "answer", "score")
    is_whole = all(isinstance(line.get(column), str) for line in lines.values() for column in wanted)
    return lines if is_whole else {}
