"""What a process's time and memory go to: a clock with phases, tokens, memory and processors, cheap to look at."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from lorasweep.training.environment import process_peak_bytes

Phase = Literal["loading", "training", "evaluating", "saving", "storage", "other"]
STATUS_FILE = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True)
class GpuUse:
    """One GPU of the process."""

    use_fraction: float | None
    """Mean over the samples of the share of time in which it computed; None where NVML can't be asked (`pynvml`)."""
    memory_bytes: int
    """Allocated by this process now, and `peak_memory_bytes` at most."""
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    """A worker's time and memory so far."""

    wall_s: float
    """Seconds since it began; those of the phases add up to it, but for what is in none of them."""
    loading_s: float
    """Base model, data, measurements, and the beginning of each run."""
    training_s: float
    evaluating_s: float
    saving_s: float
    """Weights, checkpoints and logs."""
    storage_s: float
    """Asking for trials, reporting and telling, and the sweep's record."""
    idle_fraction: float
    """Share of its time that it neither trained nor evaluated."""
    trained_tokens: int
    """Tokens of training batches, padding left out."""
    tokens_per_s: float
    """Of training time."""
    memory_bytes: int
    """Resident memory of the process now, and `peak_memory_bytes` at most; 0 where the system can't say."""
    peak_memory_bytes: int
    cpu_s: float
    """Processor time of all its threads in that time."""
    cpu_fraction: float
    """Share of the processors it may use that it did use since the sample before."""
    gpus: tuple[GpuUse, ...] = ()

    def as_numbers(self) -> dict[str, float]:
        """Returns the numbers by name, those of the first GPU as `gpu0_memory_bytes`; what is not known is left out."""
        own = asdict(self)
        for number, gpu in enumerate(own.pop("gpus")):
            own |= {f"gpu{number}_{name}": value for name, value in gpu.items() if value is not None}
        return {name: round(value, 4) for name, value in own.items()}


class Telemetry:
    """The clock of one process: at each moment it is in one phase."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: list[Phase] = ["other"]
        self._seconds: dict[Phase, float] = {}
        self._charged = time.monotonic()
        self._tokens = 0
        self._tokens_training_s = 0.0
        self._peak = 0
        self._gpus = _Gpus()
        self._cpu_began = time.process_time()
        self._cpu_before = (self._charged, self._cpu_began)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Counts the time inside as that phase, and not as the one around it, however it ends."""
        self._note_peak()
        with self._lock:
            self._charge()
            depth = len(self._phases)
            self._phases.append(name)
        try:
            yield
        finally:
            self._note_peak()
            with self._lock:
                self._charge()
                del self._phases[depth:]

    def switch(self, name: Phase) -> None:
        """Goes on in another phase, until the present `phase` ends."""
        if self._phases[-1] == name:
            return
        with self._lock:
            self._charge()
            self._phases[-1] = name

    def add_tokens(self, number: int) -> None:
        """Counts tokens that were trained on."""
        with self._lock:
            self._charge()
            self._tokens += number
            self._tokens_training_s = self._seconds.get("training", 0.0)

    def sample(self) -> Usage:
        """Returns what there is so far; takes well under a millisecond, in any thread."""
        self._note_peak()
        with self._lock:
            self._charge()
            seconds = dict(self._seconds)
            wall_s = max(sum(seconds.values()), 1e-9)
            tokens, tokens_s = self._tokens, self._tokens_training_s
            now, cpu_s = self._charged, time.process_time()
            before, self._cpu_before = self._cpu_before, (now, cpu_s)
        return Usage(
            wall_s=wall_s,
            loading_s=seconds.get("loading", 0.0),
            training_s=seconds.get("training", 0.0),
            evaluating_s=seconds.get("evaluating", 0.0),
            saving_s=seconds.get("saving", 0.0),
            storage_s=seconds.get("storage", 0.0),
            idle_fraction=max(0.0, 1 - (seconds.get("training", 0.0) + seconds.get("evaluating", 0.0)) / wall_s),
            trained_tokens=tokens,
            tokens_per_s=tokens / tokens_s if tokens_s else 0.0,
            memory_bytes=resident_bytes(),
            peak_memory_bytes=self._peak,
            cpu_s=cpu_s - self._cpu_began,
            cpu_fraction=(cpu_s - before[1]) / max(now - before[0], 1e-9) / usable_cores(),
            gpus=self._gpus.sample(),
        )

    def _charge(self) -> None:
        """Adds the time since the last change to the present phase. The lock is held."""
        now = time.monotonic()
        name = self._phases[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._charged
        self._charged = now

    def _note_peak(self) -> None:
        """Keeps the peaks, which each run measures anew."""
        self._peak = max(self._peak, process_peak_bytes())
        self._gpus.note_peaks()


class _Gpus:
    """The GPUs that this process has memory on; none before, because asking would begin to use them."""

    def __init__(self) -> None:
        self._peaks: dict[int, int] = {}
        self._use: dict[int, float] = {}
        self._samples: dict[int, int] = {}
        self._has_nvml = find_spec("pynvml") is not None

    def note_peaks(self) -> None:
        for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):  # type: ignore[no-untyped-call]
            peak = int(torch.cuda.max_memory_allocated(device))
            if peak:
                self._peaks[device] = max(self._peaks.get(device, 0), peak)

    def sample(self) -> tuple[GpuUse, ...]:
        return tuple(
            GpuUse(
                use_fraction=self._mean_use(device),
                memory_bytes=int(torch.cuda.memory_allocated(device)),
                peak_memory_bytes=peak,
            )
            for device, peak in sorted(self._peaks.items())
        )

    def _mean_use(self, device: int) -> float | None:
        if not self._has_nvml:
            return None
        try:
            use = torch.cuda.utilization(device) / 100
        except Exception:  # NVML's own errors: no driver, no permission, not known of a part of a GPU
            self._has_nvml = False
            return None
        self._use[device] = self._use.get(device, 0.0) + use
        self._samples[device] = self._samples.get(device, 0) + 1
        return self._use[device] / self._samples[device]


def add_session(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Returns the telemetry of two sessions of a sweep together: times and tokens added, the larger peaks.

    Args:
        before: The numbers of earlier sessions, as `Usage.as_numbers` names them; empty for the first one.
        now: Those of this session.
    """
    total = dict(now)
    for name, value in before.items():
        if name == "trained_tokens" or (name.endswith("_s") and name != "tokens_per_s"):
            total[name] = value + now.get(name, 0.0)
        elif "peak" in name:
            total[name] = max(value, now.get(name, 0.0))
    if training_s := total.get("training_s"):
        total["tokens_per_s"] = total["trained_tokens"] / training_s
    if wall_s := total.get("wall_s"):
        total["idle_fraction"] = max(0.0, 1 - (total["training_s"] + total["evaluating_s"]) / wall_s)
    return total


def resident_bytes() -> int:
    """Returns the resident memory of this process, or 0 where the system can't say."""
    with suppress(OSError, IndexError, ValueError):
        return int(STATUS_FILE.read_text().split("VmRSS:")[1].split()[0]) * 1024
    return 0


def usable_cores() -> int:
    """Returns how many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
