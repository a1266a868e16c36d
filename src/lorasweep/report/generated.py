"""Chooses the generated answers that the page shows side by side."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lorasweep.disk import open_inside
from lorasweep.record import ANSWERS_FILE
from lorasweep.report.sweep_data import SweepData

MAX_SHOWN_EXAMPLES = 5
"""Maximum number of test examples whose answers the page shows."""


class GeneratedExample(NamedTuple):
    """A test example with the text that each subject generated."""

    prompt: str
    reference: str
    texts: Mapping[str, tuple[str, str]]
    """Generated text and its score by subject, the base first. A score is empty if the function gave none."""


def list_generated_examples(data: SweepData) -> list[GeneratedExample]:
    """Returns test examples that the base and the first complete confirm run of each subject answered."""
    files = {"base": data.folder / ANSWERS_FILE.format("base")}  # exists if no arm is the base
    for one in sorted(data.subjects, key=lambda one: not one.row.is_base):
        for run in [run for run in one.confirm_runs if run.is_complete][:1]:
            files[one.name] = data.folder / run.run / ANSWERS_FILE.format("test")
    tables = {name: table for name, path in files.items() if (table := _read(path, data.folder))}
    rows = [row for row in next(iter(tables.values()), {}) if all(row in table for table in tables.values())]
    examples = []
    for row in rows[:: max(1, len(rows) // MAX_SHOWN_EXAMPLES)][:MAX_SHOWN_EXAMPLES]:
        prompt, reference, *_ = next(iter(tables.values()))[row]
        texts = {name: (table[row][2], table[row][3]) for name, table in tables.items()}
        examples.append(GeneratedExample(prompt, reference, texts))
    return examples


def _read(path: Path, folder: Path) -> dict[str, list[str]]:
    """Returns prompt, reference, answer and score by row; empty if the file is missing or damaged."""
    try:
        with io.TextIOWrapper(open_inside(folder, path), newline="", encoding="utf-8") as text:
            columns = ("prompt", "reference", "answer", "score")
            return {line["row"]: [str(line[name]) for name in columns] for line in csv.DictReader(text)}
    except (OSError, ValueError, KeyError, csv.Error):
        return {}
