"""Dropout whose masks follow from a key, with 16 random bits per element.

The key of a mask is the slot's seed, the place in the training (`DropoutMasks.begin`), the layer, and how often the
layer has dropped since. So a run draws the same masks alone and in a pack, after a resume, and when activation
checkpointing computes a block again, and no random stream must be saved.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

BITS = 16


class DropoutMasks:
    """Draws the dropout masks of all slots of a model.

    Attributes:
        seeds: The seed of each slot.
        only_slot: The one slot whose rows a module gets while it is computed slot by slot; otherwise None.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        self.only_slot: int | None = None
        self._place: tuple[int, ...] = ()
        self._draws: Counter[str] = Counter()

    @property
    def num_slots(self) -> int:
        return len(self.seeds)

    def begin(self, *place: int) -> None:
        """Begins the forward pass at a place in the training: step, micro-batch and process."""
        self._place, self._draws = place, Counter()

    def draw(self, x: Tensor, rates: Sequence[float], *, layer: str = "") -> Bool[Tensor, "*shape"]:
        """Returns a mask for x, which has the rows of all slots (slot-major) or of `only_slot`.

        `rates` are each slot's probabilities of False, rounded to multiples of 2^-16 and at most 1 - 2^-16. A `layer`
        with a name counts its own draws, because it may drop in some slots of a pack only.
        """
        slots = range(self.num_slots) if self.only_slot is None else [self.only_slot]
        check_slot_rows(x, len(slots))
        place = "/".join(map(str, (*self._place, layer, self._draws[layer])))
        self._draws[layer] += 1
        words = _draw_words([f"{self.seeds[slot]}/{place}" for slot in slots], x.numel() // len(slots), x.device)
        # The words are uniform in the range of int16. The lowest fraction `1 - rate` of this range is kept.
        limits = [max(round((1 - rates[slot]) * 2**BITS), 1) - 2 ** (BITS - 1) - 1 for slot in slots]
        uniform = words.view(torch.int16)[:, : x.numel() // len(slots)]
        if len(set(limits)) == 1:
            # `le_` writes 0 or 1 into the 16 bits in place: on a CPU twice as fast as `le`, which makes booleans
            kept = uniform.le_(limits[0])
        else:
            kept = uniform.le_(make_constants((*limits,), dtype=torch.int16, device=x.device)[:, None])
        return kept.to(torch.int8).view(torch.bool).reshape(x.shape)

    def drop(self, x: Tensor, rate: float) -> Tensor:
        """Returns x after dropout. A tensor without rows for each slot, such as a bias, counts as one of the first."""
        if rate == 0:
            return x
        if self.only_slot is None and (x.dim() == 0 or len(x) % self.num_slots):
            with self.compute_only_slot(0):
                return drop(x, self.draw(x[None], [rate] * self.num_slots)[0], rate=rate)
        return drop(x, self.draw(x, [rate] * self.num_slots), rate=rate)

    @contextmanager
    def compute_only_slot(self, slot: int) -> Iterator[None]:
        """Draws masks for this slot only, inside the block. The caller must pass only the rows of this slot."""
        self.only_slot = slot
        try:
            yield
        finally:
            self.only_slot = None

    def count_draws(self) -> Counter[str]:
        """Returns the number of draws of each layer so far."""
        return self._draws.copy()

    def set_draws(self, draws: Counter[str]) -> None:
        """Continues with these numbers of draws, for example to draw the same masks again."""
        self._draws = draws.copy()

    def save(self) -> AbstractContextManager[None]:
        """Returns a context in which the same masks are drawn again as after this call.

        Activation checkpointing must compute a part of the model again in the context that was saved before the part:
        `checkpoint(part, x, use_reentrant=False, context_fn=lambda: (nullcontext(), masks.save()))`.
        """
        return self._draw_again(self.count_draws())

    @contextmanager
    def _draw_again(self, draws: Counter[str]) -> Iterator[None]:
        before = self._draws
        self.set_draws(draws)
        try:
            yield
        finally:
            self._draws = before


class Dropout(nn.Dropout):
    """`nn.Dropout` with masks of `DropoutMasks`."""

    def __init__(self, p: float, masks: DropoutMasks) -> None:
        super().__init__(p)
        self.masks = masks

    def forward(self, input: Tensor) -> Tensor:
        return self.masks.drop(input, self.p) if self.training else input


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


def drops_in_functions(model: nn.Module) -> bool:
    """Returns whether a model may call `torch.nn.functional.dropout`, for example on attention probabilities.

    A model of transformers does so only if its settings have a dropout rate. Other models may do so at any time.
    """
    settings: Any = getattr(model, "config", None)
    if not hasattr(settings, "to_dict"):
        return True
    return _has_dropout_rate(settings.to_dict())


def _has_dropout_rate(settings: dict[str, Any]) -> bool:
    for name, value in settings.items():
        if isinstance(value, dict) and _has_dropout_rate(value):
            return True
        if "drop" in str(name) and isinstance(value, float) and value > 0:
            return True
    return False


def check_slot_rows(x: Tensor, num_slots: int) -> None:
    """Raises a ValueError if the number of rows of an input is not a multiple of the number of slots."""
    if x.dim() == 0 or x.shape[0] % num_slots:
        raise ValueError(
            f"The first dimension of a packed input must be a multiple of the {num_slots} slots, "
            f"but got shape {tuple(x.shape)}. Concatenate batches of equal size, one per slot."
        )


@functools.lru_cache(maxsize=64)
def make_constants(values: tuple[float, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor, which must not be changed, without a copy to a GPU, for which the CPU would wait."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def _draw_words(keys: Sequence[str], size: int, device: torch.device) -> Tensor:
    """Returns random int64 words, (keys, words), with at least `size` · `BITS` bits for each key."""
    count = -(-size * BITS // 64)
    digests = [hashlib.blake2b(key.encode(), digest_size=24).digest() for key in keys]
    if device.type != "cpu":
        words = torch.empty(len(keys), count, dtype=torch.int64, device=device)
        generator = torch.Generator(device)
        for row, digest in zip(words, digests, strict=True):
            generator.manual_seed(int.from_bytes(digest[:7], "little"))
            row.random_(-(2**63), 2**63 - 1, generator=generator)
        return words
    # NumPy's SFC64 is three times as fast as torch's generator on a CPU. A digest is a state of it as random as any.
    generator_state = np.random.SFC64(0)
    rows = []
    for digest in digests:
        state = np.append(np.frombuffer(digest, np.uint64), np.uint64(1))
        generator_state.state = {
            "bit_generator": "SFC64",
            "state": {"state": state},
            "has_uint32": 0,
            "uinteger": 0,
        }
        rows.append(generator_state.random_raw(count))
    return torch.from_numpy(np.stack(rows).view(np.int64))


def drop(x: Tensor, keep: Bool[Tensor, "*shape"], *, rate: float) -> Tensor:
    """Returns x, multiplied by 1 / (1 - rate) where `keep` is True, and 0 elsewhere."""
    dropped: Tensor = _Drop.apply(x, keep, 1 / (1 - rate) if rate < 1 else 0.0)  # type: ignore[no-untyped-call]
    return dropped


def apply_keep_mask(x: Tensor, keep: Shaped[Tensor, "*shape"]) -> Tensor:
    """Returns x where `keep` is True, else 0. On a CPU in 16 bits, an infinite x that is dropped becomes NaN.

    A mask that is applied twice may be cast before (`cast_keep_mask`).
    """
    keep = cast_keep_mask(keep, x)
    return torch.where(keep, x, 0.0) if keep.dtype is torch.bool else x * keep


def cast_keep_mask(keep: Shaped[Tensor, "*shape"], x: Tensor) -> Tensor:
    """Returns a mask as the numbers 0 and 1 in the dtype of x, if x has 16 bits and is on a CPU."""
    if x.device.type == "cpu" and x.element_size() == 2 and keep.dtype is torch.bool:
        # multiplying is several times as fast as `torch.where`, whose condition has another width than x
        return keep.view(torch.int8).to(x.dtype)
    return keep


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
