"""Chooses the examples of each optimizer step's batch, and cuts the batch so that little of it is padding.

Seed and step alone decide the batch, so a run can resume at any step.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lorasweep.data.split import Batch, Split

MAX_PADDING_FRACTION = 0.1
"""`trainer.accumulate=auto` takes the fewest micro-batches with at most this fraction of padding, if that is cheap."""
BATCH_COST_POSITIONS = 256
"""Fixed cost of a training batch, in positions. On 2 cores a step of MiniLM-L6 took 28 ms before its first token, as
long as 300 tokens take."""
MAX_COST_FACTOR = 1.1
"""Highest cost, relative to the cheapest number of micro-batches, at which the number with little padding is taken."""
MAX_MICRO_BATCHES = 16
"""Maximum number of micro-batches per step that `trainer.accumulate=auto` considers."""
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

    def select(self, micro: MicroBatch) -> MicroBatch:
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

    It is a `DistributedSampler` so that Lightning does not wrap it in another one. torch's own initialization, for a
    sampler of single examples, is not run.
    """

    def __init__(self, share: Share) -> None:
        self.share = share


class StepBatchSampler(SharedSampler):
    """Yields the micro-batches of each step.

    The order is an endless sequence of permutations of all examples, one per pass, each drawn from (seed, pass) alone.
    A batch may contain the end of one pass and the start of the next. No shared random stream is used. Within a step
    examples are sorted by length before they are cut into micro-batches: the gradient is the same, with less padding.

    Args:
        split: Examples to choose from, at least one. May be fewer than `batch_size`.
        batch_size: Examples per step.
        num_steps: Steps of the whole run, including those before `start_step`.
        seed: Decides the order.
        start_step: First step to yield, for a resumed run.
        accumulate: Micro-batches per step, at most `batch_size`; together they are the step's batch.
        share: The part of each micro-batch to yield, for a run on several processes.
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
        self._latest_pass: tuple[int, list[int]] | None = None  # number and order

    def __len__(self) -> int:
        """Returns the micro-batches of the whole run: Lightning counts those before `start_step` as fetched."""
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in range(self.start_step, self.num_steps):
            yield from map(self.share.select, self.step(step))

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
        if self._latest_pass is None or self._latest_pass[0] != number:
            self._latest_pass = number, draw_order(len(self.split), seed=self.seed, number=number)
        return self._latest_pass[1]


class EvaluationSampler(SharedSampler):
    """Yields every example once, sorted by length, in batches with little padding.

    A batch has at most as many positions as `batch_size` of the longest examples. So a batch of short examples has
    more than `batch_size` examples.
    """

    def __init__(self, split: Split, *, batch_size: int, share: Share = WHOLE_BATCH) -> None:
        super().__init__(share)
        self.batches = batches_by_length(split.lengths, budget=batch_size * int(split.lengths.max()))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return (self.share.select(MicroBatch(batch, 1.0)) for batch in self.batches)

    @property
    def order(self) -> list[int]:
        """The indices of all examples in the order in which they come."""
        return [index for batch in self.batches for index in batch]


class BatchDataset(Dataset[Batch]):
    """A torch data set whose items are whole batches of a split's examples."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, micro: MicroBatch) -> Batch:
        """Returns the batch of these examples, with the weight of the step and the number of tokens without padding."""
        batch = self.split.batch(micro.indices)
        lengths = self.split.lengths[torch.tensor(micro.indices)]
        # An infinite weight marks the placeholder of a process without examples in this micro-batch (`Share.select`).
        num_tokens = lengths.sum() if math.isfinite(micro.step_weight) else torch.zeros_like(lengths[0])
        return {**batch, "step_weight": torch.tensor(micro.step_weight), "num_tokens": num_tokens}


class BatchLoader(DataLoader[Batch]):
    """A DataLoader without state to save in a checkpoint, because its sampler knows at which step to start."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict; without this method Lightning would treat the loader as one that can't resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: there is no state to load."""


def build_loader(split: Split, batches: Iterable[MicroBatch]) -> DataLoader[Batch]:
    # A DataLoader draws a seed for its workers at every start: from this generator, not from torch's global one.
    generator = torch.Generator().manual_seed(0)
    return BatchLoader(BatchDataset(split), batch_size=None, sampler=batches, generator=generator)


def build_evaluation_loader(split: Split, *, batch_size: int, share: Share = WHOLE_BATCH) -> DataLoader[Batch]:
    """Returns a loader of each example of a share once, in the order of `EvaluationSampler`."""
    return build_loader(split, EvaluationSampler(split, batch_size=batch_size, share=share))


def cut_by_length(
    indices: Sequence[int], lengths: Int[Tensor, " examples"], *, sizes: Sequence[int]
) -> list[list[int]]:
    """Returns the indices sorted by length (equal lengths stay in order) in lists of these sizes."""
    ordered = iter(sorted(indices, key=lambda index: int(lengths[index])) if len(sizes) > 1 else indices)
    return [list(itertools.islice(ordered, size)) for size in sizes]


@functools.lru_cache(maxsize=64)
def choose_sizes(split: Split, *, batch_size: int, micro_batches: int) -> tuple[int, ...]:
    """Returns the sizes of a step's micro-batches with the least padding on average; short examples come first.

    The sizes are the same for every step, so that the slots of a pack have equal ones. Found by dynamic programming.
    """
    if micro_batches == 1 or _has_one_length(split):
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
    """Returns the mean length of a step's shortest example, of its second shortest example, and so on."""
    steps = StepBatchSampler(split, batch_size=batch_size, num_steps=SAMPLED_STEPS, seed=0)
    drawn = torch.stack([split.lengths[torch.tensor(steps.indices_of_step(step))] for step in range(SAMPLED_STEPS)])
    return tuple(drawn.sort(dim=1).values.double().mean(0).tolist())


def choose_accumulate(split: Split, *, batch_size: int, slots: int = 1) -> int:
    """Returns the number of micro-batches per step. Each saves padding and costs one call of the model.

    It depends on the data, the batch size and the number of slots alone.
    """
    if _has_one_length(split):
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
    with_little_padding = next((count for count in costs if padding[count] <= MAX_PADDING_FRACTION), cheapest)
    return with_little_padding if costs[with_little_padding] <= MAX_COST_FACTOR * costs[cheapest] else cheapest


def batches_by_length(lengths: Int[Tensor, " examples"], *, budget: int) -> list[list[int]]:
    """Returns every index once, sorted by length, in batches as large as the budget allows.

    Args:
        lengths: The length of each example.
        budget: Maximum number of positions of a batch, padding included. A longer example has its own batch.
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


def _has_one_length(split: Split) -> bool:
    return int(split.lengths.min()) == int(split.lengths.max())
