"""Which blocks make up the batch of each optimizer step: decided by seed and step alone, so a run can go on anywhere.

Comes after `parts` and before `module`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepBatchSampler(Sampler[list[int]]):
    """Yields the indices of each step's micro-batches.

    The order is an endless stream: one permutation of all examples per pass, each drawn from (seed, pass) alone, cut
    into batches across the ends of passes. Neither torch's nor any other shared random stream is used.
    """

    def __init__(
        self, num_examples: int, *, batch_size: int, num_steps: int, seed: int, start_step: int = 0, accumulate: int = 1
    ) -> None:
        """Describes the batches of steps `start_step` to `num_steps - 1`.

        Args:
            num_examples: Examples to choose from, >= 1. May be fewer than `batch_size`.
            batch_size: Examples per step; a multiple of `accumulate`.
            num_steps: Steps of the whole run, those before `start_step` included.
            seed: Decides the order.
            start_step: First step to yield, for a run that goes on.
            accumulate: Micro-batches per step, of equal size; together they are the step's batch.
        """
        assert num_examples >= 1
        assert 0 <= start_step <= num_steps
        assert batch_size % accumulate == 0
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.start_step = start_step
        self.accumulate = accumulate
        self._latest: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        """Returns the micro-batches of the whole run: Lightning counts those before `start_step` as fetched."""
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        """Yields one list of indices per micro-batch, from `start_step` on."""
        size = self.batch_size // self.accumulate
        for step in range(self.start_step, self.num_steps):
            batch = self.indices_of_step(step)
            for first in range(0, self.batch_size, size):
                yield batch[first : first + size]

    def indices_of_step(self, step: int) -> list[int]:
        """Returns the indices of one step's whole batch."""
        indices: list[int] = []
        while len(indices) < self.batch_size:
            number, offset = divmod(step * self.batch_size + len(indices), self.num_examples)
            indices += self._order_of_pass(number)[offset : offset + self.batch_size - len(indices)]
        return indices

    def _order_of_pass(self, number: int) -> list[int]:
        if self._latest is None or self._latest[0] != number:
            self._latest = number, draw_order(self.num_examples, seed=self.seed, number=number)
        return self._latest[1]


def draw_order(num_examples: int, *, seed: int, number: int) -> list[int]:
    """Returns the order of one pass: a permutation drawn from a hash of (seed, pass number)."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(num_examples, generator=generator).tolist()
