"""The task of pairs of answers, of which one was preferred."""

from __future__ import annotations

from lorasweep.tasks.preferences.dpo import Dpo
from lorasweep.tasks.preferences.orpo import Orpo
from lorasweep.tasks.preferences.read import read_preferences, recognise_pairs
from lorasweep.tasks.preferences.rows import build_pairs
from lorasweep.tasks.task import Task

TASK = Task(
    read=read_preferences,
    build_rows=build_pairs,
    list_objectives=lambda source: [Dpo, Orpo],
    recognise=recognise_pairs,
    searched={"objective.beta": {"low": 0.01, "high": 0.5, "log": True}},  # 0.1 in DPO, 0.01 to 0.1 in SimPO's search
    full_rate_times_width=0.002,  # 5e-7 at a width of 4,096 (Zephyr, arXiv 2310.16944; Tülu 3, arXiv 2411.15124)
)
