"""Checks what a sweep will use on this machine: packages, devices, precision, disk, hub, Ray and Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from importlib.metadata import requires, version
from pathlib import Path
from typing import Literal, NamedTuple

import huggingface_hub
import psutil
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from lorasweep.disk import network_file_system
from lorasweep.redaction import redact
from lorasweep.training.environment import find_version, has_cpu_bf16, has_gpu_bf16
from lorasweep.training.memory import machine_memory_bytes
from lorasweep.wording import format_bytes, join_words

HUB_TIMEOUT_S = 5.0
LITTLE_DISK_BYTES = 5 * 2**30
"""Free disk below which a warning appears. A sweep of a small model keeps some hundred MiB; `lorasweep plan` says how
much a sweep will keep."""
EXTRAS = {
    "bitsandbytes": "quantised",
    "gguf": "gguf",
    "psycopg": "postgresql",
    "lm-eval": "lm-eval",
    "peft": "peft",
}
"""Optional packages, and the extra of lorasweep that installs each. Ray and submitit have rows of their own."""
STYLES = {"ok": "green", "note": "yellow", "problem": "red"}


class Finding(NamedTuple):
    """What one check found."""

    name: str
    state: Literal["ok", "note", "problem"]
    """`problem`: sweeps can't run. `note`: something that is missing or slow."""
    text: str


def examine(folder: Path) -> list[Finding]:
    """Returns the findings of all checks. Only the hub's check uses the network.

    Args:
        folder: Where sweeps will be written. It need not exist.
    """
    return [
        check_packages(),
        check_extras(),
        check_device(),
        check_precision(),
        check_threads(),
        check_memory(),
        check_disk(folder),
        check_hub(),
        check_ray(),
        check_slurm(),
    ]


def render_findings(findings: Iterable[Finding]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row(finding.name, Text(finding.state, style=STYLES[finding.state]), Text(finding.text))
    return table


def check_packages() -> Finding:
    """Compares the installed packages with those that lorasweep requires."""
    wrong = list(_find_wrong_versions(requires("lorasweep") or []))
    if wrong:
        return Finding("packages", "problem", f"{join_words(wrong)}. Install lorasweep again with pip.")
    shown = ("torch", "lightning", "transformers", "optuna")
    versions = ", ".join(f"{name} {version(name)}" for name in shown)
    return Finding("packages", "ok", f"lorasweep {version('lorasweep')}, {versions}")


def _find_wrong_versions(lines: Iterable[str]) -> Iterator[str]:
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if (found := find_version(requirement.name)) is None:
            yield f"{requirement} is not installed"
        elif not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement} is required, but {found} is installed"


def check_extras() -> Finding:
    found = [f"{name} {found}" for name in EXTRAS if (found := find_version(name)) is not None]
    missing = [f"{name} (lorasweep[{extra}])" for name, extra in EXTRAS.items() if find_version(name) is None]
    parts = [", ".join(found), f"not installed: {', '.join(missing)}" if missing else ""]
    return Finding("optional packages", "ok", "; ".join(filter(None, parts)))


def check_device() -> Finding:
    if torch.cuda.is_available():
        names = [
            f"{torch.cuda.get_device_name(n)} with {format_bytes(torch.cuda.get_device_properties(n).total_memory)}"
            for n in range(torch.cuda.device_count())
        ]
        return Finding("devices", "ok", f"{'; '.join(names)} (CUDA {torch.version.cuda})")
    if gpus := list_gpus_of_driver():
        built = "for the CPU only" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        return Finding(
            "devices",
            "problem",
            f"PyTorch must see the GPU, but sees none, and nvidia-smi lists {join_words(gpus)}. This PyTorch was built "
            f"{built}. Install the build for the driver's CUDA version from pytorch.org.",
        )
    return Finding("devices", "ok", "the processor; there is no GPU")


def list_gpus_of_driver() -> list[str]:
    """Returns the names of the GPUs that `nvidia-smi` lists; none if it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def check_precision() -> Finding:
    on_gpu = torch.cuda.is_available()
    has_bf16 = has_gpu_bf16() if on_gpu else has_cpu_bf16()
    device = "GPU" if on_gpu else "processor"
    if has_bf16:
        return Finding("precision", "ok", f"bf16: the {device} computes in it, so `trainer.precision=auto` takes it")
    return Finding("precision", "note", f"fp32: the {device} does not compute in bf16, so training is slower")


def check_threads() -> Finding:
    usable = len(psutil.Process().cpu_affinity() or []) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    threads = torch.get_num_threads()
    limit = os.environ.get("OMP_NUM_THREADS")
    text = f"{usable} cores for this process, and {threads} threads"
    if usable is not None and threads < usable:
        cause = f"`OMP_NUM_THREADS` is {limit}" if limit else "PyTorch chose fewer threads"
        return Finding("threads", "note", f"{text}: {cause}")
    return Finding("threads", "ok", text)


def check_memory() -> Finding:
    total = machine_memory_bytes(torch.device("cpu"))
    free = min(total, psutil.virtual_memory().available)
    return Finding("memory", "ok", f"{format_bytes(total)}, of which {format_bytes(free)} are free")


def check_disk(folder: Path) -> Finding:
    """Writes a file where sweeps will be written, and removes it."""
    existing = next(part for part in (folder.resolve(), *folder.resolve().parents) if part.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"lorasweep")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding("disk", "problem", f"the folder must be writable, but got {str(existing)!r}: {error.strerror}.")
    free = shutil.disk_usage(existing).free
    text = f"{format_bytes(free)} free in {existing}"
    if free < LITTLE_DISK_BYTES:
        return Finding("disk", "note", f"{text}, which is little. `lorasweep plan` says how much a sweep keeps.")
    if kind := network_file_system(existing):
        return Finding("disk", "note", f"{text}, a network file system ({kind}), where `storage.url` is safer")
    return Finding("disk", "ok", text)


def check_hub() -> Finding:
    if constants.HF_HUB_OFFLINE:
        return Finding(
            "Hugging Face hub", "note", "`HF_HUB_OFFLINE` is set: only models and data in the cache can be read"
        )
    endpoint = constants.ENDPOINT
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_S):
            pass
    except OSError as error:
        why = redact(str(getattr(error, "reason", error)))
        return Finding("Hugging Face hub", "note", f"no answer ({why}): only local models and data can be read")
    login = "logged in" if huggingface_hub.get_token() else "not logged in, which gated models need (`hf auth login`)"
    return Finding("Hugging Face hub", "ok", f"reachable, {login}")


def check_ray() -> Finding:
    if (found := find_version("ray")) is None:
        return Finding("Ray", "note", "not installed, so `worker=ray` can't be used: pip install 'lorasweep[ray]'")
    return Finding("Ray", "ok", f"{found}: `worker=ray` can be used")


def check_slurm() -> Finding:
    has_sbatch, submitit = shutil.which("sbatch") is not None, find_version("submitit")
    if not has_sbatch:
        return Finding("Slurm", "ok", "there is no sbatch here")
    if submitit is None:
        return Finding("Slurm", "note", "sbatch is here, but `worker=slurm` needs pip install 'lorasweep[slurm]'")
    return Finding("Slurm", "ok", f"sbatch is here, with submitit {submitit}: `worker=slurm` can be used")
