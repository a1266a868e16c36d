"""The task of texts with labels."""

from __future__ import annotations

from lorasweep.tasks.table.objective import Classification, Regression
from lorasweep.tasks.table.read import read_labelled, recognise_labelled
from lorasweep.tasks.table.rows import build_labelled
from lorasweep.tasks.task import Task

TASK = Task(
    read=read_labelled,
    build_rows=build_labelled,
    list_objectives=lambda source: [Regression if source.label_kind == "regression" else Classification],
    recognise=recognise_labelled,
)
