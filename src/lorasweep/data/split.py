"""Tokenised splits: texts with labels, conversations, pairs of answers, blocks of text; the keys of their batches."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import ScoreMetric

IGNORED = -100
"""Target at positions that are not scored. It is the `ignore_index` of torch's cross-entropy."""
MODEL_KEYS = ("input_ids", "attention_mask", "token_type_ids")
"""Keys of a batch that are arguments of the model. An objective may read any other key."""
HOST_KEYS = ("num_tokens", "num_scored", "slot_lengths")
"""Keys of a batch whose values stay on the CPU, which reads them. Reading them from a GPU would wait for it."""

Batch = dict[str, Tensor]
"""The model's arguments by name (`MODEL_KEYS`; an `attention_mask` only if an example is padded), and:

- `targets`: the next token at each position, (batch, length) int64, or `IGNORED`. For labels: one label per example.
- `weights`: the weight of each example's loss, (examples,) float. Only if weights differ.
- `reference`: the log probability of each row's scored tokens under the base, (rows,). Only for pairs of answers.
- a setting of the objective by its name, such as `beta`: one number for each row (`Objective.slot_settings`).
- `step_weight`: the number that divides the step's loss, a scalar, or in a pack one for each slot. Only in training.
- `num_tokens`: number of positions without padding, a scalar. Only in batches of a loader.
- `num_scored`: number of scored tokens of each row. Only in moved batches of text.
- `slot_lengths`: length of the rows of each slot before padding to the longest slot. Only in packs whose slots differ.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitFacts(ABC):
    """What is known of one split of a data set: train, validation or test."""

    name: str
    """`train`, `validation` or `test`."""
    fingerprint: str
    """First 16 hex digits of a SHA-256 over all examples in order."""
    notes: tuple[str, ...] = ()
    """Notes for the user about the test split. Notes about train and validation are in `DataSource.notes`."""
    groups: tuple[str, ...] = ()
    """The group of each example: its document, its prompt, or its value in the column `data.group`. Examples of a group
    depend on each other; the report takes groups as independent. Empty if each example is its own group."""

    @property
    @abstractmethod
    def lengths(self) -> Int[Tensor, " examples"]:
        """Number of tokens of each example."""

    @property
    def row_lengths(self) -> Int[Tensor, " examples"]:
        """Number of tokens of the longest row of each example."""
        return self.lengths

    @property
    def padded_lengths(self) -> Int[Tensor, " examples"]:
        """Number of positions of each example in a batch where no other example is longer."""
        return self.lengths

    @property
    @abstractmethod
    def weights(self) -> Float[Tensor, " examples"]:
        """Weight of each example in the loss: its number of scored tokens, or its class weight.

        The loss of a step is the sum over its examples divided by the sum of their weights.
        """

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns the split's entry in a run record."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split(SplitFacts):
    """Tokenised examples, which make batches of any choice."""

    @abstractmethod
    def batch(self, indices: Sequence[int], *, length: int = 0) -> Batch:
        """Returns the examples at these indices, padded to `length` positions, or to the longest if it is 0."""

    @property
    def sequences(self) -> ExampleSplit | None:
        """The token sequences of the examples, one for each, or two for a pair of answers; None for running text."""
        return None

    @property
    def answered(self) -> CompletionSplit | None:
        """The prompts with the answers that generated ones are compared with; None if there are none."""
        return None

    def fill_reference(self, values: Float[Tensor, " rows"] | None = None) -> Split:
        """Returns the split with the numbers of `Objective.compute_reference`, or with zeros, to measure time."""
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class Ragged:
    """Sequences of different lengths, stored end to end in one tensor."""

    values: Tensor
    """(all tokens,), int64."""
    ends: Tensor
    """(sequences,), int64: the index in `values` after the last token of each sequence."""

    @functools.cached_property
    def lengths(self) -> Tensor:
        """The length of each sequence, (sequences,), int64."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1))

    def __getitem__(self, index: int) -> Tensor:
        """Returns one sequence as a view."""
        end = int(self.ends[index])
        return self.values[end - int(self.lengths[index]) : end]

    def select(self, mask: Tensor) -> Ragged:
        """Returns the sequences that a boolean mask, (sequences,), selects."""
        values = self.values[mask.repeat_interleave(self.lengths)]
        return Ragged(values=values, ends=self.lengths[mask].cumsum(0))

    def padded(self, indices: Sequence[int], *, fill: int, length: int = 0) -> Tensor:
        """Returns the sequences at these indices, padded on the right to `length`, or to the longest if it is 0.

        The shape is (sequences, length).
        """
        rows = torch.tensor(indices)
        lengths, ends = self.lengths[rows], self.ends[rows]
        positions = torch.arange(length or int(lengths.max()))
        is_real = positions < lengths[:, None]  # (sequences, length)
        places = (ends - lengths)[:, None] + positions
        return torch.where(is_real, self.values[places.clamp_(max=len(self.values) - 1)], fill)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleSplit(Split):
    """Base of splits whose examples are token sequences of different lengths."""

    tokens: Ragged
    pad_token: int
    bytes: int
    """Number of UTF-8 bytes of all texts."""
    truncated: int = 0
    """Number of examples that were longer than `data.max_length` and were cut."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the run record, such as the number of examples of each class."""

    @property
    def sequences(self) -> ExampleSplit:
        return self

    @property
    def lengths(self) -> Tensor:
        return self.tokens.lengths

    def describe(self) -> dict[str, Any]:
        return {
            "examples": len(self),
            "bytes": self.bytes,
            "truncated": self.truncated,
            "fingerprint": self.fingerprint,
            **self.facts,
        }

    def _inputs(self, indices: Sequence[int], *, length: int) -> Batch:
        """Returns padded token ids. Adds a mask only if an example is padded: attention is faster without."""
        input_ids = self.tokens.padded(indices, fill=self.pad_token, length=length)
        lengths = self.lengths[torch.tensor(indices)]
        if int(lengths.min()) == input_ids.shape[1]:
            return {"input_ids": input_ids}
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()  # (batch, length)
        return {"input_ids": input_ids, "attention_mask": mask}


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSplit(ExampleSplit):
    """Texts, each with its label: a class or a number."""

    labels: Tensor
    """Class indices, (examples,) int64; or numbers, (examples,) float."""
    token_types: Ragged | None = None
    """For pairs of texts: 0 at tokens of the first text, 1 at the second. None if the model has no token types."""
    class_weights: Tensor | None = None
    """Weight of each class in the training loss, (classes,); None weights all classes 1."""

    @functools.cached_property
    def weights(self) -> Tensor:
        return torch.ones(len(self.labels)) if self.class_weights is None else self.class_weights[self.labels]

    def batch(self, indices: Sequence[int], *, length: int = 0) -> Batch:
        rows = torch.tensor(indices)
        batch = {**self._inputs(indices, length=length), "targets": self.labels[rows]}
        if self.token_types is not None:
            batch["token_type_ids"] = self.token_types.padded(indices, fill=0, length=length)
        if self.class_weights is not None:
            batch["weights"] = self.weights[rows]
        return batch


@dataclass(frozen=True, kw_only=True, eq=False)
class CompletionSplit(ExampleSplit):
    """Conversations. The model predicts the assistant's tokens, and only these are scored."""

    targets: Ragged
    """The token after each position; `IGNORED` at positions that are not scored."""
    scored_bytes: int
    """Number of UTF-8 bytes of the scored text."""
    answer_starts: Tensor
    """Number of tokens before the last answer of each example, (examples,); 0 if the prompt is empty, or if the answer
    was cut off or is not scored."""
    rows: tuple[Mapping[str, Any] | None, ...]
    """The row of each example in its table (`Conversation.row`)."""

    @property
    def answered(self) -> CompletionSplit:
        return self

    @functools.cached_property
    def weights(self) -> Tensor:
        """Number of scored tokens of each example."""
        scored = torch.cat([self.targets.values.new_zeros(1), (self.targets.values != IGNORED).cumsum(0)])
        ends = scored[self.targets.ends]
        return torch.diff(ends, prepend=ends.new_zeros(1)).float()

    @property
    def bytes_per_token(self) -> float:
        """Number of bytes per scored token."""
        return self.scored_bytes / max(float(self.weights.sum()), 1.0)

    def drop_unscored(self, *, size: int = 1) -> CompletionSplit:
        """Returns the split without rows that have no scored token, because their answers were cut off.

        With a `size`, that many rows in a row belong together, and are kept or dropped together.
        """
        is_scored = (self.weights > 0).view(-1, size).all(1)
        num_dropped = int((~is_scored).sum())
        facts = {**self.facts, "left_out": num_dropped} if num_dropped else self.facts
        return replace(self.select(is_scored.repeat_interleave(size)), facts=facts)

    def select(self, mask: Tensor) -> CompletionSplit:
        """Returns the rows that a boolean mask, (examples,), selects."""
        return replace(
            self,
            tokens=self.tokens.select(mask),
            targets=self.targets.select(mask),
            answer_starts=self.answer_starts[mask],
            rows=tuple(itertools.compress(self.rows, mask.tolist())),
            groups=tuple(itertools.compress(self.groups, mask.tolist())),
        )

    def split_last_answer(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns the tokens of an example's last prompt, and those of its answer with the end-of-turn token."""
        ids, start = torch.cat([self.tokens[index], self.targets[index][-1:]]), int(self.answer_starts[index])
        return ids[:start], ids[start:]

    def batch(self, indices: Sequence[int], *, length: int = 0) -> Batch:
        targets = self.targets.padded(indices, fill=IGNORED, length=length)
        return {**self._inputs(indices, length=length), "targets": targets}


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferenceSplit(Split):
    """Pairs of answers to one prompt. An example is a pair, and has two rows in a batch, which never part."""

    completions: CompletionSplit
    """The rows: 2i has the chosen answer of pair i, and 2i + 1 the rejected one. Each has a scored token."""
    reference: Float[Tensor, " rows"] | None = None
    """The log probability of each row's scored tokens under the frozen base, fp64; None until it is computed."""

    @property
    def sequences(self) -> CompletionSplit:
        return self.completions

    @property
    def answered(self) -> CompletionSplit:
        """The rows of the chosen answers."""
        return self.completions.select(torch.arange(len(self.completions)) % 2 == 0)

    @functools.cached_property
    def lengths(self) -> Tensor:
        """Number of tokens of both rows of each pair."""
        return self.completions.lengths.view(-1, 2).sum(1)

    @functools.cached_property
    def row_lengths(self) -> Tensor:
        return self.completions.lengths.view(-1, 2).amax(1)

    @property
    def padded_lengths(self) -> Tensor:
        return 2 * self.row_lengths

    @functools.cached_property
    def weights(self) -> Tensor:
        return torch.ones(len(self.lengths))

    def describe(self) -> dict[str, Any]:
        """Returns also how many tokens are scored, and the accuracy of always choosing the longer answer."""
        chosen, rejected = self.completions.weights.double().view(-1, 2).unbind(1)
        return self.completions.describe() | {
            "examples": len(self),
            "chosen_tokens": float(chosen.mean()),
            "rejected_tokens": float(rejected.mean()),
            "longer_accuracy": float((1 + (chosen - rejected).sign()).mean() / 2),
        }

    def batch(self, indices: Sequence[int], *, length: int = 0) -> Batch:
        """Returns both rows of each pair, one after the other. A `reference` that is not known is NaN."""
        rows = self.list_rows(indices)
        unknown = torch.full(rows.shape, math.nan, dtype=torch.float64)
        reference = unknown if self.reference is None else self.reference[rows]
        return {**self.completions.batch(rows.tolist(), length=length), "reference": reference}

    def list_rows(self, indices: Sequence[int]) -> Int[Tensor, " rows"]:
        """Returns the indices of both rows of each pair, one after the other."""
        return torch.tensor([row for index in indices for row in (2 * index, 2 * index + 1)])

    def fill_reference(self, values: Tensor | None = None) -> PreferenceSplit:
        zeros = torch.zeros(len(self.completions), dtype=torch.float64)
        return replace(self, reference=zeros if values is None else values)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSplit(Split):
    """Documents joined end to end and cut into blocks that overlap by one token."""

    tokens: Tensor
    """Token ids, (blocks, block_length + 1), int64. The last token of a block is also the first token of the next
    block, so each token except the very first is predicted once. The tokens after the last full block are dropped.
    Do not write to this tensor: its blocks share memory."""
    documents: int
    """Number of documents."""
    bytes: int
    """Number of UTF-8 bytes of all texts."""
    bytes_per_token: float
    """Mean number of bytes per token in all documents; the end of a document counts as a token."""

    @functools.cached_property
    def lengths(self) -> Tensor:
        return torch.full((len(self.tokens),), self.tokens.shape[1] - 1)

    @functools.cached_property
    def weights(self) -> Tensor:
        return self.lengths.float()

    def batch(self, indices: Sequence[int], *, length: int = 0) -> Batch:
        """Returns the blocks at these indices, which have one length. The target is the next token at each position."""
        blocks = self.tokens[torch.tensor(indices)]  # (batch, block + 1)
        return {"input_ids": blocks[:, :-1].contiguous(), "targets": blocks[:, 1:].contiguous()}

    def describe(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "blocks": len(self.tokens),
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """The splits of a data set, and the metric that scores a run on them."""

    train: SplitFacts
    validation: SplitFacts
    test: Callable[[], SplitFacts]
    """Returns the test split. The first call reads it, and later calls return the same object."""
    score_metric: ScoreMetric
    notes: tuple[str, ...] = ()
    """Notes for the user on how the splits were built."""

    @property
    def metric(self) -> str:
        """Name of the metric that scores a run."""
        return self.score_metric.name

    def describe(self, split: SplitFacts) -> dict[str, Any]:
        """Returns the entry of a scored split in a run record."""
        return split.describe()

    def score_constant_answer(self, split: SplitFacts, *, fraction: float = 1.0) -> dict[str, float]:
        """Returns every metric of an answer that needs no training; empty if there is none.

        With a `fraction`, only the examples of `choose_part` count, as in a run's evaluations.
        """
        return {}


def list_passages(split: Split, index: int, *, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Returns the text of an example in passages, and whether each is scored. A label is the last passage."""
    if isinstance(split, PreferenceSplit):
        sides = [list_passages(split.completions, row, tokenizer=tokenizer) for row in (2 * index, 2 * index + 1)]
        return [("chosen: ", False), *sides[0], ("\nrejected: ", False), *sides[1]]
    batch = split.batch([index])
    ids, targets = batch["input_ids"][0].tolist(), batch["targets"][0].tolist()
    if not isinstance(targets, list):
        return [(str(tokenizer.decode(ids)), False), (str(targets), True)]
    tokens = zip([*ids, targets[-1]], [False, *(target != IGNORED for target in targets)], strict=True)
    runs = itertools.groupby((token for token in tokens if token[0] != IGNORED), key=lambda token: token[1])
    return [(str(tokenizer.decode([token for token, _ in run])), is_scored) for is_scored, run in runs]


def choose_evenly(counts: Sequence[int], *, limit: int) -> list[int]:
    """Returns the indices of `limit` blocks, spread as evenly over documents as their numbers of blocks allow.

    `counts` has the number of blocks of each document, in the order of the blocks; their sum is above `limit`.
    """
    # Each round gives one more block to every document that has one left.
    shares, share = [0] * len(counts), 0
    while sum(shares) < limit:
        share += 1
        shares = [min(count, share) for count in counts]
    largest = [index for index, count in enumerate(shares) if count == share]
    surplus = sum(shares) - limit
    for n in range(surplus):  # the last round gives a block to some of the documents only, evenly spaced among them
        shares[largest[n * len(largest) // surplus]] -= 1
    starts = itertools.accumulate(counts, initial=0)
    return [
        start + n * count // share
        for start, count, share in zip(starts, counts, shares, strict=False)
        for n in range(share)
    ]


def cut_blocks(tokens: Int[Tensor, " tokens"], *, block_length: int) -> Int[Tensor, "blocks {block_length}+1"]:
    """Returns a view of the tokens as blocks that overlap by one token."""
    return tokens.unfold(0, block_length + 1, block_length)


def padding_fraction(split: SplitFacts, batches: Sequence[Sequence[int]]) -> float:
    """Returns the fraction of positions that is padding when each batch is padded to its longest example."""
    padded = sum(len(batch) * int(split.padded_lengths[torch.tensor(batch)].max()) for batch in batches)
    real = sum(int(split.lengths[torch.tensor(batch)].sum()) for batch in batches)
    return 1.0 - real / padded if padded else 0.0


def select_model_inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in MODEL_KEYS if name in batch}


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Returns a batch of the CPU on `device`, except for what the CPU reads (`HOST_KEYS`), which is counted here."""
    counted = dict(batch)
    if batch["targets"].dim() == 2:
        counted["num_scored"] = (batch["targets"] != IGNORED).sum(1)
    return {name: value if name in HOST_KEYS else move_tensor(value, device) for name, value in counted.items()}


def move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the CPU on `device`. A copy from pinned memory to a GPU does not wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def repeat_batch(batch: Batch, *, slots: int) -> Batch:
    """Returns a batch repeated for every slot, slot after slot."""
    return {name: x.repeat(slots, *[1] * (x.dim() - 1)) if x.dim() else x for name, x in batch.items()}
