"""Which rows make up the batch of each optimizer step, and how a batch is cut so that little of it is padding.

What is learned is decided by seed and step alone, so a run can resume at any step. After `split`, before `loaders`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lorasweep.data.split import Split

MAX_PADDING = 0.1
"""`trainer.accumulate=auto` takes as few micro-batches as leave at most this share of padding, where that pays."""
BATCH_POSITIONS = 256
"""What a batch costs beside its positions, in positions: on 2 cores a step of MiniLM-L6 took 28 ms before its first
token, as long as 300 tokens take."""
EVALUATION_POSITIONS = 48
"""The same of an evaluation's batch, which has no backward pass and no optimizer, and may be large."""
WORTH_IT = 1.1
"""Little padding may cost this factor of the cheapest number of micro-batches."""
MAX_MICRO_BATCHES = 16
MAX_LENGTHS = 64
"""Rows of so many different lengths at most share an evaluation batch."""
LOOKED_AT_STEPS = 100


class MicroBatch(NamedTuple):
    """Rows that go through the model at once."""

    indices: list[int]
    step_weight: float
    """What the loss of the whole step is divided by: the weights of all its rows together."""


class Share(NamedTuple):
    """Which rows of each batch are for this one of the processes that train together."""

    rank: int = 0
    size: int = 1

    def of(self, micro: MicroBatch) -> MicroBatch:
        """Returns this rank's rows of a micro-batch, every `size`-th, so that all have rows of like lengths.

        Where there are fewer rows than ranks, one of them with an infinite divisor: it goes through the model, so that
        all ranks do the same, and counts for nothing.
        """
        if self.size == 1:
            return micro
        rows = micro.indices[self.rank :: self.size]
        return MicroBatch(rows, micro.step_weight) if rows else MicroBatch(micro.indices[:1], math.inf)


ALL = Share()


class SharedSampler(DistributedSampler[MicroBatch]):
    """Yields micro-batches, of each one the rows of its share.

    It is what it says to Lightning: a sampler that knows of the other processes and needs none around it.
    """

    def __init__(self, share: Share) -> None:
        """Takes the share. torch's own sampler, which deals out single rows, is not set up."""
        self.share = share


class StepBatchSampler(SharedSampler):
    """Yields each step's micro-batches.

    The order is an endless stream: one permutation of all rows per pass, each drawn from (seed, pass) alone, cut
    into batches across the ends of passes. Neither torch's nor any other shared random stream is used. Within a step
    rows are sorted by length before they are cut into micro-batches: the step's gradient is the same, its padding less.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        num_steps: int,
        seed: int,
        start_step: int = 0,
        accumulate: int = 1,
        share: Share = ALL,
    ) -> None:
        """Describes the batches of steps `start_step` to `num_steps - 1`.

        Args:
            split: Rows to choose from, at least one. May be fewer than `batch_size`.
            batch_size: Rows per step.
            num_steps: Steps of the whole run, those before `start_step` included.
            seed: Decides the order.
            start_step: First step to yield, for a run that goes on.
            accumulate: Micro-batches per step, at most `batch_size`; together they are the step's batch.
            share: Which of their rows to yield.
        """
        assert len(split) >= 1
        assert 0 <= start_step <= num_steps
        assert 1 <= accumulate <= batch_size
        self.split = split
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.start_step = start_step
        self.accumulate = accumulate
        super().__init__(share)
        self.sizes = choose_sizes(split, batch_size=batch_size, micro_batches=accumulate)
        self._latest: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        """Returns the micro-batches of the whole run: Lightning counts those before `start_step` as fetched."""
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields each micro-batch, from `start_step` on."""
        for step in range(self.start_step, self.num_steps):
            yield from map(self.share.of, self.step(step))

    def step(self, step: int) -> list[MicroBatch]:
        """Returns the micro-batches of one step, with all their rows."""
        indices = self.indices_of_step(step)
        weight = float(self.split.weights[torch.tensor(indices)].sum())
        return [MicroBatch(rows, weight) for rows in cut_by_length(indices, self.split.lengths, sizes=self.sizes)]

    def indices_of_step(self, step: int) -> list[int]:
        """Returns the rows of one step's whole batch, in the order that was drawn."""
        indices: list[int] = []
        while len(indices) < self.batch_size:
            number, offset = divmod(step * self.batch_size + len(indices), len(self.split))
            indices += self._order_of_pass(number)[offset : offset + self.batch_size - len(indices)]
        return indices

    def _order_of_pass(self, number: int) -> list[int]:
        if self._latest is None or self._latest[0] != number:
            self._latest = number, draw_order(len(self.split), seed=self.seed, number=number)
        return self._latest[1]


class EvaluationSampler(SharedSampler):
    """Yields every row once, sorted by length, in batches of little padding; of each batch a share of its rows."""

    def __init__(self, split: Split, *, batch_size: int, share: Share = ALL) -> None:
        """Takes a split and how many of its longest rows fit into a batch; of shorter ones it may hold more."""
        super().__init__(share)
        self.batches = batches_by_length(split.lengths, budget=batch_size * int(split.lengths.max()))

    def __len__(self) -> int:
        """Returns the number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields the batches; the step weight is 1, or infinite for a row that does not count."""
        return (self.share.of(MicroBatch(batch, 1.0)) for batch in self.batches)

    @property
    def order(self) -> list[int]:
        """The rows in the order in which they come."""
        return [index for batch in self.batches for index in batch]


def cut_by_length(indices: Sequence[int], lengths: Tensor, *, sizes: Sequence[int]) -> list[list[int]]:
    """Returns the rows sorted by length (equal ones stay in order) in lists of these sizes."""
    ordered = sorted(indices, key=lambda index: int(lengths[index])) if len(sizes) > 1 else list(indices)
    ends = list(itertools.accumulate(sizes))
    return [ordered[end - size : end] for end, size in zip(ends, sizes, strict=True)]


@functools.lru_cache(maxsize=64)
def choose_sizes(split: Split, *, batch_size: int, micro_batches: int) -> tuple[int, ...]:
    """Returns the sizes of a step's micro-batches that leave the least padding on average, the shortest rows first.

    They are the same for every step, so that the slots of a pack agree on them.
    """
    if micro_batches == 1 or int(split.lengths.min()) == int(split.lengths.max()):
        return tuple(batch_size // micro_batches + (n < batch_size % micro_batches) for n in range(micro_batches))
    typical = typical_lengths(split, batch_size)
    costs = [(count + 1) * length for count, length in enumerate(typical)]  # of the first micro-batch
    best: list[tuple[float, tuple[int, ...]]] = [(cost, (count + 1,)) for count, cost in enumerate(costs)]
    for _ in range(micro_batches - 1):
        best = [
            min(((best[i][0] + (j - i) * typical[j], (*best[i][1], j - i)) for i in range(j)), default=(math.inf, ()))
            for j in range(batch_size)
        ]
    return best[-1][1]


@functools.lru_cache(maxsize=64)
def typical_lengths(split: Split, batch_size: int) -> tuple[float, ...]:
    """Returns the mean length of a step's shortest row, of its second shortest, and so on, from the first steps."""
    steps = StepBatchSampler(split, batch_size=batch_size, num_steps=LOOKED_AT_STEPS, seed=0)
    drawn = torch.stack([split.lengths[torch.tensor(steps.indices_of_step(step))] for step in range(LOOKED_AT_STEPS)])
    return tuple(drawn.sort(dim=1).values.double().mean(0).tolist())


def choose_accumulate(split: Split, *, batch_size: int, slots: int = 1) -> int:
    """Returns how many micro-batches per step pay: cutting saves padding and costs a pass through the model each.

    It depends on the data, the batch size and the number of slots alone.
    """
    if int(split.lengths.min()) == int(split.lengths.max()):
        return 1
    typical = torch.tensor(typical_lengths(split, batch_size))
    costs: dict[int, float] = {}
    padding: dict[int, float] = {}
    for count in range(1, min(batch_size, MAX_MICRO_BATCHES) + 1):
        sizes = choose_sizes(split, batch_size=batch_size, micro_batches=count)
        ends = torch.tensor(sizes).cumsum(0) - 1
        positions = float((torch.tensor(sizes) * typical[ends]).sum())
        costs[count] = slots * positions + count * BATCH_POSITIONS
        padding[count] = 1 - float(typical.sum()) / positions
    cheapest = min(costs, key=costs.__getitem__)
    little = next((count for count in costs if padding[count] <= MAX_PADDING), cheapest)
    return little if costs[little] <= WORTH_IT * costs[cheapest] else cheapest


def batches_by_length(lengths: Tensor, *, budget: int) -> list[list[int]]:
    """Returns every row once, sorted by length, in batches of at most `budget` positions with padding (or one row).

    Cut where padding and the cost of a batch are least together, for rows of one length each time as many as fit.
    """
    order = lengths.argsort(stable=True).tolist()
    runs = [list(rows) for _, rows in itertools.groupby(order, key=lambda index: int(lengths[index]))]
    sizes = [int(lengths[run[0]]) for run in runs]
    ends = [0, *itertools.accumulate(map(len, runs))]
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of all runs before, and where the last group of runs starts
    for last, size in enumerate(sizes):
        options = []
        for first in range(last, max(-1, last - MAX_LENGTHS), -1):
            count = ends[last + 1] - ends[first]
            passes = math.ceil(count / max(1, budget // size))
            options.append((best[first][0] + count * size + passes * EVALUATION_POSITIONS, first))
        best.append(min(options))
    batches: list[list[int]] = []
    past = len(runs)
    while past:
        first = best[past][1]
        rows = order[ends[first] : ends[past]]
        most = max(1, budget // sizes[past - 1])
        batches[:0] = [rows[start : start + most] for start in range(0, len(rows), most)]
        past = first
    return batches


def draw_order(num_rows: int, *, seed: int, number: int) -> list[int]:
    """Returns the order of one pass: a permutation drawn from a hash of (seed, pass number)."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(num_rows, generator=generator).tolist()
