"""Measures time, tokens and memory of a process (`Telemetry`) and of one run (`TrainingProgress`)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lorasweep.record import RunRecord
from lorasweep.training.memory import process_peak_bytes, reset_peak_memory

Phase = Literal["training", "evaluating", "saving"]
"""Phases of a process. `saving` writes weights, checkpoints and logs, and reports the evaluations."""


class Telemetry:
    """Counts the seconds of each phase, the trained tokens and the peak memory of one process."""

    def __init__(self) -> None:
        self._phase: Phase | None = None
        self._seconds: dict[Phase | None, float] = {}
        self._began = self._changed = time.monotonic()
        self._cpu_began = time.process_time()
        self._tokens = 0
        self._peaks: dict[str, float] = {}
        self._first_step_at: float | None = None

    def switch(self, phase: Phase | None) -> None:
        """Begins another phase. None: the process does something else, such as loading a model."""
        now = time.monotonic()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._changed
        self._phase, self._changed = phase, now
        if phase == "training" and self._first_step_at is None:
            self._first_step_at = time.time()

    def add_tokens(self, num_tokens: int) -> None:
        """Adds tokens of training batches, without padding."""
        self._tokens += num_tokens

    def begin_run(self) -> None:
        """Lets a run measure its own peak memory. The highest peak so far is kept."""
        self._note_peaks()
        reset_peak_memory()

    def sample(self) -> dict[str, float]:
        """Returns the values so far.

        They are `wall_s`, the seconds of each phase (`training_s`, ...), `cpu_s` of all threads, `trained_tokens`,
        `peak_memory_bytes` of the process, and on GPUs `gpu_peak_memory_bytes`, the highest peak of one GPU. After the
        first training step has begun, also its Unix time `first_step_at`.
        """
        self._note_peaks()
        self.switch(self._phase)  # adds the seconds of the current phase so far
        values = {f"{phase}_s": self._seconds.get(phase, 0.0) for phase in get_args(Phase)}
        values |= {"wall_s": self._changed - self._began, "cpu_s": time.process_time() - self._cpu_began}
        values |= {"trained_tokens": self._tokens, **self._peaks}
        values |= {} if self._first_step_at is None else {"first_step_at": self._first_step_at}
        return {name: round(value, 4) for name, value in values.items()}

    def _note_peaks(self) -> None:
        peaks = {"peak_memory_bytes": process_peak_bytes()}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # memory queries would initialise CUDA
            devices = range(torch.cuda.device_count())
            peaks["gpu_peak_memory_bytes"] = max(int(torch.cuda.max_memory_allocated(device)) for device in devices)
        self._peaks |= {name: max(peak, self._peaks.get(name, 0)) for name, peak in peaks.items()}


@dataclass(kw_only=True)
class TrainingProgress:
    """The tokens and the training time of one run, summed over its processes and over interruptions."""

    tokens: int = 0
    """Trained tokens without padding."""
    positions: int = 0
    """Trained tokens with padding."""
    train_s: float = 0.0
    """Seconds spent in training steps, without evaluations. A run in a pack counts its share of each step."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.train_s if self.train_s else 0.0

    @property
    def padding_fraction(self) -> float:
        return 1.0 - self.tokens / self.positions if self.positions else 0.0

    def write_to(self, record: RunRecord) -> None:
        record.tokens_trained, record.tokens_per_s = self.tokens, self.tokens_per_s
        record.batching["padding_fraction"]["train"] = round(self.padding_fraction, 4)
