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
    """The stacks of all layers of a pack, and the gradients of those that a step has used.

    Attributes:
        is_open: Whether a step's stacks are shared now (`share`).
    """

    def __init__(self) -> None:
        self.is_open = False
        self._filled: set[MatrixStack] = set()
        # The leaves of each stack that was used since `share` began. Each use has its own leaf, because a leaf would
        # add up its gradients in the dtype of the products.
        self._leaves: dict[MatrixStack, list[Tensor]] = {}

    @contextmanager
    def share(self) -> Iterator[None]:
        """Fills the stacks of the last step, and after the block adds their gradients to those of the parameters."""
        self._filled = set(self._leaves)
        fill_stacks(self._leaves)
        self._leaves, self.is_open = {}, True
        try:
            yield
            self._collect_gradients()
        finally:  # also after an error: gradients that were not collected are dropped
            self._leaves = {stack: [] for stack in self._leaves}
            self.is_open = False

    def forget(self) -> None:
        """Frees all stacks, because the slots have changed."""
        self._filled, self._leaves = set(), {}

    def use(self, stack: MatrixStack) -> Float[Tensor, "slots rank width"]:
        """Returns the values of a stack as a leaf, so that its gradients reach the parameters."""
        if stack not in self._filled:  # the layer is called for the first time, or in another dtype than before
            fill_stacks([stack])
            self._filled.add(stack)
        leaves = self._leaves.setdefault(stack, [])
        if not torch.is_grad_enabled():
            return stack.values
        if any(leaf.grad is not None for leaf in leaves):  # another micro-batch begins
            self._collect_gradients()
        leaves.append(stack.values.detach().requires_grad_())
        return leaves[-1]

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        # By dtype, and by round: a layer that was called twice has two gradients for a parameter, and a GPU computes
        # all sums of one operation at the same time.
        found: dict[tuple[torch.dtype, int], dict[MatrixStack, Tensor]] = defaultdict(dict)
        for stack, leaves in self._leaves.items():
            grads = [leaf.grad for leaf in leaves if leaf.grad is not None and stack.matrices]
            for number, grad in enumerate(grads):
                found[grad.dtype, number][stack] = grad
            leaves[:] = [leaf for leaf in leaves if leaf.grad is None]
        for by_stack in found.values():
            _add_gradients(list(by_stack), list(by_stack.values()))


@torch.no_grad()
def fill_stacks(stacks: Iterable[MatrixStack]) -> None:
    """Copies the parameters into the stacks by one operation for each dtype."""
    pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for stack in stacks:
        if stack.matrices:  # empty if no slot of the group adapts this layer
            targets, matrices = pairs[stack.values.dtype]
            targets += stack.targets
            matrices += stack.matrices
    for targets, matrices in pairs.values():
        torch._foreach_copy_(targets, matrices)


def _add_gradients(stacks: Sequence[MatrixStack], grads: Sequence[Tensor]) -> None:
    """Adds the gradients of stacks to those of their parameters."""
    matrices = [matrix for stack in stacks for matrix in stack.matrices]
    for matrix in matrices:
        if matrix.grad is None:
            matrix.grad = torch.zeros_like(matrix)
    dtype = matrices[0].dtype
    if grads[0].dtype != dtype:
        cast = grads[0].new_empty(sum(grad.numel() for grad in grads), dtype=dtype)
        pieces = torch.split(cast, [grad.numel() for grad in grads])
        pieces = [piece.view(grad.shape) for piece, grad in zip(pieces, grads, strict=True)]
        torch._foreach_copy_(pieces, list(grads))
        grads = pieces
    parts = [part for stack, grad in zip(stacks, grads, strict=True) for part in stack.split(grad)]
    torch._foreach_add_([matrix.grad for matrix in matrices if matrix.grad is not None], parts)
