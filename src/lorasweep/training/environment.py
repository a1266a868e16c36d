"""Chooses device and precision, and describes code, packages and machine for a run's record."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from lorasweep.config.redaction import is_secret_name
from lorasweep.config.run import TrainerConfig
from lorasweep.errors import ConfigError

RECORDED_PACKAGES = (
    *("torch", "lightning", "transformers", "tokenizers", "safetensors", "torchmetrics", "numpy"),
    *("datasets", "pyarrow", "scipy", "optuna", "hydra-core", "omegaconf"),
    *("accelerate", "bitsandbytes"),
)
"""Packages whose versions are in a run's record."""
NUMERIC_VARIABLES = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "ATEN_", "TORCH_", "PYTORCH_"),
    *("CUBLAS_", "CUBLASLT_", "CUDNN_", "NVIDIA_TF32_OVERRIDE", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING"),
    "PYTHONHASHSEED",
)
"""Prefixes of environment variables that can change a run's results. No other variable is recorded."""
Precision = Literal["bf16", "fp32"]
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_precision(config: TrainerConfig) -> Precision:
    """Returns the precision for `trainer.precision`: `auto` is bf16 if the processor or GPU has it, else fp32."""
    on_gpu = resolve_device(config) == "gpu"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else has_cpu_bf16()
    if config.precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    if config.precision == "bf16" and on_gpu and not has_bf16:
        raise ConfigError("`trainer.precision` must be fp32 on this GPU, but got 'bf16'. Use `trainer.precision=auto`.")
    return config.precision


def resolve_device(config: TrainerConfig) -> Literal["cpu", "gpu"]:
    """Returns the kind of device for `trainer.device`. `auto` is a GPU if PyTorch finds one."""
    available = torch.cuda.is_available()
    if config.device == "gpu" and not available:
        raise ConfigError(
            "`trainer.device` must be cpu if PyTorch finds no GPU, but got 'gpu'. Use `trainer.device=auto`."
        )
    return "gpu" if available and config.device != "cpu" else "cpu"


def get_device(config: TrainerConfig) -> torch.device:
    return torch.device("cuda" if resolve_device(config) == "gpu" else "cpu")


def fork_random_streams(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context after which torch's default streams of the CPU and of `device` are as before."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def name_device() -> str:
    """Returns the name of the default device, such as `NVIDIA H100 (cuda:0)` or `cpu`."""
    return f"{torch.cuda.get_device_name()} (cuda:0)" if torch.cuda.is_available() else "cpu"


@cache
def has_cpu_bf16() -> bool:
    """Returns whether the processor multiplies bf16 in hardware, so that bf16 is faster than fp32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@cache
def describe_code() -> dict[str, Any]:
    """Returns lorasweep's version and, in a git checkout, its commit and whether files differ from it.

    Cached, so that edits during a sweep do not change the records of its later runs.
    """
    described: dict[str, Any] = {"version": _get_version("lorasweep")}
    if commit := _run_git("rev-parse", "HEAD").strip():
        described |= {"commit": commit, "modified": bool(_run_git("status", "--porcelain", "-uno").strip())}
    return described


def describe_command() -> dict[str, Any]:
    return {"arguments": [Path(sys.argv[0]).name, *sys.argv[1:]], "folder": str(Path.cwd())}


def describe_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(NUMERIC_VARIABLES) and not is_secret_name(name)
    }


@cache
def describe_packages() -> dict[str, str]:
    return {name: _get_version(name) for name in RECORDED_PACKAGES}


def describe_platform(precision: Precision, device: Literal["cpu", "gpu"]) -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if has_gpu else None,  # type: ignore[no-untyped-call]
        "precision": precision,
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


@contextmanager
def deterministic_algorithms(wanted: Literal[True, False, "strict"]) -> Iterator[None]:
    """Applies `trainer.deterministic` to torch inside the block."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    cudnn, fill = torch.backends.cudnn.deterministic, memory.fill_uninitialized_memory
    if wanted and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    memory.fill_uninitialized_memory = False  # it costs time and changes no result
    torch.backends.cudnn.deterministic = bool(wanted)
    torch.use_deterministic_algorithms(bool(wanted), warn_only=wanted != "strict")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*(does not have a|is not) deterministic.*", category=UserWarning
            )
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, memory.fill_uninitialized_memory = cudnn, fill


def _get_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _run_git(*arguments: str) -> str:
    """Returns the output of git in lorasweep's checkout; "" if git fails or lorasweep is an installed package."""
    folder = Path(__file__).resolve().parents[3]
    if not (folder / ".git").exists():  # git would look for a repository in the folders above
        return ""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
