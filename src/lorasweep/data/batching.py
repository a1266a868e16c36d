"""Chooses the examples of each optimizer step, and cuts them into micro-batches with little padding.

The seed and the step number alone decide a batch, so a run can resume at any step.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lorasweep.data.rows import Batch, Rows, SplitFacts

Indices = NDArray[np.int64]
"""Indices of examples, (examples,)."""
MIN_PART_EXAMPLES = 128
"""Minimum number of examples in an evaluation on a part of a split. In replays, sweeps that compared
trials on 32 of 96 blocks of text answered the first question wrongly in 17 instead of 3 of 100."""
MAX_BUCKETS = 8
"""Maximum number of buckets of similar lengths in a training split."""
MIN_BUCKET_BATCHES = 4
"""Minimum number of batches in a bucket. With fewer, the same few rows would always meet in a batch."""
LENGTH_MULTIPLE = 8
"""The length of a training bucket is a multiple of this number, but for the longest bucket, which has the length of the
longest row. This suits the kernels of GPUs and gives few shapes."""


class MicroBatch(NamedTuple):
    """Examples that go through the model together."""

    indices: list[int]
    step_weight: float
    """Sum of the weights of all examples of the step, not only of this micro-batch. The loss is divided by it."""
    length: int = 0
    """Number of positions to which each row is padded; 0: as many as the longest row has."""


class ProcessShare(NamedTuple):
    """Selects the examples of one process in a run on several processes."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""

    def select(self, micro: MicroBatch) -> MicroBatch:
        """Returns this process's examples of a micro-batch.

        It takes every `size`-th example, because those of an evaluation are sorted by length: so all processes get
        similar lengths.
        """
        if self.size == 1:
            return micro
        indices = micro.indices[self.rank :: self.size]
        if not indices:
            # All processes must call the model equally often. So a process without examples repeats the first example,
            # and its loss is divided by infinity, which makes it 0.
            return micro._replace(indices=micro.indices[:1], step_weight=math.inf)
        return micro._replace(indices=indices)


SINGLE_PROCESS = ProcessShare()
"""The share of a process that trains alone: all examples."""


class MicroBatchSampler(DistributedSampler[MicroBatch]):
    """Base of samplers that yield one process's part of each micro-batch.

    The base class tells Lightning that the sampler already divides examples among processes. Its `__init__` is not
    called, because it is written for single examples.
    """

    def __init__(self, share: ProcessShare) -> None:
        self.share = share


class LengthBuckets:
    """Cuts examples into buckets of similar lengths, and chooses the bucket of each step without a seed.

    The examples are sorted by length and cut into buckets of whole batches, as equal in size as possible; what is left
    of the last batch belongs to the bucket of the longest. In an epoch, each example comes once. The steps of an epoch
    are rounds, in each of which every bucket comes once, in a shuffled order. So long batches are spread evenly.
    With one bucket, batches are random, and each is padded to its own longest row.

    Attributes:
        members: The indices of the examples of each bucket, (examples of the bucket,).
        lengths: The number of positions to which the rows of each bucket are padded.
    """

    def __init__(self, row_lengths: Int[Tensor, " examples"], *, batch_size: int, group_by_length: bool) -> None:
        """Cuts the examples, whose longest rows have these lengths, into buckets; or into one, for random batches."""
        self.batch_size = batch_size
        num_batches = len(row_lengths) // batch_size
        longest = int(row_lengths.max())
        self.members: tuple[Indices, ...]
        self.lengths: list[int]
        number = min(MAX_BUCKETS, num_batches // MIN_BUCKET_BATCHES) if group_by_length else 1
        if number <= 1 or int(row_lengths.min()) == longest:
            self.members, self.lengths = (np.arange(len(row_lengths)),), [longest]
        else:
            order = row_lengths.argsort(stable=True)
            limits = [batch_size * (num_batches * n // number) for n in range(1, number)]
            self.members = tuple(part.numpy() for part in order.tensor_split(limits))
            longest_rows = [int(row_lengths[part[-1]]) for part in self.members]
            rounded = [-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE for length in longest_rows]
            self.lengths = [min(length, longest) for length in rounded]
        self._num_examples = len(row_lengths)
        self._plan_epoch = functools.lru_cache(maxsize=2)(self._plan)

    def __len__(self) -> int:
        return len(self.members)

    def choose(self, step: int) -> tuple[int, int]:
        """Returns the bucket of a step, and how many steps before it had the same bucket."""
        if len(self) == 1:
            return 0, step
        epoch = ((step + 1) * self.batch_size - 1) // self._num_examples
        first_step = epoch * self._num_examples // self.batch_size
        return self._plan_epoch(epoch)[step - first_step]

    def _plan(self, epoch: int) -> list[tuple[int, int]]:
        """Returns what `choose` returns for each step of an epoch."""
        uses = [
            range(epoch * len(part) // self.batch_size, (epoch + 1) * len(part) // self.batch_size)
            for part in self.members
        ]
        plan: list[tuple[int, int]] = []
        for number in range(max(map(len, uses))):
            due = [(bucket, steps[number]) for bucket, steps in enumerate(uses) if number < len(steps)]
            plan += [due[place] for place in draw_permutation(len(due), f"buckets/{epoch}/{number}").tolist()]
        return plan


@functools.lru_cache(maxsize=4)
def cut_buckets(row_lengths: Int[Tensor, " examples"], *, batch_size: int, group_by_length: bool) -> LengthBuckets:
    """Returns the buckets of a split, which all runs on it share. The cache compares tensors by identity."""
    return LengthBuckets(row_lengths, batch_size=batch_size, group_by_length=group_by_length)


class StepBatchSampler(MicroBatchSampler):
    """Yields the micro-batches of each training step.

    The rows of a step come from one bucket of similar lengths (`LengthBuckets`), and are padded to the bucket's
    length. Which bucket a step has depends on the lengths and the step alone, and which rows of it on the seed. So the
    slots of a pack have one shape, which is also the shape of a run alone. Random batches (not `group_by_length`) are
    padded to their own longest row, and in a pack to that of all slots.

    The split may have fewer examples than a step. `num_steps` includes the steps before `start_step`, the first one of
    a resumed run. The `accumulate` micro-batches of a step together hold `batch_size` examples.
    """

    def __init__(
        self,
        split: SplitFacts,
        *,
        batch_size: int,
        num_steps: int,
        seed: int,
        group_by_length: bool,
        start_step: int = 0,
        accumulate: int = 1,
        share: ProcessShare = SINGLE_PROCESS,
    ) -> None:
        assert len(split) >= 1
        assert 0 <= start_step <= num_steps
        assert 1 <= accumulate <= batch_size
        super().__init__(share)
        self.split = split
        self.num_steps = num_steps
        self.start_step = start_step
        self.accumulate = accumulate
        self.group_by_length = group_by_length
        self.sizes = [batch_size // accumulate + (n < batch_size % accumulate) for n in range(accumulate)]
        self.buckets = cut_buckets(split.row_lengths, batch_size=batch_size, group_by_length=group_by_length)
        self._draw_order = functools.lru_cache(maxsize=len(self.buckets))(functools.partial(draw_order, seed=seed))

    def __len__(self) -> int:
        """Returns the number of micro-batches of the whole run.

        It includes the steps before `start_step`, because Lightning counts them as fetched when it resumes.
        """
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in range(self.start_step, self.num_steps):
            yield from map(self.share.select, self.get_step(step))

    def get_step(self, step: int) -> list[MicroBatch]:
        """Returns the micro-batches of one step, with the examples of all processes."""
        bucket, indices = self._draw_step(step)
        weight = float(self.split.weights.numpy()[indices].sum(dtype="float64"))
        remaining = iter(indices)
        parts = [list(itertools.islice(remaining, size)) for size in self.sizes]
        if self.group_by_length:
            lengths = [self.buckets.lengths[bucket]] * len(parts)
        else:
            lengths = [int(self.split.row_lengths.numpy()[part].max()) for part in parts]
        return [MicroBatch(part, weight, length) for part, length in zip(parts, lengths, strict=True)]

    def get_step_indices(self, step: int) -> list[int]:
        """Returns the indices of one step's examples, in the order in which they were drawn."""
        return self._draw_step(step)[1]

    def _draw_step(self, step: int) -> tuple[int, list[int]]:
        """Returns the bucket of a step, and the indices of its examples.

        The examples of a bucket come in one permutation after another. A batch may contain the end of one and the start
        of the next.
        """
        bucket, number = self.buckets.choose(step)
        members, batch_size = self.buckets.members[bucket], self.buckets.batch_size
        indices: list[int] = []
        while len(indices) < batch_size:
            epoch, offset = divmod(number * batch_size + len(indices), len(members))
            order = self._draw_order(len(members), epoch=epoch, bucket=bucket)
            indices += members[order[offset : offset + batch_size - len(indices)]].tolist()
        return bucket, indices


class SlotSampler(DistributedSampler[tuple[MicroBatch, ...]]):
    """Yields the micro-batches of all slots of a pack together. `samplers` has those of each slot."""

    def __init__(self, samplers: Sequence[StepBatchSampler]) -> None:
        self.samplers = samplers

    def __len__(self) -> int:
        return len(self.samplers[0])

    def __iter__(self) -> Iterator[tuple[MicroBatch, ...]]:
        return zip(*self.samplers, strict=True)


class EvaluationSampler(MicroBatchSampler):
    """Yields every example once, or those of a part of the split, sorted by length, in batches with little padding.

    A batch has no more token positions than `batch_size` examples of the maximum length. So a batch of short examples
    has more than `batch_size` examples.
    """

    def __init__(
        self, split: SplitFacts, *, batch_size: int, fraction: float = 1.0, share: ProcessShare = SINGLE_PROCESS
    ) -> None:
        super().__init__(share)
        part = choose_part(len(split), fraction)
        lengths = split.padded_lengths
        batches = batch_by_length(lengths[torch.tensor(part)], budget=batch_size * int(lengths.max()))
        self.batches = [[part[place] for place in batch] for batch in batches]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        for batch in self.batches:
            yield self.share.select(MicroBatch(batch, 1.0))

    @property
    def order(self) -> list[int]:
        """The indices of all examples in the order of the evaluation."""
        return [index for batch in self.batches for index in batch]


class BatchDataset(Dataset[Batch]):
    """A torch data set that returns a whole batch for a micro-batch's indices."""

    def __init__(self, split: Rows) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, micros: MicroBatch | tuple[MicroBatch, ...]) -> Batch:
        """Returns the examples of all slots, slot after slot, and for each slot `step_weight` and `num_tokens`.

        `num_tokens` is the number of tokens without padding. The micro-batches of the slots have equal sizes.
        """
        slots = (micros,) if isinstance(micros, MicroBatch) else micros
        indices = [index for micro in slots for index in micro.indices]
        batch = self.split.batch(indices, length=max(micro.length for micro in slots))
        num_tokens = self.split.lengths[torch.tensor(indices)].view(len(slots), -1).sum(1)
        weights = torch.tensor([micro.step_weight for micro in slots])
        # An infinite weight marks the repeated example of a process without examples (`ProcessShare.select`).
        return {**batch, "step_weight": weights, "num_tokens": num_tokens * weights.isfinite()}


class BatchLoader(DataLoader[Batch]):
    """A DataLoader that saves nothing in a checkpoint, because its sampler knows at which step to resume."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict. Without this method, Lightning would assume that the loader can't resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing, because a checkpoint has no state of the loader."""


def build_loader(split: Rows, batches: Iterable[MicroBatch | tuple[MicroBatch, ...]]) -> DataLoader[Batch]:
    # Each iterator of a DataLoader draws a seed for worker processes. With a generator of its own, it leaves torch's
    # global generator as it is.
    generator = torch.Generator().manual_seed(0)
    return BatchLoader(BatchDataset(split), batch_size=None, sampler=batches, generator=generator)


def build_evaluation_loader(
    split: Rows, *, batch_size: int, fraction: float = 1.0, share: ProcessShare = SINGLE_PROCESS
) -> DataLoader[Batch]:
    """Returns a loader of the process's examples of a part of the split, each once, sorted by length."""
    return build_loader(split, EvaluationSampler(split, batch_size=batch_size, fraction=fraction, share=share))


def batch_by_length(lengths: Int[Tensor, " examples"], *, budget: int) -> list[list[int]]:
    """Returns every index once, sorted by length, in batches of at most `budget` token positions with padding.

    A longer example gets a batch of one.
    """
    batches: list[list[int]] = []
    for index in lengths.argsort(stable=True).tolist():
        if batches and (len(batches[-1]) + 1) * int(lengths[index]) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def choose_part(num_examples: int, fraction: float) -> list[int]:
    """Returns the indices of the examples in a part of a split, ascending: the same for every run and step.

    They are drawn at random, because examples may be sorted by label. A part has at least `MIN_PART_EXAMPLES` examples,
    or the whole split.
    """
    size = max(math.ceil(fraction * num_examples), min(MIN_PART_EXAMPLES, num_examples))
    return sorted(draw_order(num_examples, seed=0, epoch=0)[:size].tolist())


def draw_order(num_examples: int, *, seed: int, epoch: int, bucket: int = 0) -> Indices:
    """Returns the order of a bucket's examples in one epoch: a permutation drawn from a hash of the arguments."""
    stream = f"{seed}/{epoch}/{bucket}" if bucket else f"{seed}/{epoch}"
    return draw_permutation(num_examples, stream)


def draw_permutation(size: int, stream: str) -> Indices:
    """Returns a permutation of the numbers below `size`, drawn from a hash of the stream's name."""
    digest = hashlib.sha256(stream.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(size, generator=generator).numpy()
