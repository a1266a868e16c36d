"""How far a training is: its phase and step, and the tokens and the time of one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lorasweep.record import RunRecord

Phase: TypeAlias = Literal["training", "evaluating", "saving"]
"""Phases of a training. `saving` writes weights, checkpoints and logs, and reports the evaluations."""
OnPhase: TypeAlias = Callable[[Phase, int, int], None]
"""`on_phase(phase, step, num_steps)` is called before each step, evaluation and saving, with the steps done so far."""


def ignore_phase(phase: Phase, step: int, num_steps: int) -> None: ...


@dataclass(kw_only=True)
class TrainingProgress:
    """The tokens and the training time of one run, summed over its processes and over interruptions."""

    tokens: int = 0
    """Trained tokens without padding."""
    train_s: float = 0.0
    """Seconds spent in training steps, without evaluations. A run in a pack counts its share of each step."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.train_s if self.train_s else 0.0

    def write_to(self, record: RunRecord) -> None:
        record.tokens_trained, record.tokens_per_s = self.tokens, self.tokens_per_s
