"""Splits of examples of different lengths: sentences with labels, prompts with completions.

`splits` makes them from the token ids that `tokenise` returns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorasweep.data.split import IGNORED, Batch, Split


@dataclass(frozen=True, kw_only=True, eq=False)
class Ragged:
    """Sequences of different lengths, end to end in one tensor."""

    values: Tensor
    """(all tokens,), int64."""
    ends: Tensor
    """(sequences,), int64: where each sequence ends."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        """Returns lists of numbers as one tensor."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return cls(values=torch.tensor([x for row in rows for x in row], dtype=torch.int64), ends=lengths.cumsum(0))

    @functools.cached_property
    def lengths(self) -> Tensor:
        """The length of each sequence, (sequences,), int64."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1))

    def __getitem__(self, index: int) -> Tensor:
        """Returns one sequence, a view."""
        end = int(self.ends[index])
        return self.values[end - int(self.lengths[index]) : end]

    def take(self, indices: Sequence[int]) -> Ragged:
        """Returns only these sequences."""
        rows = [self[index] for index in indices]
        values = torch.cat(rows) if rows else self.values[:0]
        return Ragged(values=values, ends=self.lengths[torch.tensor(indices, dtype=torch.int64)].cumsum(0))

    def padded(self, indices: Sequence[int], *, fill: int) -> Tensor:
        """Returns these sequences padded on the right to the longest, (sequences, longest)."""
        return pad_sequence([self[index] for index in indices], batch_first=True, padding_value=fill)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleSplit(Split):
    """Sequences of tokens, each with something to predict."""

    tokens: Ragged
    pad_token: int
    bytes: int
    """UTF-8 bytes of all texts."""
    truncated: int = 0
    """Number of examples that were longer than `data.max_length` and were cut."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More entries for the record, such as the number of examples of each class."""

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each example."""
        return self.tokens.lengths

    def describe(self) -> dict[str, Any]:
        """Returns the split's entry in a run record."""
        return {
            "examples": len(self),
            "bytes": self.bytes,
            "truncated": self.truncated,
            "fingerprint": self.fingerprint,
            **self.facts,
        }

    def _inputs(self, tokens: Ragged, indices: Sequence[int]) -> Batch:
        """Returns token ids, and a mask if one is padded: without a mask attention may take its fastest path."""
        input_ids = tokens.padded(indices, fill=self.pad_token)
        lengths = tokens.lengths[torch.tensor(indices)]
        if int(lengths.min()) == input_ids.shape[1]:
            return {"input_ids": input_ids}
        return {"input_ids": input_ids, "attention_mask": mask_of(lengths, width=input_ids.shape[1])}


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSplit(ExampleSplit):
    """Texts with a label each: a class, several classes, or a number."""

    labels: Tensor
    """(examples,) int64 classes, (examples, labels) float of 0 and 1, or (examples,) float."""
    token_types: Ragged | None = None
    """0 for the first text and 1 for the second, for models that tell them apart."""
    class_weights: Tensor | None = None
    """(labels,): how much an example of each class counts in training; None for 1 each."""

    @functools.cached_property
    def weights(self) -> Tensor:
        """The weight of each example's class, or 1."""
        return torch.ones(len(self.labels)) if self.class_weights is None else self.class_weights[self.labels]

    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        """Returns these examples, padded, with their labels as targets."""
        batch = self._inputs(self.tokens, indices)
        if self.token_types is not None:
            batch["token_type_ids"] = self.token_types.padded(indices, fill=0)
        rows = torch.tensor(indices)
        weights = {} if self.class_weights is None else {"weights": self.weights[rows]}
        return {**batch, "targets": self.labels[rows], **weights}


@dataclass(frozen=True, kw_only=True, eq=False)
class CompletionSplit(ExampleSplit):
    """Conversations for a causal model; only some tokens are scored, such as those of the completion."""

    targets: Ragged
    """The next token at each position of `tokens`; `IGNORED` where the next token is not scored."""
    scored_bytes: int
    """UTF-8 bytes of the scored text."""
    packing: bool = False
    """Whether examples share a sequence end to end; none attends to another, because positions start anew."""

    @functools.cached_property
    def weights(self) -> Tensor:
        """Number of scored tokens of each example."""
        scored = torch.cat([self.targets.values.new_zeros(1), (self.targets.values != IGNORED).cumsum(0)])
        ends = scored[self.targets.ends]
        return torch.diff(ends, prepend=ends.new_zeros(1)).float()

    def drop_unscored(self) -> CompletionSplit:
        """Returns the split without examples in which nothing is scored, because their answers were cut off."""
        kept = self.weights.nonzero().flatten().tolist()
        if len(kept) == len(self):
            return self
        rows = {"tokens": self.tokens.take(kept), "targets": self.targets.take(kept)}
        return replace(self, **rows, facts={**self.facts, "left_out": len(self) - len(kept)})  # type: ignore[arg-type]

    @property
    def bytes_per_token(self) -> float:
        """Bytes per scored token."""
        return self.scored_bytes / max(float(self.weights.sum()), 1.0)

    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        """Returns these examples, padded, or packed into few sequences as long as the longest example."""
        if self.packing:
            return self._pack(indices, slots=slots)
        return {**self._inputs(self.tokens, indices), "targets": self.targets.padded(indices, fill=IGNORED)}

    def _pack(self, indices: Sequence[int], *, slots: int) -> Batch:
        per_slot = len(indices) // slots
        lengths = [int(self.lengths[index]) for index in indices]
        bins: list[list[list[int]]] = []  # per slot: the places in `indices` that share a sequence
        for slot in range(slots):
            places = range(slot * per_slot, (slot + 1) * per_slot)
            bins.append(fill_bins({place: lengths[place] for place in places}, capacity=max(lengths)))
        # Every slot needs equally many sequences, because a pack divides a batch evenly among its slots.
        most = max(map(len, bins))
        sequences = [places for of_slot in bins for places in (*of_slot, *[[]] * (most - len(of_slot)))]

        def join(values: list[list[Tensor]], fill: int) -> Tensor:
            joined = [torch.cat(row) if row else torch.full((1,), fill) for row in values]
            return pad_sequence(joined, batch_first=True, padding_value=fill)

        tokens = join([[self.tokens[indices[n]] for n in row] for row in sequences], self.pad_token)
        positions = join([[torch.arange(lengths[n]) for n in row] for row in sequences], 0)
        return {
            "input_ids": tokens,
            "position_ids": positions,
            "targets": join([[self.targets[indices[n]] for n in row] for row in sequences], IGNORED),
            "examples": join([[torch.full((lengths[n],), n) for n in row] for row in sequences], 0),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceSplit(ExampleSplit):
    """Pairs of texts for an encoder-decoder: `tokens` go into the encoder, `targets` are what the decoder writes."""

    targets: Ragged
    start_token: int
    """The token that the decoder starts with."""
    scored_bytes: int

    @functools.cached_property
    def weights(self) -> Tensor:
        """Number of tokens of each target."""
        return self.targets.lengths.float()

    @property
    def bytes_per_token(self) -> float:
        """Bytes per target token."""
        return self.scored_bytes / max(float(self.weights.sum()), 1.0)

    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        """Returns these pairs, both sides padded; the decoder sees the target shifted by one."""
        targets = self.targets.padded(indices, fill=IGNORED)
        before = targets.masked_fill(targets == IGNORED, self.pad_token)[:, :-1]
        start = before.new_full((len(before), 1), self.start_token)
        return {
            **self._inputs(self.tokens, indices),
            "decoder_input_ids": torch.cat([start, before], dim=1),
            "targets": targets,
        }


def mask_of(lengths: Tensor, *, width: int) -> Tensor:
    """Returns 1 where an example has a token and 0 where it is padded, (examples, width), int64."""
    return (torch.arange(width) < lengths[:, None]).long()


def fill_bins(lengths: dict[int, int], *, capacity: int) -> list[list[int]]:
    """Returns keys in bins whose lengths sum up to at most `capacity`, by first fit decreasing (Johnson 1973)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for key in sorted(lengths, key=lambda key: (-lengths[key], key)):
        place = next((n for n, free in enumerate(room) if free >= lengths[key]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(key)
        room[place] -= lengths[key]
    return bins
