"""The matrices of several slots in one tensor, for batched products.

The optimizer needs the parameters of a slot in one piece, and the products need the matrices of a layer in one piece.
So the matrices are copied once a step, and the same copy casts them to the dtype of the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorasweep.lora.layers import LoraLayer


class _Piece(NamedTuple):
    """Rows of a parameter (None: all), and their place in the stack."""

    parameter: nn.Parameter
    rows: slice | None
    place: tuple[int | slice, ...]

    def cut(self, matrix: Tensor) -> Tensor:
        return matrix if self.rows is None else matrix[self.rows]


class MatrixStack:
    """The A or the B of a layer in neighbouring slots, padded with zeros to the highest rank.

    Attributes:
        values: (slots, rank, d_in) for A, or (slots, d_out, rank) for B, in the dtype of the products.
        leaf: Has the shape of `values` and the dtype of the parameters. Backward passes add the gradients to it. If
            `values` have another dtype, its own values are undefined.
    """

    def __init__(
        self,
        layers: Sequence[LoraLayer | None],
        which: Literal["a", "b"],
        *,
        shape: tuple[int, int],
        like: nn.Parameter,
        dtype: torch.dtype,
    ) -> None:
        """Makes an empty stack. `layers` has the LoRA layer of each slot, or None if the slot does not adapt the layer.

        `shape` is (d_out, d_in) of the frozen layer. The gradients have the dtype and the device of `like`.
        """
        rank = max((layer.target.total_rank for layer in layers if layer), default=0)
        size = (len(layers), rank, shape[1]) if which == "a" else (len(layers), shape[0], rank)
        self.values: Float[Tensor, "slots rows columns"] = like.new_zeros(size, dtype=dtype)
        self._pieces = [
            piece for slot, layer in enumerate(layers) if layer for piece in _list_pieces(layer, which, slot)
        ]
        # views, so that one `_foreach_copy_` fills the whole stack
        self._targets = [self.values[piece.place] for piece in self._pieces]
        # one number that looks like a whole tensor, because only its gradient needs memory
        unused = like.new_zeros(()).expand(size)
        self.leaf: Float[Tensor, "slots rows columns"] = self.values.detach() if dtype == like.dtype else unused
        self.leaf.requires_grad_()

    def fits(self, dtype: torch.dtype, device: torch.device) -> bool:
        return (self.values.dtype, self.values.device) == (dtype, device)

    @torch.no_grad()
    def fill(self) -> None:
        """Copies the parameters into `values`, and forgets gradients that were not collected."""
        self.leaf.grad = None
        if self._pieces:  # empty if no slot of the group adapts this layer
            torch._foreach_copy_(self._targets, [piece.cut(piece.parameter) for piece in self._pieces])

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Adds the gradients since `fill` to those of the parameters."""
        if self.leaf.grad is None or not self._pieces:
            return
        grads = []
        for piece in self._pieces:
            if piece.parameter.grad is None:
                piece.parameter.grad = torch.zeros_like(piece.parameter)
            grads.append(piece.cut(piece.parameter.grad))
        torch._foreach_add_(grads, [self.leaf.grad[piece.place] for piece in self._pieces])
        self.leaf.grad = None


def _list_pieces(layer: LoraLayer, which: Literal["a", "b"], slot: int) -> list[_Piece]:
    """Returns the pieces of `layer.get_plain_matrices()`, which must be plain copies of parameters (no PiSSA)."""
    assert layer.initial_a is None
    if which == "a":
        return [_Piece(layer.lora_a, None, (slot, slice(len(layer.lora_a))))]
    if not layer.row_ranges:
        return [_Piece(layer.lora_b, None, (slot, slice(None), slice(layer.lora_b.shape[1])))]
    pieces, begin = [], 0
    for (first, end), columns in layer.target.iter_parts():
        pieces.append(_Piece(layer.lora_b, slice(begin, begin + end - first), (slot, slice(first, end), columns)))
        begin += end - first
    return pieces
