"""What a run depends on beside its settings: code, packages, machine, precision. Goes into the run record."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from lorasweep.config.run import TrainerConfig
from lorasweep.errors import ConfigError

RECORDED_PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "safetensors", "torchmetrics", "numpy")
Precision = Literal["bf16", "fp32"]


def resolve_precision(config: TrainerConfig) -> Precision:
    """Returns what `trainer.precision` means here: bf16 where the processor or GPU computes in it, else fp32.

    Raises:
        ConfigError: `bf16` is asked for on a GPU that has none.
    """
    on_gpu = resolve_device(config) == "gpu"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else has_cpu_bf16()
    if config.precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    if config.precision == "bf16" and on_gpu and not has_bf16:
        raise ConfigError("`trainer.precision` must be fp32 on this GPU, but got 'bf16'. Use `trainer.precision=auto`.")
    return config.precision


def resolve_device(config: TrainerConfig) -> Literal["cpu", "gpu"]:
    """Returns what `trainer.device` means here.

    Raises:
        ConfigError: A GPU is asked for where PyTorch sees none.
    """
    available = torch.cuda.is_available()
    if config.device == "gpu" and not available:
        raise ConfigError(
            "`trainer.device` must be cpu where PyTorch sees no GPU, but got 'gpu'. Use `trainer.device=auto`."
        )
    return "gpu" if available and config.device != "cpu" else "cpu"


@cache
def has_cpu_bf16() -> bool:
    """Whether the processor multiplies bf16 itself (AVX512-BF16 or AMX), so that bf16 is faster than fp32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@cache
def describe_code() -> dict[str, Any]:
    """Returns lorasweep's version and, in a git checkout, its commit and whether files were modified."""
    described: dict[str, Any] = {"version": _version("lorasweep")}
    folder = Path(__file__).resolve().parents[3]
    if (folder / ".git").exists():
        commit = _git(folder, "rev-parse", "HEAD")
        if commit:
            described |= {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain", "-uno"))}
    return described


@cache
def describe_packages() -> dict[str, str]:
    """Returns the versions of the packages that can change a run's numbers."""
    return {name: _version(name) for name in RECORDED_PACKAGES}


def describe_platform(precision: Precision) -> dict[str, Any]:
    """Returns the machine as far as it can change a run's numbers or speed."""
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "precision": precision,
    }


def reset_peak_memory() -> None:
    """Starts a new measurement of `peak_memory_bytes`. Where the system can't (not Linux) the old peak stays."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def peak_memory_bytes() -> int:
    """Returns the largest memory since the reset: allocated on the GPU, else resident in the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
