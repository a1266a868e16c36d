"""Which rows make up the batch of each optimizer step, and how a batch is cut so that little of it is padding.

What is learned is decided by seed and step alone, so a run can go on anywhere. Comes after `part` and before `module`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from lorasweep.data.part import Part, padding_fraction

LEAST_PADDING = 0.1
"""`trainer.accumulate=auto` cuts a step into more micro-batches until no more than this share of it is padding."""
MOST_MICRO_BATCHES = 8
LOOKED_AT_STEPS = 100


class MicroBatch(NamedTuple):
    """Rows that go through the model at once."""

    indices: list[int]
    step_weight: float
    """What the loss of the whole step is divided by: the weights of all its rows together."""


class StepBatchSampler(Sampler[MicroBatch]):
    """Yields each step's micro-batches.

    The order is an endless stream: one permutation of all rows per pass, each drawn from (seed, pass) alone, cut
    into batches across the ends of passes. Neither torch's nor any other shared random stream is used. Within a step
    rows are sorted by length before they are cut into micro-batches: the step's gradient is the same, its padding less.
    """

    def __init__(
        self, part: Part, *, batch_size: int, num_steps: int, seed: int, start_step: int = 0, accumulate: int = 1
    ) -> None:
        """Describes the batches of steps `start_step` to `num_steps - 1`.

        Args:
            part: Rows to choose from, at least one. May be fewer than `batch_size`.
            batch_size: Rows per step; a multiple of `accumulate`.
            num_steps: Steps of the whole run, those before `start_step` included.
            seed: Decides the order.
            start_step: First step to yield, for a run that goes on.
            accumulate: Micro-batches per step, of equally many rows; together they are the step's batch.
        """
        assert len(part) >= 1
        assert 0 <= start_step <= num_steps
        assert batch_size % accumulate == 0
        self.part = part
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.start_step = start_step
        self.accumulate = accumulate
        self._latest: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        """Returns the micro-batches of the whole run: Lightning counts those before `start_step` as fetched."""
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields each micro-batch, from `start_step` on."""
        for step in range(self.start_step, self.num_steps):
            yield from self.step(step)

    def step(self, step: int) -> list[MicroBatch]:
        """Returns the micro-batches of one step."""
        indices = self.indices_of_step(step)
        weight = float(self.part.weights[torch.tensor(indices)].sum())
        return [MicroBatch(rows, weight) for rows in cut_by_length(indices, self.part.lengths, parts=self.accumulate)]

    def indices_of_step(self, step: int) -> list[int]:
        """Returns the rows of one step's whole batch, in the order that was drawn."""
        indices: list[int] = []
        while len(indices) < self.batch_size:
            number, offset = divmod(step * self.batch_size + len(indices), len(self.part))
            indices += self._order_of_pass(number)[offset : offset + self.batch_size - len(indices)]
        return indices

    def _order_of_pass(self, number: int) -> list[int]:
        if self._latest is None or self._latest[0] != number:
            self._latest = number, draw_order(len(self.part), seed=self.seed, number=number)
        return self._latest[1]


class EvaluationSampler(Sampler[MicroBatch]):
    """Yields every row once, sorted by length, in batches of about as many positions each."""

    def __init__(self, part: Part, *, batch_size: int) -> None:
        """Takes a part and how many of its longest rows fit into a batch; of shorter ones it holds more."""
        self.batches = batches_by_length(part.lengths, budget=batch_size * int(part.lengths.max()))

    def __len__(self) -> int:
        """Returns the number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields the batches; the step weight means nothing here."""
        return (MicroBatch(batch, 1.0) for batch in self.batches)

    @property
    def order(self) -> list[int]:
        """The rows in the order in which they come."""
        return [index for batch in self.batches for index in batch]


def cut_by_length(indices: Sequence[int], lengths: Tensor, *, parts: int) -> list[list[int]]:
    """Returns the rows sorted by length (equal ones stay in order) in so many lists of equally many."""
    ordered = sorted(indices, key=lambda index: int(lengths[index])) if parts > 1 else list(indices)
    size = len(ordered) // parts
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def batches_by_length(lengths: Tensor, *, budget: int) -> list[list[int]]:
    """Returns every row once, sorted by length, in batches of at most `budget` positions with padding (or one row)."""
    batches: list[list[int]] = [[]]
    for index in lengths.argsort(stable=True).tolist():
        if batches[-1] and (len(batches[-1]) + 1) * int(lengths[index]) > budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def choose_accumulate(part: Part, *, batch_size: int) -> int:
    """Returns the least number of micro-batches per step whose padding is at most a tenth, by the first steps' rows.

    It depends on the data and the batch size alone, so that all trials of a sweep have the same.
    """
    steps = StepBatchSampler(part, batch_size=batch_size, num_steps=LOOKED_AT_STEPS, seed=0)
    drawn = [steps.indices_of_step(step) for step in range(LOOKED_AT_STEPS)]
    choices = [n for n in range(1, min(batch_size, MOST_MICRO_BATCHES) + 1) if batch_size % n == 0]
    for parts in choices:
        cut = [batch for rows in drawn for batch in cut_by_length(rows, part.lengths, parts=parts)]
        if padding_fraction(part.lengths, cut) <= LEAST_PADDING:
            return parts
    return choices[-1]


def draw_order(num_rows: int, *, seed: int, number: int) -> list[int]:
    """Returns the order of one pass: a permutation drawn from a hash of (seed, pass number)."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(num_rows, generator=generator).tolist()
