"""The task of conversations."""

from __future__ import annotations

from lorasweep.objectives.next_tokens import NextTokens
from lorasweep.tasks.chat.read import read_conversations, recognise_conversations
from lorasweep.tasks.chat.rows import build_conversations
from lorasweep.tasks.task import Task

TASK = Task(
    read=read_conversations,
    build_rows=build_conversations,
    list_objectives=lambda source: [NextTokens],
    recognise=recognise_conversations,
    hint=(
        "data.answers.score",
        "`data.answers.score=exact_match confirm.metric=exact_match` (or `last_number`) asks about generated answers, "
        "not about the loss.",
    ),
)
