"""The matrices of a pack's layers in stacks, which all forward passes of a step share.

The optimizer needs the parameters of a slot in one piece, and the products need the matrices of a layer in one piece.
So the matrices are copied once a step, and the same copy casts them to the dtype of the products. One operation copies
the matrices of all layers, and one adds all gradients to those of the parameters. On a GPU such an operation is one
kernel only if each pair of tensors has equal strides, and for a sum equal dtypes; else it is one kernel for each pair.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorasweep.lora.layers import LoraLayer


class MatrixStack:
    """The A or the B of a layer in neighbouring slots, padded with zeros to the highest rank. B is transposed.

    Attributes:
        values: In the dtype of the products. `width` is d_in for A and d_out for B.
        matrices: A or B of each slot that adapts the layer.
        targets: The part of `values` of each of `matrices`, with the shape of the matrix.
    """

    def __init__(
        self,
        layers: Sequence[LoraLayer | None],
        which: Literal["a", "b"],
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Makes a stack of zeros. `layers` has the LoRA layer of each slot, or None if the slot does not adapt it."""
        self._is_b = which == "b"
        self._slots = [(slot, layer.rank) for slot, layer in enumerate(layers) if layer]
        self.matrices: list[nn.Parameter] = [layer.lora_b if self._is_b else layer.lora_a for layer in layers if layer]
        rank = max((rank for _, rank in self._slots), default=0)
        self.values: Float[Tensor, "slots rank width"] = torch.zeros(
            len(layers), rank, width, dtype=dtype, device=device
        )
        self.targets = self.split(self.values)

    def split(self, stacked: Float[Tensor, "slots rank width"]) -> list[Tensor]:
        """Returns the part of each of `matrices`, as a view with the shape of the matrix."""
        parts = [stacked[slot, :rank] for slot, rank in self._slots]
        return [part.mT for part in parts] if self._is_b else parts


class StepStacks:
    """The stacks of all layers of a pack.

    Attributes:
        is_open: Whether layers use these stacks now (`share`).
    """

    def __init__(self) -> None:
        self.is_open = False
        # Each use of a stack has its own leaf, because a leaf adds up its gradients in the dtype of the products.
        self._leaves: dict[MatrixStack, list[Tensor]] = {}

    @contextmanager
    def share(self) -> Iterator[None]:
        """Fills the stacks of earlier blocks, and after the block adds all gradients to those of the parameters."""
        _fill(self._leaves)
        self.is_open = True
        try:
            yield
            self._collect_gradients()
        finally:
            self.is_open = False
            self._leaves = {stack: [] for stack in self._leaves}

    def forget(self) -> None:
        """Frees all stacks, because the slots have changed."""
        self._leaves = {}

    def use(self, stack: MatrixStack) -> Float[Tensor, "slots rank width"]:
        """Returns the values of a stack as a leaf, whose gradient reaches the parameters."""
        if stack not in self._leaves:  # the layer is called for the first time, or in another dtype than before
            _fill([stack])
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
            for number, grad in enumerate([leaf.grad for leaf in leaves if leaf.grad is not None]):
                found[grad.dtype, number].append((stack, grad))
            leaves[:] = [leaf for leaf in leaves if leaf.grad is None]
        for pairs in found.values():
            _add_gradients([pair for pair in pairs if pair[0].matrices])


@torch.no_grad()
def _fill(stacks: Iterable[MatrixStack]) -> None:
    """Copies the parameters into the stacks by one operation for each dtype."""
    by_dtype: dict[torch.dtype, list[MatrixStack]] = defaultdict(list)
    for stack in stacks:
        if stack.matrices:  # empty if no slot of the group adapts this layer
            by_dtype[stack.values.dtype].append(stack)
    for group in by_dtype.values():
        torch._foreach_copy_(
            [x for stack in group for x in stack.targets], [x for stack in group for x in stack.matrices]
        )


def _add_gradients(pairs: Sequence[tuple[MatrixStack, Tensor]]) -> None:
    """Adds gradients of one dtype to those of the stacks' parameters."""
    matrices = [matrix for stack, _ in pairs for matrix in stack.matrices]
    grads = [grad for _, grad in pairs]
    if matrices and grads[0].dtype != matrices[0].dtype:
        sizes = [grad.numel() for grad in grads]
        cast = torch.split(matrices[0].new_empty(sum(sizes)), sizes)
        grads = [part.view_as(grad) for part, grad in zip(cast, grads, strict=True)]
        torch._foreach_copy_(grads, [grad for _, grad in pairs])
    parts = [part for (stack, _), grad in zip(pairs, grads, strict=True) for part in stack.split(grad)]
    for matrix in matrices:
        if matrix.grad is None:
            matrix.grad = torch.zeros_like(matrix)
    if matrices:
        torch._foreach_add_([matrix.grad for matrix in matrices if matrix.grad is not None], parts)
