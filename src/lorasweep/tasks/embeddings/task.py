"""The task of pairs for embedding models."""

from __future__ import annotations

from lorasweep.tasks.embeddings.objective import InBatchNegatives
from lorasweep.tasks.embeddings.read import read_pairs, recognise_pairs
from lorasweep.tasks.embeddings.rows import build_pairs
from lorasweep.tasks.task import Task

TASK = Task(
    read=read_pairs,
    build_rows=build_pairs,
    list_objectives=lambda source: [InBatchNegatives],
    recognise=recognise_pairs,
)
