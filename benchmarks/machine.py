"""Measures how fast the machine multiplies matrices and copies memory. The benchmarks print it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch.nn.functional import linear
from torch.utils.benchmark import Timer

from lorasweep.training.environment import DTYPES, Precision, name_device

PRODUCT_SIZES = (2048, 512, 2048)
"""Rows, inner size and columns of the product: as in a linear layer, and large enough for all threads."""
MIN_SHOWN_LOAD = 0.25
"""Load per core from which it is said. The command itself adds less while it loads torch and the model."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Speed of the default device."""

    tflops: dict[Precision, float]
    """10^12 floating-point operations per second of a matrix product."""
    speedup: float
    """Speed of an fp32 product with all threads over that with one. It is about 1 if they share one physical core."""
    copy_gb_per_s: float
    """10^9 bytes per second that a copy reads and writes."""
    load: float = 0.0
    """Mean number of processes that ran or waited for a core in the last minute."""

    def __str__(self) -> str:
        device, threads = name_device(), torch.get_num_threads()
        if device == "cpu":
            device = f"threads: {threads} (`OMP_NUM_THREADS`), physical cores: {psutil.cpu_count(logical=False)}"
            device += f", speed over one thread: {self.speedup:.2g}" if threads > 1 else ""
        rates = " and ".join(f"{rate:.2g} ({precision})" for precision, rate in self.tflops.items())
        speed = f"this machine: {device}; products: {rates} TFLOP/s; copies: {self.copy_gb_per_s:.2g} GB/s"
        cores = os.cpu_count() or 1
        busy = f"; its {cores} cores had {self.load:.1f} busy processes in the last minute, so all times are too long"
        return speed + (busy if self.load > MIN_SHOWN_LOAD * cores else "")


def measure_machine() -> Machine:
    """Returns the speed of the default device. Takes about a second."""
    load, _, _ = os.getloadavg()  # before the measurements add to it
    device, threads = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.get_num_threads()
    rows, inner, columns = PRODUCT_SIZES

    def measure_product(precision: Precision, *, threads: int) -> float:
        left, right = (torch.ones(num, inner, dtype=DTYPES[precision], device=device) for num in (rows, columns))
        return 2e-12 * rows * inner * columns / _measure_seconds(lambda: linear(left, right), threads=threads)

    tflops = {precision: measure_product(precision, threads=threads) for precision in DTYPES}
    speedup = tflops["fp32"] / measure_product("fp32", threads=1)
    source = torch.ones(2**26, device=device)  # 256 MiB, more than the caches of most processors
    target = torch.empty_like(source)
    copy_s = _measure_seconds(lambda: target.copy_(source), threads=threads)
    return Machine(tflops=tflops, speedup=speedup, copy_gb_per_s=2e-9 * source.nbytes / copy_s, load=load)


def _measure_seconds(call: Callable[[], object], *, threads: int) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=threads)  # waits for a GPU, and warms up
    return timer.blocked_autorange(min_run_time=0.15).median
