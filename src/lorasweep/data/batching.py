"""Which examples make up the batch of each optimizer step, and how a batch is cut so that little of it is padding.

Seed and step alone decide the batch, so a run can resume at any step. The samplers take a `Split`; `loaders` uses them.
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

MAX_PADDING_FRACTION = 0.1
"""`trainer.accumulate=auto` takes the fewest micro-batches with at most this share of padding, if that is cheap."""
BATCH_COST_POSITIONS = 256
"""Fixed cost of a training batch, in positions: on 2 cores a step of MiniLM-L6 took 28 ms before its first token, as
long as 300 tokens take."""
MAX_COST_FACTOR = 1.1
"""Highest cost, relative to the cheapest number of micro-batches, at which the number with little padding is taken."""
MAX_MICRO_BATCHES = 16
"""Maximum of micro-batches per step that `trainer.accumulate=auto` considers."""
SAMPLED_STEPS = 100
"""Number of steps from which the typical lengths of a batch are estimated."""


class MicroBatch(NamedTuple):
    """Examples that go through the model at once."""

    indices: list[int]
    step_weight: float
    """Divisor of the whole step's loss: the sum of the weights of all its examples."""


class Share(NamedTuple):
    """The part of each batch that goes to one process of a run on several processes: process `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def of(self, micro: MicroBatch) -> MicroBatch:
        """Returns this rank's examples of a micro-batch: every `size`-th, so that all ranks have similar lengths.

        If there are fewer examples than ranks, a rank without an example gets the first one. Its loss is divided by
        infinity, so that it is 0: all ranks must call the model equally often.
        """
        if self.size == 1:
            return micro
        indices = micro.indices[self.rank :: self.size]
        return MicroBatch(indices, micro.step_weight) if indices else MicroBatch(micro.indices[:1], math.inf)


WHOLE_BATCH = Share()
"""The share of a process that trains alone."""


class SharedSampler(DistributedSampler[MicroBatch]):
    """Yields micro-batches with the examples of one share.

    It is a `DistributedSampler` so that Lightning does not wrap it in one of its own.
    """

    def __init__(self, share: Share) -> None:
        """Takes the share. torch's own sampler, which deals out single examples, is not set up."""
        self.share = share


class StepBatchSampler(SharedSampler):
    """Yields each step's micro-batches.

    The order is an endless sequence of permutations of all examples, one per pass, each drawn from (seed, pass) alone.
    A batch may contain the end of one pass and the start of the next. No shared random stream is used. Within a step
    examples are sorted by length before they are cut into micro-batches: the gradient is the same, with less padding.
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
        share: Share = WHOLE_BATCH,
    ) -> None:
        """Describes the batches of steps `start_step` to `num_steps - 1`.

        Args:
            split: Examples to choose from, at least one. May be fewer than `batch_size`.
            batch_size: Examples per step.
            num_steps: Steps of the whole run, those before `start_step` included.
            seed: Decides the order.
            start_step: First step to yield, for a resumed run.
            accumulate: Micro-batches per step, at most `batch_size`; together they are the step's batch.
            share: The part of each micro-batch to yield, for a run on several processes.
        """
        assert len(split) >= 1
        assert 0 <= start_step <= num_steps
        assert 1 <= accumulate <= batch_size
        super().__init__(share)
        self.split = split
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.start_step = start_step
        self.accumulate = accumulate
        self.sizes = choose_sizes(split, batch_size=batch_size, micro_batches=accumulate)
        self._latest: tuple[int, list[int]] | None = None  # number and order of the pass that was drawn last

    def __len__(self) -> int:
        """Returns the micro-batches of the whole run: Lightning counts those before `start_step` as fetched."""
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields each micro-batch, from `start_step` on."""
        for step in range(self.start_step, self.num_steps):
            yield from map(self.share.of, self.step(step))

    def step(self, step: int) -> list[MicroBatch]:
        """Returns the micro-batches of one step, with the examples of all shares."""
        indices = self.indices_of_step(step)
        weight = float(self.split.weights[torch.tensor(indices)].sum())
        return [MicroBatch(cut, weight) for cut in cut_by_length(indices, self.split.lengths, sizes=self.sizes)]

    def indices_of_step(self, step: int) -> list[int]:
        """Returns the indices of one step's whole batch, in the order that was drawn."""
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
    """Yields every example once, sorted by length, in batches with little padding."""

    def __init__(self, split: Split, *, batch_size: int, share: Share = WHOLE_BATCH) -> None:
        """Makes batches of at most as many positions as `batch_size` of the longest examples.

        A batch of short examples therefore has more examples than `batch_size`.
        """
        super().__init__(share)
        self.batches = batches_by_length(split.lengths, budget=batch_size * int(split.lengths.max()))

    def __len__(self) -> int:
        """Returns the number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields the batches; the step weight is 1, or infinite for an example that does not count."""
        return (self.share.of(MicroBatch(batch, 1.0)) for batch in self.batches)

    @property
    def order(self) -> list[int]:
        """The indices of all examples in the order in which they come."""
        return [index for batch in self.batches for index in batch]


def cut_by_length(indices: Sequence[int], lengths: Tensor, *, sizes: Sequence[int]) -> list[list[int]]:
    """Returns the indices sorted by length (equal ones stay in order) in lists of these sizes."""
    ordered = iter(sorted(indices, key=lambda index: int(lengths[index])) if len(sizes) > 1 else indices)
    return [list(itertools.islice(ordered, size)) for size in sizes]


@functools.lru_cache(maxsize=64)
def choose_sizes(split: Split, *, batch_size: int, micro_batches: int) -> tuple[int, ...]:
    """Returns the sizes of a step's micro-batches that give the least padding on average; short examples come first.

    The sizes are the same for every step, so that the slots of a pack have equal ones. Found by dynamic programming.
    """
    if micro_batches == 1 or _have_one_length(split):
        return tuple(batch_size // micro_batches + (n < batch_size % micro_batches) for n in range(micro_batches))
    typical = typical_lengths(split, batch_size)
    # best[j]: the fewest positions for the j + 1 shortest examples in the micro-batches so far, and their sizes
    best: list[tuple[float, tuple[int, ...]]] = [((j + 1) * length, (j + 1,)) for j, length in enumerate(typical)]
    for _ in range(micro_batches - 1):
        best = [
            min(((best[i][0] + (j - i) * typical[j], (*best[i][1], j - i)) for i in range(j)), default=(math.inf, ()))
            for j in range(batch_size)
        ]
    return best[-1][1]


@functools.lru_cache(maxsize=64)
def typical_lengths(split: Split, batch_size: int) -> tuple[float, ...]:
    """Returns the mean length of a step's shortest example, of its second shortest, and so on."""
    steps = StepBatchSampler(split, batch_size=batch_size, num_steps=SAMPLED_STEPS, seed=0)
    drawn = torch.stack([split.lengths[torch.tensor(steps.indices_of_step(step))] for step in range(SAMPLED_STEPS)])
    return tuple(drawn.sort(dim=1).values.double().mean(0).tolist())


def choose_accumulate(split: Split, *, batch_size: int, slots: int = 1) -> int:
    """Returns the number of micro-batches per step: each saves padding and costs one call of the model.

    It depends on the data, the batch size and the number of slots alone.
    """
    if _have_one_length(split):
        return 1
    typical = torch.tensor(typical_lengths(split, batch_size))
    costs: dict[int, float] = {}
    padding: dict[int, float] = {}
    for count in range(1, min(batch_size, MAX_MICRO_BATCHES) + 1):
        sizes = torch.tensor(choose_sizes(split, batch_size=batch_size, micro_batches=count))
        positions = float((sizes * typical[sizes.cumsum(0) - 1]).sum())
        costs[count] = slots * positions + count * BATCH_COST_POSITIONS
        padding[count] = 1 - float(typical.sum()) / positions
    cheapest = min(costs, key=costs.__getitem__)
    little = next((count for count in costs if padding[count] <= MAX_PADDING_FRACTION), cheapest)
    return little if costs[little] <= MAX_COST_FACTOR * costs[cheapest] else cheapest


def batches_by_length(lengths: Tensor, *, budget: int) -> list[list[int]]:
    """Returns every index once, sorted by length, in batches of at most `budget` positions with padding (or one index).

    Each batch is as large as its longest example allows.
    """
    batches: list[list[int]] = []
    for index in lengths.argsort(stable=True).tolist():
        if batches and (len(batches[-1]) + 1) * int(lengths[index]) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def draw_order(num_examples: int, *, seed: int, number: int) -> list[int]:
    """Returns the order of one pass: a permutation drawn from a hash of (seed, pass number)."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(num_examples, generator=generator).tolist()


def _have_one_length(split: Split) -> bool:
    return int(split.lengths.min()) == int(split.lengths.max())
