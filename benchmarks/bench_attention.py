"""Times one layer of attention on a CPU: eager and sdpa, in bf16 and fp32.

    python benchmarks/bench_attention.py [--repeats 12]
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/bench_attention.py   # as an older processor

Forward and backward of one layer with a mask, on one thread: the lowest processor time of some repeats, in ms. The rule
of `lorasweep.models.attention` rests on these numbers.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax

SHAPES = ((64, 12, 16, 32), (64, 12, 32, 32), (32, 12, 128, 32), (32, 4, 128, 64), (8, 9, 256, 64), (4, 9, 512, 64))
"""Rows, heads, tokens, size of a head."""


def attend_eagerly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Computes attention as `eager_attention_forward` of transformers does."""
    scores = query @ key.mT / math.sqrt(query.shape[-1]) + mask
    return softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def attend_in_fp32(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return attend(query.float(), key.float(), value.float(), mask.float()).to(query.dtype)


def measure(
    function: Callable[..., Tensor], shape: tuple[int, int, int, int], dtype: torch.dtype, *, repeats: int
) -> float:
    """Returns the lowest time in ms."""
    rows, heads, tokens, size = shape
    inputs = [torch.randn(rows, tokens, heads, size).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    mask = torch.zeros(rows, 1, tokens, tokens, dtype=dtype)
    mask[..., -2:] = torch.finfo(dtype).min
    seconds = []
    for _ in range(repeats):
        began = time.thread_time()
        output = function(*inputs, mask)
        output.backward(output)
        seconds.append(time.thread_time() - began)
    return 1e3 * min(seconds)


def main() -> None:
    """Reads the arguments, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(torch.backends.cpu.get_cpu_capability(), torch.cpu.get_capabilities().get("avx512_bf16"))
    print("rows × heads × tokens × size", "eager bf16", "sdpa fp32", "sdpa bf16", "eager fp32", sep=" | ")
    for shape in SHAPES:
        ways = (
            (attend_eagerly, torch.bfloat16),
            (attend_in_fp32, torch.bfloat16),
            (attend, torch.bfloat16),
            (attend_eagerly, torch.float32),
        )
        times = [f"{measure(function, shape, dtype, repeats=args.repeats):.1f}" for function, dtype in ways]
        print(" × ".join(map(str, shape)), *times, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
