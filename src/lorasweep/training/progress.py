"""How much a run has trained so far: for its record, its loggers and its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorasweep.record import RunRecord


@dataclass(kw_only=True)
class Progress:
    """The tokens and the training time of a run, over all its sessions and processes."""

    tokens: int | Tensor = 0
    """Trained tokens without padding; a scalar on the device while training, so that no step waits for the device."""
    positions: int = 0
    """The same with padding."""
    train_s: float = 0.0
    """Seconds spent in training steps, without evaluations. A run in a pack counts its share of each step."""

    @property
    def tokens_trained(self) -> int:
        """Trained tokens without padding. Waits for the device."""
        return int(self.tokens)

    @property
    def tokens_per_s(self) -> float:
        """Trained tokens per second of training time."""
        return self.tokens_trained / self.train_s if self.train_s else 0.0

    @property
    def padding_fraction(self) -> float:
        """Share of the trained positions that is padding."""
        return 1.0 - self.tokens_trained / self.positions if self.positions else 0.0

    def state(self) -> dict[str, Any]:
        """Returns plain numbers for a checkpoint."""
        return {"tokens": self.tokens_trained, "positions": self.positions, "train_s": self.train_s}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Returns the progress that `state` gave to a checkpoint."""
        return cls(**{name: state[name] for name in ("tokens", "positions", "train_s")})

    def note_in(self, record: RunRecord) -> None:
        """Writes the progress into a run's record."""
        record.tokens_trained, record.tokens_per_s = self.tokens_trained, self.tokens_per_s
        record.batching["padding_fraction"]["train"] = round(self.padding_fraction, 4)
