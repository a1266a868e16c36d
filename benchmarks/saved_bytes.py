"""Counts the bytes that a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lorasweep.training.prepare import checkpoint_activations


def count_saved_bytes(compute: Callable[[], Tensor], *, model: nn.Module, is_checkpointed: bool = False) -> int:
    """Returns the bytes that a forward pass of the model keeps for its backward pass.

    They are only counted, so no backward pass can follow. Each storage counts once. Parameters and buffers of the model
    do not count. With activation checkpointing (`is_checkpointed`) the bytes are those of the inputs of all blocks, and
    twice those that the largest block keeps when it is computed again, because the tensors of its backward pass take
    about as much. The model must then be prepared by `checkpoint_activations` again before it trains.
    """
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}
    largest_block = 0

    def note_storages(storages: dict[int, torch.UntypedStorage]) -> AbstractContextManager[None]:
        def note(tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in model_storages:
                storages[storage.data_ptr()] = storage  # keeps it alive, so that no two have the same address

        return torch.autograd.graph.saved_tensors_hooks(note, nn.Identity())

    @contextmanager
    def count_block() -> Iterator[None]:
        nonlocal largest_block
        block: dict[int, torch.UntypedStorage] = {}
        with note_storages(block):  # takes the place of the hooks that let the block be computed again
            yield
        num_bytes = sum(storage.nbytes() for address, storage in block.items() if address not in saved)
        largest_block = max(largest_block, num_bytes)

    if is_checkpointed:
        checkpoint_activations(model, lambda: (count_block(), nullcontext()))
    with note_storages(saved):
        compute()
    return sum(storage.nbytes() for storage in saved.values()) + 2 * largest_block
