"""The matrices of a pack's layers in stacks, which all forward passes of a step share.

The optimizer needs the parameters of a slot in one piece, and the products need the matrices of a layer in one piece.
So one operation scales all B, one copies and casts all matrices, and after the backward pass the same happens to the
gradients. A GPU computes each by one kernel only if each pair of tensors has equal strides, and for a sum equal dtypes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorasweep.lora.layers import LoraLayer


class MatrixStack:
    """The A or the B of a layer in neighbouring slots, padded with zeros to the highest rank.

    B is transposed and scaled.

    Attributes:
        values: In the dtype of the products. `width` is d_in for A and d_out for B.
        matrices: A or B of each slot that adapts the layer.
        factors: The factor of each of `matrices`, in an evaluation and in training; None for A, which is not scaled.
        targets: The part of `values` of each of `matrices`, with the shape of the matrix.
    """

    def __init__(
        self, layers: Sequence[LoraLayer | None], *, is_b: bool, width: int, like: Tensor, dtype: torch.dtype
    ) -> None:
        """Makes a stack of zeros on the device of `like`. A layer is None if its slot does not adapt it."""
        self._is_b = is_b
        self._slots = [(slot, layer.rank) for slot, layer in enumerate(layers) if layer]
        self.matrices: list[nn.Parameter] = [layer.lora_b if is_b else layer.lora_a for layer in layers if layer]
        self.factors = [
            [layer.compute_factor(is_training=is_training) if is_b else None for layer in layers if layer]
            for is_training in (False, True)
        ]
        size = len(layers), max((rank for _, rank in self._slots), default=0), width
        self.values: Float[Tensor, "slots rank width"] = like.new_zeros(size, dtype=dtype)
        self.targets = self.split(self.values)

    def fits(self, dtype: torch.dtype, device: torch.device) -> bool:
        return (self.values.dtype, self.values.device) == (dtype, device)

    def split(self, stacked: Float[Tensor, "slots rank width"]) -> list[Tensor]:
        """Returns the part of each of `matrices`, as a view with the shape of the matrix."""
        parts = [stacked[slot, :rank] for slot, rank in self._slots]
        return [part.mT for part in parts] if self._is_b else parts


class StepStacks:
    """The stacks of all layers of a pack.

    Attributes:
        is_training: Whether the block of `share` that runs is a training step; None outside of such blocks.
    """

    def __init__(self) -> None:
        self.is_training: bool | None = None
        # Each use of a stack has its own leaf, because a leaf adds up its gradients in the dtype of the products.
        self._leaves: dict[MatrixStack, list[Tensor]] = {}

    @contextmanager
    def share(self, *, is_training: bool = True) -> Iterator[None]:
        """Lets all forward passes of a training step, or of an evaluation, use the same stacks, which are filled once.

        The parameters must not change inside the block, and have their gradients after it. A layer in the other mode
        stacks its matrices itself.
        """
        _fill(self._leaves, is_training=is_training)
        self.is_training = is_training
        try:
            yield
            self._collect_gradients()
        finally:
            self.is_training = None
            self._leaves = {stack: [] for stack in self._leaves}

    def forget(self) -> None:
        """Frees all stacks, because the slots have changed."""
        self._leaves = {}

    def use(self, stack: MatrixStack) -> Float[Tensor, "slots rank width"]:
        """Returns the values of a stack as a leaf, whose gradient reaches the parameters."""
        if stack not in self._leaves:  # the layer is called for the first time, or in another dtype than before
            _fill([stack], is_training=bool(self.is_training))
            self._leaves[stack] = []
        leaves = self._leaves[stack]
        if not torch.is_grad_enabled():
            return stack.values
        if any(leaf.grad is not None for leaf in leaves):  # another micro-batch begins
            self._collect_gradients()
        leaves.append(stack.values.detach().requires_grad_())
        return leaves[-1]

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        # Apart are other dtypes, and the second gradient of a layer that was called twice, because a GPU computes all
        # sums of one operation at the same time.
        found: dict[tuple[torch.dtype, int], list[tuple[MatrixStack, Tensor]]] = defaultdict(list)
        for stack, leaves in self._leaves.items():
            for number, grad in enumerate([leaf.grad for leaf in leaves if leaf.grad is not None and stack.matrices]):
                found[grad.dtype, number].append((stack, grad))
            leaves[:] = [leaf for leaf in leaves if leaf.grad is None]
        for pairs in found.values():
            _add_gradients(*zip(*pairs, strict=True), is_training=bool(self.is_training))


@torch.no_grad()
def _fill(stacks: Iterable[MatrixStack], *, is_training: bool) -> None:
    """Copies the parameters into the stacks by one operation for each dtype, and the scaled ones by two."""
    by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor, float | None]]] = defaultdict(list)
    for stack in stacks:
        by_dtype[stack.values.dtype] += zip(stack.targets, stack.matrices, stack.factors[is_training], strict=True)
    for found in filter(None, by_dtype.values()):  # nothing if no slot of the group adapts the layer
        targets, matrices, factors = zip(*found, strict=True)
        # scaled in the dtype of the parameters, so that a product is rounded once
        torch._foreach_copy_(targets, _scale(matrices, factors))


def _scale(tensors: Sequence[Tensor], factors: Sequence[float | None]) -> list[Tensor]:
    """Returns each tensor times its factor, by one operation. Tensors without a factor stay as they are."""
    scaled = list(tensors)
    places = [place for place, factor in enumerate(factors) if factor is not None]
    if places:
        products = torch._foreach_mul([tensors[place] for place in places], [f for f in factors if f is not None])
        for place, product in zip(places, products, strict=True):
            scaled[place] = product
    return scaled


def _add_gradients(stacks: Sequence[MatrixStack], grads: Sequence[Tensor], *, is_training: bool) -> None:
    """Adds gradients of one dtype to those of the stacks' parameters."""
    matrices = [matrix for stack in stacks for matrix in stack.matrices]
    if grads[0].dtype != matrices[0].dtype:
        sizes = [grad.numel() for grad in grads]
        cast = torch.split(matrices[0].new_empty(sum(sizes)), sizes)
        pieces = [piece.view_as(grad) for piece, grad in zip(cast, grads, strict=True)]
        torch._foreach_copy_(pieces, tuple(grads))
        grads = pieces
    for matrix in matrices:
        matrix.grad = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
    parts = [part for stack, grad in zip(stacks, grads, strict=True) for part in stack.split(grad)]
    factors = [factor for stack in stacks for factor in stack.factors[is_training]]
    torch._foreach_add_([matrix.grad for matrix in matrices if matrix.grad is not None], _scale(parts, factors))
