"""Dropout with masks from 16 random bits per element.

A random number has 64 bits, enough for four elements. On a CPU this draws masks many times as fast as torch's
`bernoulli_`, and backward keeps a mask of one byte per element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

BITS = 16


class Dropout(nn.Dropout):
    """`nn.Dropout` with masks of `draw_keep_mask`, from torch's default stream."""

    def forward(self, input: Tensor) -> Tensor:
        return drop_from_default_stream(input, self.p) if self.training else input


class FunctionalDropout(TorchFunctionMode):
    """Inside this context, `torch.nn.functional.dropout` returns `drop(input, rate)` in training.

    Models call it for attention probabilities. Kernels that drop inside, such as sdpa's, stay as they are. Activation
    checkpointing must compute a part of the model again inside such a context, or it draws other masks.
    """

    def __init__(self, drop: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.drop = drop

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.dropout:
            return self._drop(*args, **kwargs or {})
        return func(*args, **kwargs or {})

    def _drop(
        self,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,  # noqa: FBT001, FBT002 (the arguments of torch)
        inplace: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        if inplace:
            return nn.functional.dropout(input, p, training, inplace)
        return self.drop(input, p) if training else input


def drop_from_default_stream(x: Tensor, rate: float) -> Tensor:
    """Returns x after dropout with a mask from torch's default stream."""
    return x if rate == 0 else drop(x, draw_keep_mask(x.shape, rate=rate, device=x.device), rate=rate)


def draw_keep_mask(
    shape: Sequence[int], *, rate: float, device: torch.device, generator: torch.Generator | None = None
) -> Bool[Tensor, "*shape"]:
    """Returns a mask whose elements are False with probability `rate`, rounded to a multiple of 2^-16."""
    size = torch.Size(shape).numel()
    words = _draw_words(-(-size * BITS // 64), device=device, generator=generator)
    # the words are uniform in the range of int16; the lowest fraction `1 - rate` of this range is kept
    limit = round((1 - rate) * 2**BITS) - 2 ** (BITS - 1)
    uniform = words.view(torch.int16)[:size].view(shape)
    if limit == 2 ** (BITS - 1):
        return torch.ones_like(uniform, dtype=torch.bool)
    # `lt_` writes 0 or 1 into the 16 bits in place: on a CPU twice as fast as `lt`, which makes booleans
    return uniform.lt_(limit).to(torch.int8).view(torch.bool)


def _draw_words(count: int, *, device: torch.device, generator: torch.Generator | None) -> Int[Tensor, " count"]:
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, dtype=torch.int64, device=device)
    # NumPy's SFC64 is three times as fast as torch's generator on a CPU. The torch stream gives its seed, so that the
    # state of the torch stream still decides all masks. Compiled code can't call NumPy, so it draws other masks.
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.from_numpy(np.random.SFC64(seed).random_raw(count).view(np.int64))


def drop(x: Tensor, keep: Bool[Tensor, "*shape"], *, rate: float) -> Tensor:
    """Returns x, multiplied by 1 / (1 - rate) where `keep` is True, and 0 elsewhere."""
    dropped: Tensor = _Drop.apply(x, keep, 1 / (1 - rate) if rate < 1 else 0.0)  # type: ignore[no-untyped-call]
    return dropped


def apply_keep_mask(x: Tensor, keep: Bool[Tensor, "*shape"]) -> Tensor:
    """Returns x where `keep` is True, else 0. On a CPU in 16 bits, an infinite x that is dropped becomes NaN."""
    if x.device.type == "cpu" and x.element_size() == 2:
        # multiplying is several times as fast as `torch.where`, whose condition has another width than x
        return x * keep.view(torch.int8).to(x.dtype)
    return torch.where(keep, x, 0.0)


class _Drop(torch.autograd.Function):
    """x · keep · scale. Backward keeps only the mask, one byte per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return apply_keep_mask(x, keep).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return apply_keep_mask(grad, keep).mul_(ctx.scale), None, None
