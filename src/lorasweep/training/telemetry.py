"""Measures the time of each phase, the trained tokens and the peak memory of a process, for the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from lorasweep.training.environment import process_peak_bytes

Phase = Literal["loading", "training", "evaluating", "saving", "storage"]
"""Phases of a process.

`loading` prepares the base model and the data, and measures memory; `saving` writes weights, checkpoints and logs;
`storage` is the controller's work on the studies.
"""


class Telemetry:
    """The clock of one process: at each moment it is in one phase, or in none."""

    def __init__(self) -> None:
        self._phase: Phase | None = None
        self._seconds: dict[Phase | None, float] = {}
        self._began = self._changed = time.monotonic()
        self._cpu_began = time.process_time()
        self._tokens = 0
        self._peaks: dict[str, float] = {}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Counts the time of a `with` block as this phase and not as the outer phase, also if the block raises."""
        outer = self._phase
        self._note_peaks()
        self.switch(name)
        try:
            yield
        finally:
            self._note_peaks()
            self.switch(outer)

    def switch(self, name: Phase | None) -> None:
        """Begins another phase, which lasts until the `phase` block around it ends."""
        now = time.monotonic()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._changed
        self._phase, self._changed = name, now

    def add_tokens(self, number: int) -> None:
        """Counts tokens of training batches, padding left out."""
        self._tokens += number

    def sample(self) -> dict[str, float]:
        """Returns the numbers so far.

        They are `wall_s`, the seconds of each phase (`training_s`, ...), `cpu_s` of all threads, `trained_tokens`,
        `peak_memory_bytes` of the process, and `gpu_peak_memory_bytes` of the GPU with the highest peak, if any.
        """
        self._note_peaks()
        self.switch(self._phase)
        numbers = {f"{name}_s": self._seconds.get(name, 0.0) for name in get_args(Phase)}
        numbers |= {"wall_s": self._changed - self._began, "cpu_s": time.process_time() - self._cpu_began}
        numbers |= {"trained_tokens": self._tokens, **self._peaks}
        return {name: round(value, 4) for name, value in numbers.items()}

    def _note_peaks(self) -> None:
        """Keeps the highest peaks so far, because each run resets the counters of torch and the process."""
        peaks = {"peak_memory_bytes": process_peak_bytes()}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # memory queries would initialise CUDA
            devices = range(torch.cuda.device_count())
            peaks["gpu_peak_memory_bytes"] = max(int(torch.cuda.max_memory_allocated(device)) for device in devices)
        self._peaks |= {name: max(peak, self._peaks.get(name, 0)) for name, peak in peaks.items()}


def add_telemetry(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Returns the sum of each number of two processes or sessions of a sweep; for a peak, the higher of the two."""
    total = dict(first)
    for name, value in second.items():
        known = total.get(name, 0.0)
        total[name] = max(known, value) if "peak" in name else known + value
    return total
