"""Divides the time of a whole sweep by the time that its matrix products alone would take on this machine.

    python benchmarks/bench_floor.py [--flops FILE] [quickstart] [key=value ...]

The sweep runs twice. The first time it is a process of its own, as a user starts it, and its time counts from start to
end. The second time every matrix product and attention is counted by its shapes and its type. With `--flops`, the count
is written to a file, or read from it, for further runs of the same sweep in the same precision. The floor is the number
of operations divided by the speed of products that `machine.py` measures before and after the sweep (the
faster one).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import measure_machine
from side_by_side import print_head, print_row
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from lorasweep.api import run_sweep
from lorasweep.training.environment import DTYPES


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def count_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Takes shapes. torch counts the kernels of GPUs only."""
    return int(sdpa_flop_count(query, key, value))


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def count_attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


class ProductCounter(TorchDispatchMode):
    """Counts the floating-point operations of products by type, which torch's FlopCounterMode does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func.overloadpacket)
        if count is None and (out := func.decompose(*args, **kwargs)) is not NotImplemented:
            return out  # its parts were counted
        out = func(*args, **kwargs)
        if count is not None:
            tensor = next(each for each in args if isinstance(each, torch.Tensor))
            self.flops[tensor.dtype] += count(*args, **kwargs, out_val=out)
        return out


def count_flops(name: str, overrides: Sequence[str]) -> dict[str, int]:
    """Returns the operations of a sweep's products by precision. Trains the whole sweep."""
    with tempfile.TemporaryDirectory() as folder, ProductCounter() as counter:
        run_sweep(name, overrides=overrides, output=Path(folder) / "sweep", progress=None)
    return {precision: counter.flops[dtype] for precision, dtype in DTYPES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=Path, help="file of the count")
    parser.add_argument("name", nargs="?", default="quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    before = measure_machine()
    with tempfile.TemporaryDirectory() as folder:
        words = [arguments.name, *arguments.overrides, f"sweep.output={folder}/sweep"]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lorasweep", "sweep", *words], check=True, stdout=subprocess.DEVNULL)
        total_s = time.perf_counter() - began
    machine = max(before, measure_machine(), key=lambda one: one.tflops["bf16"])
    if arguments.flops and arguments.flops.exists():
        flops = json.loads(arguments.flops.read_text())
    else:
        flops = count_flops(arguments.name, arguments.overrides)
        if arguments.flops:
            arguments.flops.write_text(json.dumps(flops))
    floor_s = sum(flops[precision] / (1e12 * rate) for precision, rate in machine.tflops.items())
    print(f"\n{machine}\n")
    print_head("sweep", "total s", "TFLOP in bf16", "in fp32", "products alone s", "total over products")
    print_row(arguments.name, total_s, *(flops[each] / 1e12 for each in DTYPES), floor_s, total_s / floor_s)


if __name__ == "__main__":
    main()
